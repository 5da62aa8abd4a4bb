"""The pickles of a checkpoint name what they call. Here that is looked at before torch or Megatron would call it.

torch reads ``.metadata`` with a bare ``pickle.load``, and objects among the shards with ``torch.load(weights_only=
False)``; Transformer Engine unpickles the bytes of ``_extra_state``.
"""

import contextlib
import io
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_gft.errors import InputError
from megatron_gft.folders import is_inner_name

_NEVER_READ = ("rng_state", "rerun_state_machine_state")  # Megatron-LM's; nothing here asks for them


def _listed(text: str) -> frozenset[str]:
    """Lines of a module and names in it."""
    lines = (line.split() for line in text.splitlines())
    return frozenset(f"{module} {name}" for module, *names in filter(None, lines) for name in names)


# What .metadata of torch 2.6 to 2.13 and of Megatron-Core 0.8 to 0.19 holds, plans of cached saves included.
_METADATA = _listed("""
    torch.distributed.checkpoint.metadata Metadata StorageMeta MetadataIndex ChunkStorageMetadata TensorProperties
    torch.distributed.checkpoint.metadata TensorStorageMetadata BytesStorageMetadata _MEM_FORMAT_ENCODING
    torch.distributed.checkpoint.planner SavePlan WriteItem WriteItemType TensorWriteData BytesIOWriteData
    torch.distributed.checkpoint.filesystem _StorageInfo _StoragePrefix
    megatron.core.dist_checkpointing.strategies.torch MCoreMetadata MCoreSavePlan
    torch Size
    torch.serialization _get_layout
    collections OrderedDict
    pathlib PosixPath
    pathlib._local PosixPath
""")
# What Transformer Engine's FP8 state holds: megatron.core.safe_globals.SafeUnpickler of Megatron-Core 0.17 to 0.19.
_EXTRA_STATE = _listed("""
    collections OrderedDict
    torch Size
    torch._utils _rebuild_tensor_v2
    torch._tensor _rebuild_from_type_v2
    torch.storage UntypedStorage _load_from_bytes
    transformer_engine.common.recipe DelayedScaling Float8CurrentScaling Float8BlockScaling MXFP8BlockScaling
    transformer_engine.common.recipe NVFP4BlockScaling Format _FormatHelper MMParams QParams
    megatron.core.extensions.transformer_engine TEDelayedScaling
    megatron.core.safe_globals safe_load_from_bytes
""")


class _Inert:
    """Stands for an object that only the real reading builds."""

    def _ignore(self, *_: Any) -> None:
        pass

    __init__ = __setstate__ = __setitem__ = append = extend = _ignore  # type: ignore[assignment]


class _Unpickler(pickle.Unpickler):
    """Calls what is listed; with ``inert``, something harmless in its place."""

    def __init__(self, content: BinaryIO, listed: frozenset[str], *, inert: bool):
        super().__init__(content)
        self._listed, self._inert = listed, inert

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and f"{module} {name}" not in self._listed:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name} is not listed")
        if not self._inert:
            return super().find_class(module, name)
        return _load_weights if name.endswith("load_from_bytes") else _Inert


def read_metadata(path: Path) -> Metadata:
    """``.metadata``; raises InputError when it names a class that is not listed or a file elsewhere, or is damaged."""
    with _told(path), open(path, "rb") as file:
        metadata = _Unpickler(file, _METADATA, inert=False).load()
        for info in metadata.storage_data.values():
            if not is_inner_name(info.relative_path) or min(info.offset, info.length) < 0:
                raise ValueError(f"data at {info.relative_path!r}, byte {info.offset!r}, {info.length!r} long")
    return metadata


def check_objects(folder: Path, metadata: Metadata) -> None:
    """Raise InputError when common.pt, or an object that a run could ask for, calls what is not listed."""
    if (common := folder / "common.pt").is_file():
        with _told(common):
            _load_weights(common.read_bytes())
    for index, info in metadata.storage_data.items():
        is_tensor = isinstance(metadata.state_dict_metadata.get(index.fqn), TensorStorageMetadata)
        if is_tensor or index.fqn.startswith(_NEVER_READ):
            continue
        path = folder / info.relative_path
        with _told(f"{path}: {index.fqn}"), open(path, "rb") as file:
            if info.transform_descriptors:
                raise ValueError(f"packed with {info.transform_descriptors}")
            file.seek(info.offset)
            value = _load_weights(file.read(info.length))
            if "_extra_state" in index.fqn:
                _check_extra_state(value)


def _load_weights(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)  # Megatron has named its classes


def _check_extra_state(value: Any) -> None:
    """A tensor is unpickled by Transformer Engine; other bytes it gives to torch's restricted reading."""
    if isinstance(value, list | tuple):
        for item in value:
            _check_extra_state(item)
    elif isinstance(value, torch.Tensor) and value.numel():
        _Unpickler(io.BytesIO(value.numpy().tobytes()), _EXTRA_STATE, inert=True).load()


@contextlib.contextmanager
def _told(place: Path | str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if isinstance(error, pickle.UnpicklingError) and (named := re.search(r"GLOBAL (\S+)", str(error))):
            raise InputError(
                f"{place}: would call {named[1]} on reading, which no checkpoint of a model needs: it may run code "
                "-> do not use it; take the checkpoint from where you trust it"
            ) from error
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{place}: damaged or missing ({reason}) -> use another checkpoint") from error
