"""How one model's Megatron parameters are made of its Hugging Face tensors, rank by rank, in both directions.

The rules of :mod:`megatron_gft.hf.families` are expanded for one :class:`ModelShape`: every parameter becomes an
:class:`Entry`, every tensor-parallel shard a list of :class:`Piece` (rows of one source that land at a row of the
shard). Loading copies the pieces in, exporting copies the same pieces out, so the two are inverse by construction,
and whatever reads the pieces decides where the bytes come from: a safetensors file, a live parameter, a checkpoint.
"""

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from megatron_gft.errors import InputError
from megatron_gft.hf.families import FAMILIES, Operation, Rule
from megatron_gft.hf.shape import ModelShape

_LIVE_TO_CANONICAL = (
    (re.compile(r"^(decoder\.layers\.\d+)\.input_layernorm\."), r"\1.self_attention.linear_qkv.layer_norm_"),
    (re.compile(r"\.experts\.local_experts\.(\d+)\.(linear_fc[12])\.weight$"), r".experts.\2.weight\1"),
)
"""Local-spec names to the canonical ones (Transformer Engine's, apart from :func:`other_norm_name`)."""

# The norm before the MLP: fused into linear_fc1 by dense Transformer Engine specs, a module of its own otherwise.
_MLP_NORMS = (".pre_mlp_layernorm.weight", ".mlp.linear_fc1.layer_norm_weight")


def other_norm_name(name: str) -> str:
    """The second name (or checkpoint key) of the norm before the MLP; any other name as it is."""
    for one, other in (_MLP_NORMS, _MLP_NORMS[::-1]):
        if name.endswith(one):
            return name.removesuffix(one) + other
    return name


@dataclass(frozen=True)
class Piece:
    """Rows ``start:stop`` of source number ``source`` that lie at row ``offset`` of the Megatron shard."""

    source: int
    start: int
    stop: int
    offset: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Shard:
    """One tensor-parallel shard: its shape, its pieces in row order, and the columns that every piece takes.

    Rows that no piece covers are vocabulary padding: zero in Megatron, absent in Hugging Face.
    """

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    columns: tuple[int, int] | None = None

    def within(self, start: int, stop: int) -> Iterator[Piece]:
        """The parts of the pieces that lie in rows ``start:stop`` of the shard, in row order."""
        for piece in self.pieces:
            low, high = max(piece.offset, start), min(piece.offset + piece.rows, stop)
            if low < high:
                first = piece.start + low - piece.offset
                yield Piece(piece.source, first, first + high - low, low)


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter of one model.

    Attributes:
        name: canonical name with layer and expert numbers.
        checkpoint_key: its key in a distributed checkpoint with stacked layers.
        index: its place along the stacked axes of that key: (), (layer,) or (layer, expert).
        sources: Hugging Face names; ``source_shapes``: their shapes.
    """

    name: str
    checkpoint_key: str
    index: tuple[int, ...]
    operation: Operation
    sources: tuple[str, ...]
    source_shapes: tuple[tuple[int, ...], ...]

    @property
    def is_expert(self) -> bool:
        """Sharded over expert groups rather than the dense tensor-parallel group."""
        return len(self.index) == 2


class HfMapping:
    """All entries of one model, and the inventory of its Hugging Face tensors.

    Attributes:
        entries: canonical name -> :class:`Entry`; a tied output layer is the embedding's second name and has none.
        hf_shapes: every tensor of the Hugging Face checkpoint -> shape, in model order.
    """

    def __init__(self, shape: ModelShape):
        self.shape = shape
        self._sizes = {
            "h": shape.hidden_size,
            "q": shape.num_attention_heads * shape.kv_channels,
            "k": shape.num_query_groups * shape.kv_channels,
            "d": shape.kv_channels,
            "f": shape.ffn_hidden_size,
            "x": shape.moe_ffn_hidden_size or 0,
            "e": shape.num_moe_experts or 0,
            "v": shape.vocab_size,
        }
        self.entries = {entry.name: entry for entry in self._expand()}
        self.hf_shapes = {
            source: size
            for entry in self.entries.values()
            for source, size in zip(entry.sources, entry.source_shapes, strict=True)
        }

    def _expand(self) -> Iterator[Entry]:
        """In the order in which Hugging Face stores a model: embedding, layers, final norm, output layer."""
        rules = FAMILIES[self.shape.model_type].rules
        yield self._entry("embedding.word_embeddings.weight", rules["embedding.word_embeddings.weight"])
        layer_rules = {name: rule for name, rule in rules.items() if "{l}" in name}
        for layer in range(self.shape.num_layers):
            for name, rule in layer_rules.items():
                if "{e}" not in name:
                    yield self._entry(name, rule, layer)
                    continue
                for expert in range(self.shape.num_moe_experts or 0):
                    yield self._entry(name, rule, layer, expert)
        yield self._entry("decoder.final_layernorm.weight", rules["decoder.final_layernorm.weight"])
        if not self.shape.share_embeddings_and_output_weights:
            yield self._entry("output_layer.weight", rules["output_layer.weight"])

    def _entry(self, name: str, rule: Rule, *index: int) -> Entry:
        numbers = dict(zip("le", index, strict=False))
        # Megatron-Core (mlp.experts.experts.linear_fc1.weight [L, E, 2f, h]) puts both numbers into the shape
        key = name.replace(".layers.{l}.", ".layers.").replace(".experts.", ".experts.experts.").replace("{e}", "")
        return Entry(
            name=name.format(**numbers),
            checkpoint_key=key,
            index=index,
            operation=rule.operation,
            sources=tuple(source.format(**numbers) for source, _ in rule.sources),
            source_shapes=tuple(tuple(self._sizes[size] for size in shape.split()) for _, shape in rule.sources),
        )

    def entry(self, name: str) -> Entry:
        """Entry of a live parameter whose layer and expert numbers are already global, in any layer spec.

        Raises:
            InputError: no rule for it (the model was built with an option that this family does not have).
        """
        for pattern, canonical in _LIVE_TO_CANONICAL:
            name = pattern.sub(canonical, name)
        if name == "output_layer.weight" and self.shape.share_embeddings_and_output_weights:
            name = "embedding.word_embeddings.weight"
        name = name if name in self.entries else other_norm_name(name)
        if name not in self.entries:
            raise InputError(
                f"Megatron parameter {name} has no rule for {self.shape.architecture} -> build the model from "
                f"hf.config.transformer_config_kwargs, or add the rule to megatron_gft/hf/families.py"
            )
        return self.entries[name]

    def checkpoint_places(self, entry: Entry) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Keys that may hold an entry in a distributed checkpoint, with the index along the stacked axes there."""
        for key in dict.fromkeys((entry.checkpoint_key, other_norm_name(entry.checkpoint_key))):
            yield key, entry.index
            if entry.index:
                yield key.replace(".layers.", f".layers.{entry.index[0]}."), entry.index[1:]

    def shard(self, entry: Entry, tp_rank: int = 0, tp_size: int = 1, vocab_rows: int | None = None) -> Shard:
        """Shard ``tp_rank`` of ``tp_size`` of a parameter. ``vocab_rows``: of a vocabulary shard, which the model's
        padding decides; default: no padding beyond a multiple of ``tp_size``."""
        head, groups = self.shape.kv_channels, self.shape.num_query_groups
        block = (head * self.shape.num_attention_heads // groups, head, head)
        rows = vocab_rows or -(-self.shape.vocab_size // tp_size)
        return _shard(entry.operation, entry.source_shapes, tp_rank, tp_size, rows, block)


@functools.lru_cache
def parameter_count(shape: ModelShape) -> int:
    """Parameters of the Hugging Face model: tied embeddings once, no vocabulary padding, all experts."""
    return sum(map(prod, HfMapping(shape).hf_shapes.values()))


@functools.lru_cache(maxsize=4096)  # layers repeat the same few shards
def _shard(
    operation: Operation,
    source_shapes: tuple[tuple[int, ...], ...],
    tp_rank: int,
    tp_size: int,
    vocab_rows: int,
    block: tuple[int, ...],
) -> Shard:
    rows, rest = source_shapes[0][0], source_shapes[0][1:]
    match operation:
        case "copy":
            return Shard((rows, *rest), (Piece(0, 0, rows, 0),))
        case "row":
            width = rest[0] // tp_size
            return Shard((rows, width), (Piece(0, 0, rows, 0),), (tp_rank * width, (tp_rank + 1) * width))
        case "vocab":
            start, stop = (min((tp_rank + step) * vocab_rows, rows) for step in (0, 1))
            return Shard((vocab_rows, *rest), (Piece(0, start, stop, 0),) if stop > start else ())
        case "gated":
            part = rows // tp_size
            pieces = tuple(Piece(i, tp_rank * part, (tp_rank + 1) * part, i * part) for i in range(2))
            return Shard((2 * part, *rest), pieces)
        case "qkv":
            part = sum(shape[0] for shape in source_shapes) // tp_size
            return Shard((part, *rest), tuple(_interleaved(block, tp_rank * part, (tp_rank + 1) * part)))


def _interleaved(block: tuple[int, ...], start: int, stop: int) -> Iterator[Piece]:
    """Rows ``start:stop`` of sources interleaved in blocks of ``block[i]`` rows of each source.

    With fewer KV groups than ranks a shard is a part of a block (Megatron-Core gathers before it splits).
    """
    for number in range(start // sum(block), -(-stop // sum(block))):
        at = number * sum(block)
        for source, rows in enumerate(block):
            low, high = max(at, start), min(at + rows, stop)
            if low < high:
                first = number * rows + low - at
                yield Piece(source, first, first + high - low, low - start)
            at += rows
