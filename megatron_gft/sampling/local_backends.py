"""Sampling in this process: transformers for CPUs and small runs, vLLM where it is installed."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from megatron_gft.chat_template import PLAIN, ChatTemplateError, TemplateOptions
from megatron_gft.sampling.local_model import Decoded, LocalModel
from megatron_gft.sampling.settings import (
    Outcome,
    Prompt,
    Sample,
    SampleFailure,
    SampleRequest,
    SamplingParams,
    with_own_eos,
)
from megatron_gft.sampling.sources import VllmSource
from megatron_gft.sampling.written import written_sample
from megatron_gft.tokenizer import Tokenizer

BATCHES_PER_WINDOW = 64  # requests are sorted by length within so many batches


class TransformersBackend:
    """Batches on one model in this process.

    Batches are cut from all requests of a run, done or not, in windows sorted by prompt length: which samples share a
    batch (and so the rounding of their logits) never depends on where an earlier run was killed.
    """

    def __init__(self, model: LocalModel, batch_size: int = 16):
        self.model, self._batch_size = model, batch_size

    def generate(
        self, requests: Iterable[SampleRequest], params: SamplingParams, is_done: Callable[[str], bool]
    ) -> Iterator[Outcome]:
        """Outcomes batch by batch."""
        stream = iter(requests)
        while window := list(itertools.islice(stream, self._batch_size * BATCHES_PER_WINDOW)):
            if all(is_done(request.key) for request in window):
                continue
            fitting, failures = _fitting(self.model.tokenizer, window, self.model.max_positions - params.max_tokens)
            yield from (failure for failure in failures if not is_done(failure.key))
            fitting.sort(key=lambda pair: len(pair[1]))
            for start in range(0, len(fitting), self._batch_size):
                batch = fitting[start : start + self._batch_size]
                if all(is_done(request.key) for request, _ in batch):
                    continue
                decoded = self.model.sample([ids for _, ids in batch], [request.seed for request, _ in batch], params)
                for (request, prompt), result in zip(batch, decoded, strict=True):
                    if not is_done(request.key):
                        yield as_sample(request.key, self.model, prompt, result, params)


def as_sample(key: str, model: LocalModel, prompt: Sequence[int], result: Decoded, params: SamplingParams) -> Sample:
    """Text of sampled ids: cut before a stop string, if one ended it; else the ids are kept beside the text."""
    text = model.response_text(prompt, result.ids)
    cut = min((at for word in params.stop if (at := text.find(word)) >= 0), default=None)
    if cut is not None and result.finish_reason == "stop":
        return Sample(key, text[:cut], "stop")
    ids, logprobs = with_own_eos(
        result.ids, result.logprobs if params.logprobs else None, model.eos_ids, model.tokenizer.eos_id
    )
    return written_sample(key, result.finish_reason, model.tokenizer, text, ids, logprobs)


def encode_prompt(
    tokenizer: Tokenizer, prompt: Prompt, longest: int, options: TemplateOptions = PLAIN
) -> tuple[list[int], str | None]:
    """Ids of a rendered prompt, or why it cannot be sampled from."""
    try:
        ids = tokenizer.encode(tokenizer.render_prompt(prompt, options))
    except ChatTemplateError as error:
        return [], f"chat template: {error}"
    if len(ids) > longest:
        return [], f"prompt of {len(ids)} tokens leaves no room for max_tokens (at most {longest} fit)"
    return ids, None


def _fitting(
    tokenizer: Tokenizer, requests: Iterable[SampleRequest], longest: int
) -> tuple[list[tuple[SampleRequest, list[int]]], list[SampleFailure]]:
    """The requests with the ids of their prompts, and those that cannot be sampled from."""
    fitting, failures = [], []
    for request in requests:
        ids, problem = encode_prompt(tokenizer, request.prompt, longest, request.options)
        if problem is None:
            fitting.append((request, ids))
        else:
            failures.append(SampleFailure(request.key, problem))
    return fitting, failures


class VllmBackend:
    """vLLM's offline engine, which is imported here."""

    def __init__(self, source: VllmSource):
        import vllm

        self._vllm, self._requests_per_call = vllm, source.requests_per_call
        self._tokenizer = source.load_tokenizer()
        self._engine = vllm.LLM(source.model, **{"trust_remote_code": source.trust_remote_code} | source.engine)
        self._longest = self._engine.llm_engine.model_config.max_model_len

    def generate(
        self, requests: Iterable[SampleRequest], params: SamplingParams, is_done: Callable[[str], bool]
    ) -> Iterator[Outcome]:
        """Outcomes call by call; each request has its own seed, so calls may be cut anywhere."""
        stream = (request for request in requests if not is_done(request.key))
        while batch := list(itertools.islice(stream, self._requests_per_call)):
            fitting, failures = _fitting(self._tokenizer, batch, self._longest - params.max_tokens)
            yield from failures
            if not fitting:
                continue
            outputs = self._engine.generate(
                [{"prompt_token_ids": ids} for _, ids in fitting],
                [self._params(request.seed, params) for request, _ in fitting],
                use_tqdm=False,
            )
            for (request, _), output in zip(fitting, outputs, strict=True):
                yield self._outcome(request.key, output.outputs[0], params)

    def _params(self, seed: int, params: SamplingParams) -> Any:
        return self._vllm.SamplingParams(
            n=1,
            seed=seed,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k or -1,
            max_tokens=params.max_tokens,
            stop=list(params.stop) or None,
            logprobs=0 if params.logprobs else None,  # 0: of the sampled token only
        )

    def _outcome(self, key: str, completion: Any, params: SamplingParams) -> Outcome:
        if completion.finish_reason not in ("stop", "length"):
            return SampleFailure(key, f"vLLM ended the request with {completion.finish_reason!r}")
        if isinstance(completion.stop_reason, str):  # cut at a stop string: the ids spell more than the text
            return Sample(key, completion.text, "stop")
        ids = list(completion.token_ids)
        logprobs = None
        if params.logprobs:
            logprobs = [step[token].logprob for token, step in zip(ids, completion.logprobs, strict=True)]
        end = self._tokenizer.special_ids if completion.finish_reason == "stop" else frozenset()
        known = with_own_eos(ids, logprobs, end, self._tokenizer.eos_id)
        return written_sample(key, completion.finish_reason, self._tokenizer, completion.text, *known)
