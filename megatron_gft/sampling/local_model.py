"""A Hugging Face model on this machine: batched sampling with a KV cache, and log-probabilities of given responses.

Why not ``model.generate``: here the prompt shared by K samples is computed once, rows that ended leave the batch, and
every row draws from its own seed, so a sample does not depend on what else is sampled. (Greedy results are those of
``generate``; a test holds them together.)
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.utils import logging as transformers_logging

from megatron_gft.chat_template import Prompt
from megatron_gft.errors import InputError
from megatron_gft.folders import from_folder
from megatron_gft.hf.config_json import check_config
from megatron_gft.hf.families import FAMILIES
from megatron_gft.hf.files import IGNORED_TENSORS
from megatron_gft.hf.shape import DTYPES
from megatron_gft.reading import absence
from megatron_gft.sampling.settings import SamplingParams
from megatron_gft.tokenizer import Tokenizer, load_tokenizer

COMPACT_SHARE = 1 / 8  # ended rows leave the batch once they are this share of it
MAX_BATCH_TOKENS = 4096  # of one teacher-forced batch
MAX_LOGITS_BYTES = 1 << 29
TOP_P_CANDIDATES = 1024
SHOWN_WEIGHTS = 5  # of those that are missing


@dataclass
class Decoded:
    """Sampled ids of one request, a final EOS included; log-probs at temperature 1, one per id."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = "length"


class LocalModel:
    """A Hugging Face folder loaded for inference, with its tokenizer.

    Args:
        dtype: ``fp32``, ``bf16``, ``fp16``; default: fp32 on a CPU, what the folder says on a GPU.
        device: default: ``cuda`` when there is one.
        chat_template: file, ``none``, or ``None`` for the folder's own.

    Raises:
        InputError: no such device, or the folder holds no whole causal language model or no tokenizer.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        dtype: str | None = None,
        device: str | None = None,
        chat_template: str | None = None,
        trust_remote_code: bool = False,
    ):
        self.path = str(path)
        self.device = _usable_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.tokenizer: Tokenizer = load_tokenizer(path, chat_template, None, trust_remote_code)
        chosen = getattr(torch, DTYPES[dtype]) if dtype else torch.float32 if self.device.type == "cpu" else "auto"
        self.model = _load_model(path, chosen, trust_remote_code).eval()
        self.model.to(self.device)  # type: ignore[arg-type]  # transformers' decorator hides the signature
        configured = (self.model.generation_config or self.model.config).eos_token_id
        ends = configured if isinstance(configured, list) else [configured]
        self.eos_ids = frozenset(end for end in ends if end is not None) | {self.tokenizer.eos_id}
        config = self.model.config.get_text_config()
        self.max_positions: int = getattr(config, "max_position_embeddings", 1 << 31)
        self.vocab_size: int = config.vocab_size
        if self.tokenizer.vocab_size > self.model.get_input_embeddings().num_embeddings:
            raise InputError(
                f"{path}: the tokenizer has {self.tokenizer.vocab_size} ids, the model's embedding fewer rows "
                f"({self.vocab_size}) -> take the model's own, or resize the embedding (resize_token_embeddings)"
            )
        self._keeps_logits = "logits_to_keep" in inspect.signature(self.model.forward).parameters

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt as the model's chat template renders it, generation prompt included."""
        return self.tokenizer.encode(self.tokenizer.render_prompt(prompt))

    def response_text(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """Text of sampled ids, without special tokens."""
        special = self.tokenizer.special_ids | self.eos_ids
        return self.tokenizer.decode_response(prompt, [i for i in ids if i not in special])

    @torch.inference_mode()
    def sample(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], params: SamplingParams) -> list[Decoded]:
        """One response per prompt (token ids), all in one batch; equal prompts are computed once. ``stop`` strings end
        a row at the token that completes one (the text is cut by the caller)."""
        decoded = [Decoded() for _ in prompts]
        generators = [numpy.random.Generator(numpy.random.Philox(seed)) for seed in seeds]
        active = list(range(len(prompts)))  # request of each row of the batch
        logits, cache, mask = self._prefill(prompts)
        for step in range(params.max_tokens):
            uniforms = torch.tensor([generators[i].random() for i in active], dtype=torch.float64)
            tokens = pick_tokens(logits, uniforms.to(logits.device), params)
            values = token_logprobs(logits, tokens).tolist() if params.logprobs else []
            for row, token in enumerate(tokens.tolist()):
                said = decoded[active[row]]
                if said.finish_reason != "stop":  # an ended row stays until enough of them leave together
                    said.ids.append(token)
                    said.logprobs += values[row : row + 1]
                    if token in self.eos_ids or self._stopped(prompts[active[row]], said.ids, params.stop):
                        said.finish_reason = "stop"
            alive = [row for row, request in enumerate(active) if decoded[request].finish_reason != "stop"]
            if not alive or step + 1 == params.max_tokens:
                break
            if len(active) - len(alive) >= max(1, len(active) * COMPACT_SHARE):
                rows = torch.tensor(alive, device=self.device)
                cache.batch_select_indices(rows)
                mask, tokens = mask[rows], tokens[rows]
                active = [active[row] for row in alive]
            mask = torch.cat([mask, mask.new_ones(len(active), 1)], dim=1)
            logits = self._forward(tokens[:, None], mask, keep=1, cache=cache)[:, -1]
        return decoded

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, Any, torch.Tensor]:
        """Compute each different prompt once, then one row per request: logits [n, V], cache, mask [n, longest]."""
        different = {tuple(prompt): 0 for prompt in prompts}
        for index, prompt in enumerate(different):
            different[prompt] = index
        ids, mask = self._left_pad(list(different))
        cache = DynamicCache(config=self.model.config)
        logits = self._forward(ids, mask, keep=1, cache=cache)[:, -1]
        rows = torch.tensor([different[tuple(prompt)] for prompt in prompts], device=self.device)
        cache.batch_select_indices(rows)
        return logits[rows], cache, mask[rows]

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, *, keep: int, cache: Any = None) -> torch.Tensor:
        """fp32 logits of the last ``keep`` positions, [n, keep, V]; ``mask`` covers the cached positions too."""
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        extra: dict[str, Any] = {"logits_to_keep": keep} if self._keeps_logits else {}
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
            **extra,
        )
        return output.logits[:, -keep:].float()

    def _left_pad(self, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        longest = max(len(row) for row in rows)
        pad = self.tokenizer.eos_id
        ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows], device=self.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=self.device)
        return ids, mask

    def _stopped(self, prompt: Sequence[int], ids: list[int], stop: Sequence[str]) -> bool:
        if not stop:
            return False
        # A token is one byte at least; the last one may go on after the stop text, a cut character may come before.
        tail = ids[-(8 + max(len(text.encode()) for text in stop)) :]
        text = self.response_text(prompt, tail)
        return any(word in text for word in stop)

    @torch.inference_mode()
    def response_logprobs(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], progress: Callable[[int], object] = lambda n: None
    ) -> list[list[float]]:
        """Log-probability of every response token given prompt and earlier tokens, temperature 1, fp32.

        Args:
            pairs: (prompt ids, response ids); a response's EOS is the caller's to append.
            progress: called with the number of pairs done since the last call.
        """
        result: list[list[float]] = [[] for _ in pairs]
        for batch in self._teacher_batches(pairs):
            ids, mask = self._left_pad([[*pairs[i][0], *pairs[i][1]] for i in batch])
            keep = max(len(pairs[i][1]) for i in batch)
            logits = self._forward(ids, mask, keep=keep + 1)[:, :-1]
            values = token_logprobs(logits.flatten(0, 1), ids[:, -keep:].flatten()).view(len(batch), keep).tolist()
            for row, index in enumerate(batch):
                length = len(pairs[index][1])
                result[index] = values[row][keep - length :] if length else []
            progress(len(batch))
        return result

    def _teacher_batches(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[list[int]]:
        """Indices in batches of similar length that keep within the limits of tokens and logits."""
        max_rows_of_logits = max(1, MAX_LOGITS_BYTES // (4 * self.vocab_size))
        batch: list[int] = []
        for index in sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1])):
            longest = len(pairs[index][0]) + len(pairs[index][1])
            keep = max(len(pairs[i][1]) for i in [*batch, index]) + 1
            rows = len(batch) + 1
            if batch and (rows * longest > MAX_BATCH_TOKENS or rows * keep > max_rows_of_logits):
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch


def pick_tokens(logits: torch.Tensor, uniforms: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Sample one token per row by inverting the cumulative distribution at ``uniforms``.

    Args:
        logits: [n, V] fp32.
        uniforms: [n] fp64 in [0, 1).

    Returns:
        [n] int64. Greedy (the first of equals) at temperature 0.
    """
    if params.temperature == 0:
        return logits.argmax(dim=-1)
    scaled = logits.double() / params.temperature
    if params.top_k and params.top_k < logits.shape[-1]:
        floor = scaled.topk(params.top_k, dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < floor, -torch.inf)
    probabilities = scaled.softmax(dim=-1)
    order = None
    if params.top_p < 1:  # the smallest set of most probable tokens that reaches top_p
        probabilities, order = _most_probable(probabilities, params.top_p)
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= params.top_p, 0.0)
    cumulative = probabilities.cumsum(dim=-1)
    total = cumulative[:, -1]
    point = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(cumulative, point[:, None], right=True)
    return (index if order is None else order.gather(1, index)).squeeze(1)


def _most_probable(probabilities: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The most probable tokens of each row in order, [n, m] with their ids: as many as hold ``share`` in every row.

    A thousand nearly always do; sorting a whole vocabulary would cost as much as a forward pass of a small model.
    """
    vocab_size = probabilities.shape[-1]
    values, indices = probabilities.topk(min(TOP_P_CANDIDATES, vocab_size), dim=-1)
    if vocab_size > TOP_P_CANDIDATES and bool((values.sum(dim=-1) < share).any()):
        values, indices = probabilities.sort(dim=-1, descending=True)
    return values, indices


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """log softmax of ``logits`` [n, V] at ``tokens`` [n], without a second [n, V] tensor."""
    return logits.gather(-1, tokens[:, None]).squeeze(-1) - logits.logsumexp(dim=-1)


def _load_model(path: str | Path, dtype: torch.dtype | str, trust: bool) -> PreTrainedModel:
    transformers_logging.disable_progress_bar()
    if not (Path(path) / "config.json").is_file():
        raise InputError(f"{path}: no Hugging Face model folder with a config.json: {absence(path)}")
    config = check_config(path)
    problem, remedy = "transformers cannot load a causal language model", "check config.json and the weight files"
    options = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # what is absent is refused below, by name
    model, found = from_folder(AutoModelForCausalLM, path, problem, remedy, trust, dtype=dtype, **options)
    missing = sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])})
    if missing:  # tied weights are not among them
        shown = ", ".join(missing[:SHOWN_WEIGHTS]) + (", ..." if len(missing) > SHOWN_WEIGHTS else "")
        raise InputError(
            f"{path}: {len(missing)} weights are in no file of this folder, or not in the shape that config.json says "
            f"({shown}): they would be random -> copy the whole model"
        )
    left = [name for name in found["unexpected_keys"] if not IGNORED_TENSORS.search(name)]
    if left and config.get("model_type") in FAMILIES:  # of others, transformers' classes leave out some on purpose
        raise InputError(f"{path}: {len(left)} weights have no place by config.json ({min(left)}) -> correct it")
    return model


def _usable_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # the latter: torch is built without CUDA
        reason = str(error).splitlines()[0]
        raise InputError(f"device {name!r} cannot be used ({reason}) -> set cpu, or cuda where there is one") from error
    return device
