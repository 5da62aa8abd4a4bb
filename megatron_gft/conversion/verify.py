"""Do a Hugging Face folder and a Megatron checkpoint compute the same? Both models run, one layer at a time.

Equal weights do not mean equal models: a wrong RoPE base or a lost sliding window converts bit for bit. So the
hidden states of one text go through both, each side from its own files: transformers' real class, built for one
layer and filled with each layer's tensors in turn, and the training model, likewise from the checkpoint. Memory:
one layer of each, plus a slice of the vocabulary.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers

from megatron_gft import cpu
from megatron_gft.checkpoints.torch_dist import TorchDistReader
from megatron_gft.config import ModelConfig, ObjectiveConfig, ParallelConfig
from megatron_gft.conversion.convert import locate_entries
from megatron_gft.errors import InputError
from megatron_gft.folders import from_folder
from megatron_gft.hf.mapping import HfMapping
from megatron_gft.hf.safetensors_io import SafetensorsFolder
from megatron_gft.hf.shape import ModelShape, read_model_shape
from megatron_gft.pack_layout import PackLayout
from megatron_gft.packing import Pack

POSITIONS = 256
RELATIVE_TOLERANCE = 1e-4
VOCAB_CHUNK_BYTES = 256 * 2**20


@dataclass(frozen=True)
class LogitsReport:
    """Float32 logits of both models over ``positions`` tokens; ``relative`` is to the largest logit."""

    positions: int
    largest_logit: float
    max_difference: float
    same_top_token: float

    @property
    def relative(self) -> float:
        return self.max_difference / self.largest_logit

    def __str__(self) -> str:
        return (
            f"logits over {self.positions} positions: max difference {self.max_difference:.2e} = "
            f"{self.relative:.2e} of the largest logit, same top token {self.same_top_token:.2%}"
        )


def verify_logits(hf_dir: str | Path, checkpoint: str | Path, text: str | None = None) -> LogitsReport:
    """Compare the logits of both models on ``text`` (default: :data:`POSITIONS` fixed token ids).

    Needs a process without a default process group; makes and removes its own.

    Raises:
        InputError: the relative difference exceeds :data:`RELATIVE_TOLERANCE`, or a top token differs.
    """
    transformers.utils.logging.disable_progress_bar()  # one a layer
    hf_dir = Path(hf_dir)
    shape = read_model_shape(hf_dir)
    tokens = _tokens(hf_dir, shape, text)
    weights = SafetensorsFolder(hf_dir)
    with torch.no_grad():
        hf_hidden = _hf_hidden_states(hf_dir, shape, weights, tokens)
        head = _MegatronSide(shape, checkpoint)
        hidden = head.hidden_states(tokens)
        report = _compare(hf_hidden, hidden, weights, head)
    if not (report.relative <= RELATIVE_TOLERANCE and report.same_top_token == 1.0):
        raise InputError(f"{checkpoint} and {hf_dir} compute different {report} -> do not use this conversion")
    return report


def _tokens(hf_dir: Path, shape: ModelShape, text: str | None) -> torch.Tensor:
    """Token ids [s]."""
    if text is None:
        return torch.randint(0, shape.vocab_size, (POSITIONS,), generator=torch.Generator().manual_seed(0))
    ids = _load(transformers.AutoTokenizer, hf_dir)(text)["input_ids"]
    if not ids:
        raise InputError(f"--text {text!r} has no tokens -> give some text")
    return torch.tensor(ids)


def _load(loader: Any, hf_dir: Path) -> Any:
    return from_folder(loader, hf_dir, "cannot be compared", "leave --verify logits and --text out", False)


# --- transformers ---------------------------------------------------------------------------------------------------


def _hf_hidden_states(
    hf_dir: Path, shape: ModelShape, weights: SafetensorsFolder, tokens: torch.Tensor
) -> torch.Tensor:
    """Normalised hidden states [s, h] of transformers' class in float32."""
    config = _load(transformers.AutoConfig, hf_dir)
    config.num_hidden_layers, config.vocab_size, config.tie_word_embeddings = 1, 1, False
    config.pad_token_id = None
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    model_class = getattr(transformers, shape.architecture)
    embedding = "model.embed_tokens.weight"
    hidden = torch.stack([weights.read(embedding, (token, token + 1))[0].float() for token in tokens.tolist()])[None]
    outside = {name: torch.zeros(1, shape.hidden_size) for name in (embedding, "lm_head.weight")}
    outside["model.norm.weight"] = weights.read("model.norm.weight").float()
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}."
        state = {
            f"model.layers.0.{name.removeprefix(prefix)}": weights.read(name).float()
            for name in weights.tensors
            if name.startswith(prefix) and not name.endswith("rotary_emb.inv_freq")
        }
        model, loading = model_class.from_pretrained(
            None,
            trust_remote_code=False,
            config=config,
            state_dict=state | outside,
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
        )
        assert not any(loading.values()), loading
        final_norm, model.model.norm = model.model.norm, torch.nn.Identity()
        hidden = model.eval().model(inputs_embeds=hidden, use_cache=False).last_hidden_state
    return final_norm(hidden)[0]


# --- Megatron -------------------------------------------------------------------------------------------------------


class _MegatronSide:
    """The training model's layers from a checkpoint, in one process, float32."""

    def __init__(self, shape: ModelShape, checkpoint: str | Path):
        self.shape = shape
        self.mapping = HfMapping(shape)
        self.reader = TorchDistReader(checkpoint)
        self.places = locate_entries(self.reader, self.mapping)

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """A parameter by canonical name, or rows of it; a tied output layer is the embedding."""
        key, index = self.places[self.mapping.entry(name).name]
        size = self.reader.tensors[key].size[len(index)]
        return self.reader.read(key, index, rows or (0, size)).float()

    def hidden_states(self, tokens: torch.Tensor) -> torch.Tensor:
        """Normalised hidden states [s, h]."""
        from megatron_gft.parallel import destroy_parallel, initialize_parallel, seed_everything

        cpu.install()
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            parallel = initialize_parallel()
            seed_everything(0, parallel)
            return self._run_layers(tokens, parallel)
        finally:
            destroy_parallel()

    def _run_layers(self, tokens: torch.Tensor, parallel) -> torch.Tensor:
        from megatron_gft.model import build_model, unwrap

        one_layer = dataclasses.replace(self.shape, num_layers=1, vocab_size=1)
        config = ModelConfig(config="", precision="fp32", backend="local", make_vocab_size_divisible_by=1)
        _, chunks = build_model(one_layer, config, ObjectiveConfig(), ParallelConfig(), parallel)
        model = unwrap(chunks[0]).cpu()
        model.pre_process = model.decoder.pre_process = False
        model.decoder.final_layernorm, final_norm = None, model.decoder.final_layernorm
        embedding = "embedding.word_embeddings.weight"
        hidden = torch.cat([self.read(embedding, (token, token + 1)) for token in tokens.tolist()])[:, None]
        pack = plain_pack(tokens)
        for layer in range(self.shape.num_layers):
            for name, parameter in model.decoder.layers[0].named_parameters():
                parameter.copy_(self.read(f"decoder.layers.{layer}.{name}"))
            model.decoder.set_input_tensor(hidden)
            hidden = model.hidden_states(pack)
        final_norm.weight.copy_(self.read("decoder.final_layernorm.weight"))
        return final_norm(hidden)[:, 0]


def plain_pack(tokens: torch.Tensor) -> Pack:
    """One sequence without loss rows."""
    length = len(tokens)
    none = torch.empty(0, dtype=torch.int64)
    return Pack(
        tokens=tokens,
        position_ids=torch.arange(length),
        layout=PackLayout(segments=torch.tensor([[0, length, 0, 0]])),
        loss_rows=none,
        labels=none,
        token_weights=none.float(),
        sources=none.to(torch.int8),
        advantages=none.float(),
        response_index=none.to(torch.int32),
        groups=(),
    )


def _compare(
    hf_hidden: torch.Tensor, hidden: torch.Tensor, weights: SafetensorsFolder, megatron: _MegatronSide
) -> LogitsReport:
    """Logits a slice of the vocabulary at a time: largest difference, largest logit, agreement of top tokens."""
    difference = largest = 0.0
    best = torch.full((2, len(hidden)), -torch.inf)
    top = torch.zeros((2, len(hidden)), dtype=torch.int64)
    tied = megatron.shape.share_embeddings_and_output_weights
    output = "model.embed_tokens.weight" if tied else "lm_head.weight"
    for start, rows in weights.read_chunks(output, chunk_bytes=VOCAB_CHUNK_BYTES):
        pair = (hf_hidden @ rows.float().T, hidden @ megatron.read("output_layer.weight", (start, start + len(rows))).T)
        difference = max(difference, (pair[0] - pair[1]).abs().max().item())
        largest = max(largest, pair[0].abs().max().item())
        for side, logits in enumerate(pair):
            values, indices = logits.max(dim=-1)
            better = values > best[side]
            best[side][better], top[side][better] = values[better], indices[better] + start
    return LogitsReport(len(hidden), largest, difference, (top[0] == top[1]).float().mean().item())
