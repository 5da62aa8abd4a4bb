"""Checkpoints saved with one layer spec (Transformer Engine or local), or converted offline, load with the other.

Weights have the same keys and shapes in both, with two exceptions: a layer asks for the ``_extra_state`` objects (FP8
scaling and the like) of its own implementation alone, and the local MoE spec gives the norm before the MLP the key of a
fused one (``gpt_layer_specs.py:419`` of 0.16.1).
"""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import megatron.core
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from packaging.version import Version

from megatron_gft.checkpoints.pickles import check_objects
from megatron_gft.checkpoints.torch_dist import TorchDistReader
from megatron_gft.errors import InputError
from megatron_gft.hf.mapping import other_norm_name


def loadable_sharded_state_dict(state: dict[str, Any], checkpoint: str | Path) -> dict[str, Any]:
    """What to pass to ``dist_checkpointing.load``: ``state`` without absent ``_extra_state``, under the keys stored.

    Weights that are absent stay in, so that loading still fails on them. Put the result into the model with
    ``load_state_dict(strict=False)``: dropped objects leave the model's own in place.

    Tensors of ``state``, a nested sharded state dict, may be renamed in place.

    Raises:
        InputError: no ``torch_dist`` checkpoint, one of a later Megatron-Core, or of another kind of optimizer; or
            reading it would call what no model needs.
    """
    reader = TorchDistReader(checkpoint)
    installed = megatron.core.__version__
    # From 0.19 on what is common to all ranks is stored among the shards. Earlier releases fail on the missing file
    # with an AttributeError about something else (dist_checkpointing/strategies/common.py).
    if Version(installed) < Version("0.19") and not (reader.folder / "common.pt").is_file():
        raise InputError(
            f"{checkpoint}: no common.pt there, so megatron-core 0.19 or later wrote it, and {installed} cannot load "
            "it -> install megatron-core>=0.19"
        )
    wanted = {value.key for value in nested_values(state) if isinstance(value, ShardedTensor | ShardedTensorFactory)}
    stored_form, wanted_form = _optimizer_form(reader.tensors), _optimizer_form(wanted)
    if wanted_form not in (None, stored_form):
        raise InputError(
            f"{checkpoint}: holds {stored_form or 'weights without an optimizer'}, this run needs {wanted_form} -> set "
            "these as they were, or checkpoint.load_optimizer=false: weights and place go on, Adam begins afresh"
        )
    check_objects(reader.folder, reader.metadata)
    return _loadable(state, set(reader.tensors), reader.objects)


def _optimizer_form(keys: Collection[str]) -> str | None:
    """The optimizer whose state has such keys, as settings; None without one."""
    kinds = {key.split(".")[2] for key in keys if key.startswith("optimizer.state.")}
    if not kinds:
        return None
    other = f"optimizer.distributed=false, model.precision={'bf16' if 'fp32_param' in kinds else 'fp32'}"
    return f"the state of {'optimizer.distributed=true' if 'param' in kinds else other}"


Asked = tuple[str, tuple[int, ...], int]
"""Key and shape of a tensor, and how many of its first dimensions may differ: a vocabulary has padding."""


def asked_for(state: dict[str, Any]) -> set[Asked]:
    """What a sharded state loads."""
    values = (value.build() if isinstance(value, ShardedTensorFactory) else value for value in nested_values(state))
    parts = (part for value in values for part in nested_values({"": value}) if isinstance(part, ShardedTensor))
    return {(part.key, tuple(part.global_shape), int(part.allow_shape_mismatch)) for part in parts}


def misfits(asked: set[Asked], checkpoint: str | Path, vocab_size: int) -> Iterator[str]:
    """Every tensor that a model asks for, on all ranks, and the checkpoint has in another shape, or not at all.

    Megatron says of these at most which ranks failed. And of weights that no rank asks for it says nothing: biases, or
    a head of its own where the model's is tied.
    """
    stored = TorchDistReader(checkpoint).tensors
    for key, wanted, free in asked:
        if key not in stored:
            yield f"{key} is missing"
        elif (found := tuple(stored[key].size))[free:] != wanted[free:] or len(found) != len(wanted):
            yield f"{key} is {list(found)}, this model and its optimizer make it {list(wanted)}"
        elif key.startswith(("embedding.", "output_layer.")) and free and found[0] < vocab_size:
            yield f"{key} is {list(found)}, this model's vocabulary has {vocab_size} tokens"
    for key in stored.keys() - {key for key, _, _ in asked}:
        if key.startswith(("embedding.", "decoder.", "output_layer.")):
            yield f"{key} {list(stored[key].size)} has no place in this model"


def _loadable(state: dict[str, Any], tensors: set[str], objects: set[str]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, dict):
            value = _loadable(value, tensors, objects)
        elif isinstance(value, ShardedObject) and "_extra_state" in name and value.unique_key not in objects:
            continue
        elif isinstance(value, ShardedTensor) and value.key not in tensors:
            other = other_norm_name(value.key)
            value.key = other if other in tensors else value.key
        kept[name] = value
    return kept
