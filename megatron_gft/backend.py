"""What Megatron-Core is told of a model: its ``TransformerConfig``, and the layers of the chosen backend.

One switch (:func:`choose_backend`) picks the layer implementations; everything else is the same on a CPU, on a
GPU without Transformer Engine, and with it.
"""

import importlib.util
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_gft.attention import CoreAttention, RMSNorm, TECoreAttention
from megatron_gft.config import ModelConfig, ParallelConfig
from megatron_gft.errors import InputError
from megatron_gft.head_rows import kernels
from megatron_gft.hf.shape import DTYPES, ModelShape, transformer_config_kwargs

# Megatron's names: TransformerConfig.fp8_recipe (0.16.1 to 0.19), all with the hybrid e4m3/e5m2 format.
FP8_FORMAT = "hybrid"


def choose_backend(requested: str, precision: str) -> str:
    """``"transformer_engine"`` or ``"local"`` for ``model.backend`` and ``model.precision``.

    ``auto`` takes Transformer Engine where it can be used; its attention over packs is half precision.

    Raises:
        InputError: Transformer Engine is asked for and cannot be used.
    """
    usable = torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None
    if requested == "transformer_engine" and not usable:
        raise InputError(
            "model.backend: transformer_engine needs a GPU and the package transformer-engine[pytorch] -> install "
            "requirements-gpu.txt, or set model.backend=auto"
        )
    if requested == "auto":
        return "transformer_engine" if usable and precision != "fp32" else "local"
    return requested


def build_transformer_config(
    shape: ModelShape, model: ModelConfig, parallel: ParallelConfig, *, backend: str, **extra: Any
) -> TransformerConfig:
    """Megatron's configuration of one model; ``extra`` overrides single fields (planning on meta tensors)."""
    dtype, kwargs = getattr(torch, DTYPES[model.precision]), transformer_config_kwargs(shape)
    kwargs["activation_func"] = {"silu": torch.nn.functional.silu}[kwargs["activation_func"]]
    on_gpu = torch.cuda.is_available()
    fused = on_gpu and backend == "transformer_engine"
    # Its linear layers fuse without apex. Megatron's own refuse to be built without it, and only the output layer is
    # one of these; GFTModel takes the flag from it.
    layers._grad_accum_fusion_available |= fused
    kwargs |= {
        "tensor_model_parallel_size": parallel.tp,
        "pipeline_model_parallel_size": parallel.pp,
        "virtual_pipeline_model_parallel_size": parallel.vpp,
        "context_parallel_size": parallel.cp,
        "expert_model_parallel_size": parallel.ep,
        "expert_tensor_parallel_size": parallel.etp,
        "sequence_parallel": parallel.sequence_parallel,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": model.precision == "bf16",
        "calculate_per_token_loss": True,  # False averages over microbatches and ranks
        # Packs differ in length; on this setting Megatron asks its communicator for the shape of each transfer
        # (pipeline.py knows it), and for the alltoall dispatcher even where the model is dense.
        "variable_seq_lengths": True,
        "moe_token_dispatcher_type": "alltoall",
        # With batch_p2p_comm the interleaved schedule swaps two transfers between the same pair of ranks
        # (wrong losses, or a hang); Megatron does not check.
        "overlap_p2p_comm": parallel.vpp is not None,
        "batch_p2p_comm": parallel.vpp is None,
        "batch_p2p_sync": False,  # a device synchronisation after each transfer, against a race of torch before 2.0
        "use_cpu_initialization": not on_gpu,
        "gradient_accumulation_fusion": fused,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "apply_rope_fusion": fused,
        "moe_permute_fusion": fused,  # the eager path asks the device for counts, twice a layer
        "moe_router_dtype": "fp32",
        "bias_activation_fusion": on_gpu and kernels() is not None,  # by torch.compile, which builds as Triton does
        "bias_dropout_fusion": False,
        "moe_grouped_gemm": backend == "transformer_engine" and bool(shape.num_moe_experts),
    }
    if parallel.layers_per_stage is not None:
        stages = [["decoder"] * layers for layers in parallel.layers_per_stage]
        kwargs["pipeline_model_parallel_layout"] = [["embedding", *stages[0]], *stages[1:-1], [*stages[-1], "loss"]]
    if model.recompute == "full":
        kwargs |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif model.recompute == "core_attention":
        kwargs |= {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    if model.fp8:
        kwargs |= {"fp8": FP8_FORMAT, "fp8_recipe": model.fp8}
    return TransformerConfig(**kwargs | extra)


def build_layer_spec(
    config: TransformerConfig, backend: str, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """Layers of this pipeline stage, with norms and core attention of the chosen backend. A block spec: beside a layer
    spec Megatron takes a final norm of its own, which refuses sequence parallel."""
    moe = {"num_experts": config.num_moe_experts, "moe_grouped_gemm": config.moe_grouped_gemm}
    if backend == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm  # optional dependency

        layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm, **moe)
        layer.submodules.self_attention.submodules.core_attention = TECoreAttention
        norm: Any = TENorm
    else:
        layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm", **moe)
        _use_local_modules(layer)
        if config.num_moe_experts:
            # Megatron's local MoE spec claims that this norm belongs to fc1; Transformer Engine's, rightly, does
            # not, so checkpoints of one would not load with the other.
            layer.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
        norm = RMSNorm
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config, vp_stage=vp_stage), layer_norm=norm
    )


def _use_local_modules(layer: ModuleSpec) -> None:
    modules, attention = layer.submodules, layer.submodules.self_attention.submodules
    attention.core_attention = CoreAttention
    modules.input_layernorm = modules.pre_mlp_layernorm = RMSNorm
    for name in ("q_layernorm", "k_layernorm"):
        if getattr(attention, name) is not IdentityOp:
            setattr(attention, name, RMSNorm)
    # 0.16.1 reads this name in the router without defining it where Transformer Engine is absent.
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
