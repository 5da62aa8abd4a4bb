"""Layers with Transformer Engine's parameter names, extra states and checkpoint keys, in plain torch.

Not Transformer Engine: they stand in for it where it cannot be installed, to test names and keys.
"""

import io

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from tiny_models import build_gpt, local_layer_spec

from megatron_gft.hf.shape import read_model_shape
from megatron_gft.parallel import initialize_parallel

EXTRA_STATE = b"scaling factors of another run"


class LayerNormColumnParallelLinear(ColumnParallelLinear):
    """RMSNorm fused into the linear layer: ``layer_norm_weight`` beside ``weight``, and an extra state."""

    def __init__(self, input_size, output_size, *, config, **kwargs):
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size))
        self.eps = config.layernorm_epsilon

    def forward(self, input_, *args, **kwargs):
        normalised = torch.nn.functional.rms_norm(input_, input_.shape[-1:], self.layer_norm_weight, self.eps)
        return super().forward(normalised, *args, **kwargs)

    def get_extra_state(self):
        return io.BytesIO(EXTRA_STATE)


class ExtraStateAttention(DotProductAttention):
    """TE's core attention has an extra state, the local one has none."""

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        key = f"{prefix}_extra_state"
        shape, offset = ((sharded_offsets[0][2],), (sharded_offsets[0][1],)) if sharded_offsets else ((1,), (0,))
        replica = (0, self.pg_collection.tp.rank(), metadata["dp_cp_group"].rank())
        return {key: ShardedObject(key, io.BytesIO(EXTRA_STATE), shape, offset, replica)}

    def get_extra_state(self):
        return io.BytesIO(EXTRA_STATE)

    def set_extra_state(self, state):
        pass


class GroupedLinear(torch.nn.Module):
    """One weight an expert, ``weight0``, ``weight1``...; keys as TEGroupedLinear._sharded_state_dict_grouped."""

    tp_axis = 0

    def __init__(self, num_experts, input_size, output_size, *, config, pg_collection, **_):
        super().__init__()
        self.num_experts, self.pg = num_experts, pg_collection
        tp = pg_collection.expt_tp.size()
        size = (output_size // tp, input_size) if self.tp_axis == 0 else (output_size, input_size // tp)
        for index in range(num_experts):
            self.register_parameter(f"weight{index}", torch.nn.Parameter(torch.randn(size)))

    def forward(self, rows, tokens_per_expert):
        parts = rows.split(list(tokens_per_expert))
        weights = [getattr(self, f"weight{index}") for index in range(self.num_experts)]
        return torch.cat([part @ weight.T for part, weight in zip(parts, weights, strict=True)]), None

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        sharded = {}
        first, total = self.pg.ep.rank() * self.num_experts, self.pg.ep.size() * self.num_experts
        for index in range(self.num_experts):
            offsets = (*sharded_offsets, (len(sharded_offsets), first + index, total))
            tensors = {f"{index}.weight": getattr(self, f"weight{index}"), f"{index}._extra_state": None}
            axes = {f"{index}.weight": self.tp_axis}
            part = make_sharded_tensors_for_checkpoint(
                tensors, "", axes, offsets, tp_group=self.pg.expt_tp, dp_cp_group=metadata["dp_cp_group"]
            )
            replace_prefix_for_sharding(part, f"{index}.", prefix)
            for value in part.values():
                value.replica_id = (*value.replica_id[:2], self.pg.expt_dp.rank())
            sharded[f"{prefix}weight{index}"] = part[f"{index}.weight"]
            sharded[f"{prefix}_extra_state{index or ''}"] = part[f"{index}._extra_state"]
        return sharded


class RowGroupedLinear(GroupedLinear):
    tp_axis = 1


def te_layer_spec(config):
    """The local layer spec with modules named as ``get_gpt_layer_with_transformer_engine_spec`` names them."""
    layer = local_layer_spec(config)
    attention, modules = layer.submodules.self_attention.submodules, layer.submodules
    attention.linear_qkv = LayerNormColumnParallelLinear
    attention.core_attention = ExtraStateAttention
    modules.input_layernorm = IdentityOp
    modules.sharded_state_dict_keys_map = {}
    mlp = mlp_submodules(modules.mlp)
    if config.num_moe_experts:
        experts = MLPSubmodules(linear_fc1=GroupedLinear, linear_fc2=RowGroupedLinear)
        mlp.experts = ModuleSpec(module=TEGroupedMLP, submodules=experts)
    else:
        modules.pre_mlp_layernorm = IdentityOp
        mlp.linear_fc1 = LayerNormColumnParallelLinear
    return layer


def mlp_submodules(mlp):
    """Submodules of a layer's ``mlp``: a ``ModuleSpec``, from megatron-core 0.18 on a ``functools.partial``."""
    return mlp.submodules if isinstance(mlp, ModuleSpec) else mlp.keywords["submodules"]


def stock_local_spec(config):
    """As Megatron has it, with the wrong key for the MoE norm left in."""
    layer = local_layer_spec(config)
    assert "pre_mlp_layernorm." in layer.submodules.sharded_state_dict_keys_map
    return layer


def without_wrong_key(config):
    layer = local_layer_spec(config)
    if config.num_moe_experts:
        layer.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.")
    return layer


SPECS = {"local": local_layer_spec, "te": te_layer_spec, "stock": stock_local_spec, "fixed": without_wrong_key}


def build_rank(folder, layout=None, spec="local"):
    """(parallel, shape, randomly initialised chunks) of this rank."""
    parallel = initialize_parallel(**(layout or {}))
    shape = read_model_shape(folder)
    return parallel, shape, build_gpt(shape, parallel, SPECS[spec])
