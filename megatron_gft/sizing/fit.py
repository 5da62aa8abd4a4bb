"""Does this configuration fit on N devices, and how fast will it be? Answered without a GPU, in seconds.

:func:`make_plan` builds the model of one rank per pipeline stage on meta tensors (exact bytes), estimates activations,
plans real or assumed steps and estimates their time. What is exact and what is estimated is part of the result.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_gft.batch import open_groups
from megatron_gft.config import Config
from megatron_gft.hf.mapping import parameter_count
from megatron_gft.hf.shape import ModelShape
from megatron_gft.sizing.layout_search import Suggestion, suggest_layout
from megatron_gft.sizing.memory import (
    ActivationMemory,
    StaticMemory,
    estimate_activations,
    measure_stage,
    simulated_rank,
    stage_layers,
)
from megatron_gft.sizing.throughput import (
    GPUS_PER_NODE,
    AssumedGroups,
    StepStatistics,
    StepTime,
    Workload,
    better_cut,
    describe_steps,
    estimate_step_time,
    head_in_layers,
    stated_efficiency,
)
from megatron_gft.validation import check

SCHEMA = 1
GIB = 2**30


@dataclass(frozen=True)
class Device:
    """One accelerator. ``reserve_gib`` is kept for the CUDA context, NCCL and cuBLAS buffers, and fragmentation."""

    name: str = "H100 80GB"
    memory_gib: float = 79.1
    reserve_gib: float = 5.0
    peak_tflops: float = 989.0

    @property
    def budget_bytes(self) -> float:
        """What a rank may use."""
        return (self.memory_gib - self.reserve_gib) * GIB


@dataclass(frozen=True)
class StagePlan:
    """Memory of the ranks of one pipeline stage."""

    stage: int
    exact: StaticMemory
    estimate: ActivationMemory

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return self.exact.total + max(self.estimate.total, self.exact.save)


@dataclass(frozen=True)
class Plan:
    """The answer; see :func:`make_plan`."""

    world_size: int
    config: Config
    shape: ModelShape
    device: Device
    stages: tuple[StagePlan, ...]
    steps: StepStatistics | None
    time: StepTime | None
    suggestion: Suggestion | None
    notes: tuple[str, ...]

    @property
    def dp(self) -> int:
        p = self.config.parallel
        return self.world_size // (p.tp * p.pp * p.cp)

    @property
    def peak_bytes(self) -> int:
        """Of the fullest stage."""
        return max(stage.total for stage in self.stages)

    @property
    def fits(self) -> bool:
        """Every stage stays within the device's memory less the reserve."""
        return self.peak_bytes <= self.device.budget_bytes

    @property
    def verdict(self) -> str:
        return "fits" if self.fits else "does not fit"

    def to_json(self) -> dict[str, Any]:
        """Plain values, bytes and seconds; every number is under a key that says ``exact`` or ``estimate``.
        ``schema`` counts up when a key changes its meaning."""
        p = self.config.parallel
        return {
            "schema": SCHEMA,
            "verdict": self.verdict,
            "world_size": self.world_size,
            "model": {"architecture": self.shape.architecture, "parameters": parameter_count(self.shape)},
            "layout": {"tp": p.tp, "pp": p.pp, "vpp": p.vpp, "cp": p.cp, "ep": p.ep, "etp": p.etp, "dp": self.dp}
            | {"sequence_parallel": p.sequence_parallel, "recompute": self.config.model.recompute},
            "device": dataclasses.asdict(self.device),
            "stages": [
                {
                    "stage": stage.stage,
                    "exact": dataclasses.asdict(stage.exact),
                    "estimate": dataclasses.asdict(stage.estimate) | {"total_with_exact": stage.total},
                    "fits": stage.total <= self.device.budget_bytes,
                }
                for stage in self.stages
            ],
            "steps": {"exact": dataclasses.asdict(self.steps)} if self.steps else None,
            "time": {"estimate": dataclasses.asdict(self.time)} if self.time else None,
            "suggestion": dataclasses.asdict(self.suggestion) if self.suggestion else None,
            "notes": list(self.notes),
        }


def make_plan(
    config: Config,
    shape: ModelShape,
    world_size: int,
    *,
    device: Device | None = None,
    workload: Workload | None = None,
    efficiency: float | None = None,
    with_steps: bool = True,
) -> Plan:
    """Plan a run of ``config`` on ``world_size`` devices. Needs a process without a process group.

    Args:
        workload: groups to assume where ``data.train`` is empty.
        efficiency: share of peak reached while computing; default the anchor of :func:`stated_efficiency`.
        with_steps: false plans memory alone, for steps of many packs.

    Raises:
        InputErrors: everything that is wrong with the configuration, at once.
    """
    check(config, shape, world_size, training=False)
    device = device or Device()
    steps = _steps(config, shape, world_size, workload or Workload()) if with_steps else None
    packs = round(steps.packs_per_rank) if steps else None
    stages = _stages(config, shape, world_size, packs)
    time, fullest = None, max((stage.exact for stage in stages), key=lambda exact: exact.total)
    if steps:
        speed = {"efficiency": efficiency or stated_efficiency(config, shape), "peak_tflops": device.peak_tflops}
        time = estimate_step_time(config, shape, steps, fullest, world_size, **speed)
    notes = (*_notes(config, shape, steps, with_steps), _save_note(fullest, min(world_size, GPUS_PER_NODE)))
    plan = Plan(world_size, config, shape, device, stages, steps, time, None, notes)
    if plan.fits:
        return plan

    def peak(candidate: Config, ranks: int) -> int:
        return max(stage.total for stage in _stages(candidate, shape, ranks, packs=None))

    return dataclasses.replace(plan, suggestion=suggest_layout(config, shape, world_size, device.budget_bytes, peak))


def _stages(config: Config, shape: ModelShape, world_size: int, packs: int | None) -> tuple[StagePlan, ...]:
    """Stages that hold the same are built once: as many layers, and neither or both of them at an end."""
    pp, layers = config.parallel.pp, stage_layers(config.parallel, shape.num_layers)
    measured: dict[tuple[int, bool, bool], StaticMemory] = {}
    stages = []
    for stage in range(pp):
        key = (layers[stage], stage == 0, stage == pp - 1)
        exact = measured[key] = measured.get(key) or measure_stage(config, shape, world_size, stage)
        stages.append(StagePlan(stage, exact, estimate_activations(config, shape, stage, exact, packs)))
    return tuple(stages)


def _steps(config: Config, shape: ModelShape, world_size: int, workload: Workload) -> StepStatistics | None:
    with simulated_rank(config, 0, world_size) as parallel:
        if config.data.train:
            groups, _ = open_groups(config, shape)
            return describe_steps(groups, config, shape, parallel, assumed=False)
        longest = min(half := config.data.max_tokens_per_pack // 2, config.data.max_response_tokens or half)
        return describe_steps(AssumedGroups(workload, longest=longest), config, shape, parallel, assumed=True)


def _save_note(fullest: StaticMemory, ranks: int) -> str:
    """What a save takes of a host, as measured on one rank: 36 bytes a parameter, of which 12 stay for the next one."""
    peak, kept = (count * fullest.parameters * ranks / GIB for count in (36, 12))
    device = f"{fullest.save / GIB:.1f} GiB of a device's" if fullest.save else "none of a device's"
    return f"a save takes up to {peak:,.1f} GiB of a host (its ranks: {ranks}), keeps {kept:,.1f}, and takes {device}"


def _notes(config: Config, shape: ModelShape, steps: StepStatistics | None, with_steps: bool) -> Iterator[str]:
    """What is legal and probably not meant."""
    p, pack = config.parallel, config.data.max_tokens_per_pack
    if p.tp > GPUS_PER_NODE:
        yield f"parallel.tp={p.tp} reaches beyond a machine of {GPUS_PER_NODE} GPUs: slow links in every layer"
    if p.tp > 1 and not p.sequence_parallel:
        yield "parallel.sequence_parallel is off: norms and residuals are kept whole on every tensor rank"
    if pack > shape.max_sequence_length:
        yield (
            f"data.max_tokens_per_pack={pack} exceeds the model's {shape.max_sequence_length} positions; a pack may, a "
            "single response with its prompt should not"
        )
    if steps is None and with_steps:
        yield "no step of the sample trains anything (equal rewards in every group?)"
    elif steps is not None and p.pp > 1 and steps.packs_per_rank * (p.vpp or 1) < 4 * (p.pp - 1):
        yield (
            f"{steps.packs_per_rank:.0f} packs per rank leave the pipeline of {p.pp} stages idle much of the time "
            "-> more data.groups_per_step, smaller parallel.pp, or parallel.vpp"
        )
    if steps is not None and p.vpp is None and (better := better_cut(p, shape, steps)):
        layers, gain = better
        yield (
            f"the output layer works as long as {head_in_layers(shape, steps):.1f} layers, on the last stage -> "
            f"parallel.layers_per_stage={layers} makes a step {gain:.1%} faster"
        )
