"""What one rank of a layout holds in device memory: parameters and buffers exactly, activations as an estimate.

Exact: :func:`measure_stage` builds the real model, DDP and distributed optimizer of one rank on meta tensors under a
fake process group (no memory, no other process) and adds up storages.

Estimate: :func:`estimate_activations` counts what the layers save for backward, from the shapes of their operators
with flash attention and fused SwiGLU, as Megatron-Core runs them on a GPU (Korthikanti et al., arXiv 2205.05198,
section 4, brought up to date for gated MLPs, grouped queries and no dropout). It has not been calibrated on a GPU.

Symbols: T rows of a pack, t tensor-parallel, c context-parallel size, h hidden, q and k query and key channels,
f MLP channels, v vocabulary rows; all sizes in bytes.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_gft import cpu
from megatron_gft.config import Config, ParallelConfig
from megatron_gft.errors import InputError
from megatron_gft.hf.shape import ModelShape, padded_vocab_size
from megatron_gft.model import build_model
from megatron_gft.objectives import HeadSettings
from megatron_gft.optimizer import build_optimizer, gathered_bytes, saves_on_hosts, wrap_data_parallel
from megatron_gft.parallel import Parallel, destroy_parallel, initialize_parallel

# Adam keeps two moments per weight, in float32.
MOMENT_BYTES = 2 * 4
# FP8 keeps a row-wise and a column-wise (transposed) copy of every linear weight beside the bf16 one.
FP8_COPY_BYTES = 2
# Gathered keys and values of a shared-prefix pack, relative to its rows: each response sees [prompt; itself].
PREFIX_KV_FACTOR = 2.0
# Tokens of the busiest expert rank relative to the mean.
EXPERT_IMBALANCE = 1.2
# Gradients and temporaries alive while one layer runs backward, relative to what the layer saved.
BACKWARD_WORKING_SHARE = 0.5


@dataclass(frozen=True)
class StaticMemory:
    """Bytes that stay allocated for the whole run; exact.

    ``weights`` counts parameters and module buffers, ``gradients`` DDP's buffers with their padding, ``optimizer``
    float32 main weights and Adam's moments. ``linear_parameters`` counts matrices of the trunk (FP8 copies). ``save``
    comes on top during a save, when there are no activations.
    """

    parameters: int
    linear_parameters: int
    weights: int
    gradients: int
    optimizer: int
    save: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def storage_bytes(tensors: Iterable[torch.Tensor], *, without: Iterable[torch.Tensor] = ()) -> int:
    """Bytes of the distinct storages behind ``tensors`` that are not behind ``without``; meta tensors count too."""
    known = {tensor.untyped_storage()._cdata for tensor in without}
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            found[storage._cdata] = storage.nbytes()
    return sum(found.values())


def static_memory(chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer) -> StaticMemory:
    """Add up what model chunks and their optimizer hold, on any device; moments that do not exist yet included."""
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    weights = parameters + [buffer for chunk in chunks for buffer in chunk.module.buffers()]
    gradients = [buffer.grad_data for chunk in chunks for buffer in chunk.buffers + chunk.expert_parallel_buffers]
    main = list(_updated(optimizer))
    trunk = [
        parameter
        for chunk in chunks
        for name, parameter in chunk.named_parameters()
        if parameter.dim() > 1 and ".layers." in name and ".router." not in name
    ]
    return StaticMemory(
        parameters=sum(parameter.numel() for parameter in parameters),
        linear_parameters=sum(parameter.numel() for parameter in trunk),
        weights=storage_bytes(weights),
        gradients=storage_bytes(gradients),
        optimizer=storage_bytes(main, without=weights) + MOMENT_BYTES * sum(parameter.numel() for parameter in main),
        save=0 if saves_on_hosts(optimizer) else gathered_bytes(optimizer),
    )


def _updated(optimizer: MegatronOptimizer) -> Iterator[torch.Tensor]:
    """What Adam updates: float32 main weights (of this rank's share), or the weights themselves."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if not getattr(part, "is_stub_optimizer", False):
            for group in part.optimizer.param_groups:
                yield from group["params"]


@contextlib.contextmanager
def simulated_rank(config: Config, rank: int, world_size: int) -> Iterator[Parallel]:
    """This process as ``rank`` of ``world_size``: real Megatron groups over a fake process group."""
    if dist.is_initialized():
        raise InputError("planning needs a process of its own: a process group is initialised already")
    p = config.parallel
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield initialize_parallel(tp=p.tp, pp=p.pp, vpp=p.vpp, cp=p.cp, ep=p.ep, etp=p.etp, create_gloo_groups=False)
    finally:
        destroy_parallel()


def measure_stage(config: Config, shape: ModelShape, world_size: int, stage: int) -> StaticMemory:
    """Build the first rank of a pipeline stage without memory and add it up.

    Stage s begins at rank ``s * world_size / pp``; its ranks differ by the padding of their optimizer shards at most.
    """
    cpu.install(device="meta")
    # Transformer Engine's modules hold the same parameters; FP8 changes what they keep besides (added by the plan).
    model = config.model.model_copy(update={"backend": "local", "fp8": None})
    with simulated_rank(config, stage * world_size // config.parallel.pp, world_size) as parallel:
        with torch.device("meta"):
            transformer, modules = build_model(
                shape,
                model,
                config.objective,
                config.parallel,
                parallel,
                perform_initialization=False,
                init_model_with_meta_device=True,
            )
            chunks = wrap_data_parallel(modules, transformer, config.optimizer)
            optimizer = build_optimizer(chunks, config.optimizer, bf16=transformer.bf16, use_gloo=False)
        return static_memory(chunks, optimizer)


@dataclass(frozen=True)
class ActivationMemory:
    """Bytes of activations at the peak of one stage; an estimate.

    ``per_layer`` is saved by one layer for one pack, ``layers_in_flight`` times at once; ``saved`` is all of that, with
    embedding and head outputs; ``working`` the larger of one layer's backward and the head's chunk; ``fp8_copies``
    quantised weights beside the bf16 ones.
    """

    per_layer: int
    layers_in_flight: int
    saved: int
    working: int
    fp8_copies: int

    @property
    def total(self) -> int:
        return self.saved + self.working + self.fp8_copies


def stage_layers(parallel: ParallelConfig, num_layers: int) -> list[int]:
    """Layers of each pipeline rank, all its chunks together."""
    chunks = parallel.pp * (parallel.vpp or 1)
    layers = parallel.layers_per_stage or [num_layers // chunks] * chunks
    return [sum(layers[stage :: parallel.pp]) for stage in range(parallel.pp)]


def microbatches_in_flight(stage: int, pp: int, vpp: int | None, packs: int | None = None) -> int:
    """Model chunks with saved activations on a stage at the peak of 1F1B or interleaved 1F1B.

    Warm-up forwards plus the one whose backward is next (Narayanan et al., arXiv 2104.04473, section 2.2).
    Without interleaving a chunk is all of the stage's layers; else a ``vpp``-th of them.
    ``packs``: microbatches of a step; None means many.
    """
    if vpp is None:
        in_flight = pp - stage
    else:
        in_flight = 2 * (pp - stage - 1) + (vpp - 1) * pp + 1
    return in_flight if packs is None else min(in_flight, packs * (vpp or 1))


def estimate_activations(
    config: Config, shape: ModelShape, stage: int, static: StaticMemory, packs: int | None = None
) -> ActivationMemory:
    """Activations of one rank of pipeline stage ``stage`` when every pack is full."""
    p, m = config.parallel, config.model
    rows = config.data.max_tokens_per_pack / p.cp
    dtype = 2 if m.precision == "bf16" else 4
    residual = rows * shape.hidden_size * dtype / (p.tp if p.sequence_parallel else 1)  # [T/(c t), h]
    layer = _layer_bytes(config, shape, rows, dtype)
    layers = stage_layers(p, shape.num_layers)[stage]
    chunks = microbatches_in_flight(stage, p.pp, p.vpp, packs)
    in_flight = math.ceil(chunks * layers / (p.vpp or 1))
    per_layer = residual if m.recompute == "full" else layer
    saved = in_flight * per_layer + chunks * rows * shape.kv_channels * 4  # and angles of positions, float32
    working = BACKWARD_WORKING_SHARE * layer + (layer if m.recompute == "full" else 0)
    if p.pp > 1:
        working += 4 * residual  # received and sent, forward and backward
        saved += chunks * residual  # what was sent: Megatron keeps it, and may free it in no interleaved schedule
    if p.sequence_parallel:
        working += rows * shape.hidden_size * dtype  # Megatron's buffer for the gathered input of a linear layer
    if stage == p.pp - 1:
        saved += 2 * residual
        working = max(working, _head_bytes(config, shape, rows, dtype))
    if config.optimizer.distributed and not config.optimizer.grad_reduce_in_fp32:
        working = max(working, static.optimizer / (MOMENT_BYTES + 4) * 4)  # float32 gradients of the shard
    return ActivationMemory(
        per_layer=int(per_layer),
        layers_in_flight=in_flight,
        saved=int(saved),
        working=int(working),
        fp8_copies=FP8_COPY_BYTES * static.linear_parameters if m.fp8 else 0,
    )


def _layer_bytes(config: Config, shape: ModelShape, rows: float, dtype: int) -> float:
    """What one transformer layer saves for backward, without recomputation."""
    p = config.parallel
    gemm_input = 1 if config.model.fp8 else dtype  # FP8 layers save their inputs quantised
    whole = 1 / p.tp if p.sequence_parallel else 1
    heads = shape.num_attention_heads / p.tp
    q = heads * shape.kv_channels
    kv = 2 * max(1.0, shape.num_query_groups / p.tp) * shape.kv_channels
    seen = p.cp * (1 if config.data.packing == "packed" else PREFIX_KV_FACTOR)  # keys that are kept, per local row
    norms = 2 * whole * shape.hidden_size * (dtype + gemm_input)  # input and output of both norms
    attention = q * dtype + kv * seen * dtype + q * dtype + 4 * heads  # q, k and v, output, log-sum-exp
    if config.model.fp8:
        attention += q * gemm_input  # the projection's own copy of the output
    # The inputs of norms of q and k; a checkpoint takes v before it is copied, a view of the whole projection.
    attention += (shape.qk_layernorm + (config.model.recompute == "core_attention")) * (q + kv / 2) * dtype
    if shape.num_moe_experts is None:
        f = shape.ffn_hidden_size / p.tp
        return rows * (norms + attention + 2 * f * dtype + f * gemm_input)  # gate and up, product
    etp = p.etp or p.tp
    f = (shape.moe_ffn_hidden_size or shape.ffn_hidden_size) / etp
    copies = whole * etp * (shape.moe_router_topk or 1) * EXPERT_IMBALANCE  # rows after dispatch, per local row
    expert = shape.hidden_size * (gemm_input + dtype) + 2 * f * dtype + f * gemm_input
    router = whole * shape.num_moe_experts * (4 + 4 + 1)  # float32 logits and probabilities, routing map
    return rows * (norms + attention + router + copies * expert)


def _head_bytes(config: Config, shape: ModelShape, rows: float, dtype: int) -> float:
    """Peak of the output layer and loss when every row carries loss."""
    vocab = padded_vocab_size(shape.vocab_size, config.parallel.tp, config.model.make_vocab_size_divisible_by)
    v = vocab / config.parallel.tp
    hidden = rows * shape.hidden_size * dtype
    if not config.objective.fused_head:
        return 2 * hidden + rows * v * (dtype + 4 + 4)  # logits, their float32 copy, exponentials
    chunk = min(HeadSettings(chunk_tokens=config.objective.head_chunk_tokens).chunk_rows(int(v), dtype), rows)
    # gathered rows, selected rows, their gradient; logits of a chunk; the weight's placeholder gradient
    return 3 * hidden + chunk * v * dtype * 1.1 + v * shape.hidden_size * dtype
