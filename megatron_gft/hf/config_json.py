"""``config.json`` of a Hugging Face model as typed values: every wrong key is found at once, none is guessed at."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from megatron_gft.errors import InputError, refuse
from megatron_gft.folders import ConfigKeys, Strict, check_folder, typed
from megatron_gft.hf.families import FAMILIES
from megatron_gft.reading import absence, read_json

# Of layers, heads, experts; of rows and columns. Beyond are typing errors: sizes of matrices no longer fit 64 bits.
Count = Annotated[int, Field(gt=0, le=2**12)]
Width = Annotated[int, Field(gt=0, le=2**24)]
Positive = Annotated[float, Field(gt=0)]


class Rope(Strict):
    """``rope_scaling`` (transformers 4) or ``rope_parameters`` (transformers 5)."""

    rope_type: str | None = None
    type: str | None = None
    factor: Annotated[float, Field(ge=1)] | None = None
    rope_theta: Positive | None = None
    partial_rotary_factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: float | None = None


class ConfigJson(ConfigKeys):
    """What is read of the file, under its own names. ``None``: transformers' default counts."""

    model_type: str
    num_hidden_layers: Count
    hidden_size: Width
    num_attention_heads: Count
    num_key_value_heads: Count | None = None
    head_dim: Count | None = None
    intermediate_size: Width
    vocab_size: Width
    rms_norm_eps: Annotated[float, Field(gt=0, lt=1)]
    max_position_embeddings: Annotated[int, Field(gt=0)]
    rope_theta: Positive | None = None
    partial_rotary_factor: float | None = None
    sliding_window: Annotated[int, Field(gt=0)] | None = None
    use_sliding_window: bool | None = None
    num_experts: Count | None = None
    num_local_experts: Count | None = None
    num_experts_per_tok: Count | None = None
    moe_intermediate_size: Width | None = None
    norm_topk_prob: bool | None = None
    max_window_layers: int | None = None
    initializer_range: float | None = Field(default=None, ge=0)
    original_max_position_embeddings: int | None = None
    is_causal: Literal[True] | None = None
    text_config: None = None  # models in models, and layers of their own kind, are other functions
    per_layer_config: None = None


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
    """The parsed ``config.json`` of a model folder, or of the file that is named itself."""
    path = config_file(model)
    check_folder(path.parent, (path.name,))
    if not Path(model).exists():
        raise InputError(f"{model}: no Hugging Face config.json there: {absence(model)}")
    if not path.is_file():
        raise InputError(f"{path}: no Hugging Face config.json there -> name a model folder or its config.json")
    return read_json(path)


def check_config(model: str | os.PathLike) -> dict[str, Any]:
    """As :func:`read_config`, for what transformers computes: types and ranges are right, options need not be mapped.

    Raises:
        InputErrors: every key that is wrong.
    """
    values, problems = read_config(model), list[str]()
    typed(ConfigJson if values.get("model_type") in FAMILIES else ConfigKeys, values, problems)
    # What is missing has a default.
    refuse(str(config_file(model)), [one for one in problems if not one.endswith("is missing -> add it")])
    return values
