"""Hugging Face model families as data: one declaration a family, read by everything that crosses HF <-> Megatron.

A family says which options its transformers class has (bias, query/key norm, sliding window, rope default, ...)
and how each Megatron-Core parameter is made of Hugging Face tensors. Parameters carry their canonical name, which
is the key that Megatron-Core 0.16-0.19 writes to a distributed checkpoint, with the layer number ``{l}`` put back
and the expert number ``{e}`` appended; live models with Transformer Engine or local layer specs are renamed to it
(``mapping.canonical_name``). Adding a dense family means adding one :class:`Family` here, and a tiny random
model to ``tests/tiny_models.py``.

Imports neither torch nor megatron nor transformers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Operation = Literal["copy", "vocab", "qkv", "gated", "row"]
"""How a Megatron tensor is made of its sources: copied whole; rows padded to the padded vocabulary; query, key and
value interleaved by KV group; gate stacked on up (per tensor-parallel rank); columns cut over tensor-parallel ranks.
"""


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter: the operation, and the Hugging Face tensors it takes, in order, with their shapes.

    A shape is a string of size names: ``h`` hidden, ``q`` query rows (heads x head size), ``k`` key rows (KV groups
    x head size), ``d`` head size, ``f`` ffn, ``x`` one expert's ffn, ``e`` experts, ``v`` vocabulary.
    """

    operation: Operation
    sources: tuple[tuple[str, str], ...]


def _rule(operation: Operation, place: str, kind: str = "weight", /, **sources: str) -> Rule:
    """Of the tensors ``place.NAME.kind``, given their names and shapes."""
    return Rule(operation, tuple((f"{place}{name}.{kind}", shape) for name, shape in sources.items()))


_ATTENTION, _MLP = "decoder.layers.{l}.self_attention.", "decoder.layers.{l}.mlp."
_HF_LAYER = "model.layers.{l}."
_HF_ATTENTION, _HF_MLP = _HF_LAYER + "self_attn.", _HF_LAYER + "mlp."

_TRUNK = {
    "embedding.word_embeddings.weight": _rule("vocab", "model.", embed_tokens="v h"),
    "output_layer.weight": _rule("vocab", "", lm_head="v h"),
    "decoder.final_layernorm.weight": _rule("copy", "model.", norm="h"),
    _ATTENTION + "linear_qkv.layer_norm_weight": _rule("copy", _HF_LAYER, input_layernorm="h"),
    _ATTENTION + "linear_qkv.weight": _rule("qkv", _HF_ATTENTION, q_proj="q h", k_proj="k h", v_proj="k h"),
    _ATTENTION + "linear_proj.weight": _rule("row", _HF_ATTENTION, o_proj="h q"),
}
_QKV_BIAS = {_ATTENTION + "linear_qkv.bias": _rule("qkv", _HF_ATTENTION, "bias", q_proj="q", k_proj="k", v_proj="k")}
_QK_NORM = {
    _ATTENTION + "q_layernorm.weight": _rule("copy", _HF_ATTENTION, q_norm="d"),
    _ATTENTION + "k_layernorm.weight": _rule("copy", _HF_ATTENTION, k_norm="d"),
}
_DENSE_MLP = {
    _MLP + "linear_fc1.layer_norm_weight": _rule("copy", _HF_LAYER, post_attention_layernorm="h"),
    _MLP + "linear_fc1.weight": _rule("gated", _HF_MLP, gate_proj="f h", up_proj="f h"),
    _MLP + "linear_fc2.weight": _rule("row", _HF_MLP, down_proj="h f"),
}


def _moe_mlp(block: str, gate: str, up: str, down: str) -> dict[str, Rule]:
    """Router and experts under ``model.layers.{l}.<block>``, given the names of the three expert projections."""
    router, expert = f"{_HF_LAYER}{block}.", f"{_HF_LAYER}{block}.experts.{{e}}."
    return {
        "decoder.layers.{l}.pre_mlp_layernorm.weight": _rule("copy", _HF_LAYER, post_attention_layernorm="h"),
        _MLP + "router.weight": _rule("copy", router, gate="e h"),
        _MLP + "experts.linear_fc1.weight{e}": _rule("gated", expert, **{gate: "x h", up: "x h"}),
        _MLP + "experts.linear_fc2.weight{e}": _rule("row", expert, **{down: "h x"}),
    }


@dataclass(frozen=True)
class Family:
    """What one transformers model class does, as far as its ``config.json`` does not say it.

    ``refused_options`` lists config keys with the only value that is mapped; any other value is an error. Missing
    keys take transformers' own default, so only defaults that matter are repeated here.
    """

    architecture: str
    rules: Mapping[str, Rule]
    qkv_bias: bool = False
    qk_layernorm: bool = False
    rope_theta: float = 10000.0
    head_dim: int | None = None
    """transformers' default; None means hidden_size / num_attention_heads."""
    num_experts_key: str | None = None
    norm_topk_prob: bool = True
    window: Literal["none", "uniform", "per_layer"] = "none"
    """Qwen's is per layer: on only with use_sliding_window, and then from layer max_window_layers on."""
    sliding_window: int | None = None
    """transformers' default where the key is absent."""
    refused_options: Mapping[str, object] = field(default_factory=dict)


_PLAIN = {"hidden_act": "silu", "attention_dropout": 0.0, "mlp_bias": False, "attention_bias": False}
_MOE = {**_PLAIN, "decoder_sparse_step": 1, "mlp_only_layers": [], "router_jitter_noise": 0.0}

FAMILIES: dict[str, Family] = {
    "llama": Family(architecture="LlamaForCausalLM", rules=_TRUNK | _DENSE_MLP, refused_options=_PLAIN),
    "mistral": Family(
        architecture="MistralForCausalLM",
        rules=_TRUNK | _DENSE_MLP,
        window="uniform",
        sliding_window=4096,
        refused_options=_PLAIN,
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        rules=_TRUNK | _QKV_BIAS | _DENSE_MLP,
        qkv_bias=True,
        window="per_layer",
        refused_options={"hidden_act": "silu", "attention_dropout": 0.0},
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        rules=_TRUNK | _QK_NORM | _DENSE_MLP,
        qk_layernorm=True,
        head_dim=128,
        window="per_layer",
        refused_options=_PLAIN,
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        rules=_TRUNK | _QK_NORM | _moe_mlp("mlp", "gate_proj", "up_proj", "down_proj"),
        qk_layernorm=True,
        num_experts_key="num_experts",
        norm_topk_prob=False,
        window="per_layer",
        refused_options=_MOE,
    ),
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        rules=_TRUNK | _moe_mlp("block_sparse_moe", "w1", "w3", "w2"),
        rope_theta=1000000.0,
        num_experts_key="num_local_experts",
        window="uniform",
        refused_options={**_MOE, "norm_topk_prob": True},
    ),
}
