"""``config.json`` of a Hugging Face model as typed values: every wrong key is found at once, none is guessed at."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic
from pydantic import Field

from megatron_gft.errors import InputError
from megatron_gft.folders import check_folder
from megatron_gft.reading import absence, read_json, wrong_values

# Of layers, heads, experts; of rows and columns. Beyond are typing errors: sizes of matrices no longer fit 64 bits.
Count = Annotated[int, Field(gt=0, le=2**12)]
Width = Annotated[int, Field(gt=0, le=2**24)]
Positive = Annotated[float, Field(gt=0)]


class _Strict(pydantic.BaseModel):
    """Values have the type that they should have: "16", 16.0 and true are no integer, "false" is no bool."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True, allow_inf_nan=False, defer_build=True)


class Rope(_Strict):
    """``rope_scaling`` (transformers 4) or ``rope_parameters`` (transformers 5)."""

    rope_type: str | None = None
    type: str | None = None
    factor: Annotated[float, Field(ge=1)] | None = None
    rope_theta: Positive | None = None
    partial_rotary_factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: float | None = None


class ConfigJson(_Strict):
    """What is read of the file, under its own names. ``None``: transformers' default counts."""

    model_type: str
    architectures: list[str] | None = None
    num_hidden_layers: Count
    hidden_size: Width
    num_attention_heads: Count
    num_key_value_heads: Count | None = None
    head_dim: Count | None = None
    intermediate_size: Width
    vocab_size: Width
    rms_norm_eps: Annotated[float, Field(gt=0, lt=1)]
    max_position_embeddings: Annotated[int, Field(gt=0)]
    tie_word_embeddings: bool | None = None
    rope_theta: Positive | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    partial_rotary_factor: float | None = None
    sliding_window: Annotated[int, Field(gt=0)] | None = None
    use_sliding_window: bool | None = None
    layer_types: list[str] | None = None
    num_experts: Count | None = None
    num_local_experts: Count | None = None
    num_experts_per_tok: Count | None = None
    moe_intermediate_size: Width | None = None
    norm_topk_prob: bool | None = None


Values = TypeVar("Values", bound=_Strict)


def typed(kind: type[Values], values: Mapping[str, Any], problems: list[str], place: str = "") -> Values | None:
    """``values`` as ``kind``; None when some have another type or are out of range, each of them in ``problems``.

    Args:
        place: key of config.json that the values stand under, followed by a dot.
    """
    try:
        return kind.model_validate(dict(values))
    except pydantic.ValidationError as error:
        problems += [f"{place}{what} -> {expected}" for what, expected in wrong_values(error)]
        return None


def refuse_adapter(folder: str | os.PathLike) -> None:
    """Raise InputError for a folder with a LoRA adapter: its weights alone are not the model that people mean by it."""
    if (Path(folder) / "adapter_config.json").exists():
        raise InputError(
            f"{folder}: adapter_config.json is there, so this is a LoRA adapter and its base model -> merge the two "
            "(peft: merge_and_unload, save_pretrained) and name the merged folder"
        )


def config_file(model: str | os.PathLike) -> Path:
    """The ``config.json`` of a model folder, or the file that is named itself."""
    path = Path(model)
    refuse_adapter(path)
    return path / "config.json" if path.is_dir() else path


def read_config(model: str | os.PathLike) -> dict[str, Any]:
    """The parsed ``config.json`` of a model folder, or of the file that is named itself.

    Raises:
        InputError: missing, or not a JSON object.
    """
    path = config_file(model)
    check_folder(path.parent, (path.name,))
    if not Path(model).exists():
        raise InputError(f"{model}: no Hugging Face config.json there: {absence(model)}")
    if not path.is_file():
        raise InputError(f"{path}: no Hugging Face config.json there -> name a model folder or its config.json")
    return read_json(path)
