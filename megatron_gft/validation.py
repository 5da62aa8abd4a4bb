"""Checks that cross sections of the configuration, the model and the world size; all problems in one error.

Torch-free: it runs before any process group, and in ``tools/plan.py``. Several of these combinations run in
Megatron-Core without a word and give wrong numbers; each rule says so.
"""

from __future__ import annotations

import importlib.util
import math

from megatron_gft.config import Config
from megatron_gft.errors import InputErrors
from megatron_gft.hf_config import ModelShape, shape_problems


def check(config: Config, shape: ModelShape, world_size: int, *, training: bool = True) -> None:
    """Raise one :class:`InputErrors` with every problem of this combination, or return.

    Args:
        world_size: processes of the job.
        training: false for planning, where shards and optional packages need not be there.
    """
    problems = [
        *_layout(config, shape, world_size),
        *_data(config, training),
        *_objective(config),
        *_optimizer(config),
        *_model(config, training),
    ]
    if problems:
        raise InputErrors("configuration", problems)


def _layout(config: Config, shape: ModelShape, world_size: int) -> list[str]:
    p, problems = config.parallel, []
    model_size = p.tp * p.pp * p.cp
    if world_size % model_size:
        problems.append(
            f"parallel: tp({p.tp}) * pp({p.pp}) * cp({p.cp}) = {model_size} does not divide the world size "
            f"{world_size} -> start a multiple of {model_size} processes, or change parallel.tp, pp or cp"
        )
    etp = p.etp or p.tp
    expert_size = etp * p.ep * p.pp
    if shape.num_moe_experts and world_size % expert_size:
        problems.append(
            f"parallel: etp({etp}) * ep({p.ep}) * pp({p.pp}) = {expert_size} does not divide the world size "
            f"{world_size} -> change parallel.ep or parallel.etp"
        )
    problems += [
        f"parallel: {text}" for text in shape_problems(shape, tp=p.tp, pp=p.pp, vpp=p.vpp or 1, ep=p.ep, etp=etp)
    ]
    if p.vpp is not None and p.pp < 2:
        problems.append(f"parallel.vpp={p.vpp} interleaves pipeline stages and pp is 1 -> set parallel.pp or drop vpp")
    if p.sequence_parallel and p.tp == 1:
        problems.append("parallel.sequence_parallel cuts over tensor ranks and tp is 1 -> set it to false")
    if shape.num_moe_experts and p.tp > 1 and not p.sequence_parallel:
        problems.append(
            "parallel: Megatron-Core trains mixture-of-experts with tp > 1 only with sequence parallel "
            "-> set parallel.sequence_parallel=true"
        )
    return problems


def _data(config: Config, training: bool) -> list[str]:
    d, p, problems = config.data, config.parallel, []
    if training and not d.train:
        problems.append("data.train: missing -> name shard prefixes or globs, written by tools/preprocess_groups.py")
    if d.train_weights is not None and len(d.train_weights) != len(d.train):
        problems.append(f"data.train_weights has {len(d.train_weights)} entries for {len(d.train)} of data.train")
    shares = d.split.split(",")
    try:
        numbers = [float(share) for share in shares]
    except ValueError:
        numbers = []
    if len(numbers) != 3 or min(numbers, default=-1) < 0 or numbers[0] <= 0:
        problems.append(f'data.split={d.split!r}: not three shares -> for example "98,2,0" (train, valid, test)')
    elif config.train.validate_every and not d.valid and numbers[1] == 0:
        problems.append('train.validate_every is set and there is no validation data -> data.valid, or split "98,2,0"')
    unit = math.lcm(2 * p.cp if p.cp > 1 else 1, p.cp * (p.tp if p.sequence_parallel else 1))
    if d.max_tokens_per_pack < unit:
        problems.append(
            f"data.max_tokens_per_pack={d.max_tokens_per_pack} is below {unit}, the padding unit of this layout "
            "(2 * cp rows per sequence, tp * cp per pack)"
        )
    return problems


def _objective(config: Config) -> list[str]:
    o, problems = config.objective, []
    if len(set(o.sources or [])) != len(o.sources or []):
        problems.append(f"objective.sources={o.sources}: a source is named twice")
    if o.advantage != "none" and o.sources is not None and len(o.sources) == 1 and o.sources[0] == "expert":
        problems.append(
            "objective: advantages over a single expert per group are its reward alone -> set "
            "objective.advantage=none, or add sources"
        )
    return problems


def _optimizer(config: Config) -> list[str]:
    o, problems = config.optimizer, []
    if o.min_lr > o.lr:
        problems.append(f"optimizer.min_lr={o.min_lr} is above optimizer.lr={o.lr}")
    if o.decay_steps is not None and o.decay_steps <= o.warmup_steps:
        problems.append(f"optimizer.decay_steps={o.decay_steps} must exceed warmup_steps={o.warmup_steps}")
    if o.overlap_param_gather and not (o.overlap_grad_reduce and o.distributed):
        problems.append(
            "optimizer.overlap_param_gather needs optimizer.overlap_grad_reduce=true and optimizer.distributed=true"
        )
    return problems


def _model(config: Config, training: bool) -> list[str]:
    m, problems = config.model, []
    if m.fp8 and m.backend == "local":
        problems.append("model.fp8 needs Transformer Engine -> set model.backend=auto")
    if training and m.fp8 and importlib.util.find_spec("transformer_engine") is None:
        problems.append("model.fp8 needs Transformer Engine -> pip install -r requirements-gpu.txt, or drop model.fp8")
    if m.fp8 and m.precision != "bf16":
        problems.append("model.fp8 quantises bf16 weights -> set model.precision=bf16")
    return problems
