"""Megatron's DDP, (distributed) optimizer and learning-rate schedule, built from our configuration."""

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer, clip_grads, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import local_multi_tensor_l2_norm
from torch.nn.utils import get_total_norm

from megatron_gft.config import OptimizerConfig
from megatron_gft.errors import InputError


def wrap_data_parallel(
    chunks: list[torch.nn.Module], transformer: TransformerConfig, optimizer: OptimizerConfig
) -> list[DistributedDataParallel]:
    """Megatron's DDP around every model chunk, and the hooks that its schedules call.

    Gradients are summed, not averaged: ``calculate_per_token_loss`` divides them once by the step's
    denominator (``finalize_model_grads``).
    """
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=optimizer.distributed,
        overlap_grad_reduce=optimizer.overlap_grad_reduce,
        overlap_param_gather=optimizer.overlap_param_gather,
        grad_reduce_in_fp32=optimizer.grad_reduce_in_fp32,
        average_in_collective=False,
        check_for_nan_in_grad=False,  # ours names the group ids and keeps the microbatch
    )
    # Later chunks do not bucket: their gradients are reduced while the first chunk still runs backward.
    wrapped = [
        DistributedDataParallel(transformer, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    transformer.finalize_model_grads_func = finalize_model_grads
    if optimizer.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in wrapped]
        transformer.no_sync_func = no_sync if len(wrapped) > 1 else no_sync[0]
        if len(wrapped) > 1:
            transformer.grad_sync_func = [chunk.start_grad_sync for chunk in wrapped]
    return wrapped


def build_optimizer(
    chunks: list[DistributedDataParallel], optimizer: OptimizerConfig, *, bf16: bool, use_gloo: bool = True
) -> MegatronOptimizer:
    """Megatron's Adam(W) over the chunks. Weight decay leaves out biases and one-dimensional weights (norms)."""
    config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_eps=optimizer.eps,
        clip_grad=optimizer.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=optimizer.distributed,
        overlap_param_gather=optimizer.overlap_param_gather,
    )
    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:  # without Transformer Engine: it reads each norm
        clip_grads.l2_norm_impl = _norm_on_device
    built = get_megatron_optimizer(config, chunks, use_gloo_process_groups=use_gloo)
    for part in _distributed(built):
        part.get_parameter_state_dp_zero = partial(_gathered_with_padding, part)
    return built


def _norm_on_device(chunk_size: int, overflow: torch.Tensor, lists: list[list[torch.Tensor]], each: bool) -> Any:
    """Apex's ``multi_tensor_l2norm``: the norm of one list of gradients, float32 [1], and no norms of each."""
    return get_total_norm(lists[0])[None], None


# Of a device, to gather one bucket of the optimizer's state for a save. Beyond it the hosts gather, by gloo.
MOST_GATHERED_BYTES = 2**31


def gathered_bytes(optimizer: MegatronOptimizer) -> int:
    """What a save takes of a device beside weights, gradients and state: the largest bucket, whole and this rank's
    part, in float32 (``DistributedOptimizer.get_parameter_state_dp_zero``). A bucket is the whole buffer where
    ``overlap_grad_reduce`` is off."""
    sizes = [
        bucket.grad_data.numel() * (1 + 1 / buffer.data_parallel_world_size)
        for part in _distributed(optimizer)
        for buffer in part.buffers
        for bucket in buffer.buckets
    ]
    return int(4 * max(sizes, default=0))


def saves_on_hosts(optimizer: MegatronOptimizer) -> bool:
    """Whether a save is gathered by the hosts, on one of each data-parallel group: slower, and no device memory."""
    return gathered_bytes(optimizer) > MOST_GATHERED_BYTES


def _distributed(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    """The optimizers in it that share buffers among data-parallel ranks."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if isinstance(part, DistributedOptimizer)]


def _gathered_with_padding(part: DistributedOptimizer, **options: Any) -> dict[str | int, Any] | None:
    """The state of the whole buffers (flat, fp32), with the padding that ends their buckets.

    Megatron-Core (0.16.1 to 0.19.2) leaves it out, and then cuts parameters out where they lie in the padded buffer
    (``distrib_optimizer.py``, ``sharded_param_state_fully_reshardable``). A checkpoint would hold weights and moments
    shifted by the padding, for every bucket but the first.
    """
    state = DistributedOptimizer.get_parameter_state_dp_zero(part, **options)
    for index, buffer in enumerate(part.buffers if state else ()):
        for tensors in state[index].values():
            for name, flat in tensors.items():
                if isinstance(flat, torch.Tensor) and len(flat) == buffer.numel_unpadded < buffer.numel:
                    pieces = flat.split([bucket.numel_unpadded for bucket in buffer.buckets])
                    tensors[name] = flat.new_zeros(buffer.numel)
                    for bucket, piece in zip(buffer.buckets, pieces, strict=True):
                        tensors[name][bucket.offset : bucket.offset + len(piece)] = piece
    return state


def complete_state(optimizer: MegatronOptimizer) -> None:
    """Moments of zero where no update has made any: no group so far had anything to teach. Checkpoints hold them."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if not getattr(part, "is_stub_optimizer", False) and not part.optimizer.state:
            part.init_state_fn(part.optimizer, part.config)


def build_scheduler(
    optimizer: MegatronOptimizer, config: OptimizerConfig, total_steps: int, finished_steps: int
) -> OptimizerParamScheduler:
    """Megatron's schedule, at the rate of the next update; the rate is a function of the finished steps alone.

    Update k (from 1) of a warm-up of W steps uses ``lr * k / W``, without a warm-up the first one uses ``lr``. The last
    update of the decay is above ``min_lr``, which comes after it: a rate of 0 would waste that step.
    """
    # Megatron's rate 0 of a warm-up is at its step 0: update k takes step k. Without one, update 1 takes step 0.
    ahead = int(config.warmup_steps > 0)
    decay_steps = (config.decay_steps or total_steps) + ahead
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=min(config.min_lr, config.lr),
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=max(decay_steps, config.warmup_steps + 1),
        lr_decay_style=config.schedule,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=max(total_steps, 1),
        wd_incr_style="constant",
    )
    scheduler.step(finished_steps + ahead)
    return scheduler


def load_optimizer_state(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Restore moments and step counts of a ``state`` that :func:`check_optimizer_state` has passed; learning rate,
    betas, eps and weight decay stay those of the configuration."""
    wanted = [{name: group[name] for name in _SETTINGS if name in group} for group in optimizer.param_groups]
    # From 0.19 on Megatron-Core finds a group again by its rates, which are alike in all groups here.
    rates = {name: wanted[0][name] for name in ("max_lr", "min_lr") if wanted and name in wanted[0]}
    for part in state.values() if _apart(optimizer) else (state,):
        for group in part.get("optimizer", part).get("param_groups", ()):
            group.update({name: rate for name, rate in rates.items() if name in group})
    with torch.no_grad():  # the loader of one of Megatron's formats writes into leaf views
        optimizer.load_state_dict(state)
    for group, settings in zip(optimizer.param_groups, wanted, strict=True):
        group.update(settings)


def check_optimizer_state(optimizer: MegatronOptimizer, state: dict[Any, Any], path: Path) -> None:
    """See that a loaded state is this optimizer's, and that its fp32 weights, rounded, are the model's, loaded before.

    They are not in runs of several buckets that were saved before :func:`_gathered_with_padding`.

    Raises:
        InputError: on this rank they differ; or experts had an optimizer of their own and have none now, or the other
            way round.
    """
    apart = _apart(optimizer)
    if {isinstance(name, int) for name in state} != {apart}:
        raise InputError(
            f"{path}: its optimizer is one of another parallel.ep: Megatron-Core keeps experts apart where ep > 1 "
            "-> set parallel.ep as it was, or checkpoint.load_optimizer=false: weights and place go on"
        )
    for number, part in enumerate(_distributed(optimizer)):
        stored = (state[number] if apart else state)["param_state"]
        weights = (weight for buffer in part.buffers for weight in buffer.param_index_map)
        for place, weight in enumerate(weights):
            if not torch.equal(stored[place]["param"].to(weight), weight):
                raise InputError(
                    f"{path}: the optimizer's copy of weight {place}, {list(weight.shape)}, is not that weight "
                    "-> set checkpoint.load_optimizer=false: weights and place go on, Adam begins afresh"
                )


def _apart(optimizer: MegatronOptimizer) -> bool:
    """Whether experts have an optimizer of their own; states are by number, then."""
    return len(getattr(optimizer, "chained_optimizers", ())) > 1


_SETTINGS = ("max_lr", "min_lr", "betas", "eps", "weight_decay")


def learning_rate(optimizer: MegatronOptimizer) -> float:
    """The rate that the next update uses."""
    return max((group["lr"] for group in optimizer.param_groups if group["params"]), default=0.0)


def reduce_gradients(optimizer: MegatronOptimizer) -> float:
    """Copy the reduced gradients to the optimizer and return their global norm, before any clipping."""
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


def apply_gradients(optimizer: MegatronOptimizer, grad_norm: float, clip: float) -> None:
    """Clip by the global norm and update; the second half of ``MegatronOptimizer.step``.

    The halves are apart so that a step whose gradient is not finite never touches weights or Adam's state.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        parameters = [] if getattr(part, "is_stub_optimizer", False) else part.get_parameters()
        if clip > 0 and parameters:
            clip_grad_by_total_norm_fp32(parameters, max_norm=clip, total_norm=grad_norm)
    optimizer.step_with_ready_grads()


@contextlib.contextmanager
def gathered_parameters(chunks: list[DistributedDataParallel]) -> Iterator[None]:
    """Inside, every rank holds the updated weights, also where their all-gather overlaps the next forward."""
    overlapped = [chunk for chunk in chunks if chunk.use_forward_hook]
    for chunk in overlapped:
        chunk.disable_forward_pre_hook()
    try:
        yield
    finally:
        for chunk in overlapped:
            chunk.enable_forward_pre_hook()
