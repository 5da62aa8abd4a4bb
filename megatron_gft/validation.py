"""Checks that cross sections of the configuration, the model and the world size; all problems in one error.

Torch-free: it runs before any process group, and in ``tools/plan.py``. Several of these combinations run in
Megatron-Core without a word and give wrong numbers; each rule says so.
"""

import importlib.metadata
import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path

from megatron_gft.config import Config, ParallelConfig
from megatron_gft.errors import refuse
from megatron_gft.hf.shape import ModelShape, shape_problems
from megatron_gft.objectives import SOURCES, by_source
from megatron_gft.reading import absence

# What Megatron-Core imports from apex, as paths inside the package.
APEX_MODULES = ("optimizers", "multi_tensor_apply")


def check(config: Config, shape: ModelShape, world_size: int, *, training: bool = True) -> None:
    """Raise one :class:`InputErrors` with every problem of this combination, or return.

    Args:
        world_size: processes of the job.
        training: false for planning, where shards, weights and optional packages need not be there.
    """
    problems = [
        *_world_size(config, shape, world_size),
        *_parallel(config, shape),
        *_data(config, shape, training),
        *_objective(config),
        *_optimizer(config),
        *_model(config, training),
        *_run(config, world_size, training),
    ]
    refuse("configuration", problems)


def _world_size(config: Config, shape: ModelShape, world_size: int) -> Iterator[str]:
    p = config.parallel
    model_size = p.tp * p.pp * p.cp
    if world_size % model_size:
        yield (
            f"parallel.tp={p.tp} * parallel.pp={p.pp} * parallel.cp={p.cp} = {model_size} does not divide the world "
            f"size {world_size} -> start a multiple of {model_size} processes, or choose sizes that divide it"
        )
    etp = p.etp or p.tp
    expert_size = etp * p.ep * p.pp
    if shape.num_moe_experts and world_size % expert_size:
        yield (
            f"parallel.ep={p.ep} * parallel.etp={etp} * parallel.pp={p.pp} = {expert_size} does not divide the world "
            f"size {world_size} -> choose sizes that divide it (parallel.etp follows parallel.tp unless it is set)"
        )


def _parallel(config: Config, shape: ModelShape) -> Iterator[str]:
    p = config.parallel
    sizes = {
        "parallel.tp": {"tp": p.tp},
        "parallel.pp": {"pp": p.pp, "vpp": p.vpp or 1} if p.layers_per_stage is None else {},
        "parallel.ep": {"ep": p.ep},
        "parallel.etp": {"etp": p.etp or p.tp},
    }
    for key, size in sizes.items():
        yield from (f"{key}: {text}" for text in shape_problems(shape, **size))
    yield from _stages(p, shape)
    if p.sequence_parallel and p.tp == 1:
        yield "parallel.sequence_parallel cuts over tensor ranks and parallel.tp is 1 -> set it to false"
    if p.etp is not None and not shape.num_moe_experts:
        yield f"parallel.etp={p.etp} cuts experts and this model has none -> drop it"
    if shape.num_moe_experts and p.tp > 1 and not p.sequence_parallel:
        yield (
            f"parallel.tp={p.tp}: Megatron-Core trains mixture-of-experts with tensor parallelism only together with "
            "sequence parallelism -> set parallel.sequence_parallel=true"
        )


def _stages(p: ParallelConfig, shape: ModelShape) -> Iterator[str]:
    layers, chunks = p.layers_per_stage, p.pp * (p.vpp or 1)
    if layers is not None and (len(layers) != chunks or sum(layers) != shape.num_layers):
        yield (
            f"parallel.layers_per_stage={layers}: {len(layers)} stages with {sum(layers)} layers, for {chunks} "
            f"(parallel.pp * parallel.vpp) and the model's {shape.num_layers} -> one number a stage, their sum the "
            "model's"
        )
    if p.vpp is not None and p.pp < 2:
        yield (f"parallel.vpp={p.vpp} interleaves pipeline stages and parallel.pp is 1 -> raise it or drop vpp")


def _data(config: Config, shape: ModelShape, training: bool) -> Iterator[str]:
    d = config.data
    if training and not d.train:
        yield "data.train: missing -> name shard prefixes or globs, written by tools/preprocess_groups.py"
    if d.train_weights is not None and len(d.train_weights) != len(d.train):
        yield (
            f"data.train_weights has {len(d.train_weights)} entries for {len(d.train)} of data.train -> one for each"
        )
    yield from _split(config)
    unit = math.lcm(*config.row_multiples)
    if d.max_tokens_per_pack < unit:
        yield (
            f"data.max_tokens_per_pack={d.max_tokens_per_pack} is below {unit}, to a multiple of which this layout "
            f"pads a pack (2 * parallel.cp rows of a response, sequence parallelism, FP8) -> at least {unit}"
        )
    if d.max_response_tokens is not None and d.max_response_tokens > shape.max_sequence_length:
        yield (
            f"data.max_response_tokens={d.max_response_tokens} exceeds the {shape.max_sequence_length} positions that "
            "the model was made for (max_position_embeddings) -> lower it"
        )


def _split(config: Config) -> Iterator[str]:
    d = config.data
    if problem := split_problem(d.split):
        yield problem
    elif config.train.validate_every and not d.valid and float(d.split.split(",")[1]) == 0:
        yield "train.validate_every is set and there is no validation data -> set data.valid, or data.split to 98,2"


def split_problem(split: str) -> str | None:
    """What is wrong with ``data.split``; a third share, which earlier versions asked for, must be 0."""
    try:
        train, valid, *rest = map(float, split.split(","))
    except ValueError:
        train, valid, rest = -1.0, -1.0, []
    if len(rest) == 1 and rest[0] != 0:
        return f"data.split={split!r}: nothing reads a third share, its groups would be lost -> two shares, train,valid"
    if not (0 < train < math.inf and 0 <= valid < math.inf) or len(rest) > 1:
        return f'data.split={split!r}: not two shares -> for example "98,2" (train, valid)'
    return None


def _objective(config: Config) -> Iterator[str]:
    o = config.objective
    sources = o.sources or []
    if len(set(sources)) != len(sources):
        yield f"objective.sources={sources}: a source is named twice -> once"
    for key, value in {"coefficient": o.coefficient, "advantage": o.advantage}.items():
        if missing := [s for s, of in zip(SOURCES, by_source(value), strict=True) if s in sources and of is None]:
            yield f"objective.{key}={value}: none for {', '.join(missing)}, which objective.sources names -> name one"
    if o.beta and o.reference is None:
        yield f"objective.beta={o.beta}: the KL anchor has no model -> set objective.reference to its log-probs' name"
    if o.baseline_shift and {*by_source(o.advantage)} & {"none", "reward"}:
        yield f"objective.baseline_shift={o.baseline_shift}: {o.advantage} has no baseline -> mean_only or std"
    if by_source(o.advantage)[0] not in ("none", "reward") and sources == ["expert"]:
        yield (
            f"objective.advantage={o.advantage}: over a single expert per group it is the reward alone -> set it to "
            "none, or add to objective.sources"
        )


def _optimizer(config: Config) -> Iterator[str]:
    o = config.optimizer
    if o.min_lr > o.lr:
        yield f"optimizer.min_lr={o.min_lr} is above optimizer.lr={o.lr} -> lower it"
    if o.decay_steps is not None and o.decay_steps <= o.warmup_steps:
        yield (
            f"optimizer.decay_steps={o.decay_steps} does not exceed optimizer.warmup_steps={o.warmup_steps} -> it "
            "counts from the first step, warm-up included"
        )
    if o.overlap_param_gather and not (o.overlap_grad_reduce and o.distributed):
        yield (
            "optimizer.overlap_param_gather needs optimizer.overlap_grad_reduce=true and optimizer.distributed=true "
            "-> set them"
        )


def _model(config: Config, training: bool) -> Iterator[str]:
    m = config.model
    if m.fp8 and m.backend == "local":
        yield f"model.fp8={m.fp8} needs Transformer Engine -> set model.backend=auto"
    if m.fp8 and m.precision != "bf16":
        yield f"model.fp8={m.fp8} quantises bf16 weights -> set model.precision=bf16"
    if m.backend == "transformer_engine" and m.precision == "fp32":
        yield (
            "model.backend=transformer_engine: its attention over packs is half precision -> set "
            "model.precision=bf16 or model.backend=local"
        )
    if training and m.fp8 and importlib.util.find_spec("transformer_engine") is None:
        yield (f"model.fp8={m.fp8} needs Transformer Engine -> pip install -r requirements-gpu.txt, or drop model.fp8")
    if training and (problem := apex_problem()):
        yield problem


def _run(config: Config, world_size: int, training: bool) -> Iterator[str]:
    beyond = [rank for rank in config.profile.ranks if rank >= world_size]
    if config.profile.steps and beyond:
        yield f"profile.ranks={beyond}: ranks go from 0 to {world_size - 1} -> choose among them"
    origin = config.checkpoint.init_from
    folder = (origin or "").removeprefix("hf:")
    if training and origin is not None and not Path(folder).is_dir():
        yield (
            f"checkpoint.init_from={origin}: {absence(folder)}; hf:DIR for a Hugging Face model, DIR for a checkpoint"
        )
    if config.checkpoint.init_optimizer and (origin is None or origin.startswith("hf:")):
        yield f"checkpoint.init_optimizer: checkpoint.init_from={origin} has no optimizer -> name a run's checkpoints"


def apex_problem() -> str | None:
    """What is wrong with an installed ``apex``, None when it is NVIDIA's or absent. Does not import it.

    The project of that name on PyPI is a toolkit for the Pyramid web framework; Megatron-Core tries to import
    NVIDIA's from it and falls back without a word, or fails on its import.
    """
    spec = importlib.util.find_spec("apex")
    folders = [Path(folder) for folder in spec.submodule_search_locations or []] if spec else []
    missing = [name for name in APEX_MODULES if not any((folder / name).is_dir() for folder in folders)]
    if spec is None or not missing:
        return None
    try:
        version = f"apex {importlib.metadata.version('apex')}"
    except importlib.metadata.PackageNotFoundError:
        version = "an apex"
    return (
        f"{version} is installed at {folders[0] if folders else spec.origin} and is not NVIDIA's (no "
        f"{', '.join(missing)}): PyPI's apex is another project -> pip uninstall apex; NVIDIA's is built from source, "
        "see requirements-gpu.txt"
    )
