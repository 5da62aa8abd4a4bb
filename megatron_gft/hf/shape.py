"""Model shape from a Hugging Face ``config.json``: the one place where HF options become Megatron-Core options.

Reads both styles: transformers 4 (``rope_theta``, ``rope_scaling``) and transformers 5 (``rope_parameters``).
An option that is not mapped is refused, never dropped: a dropped option (rope scaling, sliding window, router
order) gives a model whose weights convert bit for bit and whose logits are wrong.

Imports neither torch nor megatron nor transformers.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_gft.errors import InputError, InputErrors
from megatron_gft.hf.families import FAMILIES, Family

LLAMA3_ROPE_CONSTANTS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Hard-coded in megatron/core/models/common/embeddings/rotary_pos_embedding.py (0.16.1 and 0.19.2)."""

_REQUIRED = (
    *("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size"),
    *("rms_norm_eps", "max_position_embeddings"),
)

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
    "rope_scaling_factor": "rope_scaling",
    "seq_len_interpolation_factor": "rope_scaling",
    "window_size": "sliding_window",
    "num_moe_experts": "num_experts",
    "moe_router_topk": "num_experts_per_tok",
    "moe_ffn_hidden_size": "moe_intermediate_size",
    "moe_router_pre_softmax": "norm_topk_prob",
}
"""Keys of config.json for fields of :class:`ModelShape`; the others have one name. For messages."""


def shape_differences(one: ModelShape, other: ModelShape) -> dict[str, tuple[object, object]]:
    """Both values of everything in which two models compute another function, by the key of config.json.

    The longest sequence is not among them: positions are computed, not learned.
    """
    pairs = {field.name: (getattr(one, field.name), getattr(other, field.name)) for field in dataclasses.fields(one)}
    del pairs["max_sequence_length"]
    return {HF_KEYS.get(name, name): pair for name, pair in pairs.items() if pair[0] != pair[1]}


def refuse_adapter(folder: str | os.PathLike) -> None:
    """Raise InputError for a folder with a LoRA adapter: its weights alone are not the model that people mean by it."""
    if (Path(folder) / "adapter_config.json").exists():
        raise InputError(
            f"{folder}: adapter_config.json is there, so this is a LoRA adapter and its base model -> merge the two "
            "(peft: merge_and_unload, save_pretrained) and name the merged folder"
        )


def _config_file(model: str | os.PathLike) -> Path:
    path = Path(model)
    refuse_adapter(path)
    return path / "config.json" if path.is_dir() else path


def read_config(model: str | os.PathLike) -> dict[str, Any]:
    """The parsed ``config.json`` of a model folder, or of the file that is named itself.

    Raises:
        InputError: missing, or not a JSON object.
    """
    path = _config_file(model)
    if not path.is_file():
        raise InputError(f"{path}: no Hugging Face config.json there -> name a model folder or its config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid JSON ({error}) -> copy the file again") from error
    if not isinstance(config, dict):
        raise InputError(f"{path}: holds {type(config).__name__}, not an object -> name a model's config.json")
    return config


def read_model_shape(model: str | os.PathLike) -> ModelShape:
    """Shape of a Hugging Face model folder or ``config.json``.

    Raises:
        InputError: an architecture or an option that is not mapped; all problems of the file at once.
    """
    return model_shape_from_config(read_config(model), str(_config_file(model)))


def model_shape_from_config(config: Mapping[str, Any], place: str) -> ModelShape:
    """As :func:`read_model_shape` for a parsed config; ``place`` names it in errors."""
    family = _family(config, place)
    sizes = {key: config.get(key) for key in _REQUIRED}
    if wrong := [key for key, value in sizes.items() if not _is_positive(value, int | float)]:
        raise InputErrors(place, [f"{key} is {sizes[key]!r} -> it must be a positive number" for key in wrong])
    problems = _option_problems(config, family)
    theta, scaling_factor, interpolation_factor = _rope(config, family, problems)
    experts, topk = _experts(config, family, problems)
    window = _window(config, family, problems)
    if problems:
        raise InputErrors(place, problems)
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    return ModelShape(
        architecture=family.architecture,
        model_type=config["model_type"],
        num_layers=config["num_hidden_layers"],
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=config.get("num_key_value_heads") or heads,
        kv_channels=config.get("head_dim") or family.head_dim or hidden // heads,
        ffn_hidden_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        layernorm_epsilon=float(config["rms_norm_eps"]),
        add_qkv_bias=family.qkv_bias,
        qk_layernorm=family.qk_layernorm,
        share_embeddings_and_output_weights=bool(config.get("tie_word_embeddings", False)),
        rotary_base=theta,
        rope_scaling_factor=scaling_factor,
        seq_len_interpolation_factor=interpolation_factor,
        max_sequence_length=config["max_position_embeddings"],
        window_size=None if window is None else (window - 1, 0),
        num_moe_experts=experts,
        moe_router_topk=topk,
        moe_ffn_hidden_size=(config.get("moe_intermediate_size") or config["intermediate_size"]) if experts else None,
        # softmax over all experts before top-k = no renormalisation of the chosen probabilities afterwards
        moe_router_pre_softmax=bool(experts) and not config.get("norm_topk_prob", family.norm_topk_prob),
    )


def _is_positive(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and value > 0


def _family(config: Mapping[str, Any], place: str) -> Family:
    model_type, architectures = config.get("model_type"), config.get("architectures") or []
    family = FAMILIES.get(model_type or "")
    if family is None or (architectures and architectures[0] != family.architecture):
        supported = ", ".join(f"{name} ({entry.architecture})" for name, entry in FAMILIES.items())
        raise InputError(
            f"{place}: architecture {architectures[0] if architectures else None!r} (model_type {model_type!r}) is "
            f"not mapped -> use one of {supported}, or add a family to megatron_gft/hf/families.py"
        )
    return family


def _experts(config: Mapping[str, Any], family: Family, problems: list[str]) -> tuple[int | None, int | None]:
    """(experts, experts of a token), None for a dense family. transformers 5 writes ``num_local_experts`` for both."""
    if family.num_experts_key is None:
        return None, None
    key = family.num_experts_key if config.get(family.num_experts_key) is not None else "num_local_experts"
    found = []
    for name, shown in ((key, family.num_experts_key), ("num_experts_per_tok", "num_experts_per_tok")):
        value = config.get(name)
        if value is None:
            problems.append(f"{shown} is missing -> add it")
        elif not _is_positive(value, int):
            problems.append(f"{name} is {value!r} -> it must be a positive integer")
        found.append(value)
    return found[0], found[1]


def _option_problems(config: Mapping[str, Any], family: Family) -> list[str]:
    problems = [
        f"{key} is {config[key]!r}, only {mapped!r} is mapped -> convert with an option of that value, or extend "
        f"megatron_gft/hf/families.py"
        for key, mapped in family.refused_options.items()
        if config.get(key) is not None and config[key] != mapped
    ]
    if config.get("quantization_config"):
        problems.append("quantization_config is set -> dequantize the weights first")
    heads, groups = config["num_attention_heads"], config.get("num_key_value_heads")
    if groups is None and config["model_type"] != "llama":
        problems.append("num_key_value_heads is missing -> add it")
    if groups and heads % groups:
        problems.append(f"num_attention_heads {heads} is no multiple of num_key_value_heads {groups} -> correct it")
    if not (config.get("head_dim") or family.head_dim) and config["hidden_size"] % heads:
        problems.append(f"hidden_size {config['hidden_size']} is not a multiple of num_attention_heads {heads}")
    return problems


def _rope(config: Mapping[str, Any], family: Family, problems: list[str]) -> tuple[float, float | None, float | None]:
    """(rotary base, llama3 factor or None, linear factor or None)."""
    new_style, old_style = config.get("rope_parameters"), config.get("rope_scaling")
    if new_style and old_style and new_style != old_style:
        problems.append("rope_parameters and rope_scaling are both set and differ -> keep the one that is right")
    rope = dict(new_style or old_style or {})
    if any(isinstance(value, Mapping) for value in rope.values()):
        problems.append("rope_parameters differ by layer type -> not mapped")
        return family.rope_theta, None, None
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or family.rope_theta)
    if (rotary := rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))) not in (None, 1, 1.0):
        problems.append(f"partial_rotary_factor is {rotary!r} -> only 1 is mapped")
    return theta, *_rope_scaling(rope, problems)


def _rope_scaling(rope: Mapping[str, Any], problems: list[str]) -> tuple[float | None, float | None]:
    """(llama3 factor or None, linear factor or None)."""
    rope_type, factor = rope.get("rope_type") or rope.get("type") or "default", rope.get("factor")
    if rope_type == "default":
        return None, None
    if rope_type not in ("llama3", "linear"):
        problems.append(f"rope type {rope_type!r} is not mapped -> default, linear and llama3 are")
        return None, None
    if isinstance(factor, bool) or not isinstance(factor, int | float) or factor < 1:
        problems.append(f"rope factor is {factor!r} -> it must be a number of at least 1")
        return None, None
    if rope_type == "linear":
        return None, float(factor)
    problems.extend(
        f"llama3 rope {key} is {rope.get(key)!r}, Megatron-Core fixes it at {fixed} -> not mapped"
        for key, fixed in LLAMA3_ROPE_CONSTANTS.items()
        if rope.get(key) != fixed
    )
    return float(factor), None


def _window(config: Mapping[str, Any], family: Family, problems: list[str]) -> int | None:
    """Sliding window of every layer, or None. A window on some layers only is refused."""
    kinds = set(config.get("layer_types") or [])
    if family.window == "per_layer":
        if config.get("use_sliding_window") or kinds - {"full_attention"}:
            problems.append("sliding windows (use_sliding_window, layer_types) are not mapped here -> turn them off")
        return None
    window = config.get("sliding_window", family.sliding_window)
    if window is None:
        if kinds - {"full_attention"}:
            problems.append(f"layer_types is {sorted(kinds)} without a sliding_window -> set one of them right")
        return None
    if family.window == "none":
        problems.append(f"sliding_window is {window!r}, which transformers ignores for this model -> set it to null")
    elif not _is_positive(window, int):
        problems.append(f"sliding_window is {window!r} -> it must be a positive integer or null")
    elif kinds - {"sliding_attention"}:
        problems.append(f"layer_types mixes {sorted(kinds)} -> a window on some layers only is not mapped")
    else:
        return window
    return None


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
        yield (f"{shape.num_layers} layers do not divide by PP {pp} x {vpp} virtual stages -> choose sizes that do")
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
