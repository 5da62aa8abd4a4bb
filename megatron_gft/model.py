"""Megatron-Core's GPT model with packs as input and the GFT loss as output.

One switch (:func:`choose_backend`) picks the layer implementations; everything else is the same on a CPU, on a
GPU without Transformer Engine, and with it. :class:`GFTModel` stays a ``GPTModel`` (parameters, checkpoints,
pipeline, DDP hooks); its forward takes a pack, indexes RoPE by our position ids, and ends in the head that
computes the loss from the last hidden state.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_gft.attention import CoreAttention, RMSNorm, TECoreAttention
from megatron_gft.config import ModelConfig, ObjectiveConfig, ParallelConfig
from megatron_gft.errors import InputError, InputErrors
from megatron_gft.head import GFTOutputLayer
from megatron_gft.hf.shape import DTYPES, ModelShape, gpt_model_kwargs, padded_vocab_size, transformer_config_kwargs
from megatron_gft.objectives import HeadSettings
from megatron_gft.packing import Pack
from megatron_gft.parallel import Parallel
from megatron_gft.validation import transformer_problems

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
    """Megatron's configuration of one model; ``extra`` overrides single fields (planning on meta tensors).

    Fields that this megatron-core version does not have are left out, so one list serves 0.16.1 to 0.19.

    Raises:
        InputErrors: ``extra`` sets what would silently train another loss.
    """
    dtype = getattr(torch, DTYPES[model.precision])
    kwargs = transformer_config_kwargs(shape)
    kwargs["activation_func"] = {"silu": torch.nn.functional.silu}[kwargs["activation_func"]]
    on_gpu = torch.cuda.is_available()
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
        "calculate_per_token_loss": True,
        # Packs differ in length; on this setting Megatron sends shapes ahead, and asks for the alltoall
        # dispatcher even where the model is dense.
        "variable_seq_lengths": True,
        "moe_token_dispatcher_type": "alltoall",
        # With batch_p2p_comm the interleaved schedule swaps two transfers between the same pair of ranks
        # (wrong losses, or a hang); Megatron does not check.
        "overlap_p2p_comm": parallel.vpp is not None,
        "batch_p2p_comm": parallel.vpp is None,
        "use_cpu_initialization": not on_gpu,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "apply_rope_fusion": False,
        "bias_activation_fusion": on_gpu,
        "bias_dropout_fusion": False,
        "moe_grouped_gemm": backend == "transformer_engine" and bool(shape.num_moe_experts),
    }
    if model.recompute == "full":
        kwargs |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif model.recompute == "core_attention":
        kwargs |= {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    if model.fp8:
        kwargs |= {"fp8": FP8_FORMAT, "fp8_recipe": model.fp8}
    kwargs |= extra
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    config = TransformerConfig(**{key: value for key, value in kwargs.items() if key in known})
    if problems := list(transformer_problems(config)):
        raise InputErrors("Megatron's TransformerConfig", problems)
    return config


def build_layer_spec(
    config: TransformerConfig, backend: str, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """Layers of this pipeline stage, with norms and core attention of the chosen backend.

    A block spec, not a layer spec: with the latter Megatron's final norm would be its own, which refuses
    sequence parallel.
    """
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


@dataclass
class LossOutput:
    """What the last stage returns for one pack.

    ``loss_sum`` is ``sum(w * c * -log p)`` over this rank's loss rows, scalar, with gradient; ``logprobs`` and
    ``entropy`` are ``[N]`` float32 without gradient (``entropy`` None when not asked for).
    """

    loss_sum: torch.Tensor
    logprobs: torch.Tensor
    entropy: torch.Tensor | None


class GFTModel(GPTModel):
    """``GPTModel`` whose forward takes a :class:`Pack` and, on the last stage, returns a :class:`LossOutput`."""

    def __init__(
        self,
        config: TransformerConfig,
        spec: TransformerBlockSubmodules,
        shape: ModelShape,
        *,
        vocab_size: int,
        head: HeadSettings,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None = None,
    ):
        options = gpt_model_kwargs(shape)
        super().__init__(
            config,
            spec,
            vocab_size=vocab_size,
            max_sequence_length=options["max_sequence_length"],
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=options["share_embeddings_and_output_weights"],
            position_embedding_type="none",  # RoPE below, by position id
            vp_stage=vp_stage,
        )
        self.shape = shape
        self.head = head
        self.rotary_pos_emb = RotaryEmbedding(
            kv_channels=shape.kv_channels,
            rotary_percent=1.0,
            rotary_base=options["rotary_base"],
            rope_scaling=options.get("rope_scaling", False),
            rope_scaling_factor=options.get("rope_scaling_factor", 8.0),
            use_cpu_initialization=config.use_cpu_initialization,
        )
        if post_process:
            # Same parameters, other forward. Building a second layer would allocate the vocabulary matrix twice.
            self.output_layer.__class__ = GFTOutputLayer

    def rotary_frequencies(self, position_ids: torch.Tensor) -> torch.Tensor:
        """RoPE angles of ``position_ids`` [t] as [t, 1, 1, kv_channels].

        Megatron counts positions from the start of a buffer or of a thd segment; neither holds for a response
        that continues a shared prompt.
        """
        inv_freq = self.rotary_pos_emb.inv_freq.to(position_ids.device)
        positions = position_ids.to(inv_freq.dtype) / (self.shape.seq_len_interpolation_factor or 1.0)
        angles = torch.outer(positions, inv_freq)
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]

    def hidden_states(self, pack: Pack) -> torch.Tensor:
        """Output of this stage's layers, [t(/tp with sequence parallel), 1, h]; t rows of this context rank."""
        embedded = None
        if self.pre_process:
            embedded = self.embedding(input_ids=pack.tokens[None], position_ids=pack.position_ids[None])
        return self.decoder(
            hidden_states=embedded,
            attention_mask=None,
            rotary_pos_emb=self.rotary_frequencies(pack.position_ids),
            packed_seq_params=pack.layout,
        )

    def output_weight(self) -> torch.Tensor | None:
        """The embedding matrix where it is also the output layer's, else None."""
        return self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None

    def forward(self, pack: Pack) -> torch.Tensor | LossOutput:  # type: ignore[override]
        """Hidden states for the next stage, or on the last one the loss of this pack's rows."""
        hidden = self.hidden_states(pack)
        if not self.post_process:
            return hidden
        loss_sum, logprobs, entropy = self.output_layer(
            hidden,
            weight=self.output_weight(),
            loss_rows=pack.loss_rows,
            labels=pack.labels,
            token_weights=pack.token_weights,
            settings=self.head,
        )
        return LossOutput(loss_sum, logprobs, entropy)

    def logits(self, pack: Pack) -> torch.Tensor:
        """Logits of every row of this context rank, [t, vocab/tp] (padding columns included); last stage only."""
        hidden = self.hidden_states(pack)
        logits, _ = self.output_layer(hidden, weight=self.output_weight())
        return logits[:, 0]


class HalfModule(Float16Module):
    """Megatron's half-precision wrapper; a pack holds integers and float32 weights that must stay as they are."""

    def forward(self, pack: Pack) -> torch.Tensor | LossOutput:  # type: ignore[override]
        return self.module(pack)


def build_model(
    shape: ModelShape,
    model: ModelConfig,
    objective: ObjectiveConfig,
    parallel_config: ParallelConfig,
    parallel: Parallel,
    **extra: Any,
) -> tuple[TransformerConfig, list[torch.nn.Module]]:
    """The model chunks of this rank (one, or ``vpp`` of them), on the GPU when there is one.

    Returns Megatron's configuration and the chunks, in bf16 wrapped in :class:`HalfModule`.
    """
    backend = choose_backend(model.backend, model.precision)
    config = build_transformer_config(shape, model, parallel_config, backend=backend, **extra)
    head = HeadSettings(
        tau=objective.tau,
        coefficient=objective.coefficient or "rectified",
        vocab_size=shape.vocab_size,
        fused=objective.fused_head,
        chunk_tokens=objective.head_chunk_tokens,
        entropy=objective.entropy,
    )
    vocab_size = padded_vocab_size(shape.vocab_size, parallel.tp_size, model.make_vocab_size_divisible_by)
    stages: Sequence[int | None] = [None] if parallel.vp_size is None else range(parallel.vp_size)
    chunks: list[torch.nn.Module] = []
    for vp_stage in stages:
        first, last = parallel.stage_bounds(vp_stage)
        chunk: torch.nn.Module = GFTModel(
            config,
            build_layer_spec(config, backend, vp_stage),
            shape,
            vocab_size=vocab_size,
            head=head,
            pre_process=first,
            post_process=last,
            vp_stage=vp_stage,
        )
        if torch.cuda.is_available() and not extra.get("init_model_with_meta_device"):
            chunk.cuda(torch.cuda.current_device())
        if config.bf16:
            chunk = HalfModule(config, chunk)
        chunks.append(chunk)
    return config, chunks


def unwrap(chunk: torch.nn.Module) -> GFTModel:
    """The model inside DDP and half-precision wrappers."""
    while not isinstance(chunk, GFTModel):
        assert isinstance(chunk.module, torch.nn.Module)
        chunk = chunk.module
    return chunk
