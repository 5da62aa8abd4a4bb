"""Hugging Face weight folders: read slice by slice, written tensor by tensor.

Reading is the ``safetensors`` library's. It maps files into memory, and mapped pages count as resident, so a file
is opened afresh after :data:`REOPEN_BYTES`. Writing a file through the library needs all its tensors at once; here
the shard plan is known from shapes alone, so the header is written first and the tensors stream after it.
"""

import itertools
import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from megatron_gft.errors import InputError, refuse
from megatron_gft.folders import check_folder, is_inner_name
from megatron_gft.reading import absence, lfs_hint, read_json

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
REOPEN_BYTES = 64 * 2**20
DEFAULT_SHARD_BYTES = 5 * 10**9

TensorLayout = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a tensor to write."""

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
"""The dtypes that language model weights come in, by their names in the file format."""
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Header entry of one tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return layout_bytes((self.shape, self.dtype))


class SafetensorsFolder:
    """The tensors of a model folder (``model.safetensors``, or shards with an index).

    Attributes:
        tensors: name -> :class:`TensorInfo`.

    Raises:
        InputErrors: on opening: no weights, a missing or truncated shard, an index that names an absent tensor, a
            tensor in two shards. All of them at once, by name.
    """

    def __init__(self, folder: str | Path, files: Sequence[str] | None = None):
        """``files``: read just these, whether an index names them or not."""
        self.folder = Path(folder)
        self.tensors: dict[str, TensorInfo] = {}
        self._open_path: Path | None = None
        self._file: safe_open | None = None
        self._read_bytes = 0
        check_folder(self.folder, (INDEX_NAME, "*.safetensors"))
        index = self._read_index() if files is None else None
        if files is None:
            files = [SINGLE_NAME] if index is None else sorted(set(index.values()))
        refuse(str(self.folder), [problem for file in files for problem in self._add_file(file, index)], shown=12)

    def _read_index(self) -> dict[str, str] | None:
        path = self.folder / INDEX_NAME
        if not path.is_file():
            if (self.folder / SINGLE_NAME).is_file():
                return None
            raise InputError(f"{self.folder}: neither {SINGLE_NAME} nor {INDEX_NAME}{self._instead()}")
        files = read_json(path).get("weight_map")
        if not isinstance(files, dict) or not files:
            raise InputError(
                f"{path}: not a safetensors index (weight_map is {str(files)[:60]}) -> copy the file again"
            )
        wrong = [name for name, file in files.items() if not is_inner_name(file)]
        if wrong:
            shown = f"{wrong[0]!r}: {str(files[wrong[0]])[:60]}"
            raise InputError(f"{path}: weight_map does not name a file ({shown}) -> copy the file again")
        return files

    def _instead(self) -> str:
        """What a folder without weights probably is, and the way out."""
        if not self.folder.is_dir():
            return f": {absence(self.folder)}"
        names = sorted(path.name for path in self.folder.iterdir())
        if shards := [name for name in names if name.endswith(".safetensors")]:
            return f"; {len(shards)} files like {shards[0]} are there, their index is not -> copy {INDEX_NAME}, too"
        if pickled := [name for name in names if name.endswith((".bin", ".pt", ".pth"))]:
            return (
                f"; it has {pickled[0]}, a pickle -> make safetensors: transformers' from_pretrained, save_pretrained"
            )
        return " -> name a folder with safetensors"

    def _add_file(self, file_name: str, index: Mapping[str, str] | None) -> Iterator[str]:
        """Take in the header of one file; what is wrong with it."""
        path = self.folder / file_name
        if not path.is_file():
            yield f"shard {file_name} is missing -> copy it again"
            return
        try:
            with safe_open(path, "pt") as file:
                pieces = {name: file.get_slice(name) for name in file.keys()}
                found = {name: (tuple(piece.get_shape()), piece.get_dtype()) for name, piece in pieces.items()}
        except (SafetensorError, OSError) as error:
            yield f"{file_name} is damaged or truncated ({error}){lfs_hint(path) or ' -> copy it again'}"
            return
        for name, (shape, dtype) in found.items():
            if dtype not in _DTYPES:
                yield f"tensor {name} has dtype {dtype} -> only {', '.join(_DTYPES)} are known"
                continue
            if name in self.tensors:
                yield f"tensor {name} is in both {self.tensors[name].file.name} and {file_name} -> copy them again"
            elif index is not None and index.get(name) != file_name:
                yield f"tensor {name} in {file_name} is not in {INDEX_NAME} -> copy both again"
            self.tensors[name] = TensorInfo(path, shape, _DTYPES[dtype])
        for name, file_of_name in (index or {}).items():
            if file_of_name == file_name and name not in found:
                yield f"{INDEX_NAME} names tensor {name}, which {file_name} does not hold -> copy both again"

    def read(
        self, name: str, rows: tuple[int, int] | None = None, columns: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """Rows and columns of a tensor, all by default. The result is a view into the mapped file: copy it soon.

        Raises:
            InputError: the file went away or was cut after it was opened.
        """
        info = self.tensors[name]
        if info.file != self._open_path or self._read_bytes > REOPEN_BYTES:
            try:
                self._file = safe_open(info.file, "pt")
            except (SafetensorError, OSError) as error:
                raise InputError(f"{info.file}: damaged or truncated ({error}) -> copy it again") from error
            self._open_path, self._read_bytes = info.file, 0
        low, high = rows or (0, info.shape[0])
        assert self._file is not None
        piece = self._file.get_slice(name)
        tensor = piece[low:high] if columns is None else piece[low:high, columns[0] : columns[1]]
        self._read_bytes += (high - low) * info.num_bytes // max(1, info.shape[0])
        return tensor

    def read_chunks(
        self,
        name: str,
        rows: tuple[int, int] | None = None,
        columns: tuple[int, int] | None = None,
        chunk_bytes: int = REOPEN_BYTES,
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """As :meth:`read`, in pieces of whole rows: (first row relative to ``rows``, piece)."""
        info = self.tensors[name]
        low, high = rows or (0, info.shape[0])
        for start, stop in row_chunks(high - low, info.num_bytes // max(1, info.shape[0]), chunk_bytes):
            yield start, self.read(name, (low + start, low + stop), columns)


def refuse_nonfinite(values: torch.Tensor, place: str, before: Iterable[torch.Tensor] = ()) -> None:
    """Raise InputError for a NaN or an infinity among values [...] of ``place``; ``before`` are the same before they
    were cast to this dtype, looked at only to tell the cause."""
    if not values.numel():
        return
    ends = torch.stack(torch.aminmax(values.detach().float() if values.element_size() == 1 else values.detach()))
    if bool(ends.isfinite().all()):  # aminmax hands a NaN on
        return
    sources = [bool(part.isfinite().all()) for part in before]
    if sources and all(sources):
        raise InputError(f"{place} has values that {values.dtype} cannot hold -> choose bf16 or fp32")
    raise InputError(f"{place} holds NaN or infinities: nothing can be trained or said with it -> take other weights")


def row_chunks(rows: int, row_bytes: int, chunk_bytes: int) -> Iterator[tuple[int, int]]:
    """Cut ``rows`` into ranges of at most ``chunk_bytes`` (at least one row)."""
    step = max(1, chunk_bytes // max(1, row_bytes))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def layout_bytes(layout: TensorLayout) -> int:
    """Bytes of the data of such a tensor."""
    return prod(layout[0]) * layout[1].itemsize


def plan_shards(
    groups: Iterable[Mapping[str, TensorLayout]], max_bytes: int = DEFAULT_SHARD_BYTES
) -> list[dict[str, dict[str, TensorLayout]]]:
    """Distribute tensors over files, in order, no file above ``max_bytes`` unless one tensor is.

    ``groups`` are the tensors of each writer, name -> layout: no file is shared by two. What comes back are each
    writer's files with their tensors, numbered over all of them (``model-00001-of-00003.safetensors``).
    """
    writers: list[list[dict[str, TensorLayout]]] = []
    for group in groups:
        files: list[dict[str, TensorLayout]] = []
        room = 0
        for name, layout in group.items():
            if not files or layout_bytes(layout) > room:
                files.append({})
                room = max_bytes
            files[-1][name] = layout
            room -= layout_bytes(layout)
        writers.append(files)
    count, number = sum(map(len, writers)), itertools.count(1)
    name = SINGLE_NAME if count == 1 else f"model-{{:05d}}-of-{count:05d}.safetensors"
    return [{name.format(next(number)): tensors for tensors in files} for files in writers]


def write_index(folder: Path, files: Mapping[str, Mapping[str, TensorLayout]]) -> None:
    """Write the index of several shards; a single file needs none."""
    if len(files) < 2:
        return
    layouts = itertools.chain.from_iterable(tensors.values() for tensors in files.values())
    index = {
        "metadata": {"total_size": sum(map(layout_bytes, layouts))},
        "weight_map": {name: file for file, tensors in files.items() for name in tensors},
    }
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def write_shard(path: Path, layouts: Mapping[str, TensorLayout], tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Stream tensors into a new file, flushed to the disk; they come in the order and with the layouts planned.

    Format: https://huggingface.co/docs/safetensors (u64 header length, JSON header, tensor bytes).
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (shape, dtype) in layouts.items():
        end = offset + layout_bytes((shape, dtype))
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for planned, (name, tensor) in zip(layouts, tensors, strict=True):
            assert name == planned, f"{name} is not the next tensor of {path}"
            file.write(tensor_bytes(tensor))
        file.flush()
        os.fsync(file.fileno())


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a CPU tensor in row-major order, without a copy if it is contiguous."""
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data
