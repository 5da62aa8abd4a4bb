"""How long a step takes: real packs of real (or assumed) groups, their FLOPs, the pipeline bubble, a stated efficiency.

Packs, tokens, FLOPs, fill and balance are exact for the groups at hand: the same :class:`StepLoader` plans them as in
training. Seconds and MFU are estimates, as good as the efficiency they start from (:data:`ANCHORS`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from megatron_gft.atomic import sha256_json
from megatron_gft.batch import Groups, StepLoader
from megatron_gft.config import Config, ParallelConfig
from megatron_gft.hf.shape import ModelShape
from megatron_gft.objectives import SOURCES
from megatron_gft.parallel import Parallel
from megatron_gft.planning import FlopModel
from megatron_gft.shards import GroupTable
from megatron_gft.sizing.memory import StaticMemory, stage_layers

ANCHORS = {
    # Llama-3.1-70B, 64 to 2048 H100, BF16: NVIDIA dgxc-benchmarking v25.04.01, llama3.1/README.md (bubble 1 %)
    "dense bf16": 0.54,
    # Llama-3-70B, 64 H100, FP8 current scaling, 719 TFLOP/s: Megatron-Bridge 25.11, docs/performance-summary.md
    "dense fp8": 0.73,
    # Qwen3-30B-A3B, 16 H100, 121 TFLOP/s: same page
    "mixture of experts": 0.12,
}
"""Published model FLOPs per second of one H100 over its dense bf16 peak, while it computes. These runs hide the
collectives of tensor parallelism behind matrix products, which packs of varying length cannot (``tp_comm_overlap``)."""

# TP 8 instead of TP 4 for 70B, 509 instead of 710 TFLOP/s: Megatron-Bridge, skills/nemo-mbridge-perf-memory-tuning.
TP8_FACTOR = 0.72
# Bytes per second and GPU that collectives reach: NVLink 4 inside a machine, one 400 Gb/s port each between machines.
NVLINK_BANDWIDTH, NETWORK_BANDWIDTH = 300e9, 40e9
GPUS_PER_NODE = 8
# A save stalls training until float32 weights and both moments of a rank's parameters are gathered over its
# data-parallel group and copied to the host; how fast has not been measured on a GPU.
SAVED_BYTES, SAVE_BANDWIDTH = 12, 2e9
# A cut of the layers that saves less is not worth a key.
SMALLEST_GAIN = 0.02
# Full recomputation runs the forward pass twice: 4 instead of 3 units of work.
RECOMPUTE_FACTOR = 4 / 3
# Steps that are planned to describe an epoch; fewer where that would take long.
SAMPLED_STEPS, SAMPLED_GROUPS = 4, 4096


@dataclass(frozen=True)
class Workload:
    """Assumed groups, for planning without shards. Lengths are log-normal around the means; rewards are 0 or 1."""

    groups: int = 10_000
    responses: int = 8
    prompt_tokens: int = 150
    response_tokens: int = 700
    spread: float = 0.5  # of the logarithm of a length
    expert_responses: int = 1


class AssumedGroups:
    """A :class:`megatron_gft.batch.Groups` of a :class:`Workload`: facts without tokens, the same on every call."""

    def __init__(self, workload: Workload, *, longest: int):
        self.workload, self.longest = workload, longest

    @property
    def fingerprint(self) -> str:
        return sha256_json([repr(self.workload), self.longest])

    def __len__(self) -> int:
        return self.workload.groups

    def __getitem__(self, index: int) -> NoReturn:
        raise TypeError("assumed groups have lengths and no tokens")

    def describe(self, index: int) -> str:
        return f"assumed group {index}"

    def table(self, indices: Sequence[int] | np.ndarray, *, ends: bool = False) -> GroupTable:
        return GroupTable.of_groups([self._group(int(index)) for index in indices])

    def _group(self, index: int) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
        w = self.workload
        random = np.random.Generator(np.random.Philox(key=index))
        means = np.array([w.prompt_tokens] + [w.response_tokens] * w.responses)
        lengths = np.maximum(np.exp(np.log(means) - w.spread**2 / 2 + w.spread * random.normal(size=len(means))), 1)
        prompt = int(min(lengths[0], self.longest // 2))
        rewards = random.integers(0, 2, w.responses).astype(np.float32)
        rewards[: w.expert_responses] = 1.0
        sources = np.full(w.responses, SOURCES.index("self"), dtype=np.int8)
        sources[: w.expert_responses] = SOURCES.index("expert")
        return prompt, np.minimum(lengths[1:], self.longest - prompt).astype(np.int64), sources, rewards


@dataclass(frozen=True)
class StepStatistics:
    """Means over ``sampled_steps`` planned steps, evenly spread over an epoch; exact for these steps.

    ``groups`` counts the data set's, ``dead_groups`` those of a step that cannot change the weights, ``tokens`` rows
    that the model runs (padding included), ``flops`` forward and backward without recomputation.
    """

    assumed: bool
    groups: int
    steps_per_epoch: int
    sampled_steps: int
    packs_per_rank: float
    tokens: float
    loss_tokens: float
    padding_share: float
    dead_groups: float
    fill: float
    balance: float
    flops: float


def describe_steps(
    groups: Groups, config: Config, shape: ModelShape, parallel: Parallel, *, assumed: bool
) -> StepStatistics | None:
    """Plan some steps of an epoch; None when nothing of them trains.

    Raises:
        InputErrors: responses that do not fit, with ``data.overlong=error``.
    """
    loader = StepLoader(groups, config, shape, parallel)
    count = max(1, min(SAMPLED_STEPS, SAMPLED_GROUPS // config.data.groups_per_step, loader.steps_per_epoch))
    batches = [loader.batch(i * loader.steps_per_epoch // count) for i in range(count)]
    plans = [batch.plan for batch in batches if batch.plan is not None]
    if not plans:
        return None
    names = ("packs_per_rank", "tokens", "fill", "balance", "flops")
    return StepStatistics(
        assumed=assumed,
        groups=len(groups),
        steps_per_epoch=loader.steps_per_epoch,
        sampled_steps=count,
        loss_tokens=sum(batch.loss_tokens for batch in batches if batch.plan is not None) / len(plans),
        padding_share=sum(plan.padding for plan in plans) / sum(plan.tokens for plan in plans),
        dead_groups=sum(batch.dead_groups for batch in batches) / count,
        **{name: sum(getattr(plan, name) for plan in plans) / len(plans) for name in names},
    )


def pipeline_bubble(pp: int, vpp: int | None, packs: float) -> float:
    """Idle time over working time of 1F1B with ``packs`` microbatches (arXiv 2104.04473, section 2.2)."""
    return (pp - 1) / (packs * (vpp or 1))


def head_in_layers(shape: ModelShape, steps: StepStatistics) -> float:
    """Work of the output layer on its loss rows, in transformer layers' on all rows."""
    head = FlopModel.from_shape(shape).head_per_row * steps.loss_tokens
    return shape.num_layers * head / (steps.flops - head)


def better_cut(parallel: ParallelConfig, shape: ModelShape, steps: StepStatistics) -> tuple[list[int], float] | None:
    """``parallel.layers_per_stage`` with a less busy busiest stage, and the share of time it saves; None below 2 %."""
    head, pp = head_in_layers(shape, steps), parallel.pp
    cuts = {}
    for last in range(1, shape.num_layers // pp + 1 if pp > 1 else 0):
        each, more = divmod(shape.num_layers - last, pp - 1)
        layers = [each + 1] * more + [each] * (pp - 1 - more) + [last]  # the first ones hold most activations, too
        cuts[max(layers[0], last + head)] = layers
    now = _busiest(stage_layers(parallel, shape.num_layers), head)
    if not cuts or (best := min(cuts)) > (1 - SMALLEST_GAIN) * now:
        return None
    return cuts[best], 1 - best / now


def _busiest(layers: list[int], head: float) -> float:
    """Work of the busiest stage in layers."""
    return max(*layers[:-1], layers[-1] + head) if len(layers) > 1 else layers[0] + head


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step and what they rest on; an estimate.

    ``efficiency`` is the share of the device's bf16 peak reached while computing, ``stage_balance`` the mean work of a
    pipeline stage over that of the busiest (the last one has the output layer), ``mfu`` the share of the peak over
    the whole step (recomputation does not count as useful work). ``tensor_parallel_seconds``: collectives between
    layers, which nothing hides as long as packs differ in length; ``gradient_sync_seconds``: what is not hidden
    behind computing; ``save_seconds``: a save's stall, spread over ``checkpoint.save_every`` steps.
    """

    efficiency: float
    compute_seconds: float
    stage_balance: float
    tensor_parallel_seconds: float
    bubble: float
    gradient_sync_seconds: float
    save_seconds: float
    seconds: float
    mfu: float
    tokens_per_second_per_device: float
    epoch_hours: float


def stated_efficiency(config: Config, shape: ModelShape) -> float:
    """The anchor for this kind of run."""
    if shape.num_moe_experts:
        return ANCHORS["mixture of experts"]
    factor = TP8_FACTOR if config.parallel.tp >= 8 else 1.0
    return factor * ANCHORS["dense fp8" if config.model.fp8 else "dense bf16"]


def _tensor_parallel_seconds(config: Config, shape: ModelShape, tokens: float, layers: int) -> float:
    """Collectives of ``layers`` layers for ``tokens`` rows of one tensor-parallel group.

    Attention and MLP each gather their input and scatter their output, in forward, backward and recomputation
    (arXiv 2205.05198, section 4.2.2); without sequence parallelism two all-reduces move the same bytes.
    """
    p = config.parallel
    passes = 3 if config.model.recompute == "full" else 2
    element = 2 if config.model.precision == "bf16" else 4
    volume = 4 * passes * tokens / p.cp * shape.hidden_size * element * (p.tp - 1) / p.tp
    return layers * volume / (NVLINK_BANDWIDTH if p.tp <= GPUS_PER_NODE else NETWORK_BANDWIDTH)


def estimate_step_time(
    config: Config,
    shape: ModelShape,
    steps: StepStatistics,
    static: StaticMemory,
    world_size: int,
    *,
    efficiency: float,
    peak_tflops: float,
) -> StepTime:
    """Work of the busiest stage of the busiest rank at the stated efficiency, and what is not hidden behind it."""
    p = config.parallel
    layers, head = stage_layers(p, shape.num_layers), head_in_layers(shape, steps)
    again = RECOMPUTE_FACTOR if config.model.recompute == "full" else 1.0  # the output layer's is never repeated
    stage_balance = (shape.num_layers + head / again) / p.pp / _busiest(layers, head / again)
    work = steps.flops / world_size * (shape.num_layers * again + head) / (shape.num_layers + head)
    compute = work / (peak_tflops * 1e12 * efficiency) / steps.balance / stage_balance
    tokens = steps.tokens * p.tp * p.pp * p.cp / world_size
    traffic = _tensor_parallel_seconds(config, shape, tokens, max(layers))
    bubble = pipeline_bubble(p.pp, p.vpp, steps.packs_per_rank)
    sync = 0.0
    if world_size > p.tp * p.pp:
        # Reduce-scatter of the gradients, all-gather of the weights. Between machines every member of the
        # data-parallel group in a machine brings its own port.
        ports = NVLINK_BANDWIDTH if world_size <= GPUS_PER_NODE else max(1, GPUS_PER_NODE // p.tp) * NETWORK_BANDWIDTH
        sync = (static.gradients + static.weights) / min(NVLINK_BANDWIDTH, ports)
        if config.optimizer.overlap_grad_reduce:  # behind the last pack's backward and the first one's forward
            sync = max(0.0, sync - compute / steps.packs_per_rank)
    save = SAVED_BYTES * static.parameters / SAVE_BANDWIDTH / (config.checkpoint.save_every or math.inf)
    seconds = (compute + traffic) * (1 + bubble) + sync + save
    return StepTime(
        efficiency=efficiency,
        compute_seconds=compute,
        stage_balance=stage_balance,
        tensor_parallel_seconds=traffic,
        bubble=bubble,
        gradient_sync_seconds=sync,
        save_seconds=save,
        seconds=seconds,
        mfu=steps.flops / world_size / seconds / (peak_tflops * 1e12),
        tokens_per_second_per_device=steps.tokens * (1 - steps.padding_share) / seconds / world_size,
        epoch_hours=seconds * steps.steps_per_epoch / 3600,
    )
