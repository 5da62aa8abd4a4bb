"""The nearest layout that fits, for a configuration that does not."""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron_gft.config import Config
from megatron_gft.errors import InputErrors
from megatron_gft.hf.mapping import parameter_count
from megatron_gft.hf.shape import ModelShape
from megatron_gft.sizing.memory import StaticMemory, estimate_activations
from megatron_gft.validation import check

# Candidates that are measured exactly before the search gives up; a measurement takes about a second.
MAX_MEASURED = 4
MAX_WORLD_SIZE = 4096
# Packs below this many rows cannot hold the usual responses any more.
SMALLEST_PACK = 4096


@dataclass(frozen=True)
class Suggestion:
    """``overrides`` make the configuration fit on ``world_size`` devices with ``peak_bytes`` on the fullest."""

    world_size: int
    overrides: tuple[str, ...]
    peak_bytes: int


def suggest_layout(
    config: Config,
    shape: ModelShape,
    world_size: int,
    budget_bytes: float,
    peak_bytes: Callable[[Config, int], int],
) -> Suggestion | None:
    """Search sizes, recomputation and pack size, nearest first; more devices only when none of that helps.

    Candidates are sifted by an approximate parameter count and confirmed by ``peak_bytes``.
    """
    ranks = world_size
    while ranks <= MAX_WORLD_SIZE:
        measured = 0
        for _, candidate in sorted(_candidates(config, shape, ranks), key=lambda pair: pair[0]):
            if _approximate_peak(candidate, shape, ranks) > budget_bytes:
                continue
            peak = peak_bytes(candidate, ranks)
            if peak <= budget_bytes:
                return Suggestion(ranks, _overrides(config, candidate), peak)
            measured += 1
            if measured == MAX_MEASURED:
                break
        ranks *= 2
    return None


def _candidates(config: Config, shape: ModelShape, world_size: int) -> Iterator[tuple[float, Config]]:
    """(distance from ``config``, configuration) of every layout that passes :func:`check`."""
    tps = (1, 2, 4, 8)  # within a machine
    pps = [n for n in range(1, shape.num_layers + 1) if shape.num_layers % n == 0 and world_size % n == 0]
    eps = [2**i for i in range(MAX_WORLD_SIZE.bit_length()) if (shape.num_moe_experts or 1) % 2**i == 0]
    pack = config.data.max_tokens_per_pack
    packs = [n for n in (pack, pack >> 1, pack >> 2) if n == pack or n >= SMALLEST_PACK]
    recomputation = dict.fromkeys((config.model.recompute, "full"))
    for layout in itertools.product(tps, pps, eps, packs, recomputation):
        candidate = _changed(config, shape, *layout)
        try:
            check(candidate, shape, world_size, training=False)
        except InputErrors:
            continue
        yield _distance(config, candidate), candidate


def _changed(config: Config, shape: ModelShape, tp: int, pp: int, ep: int, pack: int, recompute: str) -> Config:
    """``config`` in another layout. Virtual stages stay where they divide; TP brings sequence parallelism with it."""
    p = config.parallel
    keeps_vpp = p.vpp is not None and pp > 1 and shape.num_layers % (pp * p.vpp) == 0
    sizes: dict[str, Any] = {"tp": tp, "pp": pp, "ep": ep, "vpp": p.vpp if keeps_vpp else None}
    if pp != p.pp:
        sizes["layers_per_stage"] = None
    sizes["sequence_parallel"] = tp > 1 and (p.sequence_parallel or p.tp == 1)
    return config.model_copy(
        update={
            "parallel": p.model_copy(update=sizes),
            "data": config.data.model_copy(update={"max_tokens_per_pack": pack}),
            "model": config.model.model_copy(update={"recompute": recompute}),
        }
    )


def _distance(old: Config, new: Config) -> float:
    """Doublings of a parallel size, halvings of a pack, and 1.5 for full recomputation (a third more work)."""
    o, n = old.parallel, new.parallel
    steps = [(n.tp, o.tp), (n.pp, o.pp), (n.ep, o.ep), (old.data.max_tokens_per_pack, new.data.max_tokens_per_pack)]
    doublings = sum(abs(math.log2(one / other)) for one, other in steps)
    return doublings + 1.5 * (new.model.recompute != old.model.recompute) + 0.5 * (n.vpp != o.vpp)


def _approximate_peak(config: Config, shape: ModelShape, world_size: int) -> float:
    """Bytes of the first or last stage from parameter counts alone, some percent off."""
    p = config.parallel
    per_layer = 3 * shape.hidden_size * (shape.moe_ffn_hidden_size or 0) * (shape.num_moe_experts or 0)
    expert = float(shape.num_layers * per_layer)
    matrix = shape.vocab_size * shape.hidden_size
    embeddings = matrix * (1 if shape.share_embeddings_and_output_weights else 2)
    trunk = (parameter_count(shape) - expert - embeddings) / p.pp
    dense = (trunk + (embeddings if p.pp == 1 else matrix)) / p.tp
    etp = p.etp or p.tp
    expert = expert / (p.pp * etp * p.ep)
    dp, expert_dp = world_size / (p.tp * p.pp), world_size / (etp * p.ep * p.pp)
    bf16 = config.model.precision == "bf16"
    shards = (dense / dp + expert / expert_dp) if config.optimizer.distributed else dense + expert
    weights = (2 if bf16 else 4) * (dense + expert)
    gradients = (4 if config.optimizer.grad_reduce_in_fp32 or not bf16 else 2) * (dense + expert)
    static = StaticMemory(
        parameters=int(dense + expert),
        linear_parameters=int(trunk / p.tp + expert),
        weights=int(weights),
        gradients=int(gradients),
        optimizer=int((12 if bf16 else 8) * shards),
    )
    activations = [estimate_activations(config, shape, stage, static).total for stage in (0, p.pp - 1)]
    return static.total + max(activations)


def _overrides(old: Config, new: Config) -> tuple[str, ...]:
    """``section.key=value`` for everything that differs."""
    before, after = old.model_dump(), new.model_dump()
    return tuple(
        f"{section}.{key}={'null' if value is None else str(value).lower()}"
        for section, values in after.items()
        for key, value in values.items()
        if before[section][key] != value
    )
