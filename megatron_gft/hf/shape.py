"""Model shape from a Hugging Face ``config.json``: the one place where HF options become Megatron-Core options.

Reads both styles: transformers 4 (``rope_theta``, ``rope_scaling``) and transformers 5 (``rope_parameters``).
An option that is not mapped is refused, never dropped: a dropped option (rope scaling, sliding window, router
order) gives a model whose weights convert bit for bit and whose logits are wrong.
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_gft.errors import InputError, InputErrors, refuse
from megatron_gft.folders import typed
from megatron_gft.hf.config_json import ConfigJson, Rope, config_file, read_config
from megatron_gft.hf.families import FAMILIES, Family

LLAMA3_ROPE_CONSTANTS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Hard-coded in megatron/core/models/common/embeddings/rotary_pos_embedding.py (0.16.1 and 0.19.2)."""

# Of ModelShape, under the same names in Megatron's TransformerConfig.
_TRANSFORMER_FIELDS = (
    *("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "ffn_hidden_size"),
    *("layernorm_epsilon", "add_qkv_bias", "qk_layernorm"),
)
_MOE_FIELDS = ("num_moe_experts", "moe_router_topk", "moe_ffn_hidden_size", "moe_router_pre_softmax")

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Dtypes of models by the names that people set: torch's and Hugging Face's name."""


@dataclass(frozen=True)
class ModelShape:
    """Everything about a model that does not depend on how it is run. Sizes are global, not per rank.

    ``vocab_size`` is the true one; Megatron pads it per layout (:func:`padded_vocab_size`). ``window_size`` is
    Megatron's ``(left, right)``: Hugging Face's window W, which counts the token itself, is ``(W - 1, 0)``.
    """

    architecture: str
    model_type: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    ffn_hidden_size: int
    vocab_size: int
    layernorm_epsilon: float
    add_qkv_bias: bool
    qk_layernorm: bool
    share_embeddings_and_output_weights: bool
    rotary_base: float
    rope_scaling_factor: float | None
    """llama3 rope scaling."""
    seq_len_interpolation_factor: float | None
    """linear rope scaling."""
    max_sequence_length: int
    window_size: tuple[int, int] | None
    num_moe_experts: int | None
    moe_router_topk: int | None
    moe_ffn_hidden_size: int | None
    moe_router_pre_softmax: bool


HF_KEYS = {
    "num_layers": "num_hidden_layers",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "ffn_hidden_size": "intermediate_size",
    "layernorm_epsilon": "rms_norm_eps",
    "add_qkv_bias": "attention_bias",
    "share_embeddings_and_output_weights": "tie_word_embeddings",
    "rotary_base": "rope_theta",
    "window_size": "sliding_window",
    "num_moe_experts": "num_experts",
    "moe_router_topk": "num_experts_per_tok",
    "moe_ffn_hidden_size": "moe_intermediate_size",
    "moe_router_pre_softmax": "norm_topk_prob",
}
"""Keys of config.json for fields of :class:`ModelShape`; the others have one name. For messages."""


SAME_TENSORS = frozenset(
    "architecture model_type rms_norm_eps rope_theta rope_scaling sliding_window num_experts_per_tok "
    "norm_topk_prob".split()
)
"""Of the keys that :func:`shape_differences` gives those which no tensor's shape depends on."""


def shape_differences(one: ModelShape, other: ModelShape) -> dict[str, tuple[object, object]]:
    """Both values of everything in which two models compute another function, by the key of config.json.

    The longest sequence is not among them: positions are computed, not learned.
    """
    pairs = {field.name: (getattr(one, field.name), getattr(other, field.name)) for field in dataclasses.fields(one)}
    for name in ("max_sequence_length", "rope_scaling_factor", "seq_len_interpolation_factor"):
        del pairs[name]
    pairs["rope_scaling"] = _scaling(one), _scaling(other)
    return {HF_KEYS.get(name, name): pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _scaling(shape: ModelShape) -> str | None:
    llama3, linear = shape.rope_scaling_factor, shape.seq_len_interpolation_factor
    return f"llama3 {llama3}" if llama3 else f"linear {linear}" if linear not in (None, 1) else None


def read_model_shape(model: str | os.PathLike) -> ModelShape:
    """Shape of a Hugging Face model folder or ``config.json``.

    Raises:
        InputError: an architecture or an option that is not mapped; all problems of the file at once.
    """
    return model_shape_from_config(read_config(model), str(config_file(model)))


def model_shape_from_config(values: Mapping[str, Any], place: str) -> ModelShape:
    """As :func:`read_model_shape` for a parsed config; ``place`` names it in errors."""
    family = _family(values, place)
    problems = _option_problems(values, family)
    config = typed(ConfigJson, values, problems)
    if config is None:
        raise InputErrors(place, problems)
    problems += _head_problems(config, family)
    theta, scaling_factor, interpolation_factor = _rope(config, family, problems)
    experts, topk = _experts(config, family, problems)
    window = _window(config, family, problems)
    refuse(place, problems)
    renormalizes = family.norm_topk_prob if config.norm_topk_prob is None else config.norm_topk_prob
    return ModelShape(
        architecture=family.architecture,
        model_type=config.model_type,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads or config.num_attention_heads,
        kv_channels=_head_size(config, family),
        ffn_hidden_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        layernorm_epsilon=float(config.rms_norm_eps),
        add_qkv_bias=family.qkv_bias,
        qk_layernorm=family.qk_layernorm,
        share_embeddings_and_output_weights=bool(config.tie_word_embeddings),
        rotary_base=theta,
        rope_scaling_factor=scaling_factor,
        seq_len_interpolation_factor=interpolation_factor,
        max_sequence_length=config.max_position_embeddings,
        window_size=None if window is None else (window - 1, 0),
        num_moe_experts=experts,
        moe_router_topk=topk,
        moe_ffn_hidden_size=(config.moe_intermediate_size or config.intermediate_size) if experts else None,
        # softmax over all experts before top-k = no renormalisation of the chosen probabilities afterwards
        moe_router_pre_softmax=bool(experts) and not renormalizes,
    )


def _family(config: Mapping[str, Any], place: str) -> Family:
    model_type, architectures = config.get("model_type"), config.get("architectures") or []
    named = architectures[0] if isinstance(architectures, list) and architectures else architectures or None
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None or (named is not None and named != family.architecture):
        supported = ", ".join(f"{name} ({entry.architecture})" for name, entry in FAMILIES.items())
        raise InputError(
            f"{place}: architecture {named!r} (model_type {model_type!r}) is not mapped -> use one of {supported}, or "
            "add a family to megatron_gft/hf/families.py"
        )
    return family


def _experts(config: ConfigJson, family: Family, problems: list[str]) -> tuple[int | None, int | None]:
    """(experts, experts of a token), None for a dense family. transformers 5 writes ``num_local_experts`` for both."""
    if family.num_experts_key is None:
        return None, None
    experts, topk = getattr(config, family.num_experts_key) or config.num_local_experts, config.num_experts_per_tok
    for key, value in ((family.num_experts_key, experts), ("num_experts_per_tok", topk)):
        if value is None:
            problems.append(f"{key} is missing -> add it")
    if experts and topk and topk > experts:
        problems.append(
            f"num_experts_per_tok is {topk}, {family.num_experts_key} only {experts} -> correct one of them"
        )
    return experts, topk


def _option_problems(config: Mapping[str, Any], family: Family) -> list[str]:
    given = {key: config[key] for key in family.refused_options if config.get(key) is not None}
    problems = [
        f"{key} is {value!r}, only {mapped!r} is mapped -> convert with an option of that value, or extend "
        f"megatron_gft/hf/families.py"
        for key, value in given.items()
        if value != (mapped := family.refused_options[key]) or isinstance(value, bool) != isinstance(mapped, bool)
    ]
    if config.get("quantization_config"):
        problems.append("quantization_config is set -> dequantize the weights first")
    return problems


def _head_size(config: ConfigJson, family: Family) -> int:
    return config.head_dim or family.head_dim or config.hidden_size // config.num_attention_heads


def _head_problems(config: ConfigJson, family: Family) -> Iterator[str]:
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if groups is None and config.model_type != "llama":
        yield "num_key_value_heads is missing -> add it"
    if groups and heads % groups:
        yield f"num_attention_heads {heads} is no multiple of num_key_value_heads {groups} -> correct it"
    if not (config.head_dim or family.head_dim) and config.hidden_size % heads:
        yield f"hidden_size {config.hidden_size} is not a multiple of num_attention_heads {heads}"
    elif (size := _head_size(config, family)) % 2:
        yield f"head_dim is {size}, and rotary positions turn pairs of channels -> it must be even"


def _rope(config: ConfigJson, family: Family, problems: list[str]) -> tuple[float, float | None, float | None]:
    """(rotary base, llama3 factor or None, linear factor or None)."""
    new_style, old_style = config.rope_parameters, config.rope_scaling
    if new_style and old_style and new_style != old_style:
        problems.append("rope_parameters and rope_scaling are both set and differ -> keep the one that is right")
    rope = _rope_values(new_style or old_style or {}, "rope_parameters." if new_style else "rope_scaling.", problems)
    if rope is None:
        return family.rope_theta, None, None
    if length := config.original_max_position_embeddings:  # goes first in transformers, too
        rope = rope.model_copy(update={"original_max_position_embeddings": length})
    given = [theta for theta in (rope.rope_theta, config.rope_theta) if theta is not None]
    if len(set(given)) > 1:
        problems.append(f"rope_theta is {given[1]}, in rope_parameters {given[0]} -> keep the right one")
    theta = float([*given, family.rope_theta][0])
    rotary = config.partial_rotary_factor if rope.partial_rotary_factor is None else rope.partial_rotary_factor
    if rotary not in (None, 1):
        problems.append(f"partial_rotary_factor is {rotary!r} -> only 1 is mapped")
    return theta, *_rope_scaling(rope, problems)


def _rope_values(values: Mapping[str, Any], place: str, problems: list[str]) -> Rope | None:
    if any(isinstance(value, Mapping) for value in values.values()):
        problems.append(f"{place[:-1]} differ by layer type -> not mapped")
        return None
    problems += [f"{place}{key} is not mapped -> remove it" for key in values if key not in Rope.model_fields]
    return typed(Rope, values, problems, place)


def _rope_scaling(rope: Rope, problems: list[str]) -> tuple[float | None, float | None]:
    """(llama3 factor or None, linear factor or None)."""
    rope_type = rope.rope_type or rope.type or "default"
    if rope_type == "default":
        return None, None
    if rope_type not in ("llama3", "linear"):
        problems.append(f"rope type {rope_type!r} is not mapped -> default, linear and llama3 are")
        return None, None
    if rope.factor is None:
        problems.append("rope factor is None -> it must be a number of at least 1")
        return None, None
    if rope_type == "linear":
        return None, float(rope.factor)
    problems.extend(
        f"llama3 rope {key} is {getattr(rope, key)!r}, Megatron-Core fixes it at {fixed} -> not mapped"
        for key, fixed in LLAMA3_ROPE_CONSTANTS.items()
        if getattr(rope, key) != fixed
    )
    return float(rope.factor), None


def _window(config: ConfigJson, family: Family, problems: list[str]) -> int | None:
    """Sliding window of every layer, or None. A window on some layers only is refused."""
    kinds = set(config.layer_types or [])
    if family.window == "per_layer":
        if config.use_sliding_window or kinds - {"full_attention"}:
            problems.append("sliding windows (use_sliding_window, layer_types) are not mapped here -> turn them off")
        return None
    window = config.sliding_window if "sliding_window" in config.model_fields_set else family.sliding_window
    if window is None:
        if kinds - {"full_attention"}:
            problems.append(f"layer_types is {sorted(kinds)} without a sliding_window -> set one of them right")
    elif family.window == "none":
        problems.append(f"sliding_window is {window!r}, which transformers ignores for this model -> set it to null")
    elif kinds - {"sliding_attention"}:
        problems.append(f"layer_types mixes {sorted(kinds)} -> a window on some layers only is not mapped")
    return window


def transformer_config_kwargs(shape: ModelShape) -> dict[str, Any]:
    """Fields of Megatron's ``TransformerConfig`` that the model itself fixes, as plain Python values.

    ``activation_func`` is the string ``"silu"``; the caller puts the function there.
    """
    kwargs: dict[str, Any] = {name: getattr(shape, name) for name in _TRANSFORMER_FIELDS} | {
        "normalization": "RMSNorm",
        "activation_func": "silu",
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,  # dropout would make the loss depend on the layout and the pack form
        "attention_dropout": 0.0,
    }
    if shape.window_size is not None:
        kwargs["window_size"] = shape.window_size
    if shape.num_moe_experts:
        kwargs |= {name: getattr(shape, name) for name in _MOE_FIELDS}
        # An auxiliary loss would depend on how the step is packed, as capacity, z-loss and jitter (None) would.
        kwargs |= {"moe_router_load_balancing_type": "none", "moe_token_dispatcher_type": "alltoall"}
    return kwargs


def gpt_model_kwargs(shape: ModelShape) -> dict[str, Any]:
    """Arguments of Megatron's ``GPTModel`` that the model itself fixes."""
    kwargs: dict[str, Any] = {
        "position_embedding_type": "rope",
        "rotary_base": shape.rotary_base,
        "max_sequence_length": shape.max_sequence_length,
        "share_embeddings_and_output_weights": shape.share_embeddings_and_output_weights,
    }
    if shape.rope_scaling_factor is not None:
        kwargs |= {"rope_scaling": True, "rope_scaling_factor": shape.rope_scaling_factor}
    if shape.seq_len_interpolation_factor is not None:
        kwargs["seq_len_interpolation_factor"] = shape.seq_len_interpolation_factor
    return kwargs


def padded_vocab_size(vocab_size: int, tp_size: int, divisible_by: int = 128) -> int:
    """Smallest multiple of ``divisible_by * tp_size`` that holds the vocabulary (Megatron's own rule).

    The rows beyond ``vocab_size`` are zero after loading and are cut off on export.
    """
    multiple = divisible_by * tp_size
    return -(-vocab_size // multiple) * multiple


def shape_problems(
    shape: ModelShape, *, tp: int = 1, pp: int = 1, vpp: int = 1, ep: int = 1, etp: int = 1
) -> Iterator[str]:
    """What keeps this model from running in this layout (nothing: none).

    KV groups fewer than TP are replicated by Megatron-Core, so one must divide the other.
    """
    if shape.num_attention_heads % tp:
        divisors = [n for n in range(1, shape.num_attention_heads + 1) if shape.num_attention_heads % n == 0]
        yield f"{shape.num_attention_heads} attention heads do not divide by TP {tp} -> TP in {divisors}"
    if shape.num_query_groups % tp and tp % shape.num_query_groups:
        yield (f"{shape.num_query_groups} KV groups and TP {tp}: neither divides the other -> choose such a TP")
    if shape.num_layers % (pp * vpp):
        yield (
            f"{shape.num_layers} layers do not divide by PP {pp} x {vpp} virtual stages -> choose sizes that do, or "
            "set parallel.layers_per_stage"
        )
    if shape.num_moe_experts is None:
        if shape.ffn_hidden_size % tp:
            yield f"ffn_hidden_size {shape.ffn_hidden_size} does not divide by TP {tp} -> choose such a TP"
        if ep > 1:
            yield f"expert parallel size is {ep} and the model has no experts -> set it to 1"
        return
    if shape.num_moe_experts % ep:
        yield f"{shape.num_moe_experts} experts do not divide by EP {ep} -> choose such an EP"
    if shape.moe_ffn_hidden_size and shape.moe_ffn_hidden_size % etp:
        yield f"expert ffn size {shape.moe_ffn_hidden_size} does not divide by expert TP {etp}"
