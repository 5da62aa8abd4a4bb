"""Megatron's ``torch_dist`` checkpoint format, written and read piece by piece without building a model.

``megatron.core.dist_checkpointing.save`` wants every tensor in memory first. Here torch's own DCP writer, which is
what Megatron writes through, gets a planner whose data are made one chunk at a time, just before they are written;
a thread makes the next chunk meanwhile. ``dist_checkpointing.load`` takes the result at any layout.

Needs torch only: Megatron would cost a conversion seconds and 100 MB. One process needs no process group. Only
:func:`replace_results_queue` is about Megatron's own writer, which runs use.
"""

import contextlib
import dataclasses
import io
import json
import os
import pickle
import queue
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_gft.checkpoints.pickles import read_metadata
from megatron_gft.errors import InputError
from megatron_gft.folders import check_folder
from megatron_gft.hf.safetensors_io import row_chunks
from megatron_gft.runtime import prefetch

CHUNK_BYTES = 16 * 2**20
"""Of one stored chunk. The writer keeps the last chunk of every key until its file is closed."""


@dataclass(frozen=True)
class Backends:
    """metadata.json, as CheckpointingConfig of megatron/core/dist_checkpointing/core.py (0.16.1 to 0.19.2)."""

    sharded_backend: str
    sharded_backend_version: int = 1
    common_backend: str = "torch"
    common_backend_version: int = 1


@dataclass(frozen=True)
class StoredTensor:
    """A tensor to store: ``key``, its whole shape and dtype, and the part of it that ``index`` and rows select.

    ``index`` fixes the leading (layer, expert) axes; ``rows`` counts along the next axis.
    """

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    index: tuple[int, ...]
    rows: tuple[int, int]

    @property
    def offsets(self) -> tuple[int, ...]:
        return (*self.index, self.rows[0], *([0] * (len(self.shape) - len(self.index) - 1)))

    @property
    def sizes(self) -> tuple[int, ...]:
        axis = len(self.index)
        return (*([1] * axis), self.rows[1] - self.rows[0], *self.shape[axis + 1 :])


class _StreamPlanner(DefaultSavePlanner):
    """Plans ``parts`` in order and takes their data, in the same order, from ``data``."""

    def __init__(self, parts: Sequence[StoredTensor], data: Iterator[torch.Tensor]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.parts, self.data = parts, data

    def create_local_plan(self) -> SavePlan:
        items = []
        for part in self.parts:
            chunk = ChunkStorageMetadata(torch.Size(part.offsets), torch.Size(part.sizes))
            properties = TensorProperties(dtype=part.dtype)
            items.append(
                WriteItem(
                    index=MetadataIndex(part.key, chunk.offsets),
                    type=WriteItemType.SHARD,
                    tensor_data=TensorWriteData(chunk, properties, torch.Size(part.shape)),
                )
            )
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        tensor = next(self.data)
        assert write_item.tensor_data is not None
        return tensor.view(write_item.tensor_data.chunk.sizes)


class _RecordingFileSystem(FileSystem):
    """Remembers the first system error of a write: torch's archive writer replaces it by one of its own."""

    failure: OSError | None = None

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        with _RecordingWriter(io.FileIO(path, mode)) as stream:
            stream.file_system = self
            yield stream


class _RecordingWriter(io.BufferedWriter):
    file_system: _RecordingFileSystem

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.file_system.failure = self.file_system.failure or error
            raise


def write_torch_dist(folder: Path, parts: Sequence[StoredTensor], data: Iterable[torch.Tensor]) -> None:
    """Write this process's ``parts`` of a checkpoint into the empty ``folder``; collective if there is a process group.

    ``data`` gives a tensor for each part, of the size of its rows [rows, ...]; made in a thread, one ahead.

    Raises:
        OSError, InputError: from writing or from ``data``.
    """
    stream = prefetch(data)
    # copy_ahead 0: no reordering of the parts by size; every process syncs its file, which may be on another node
    writer = dcp.FileSystemWriter(folder, thread_count=1, per_thread_copy_ahead=0, sync_files=True)
    writer.fs = file_system = _RecordingFileSystem()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "torch.distributed is uninitialized, assuming a single process"
            planner = _StreamPlanner(parts, stream)
            dcp.save({}, storage_writer=writer, planner=planner, no_dist=not dist.is_initialized())
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        cause = file_system.failure or cause
        if isinstance(cause, OSError | InputError):
            raise cause from error
        raise InputError(f"process {rank} could not write its part ({cause})") from error
    finally:
        stream.close()
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save({}, folder / "common.pt")
        (folder / "metadata.json").write_text(json.dumps(dataclasses.asdict(Backends("torch_dist"))))


class ResultFile:
    """The "queue" by which a forked checkpoint writer tells its parent what it wrote: one value, in memory.

    A pipe would block above 64 KiB.
    """

    def __init__(self) -> None:
        self.file = os.fdopen(os.memfd_create("checkpoint-results"), "w+b")

    def put(self, value: Any) -> None:
        pickle.dump(value, self.file)
        self.file.flush()

    def get_nowait(self) -> Any:
        self.file.seek(0)
        try:
            return pickle.load(self.file)
        except EOFError:
            raise queue.Empty from None


def replace_results_queue() -> None:
    """Let Megatron's background writers answer by :class:`ResultFile`.

    Its own queue lives in a server process, which a signal to the process group kills (a preemption, Ctrl-C) and the
    next save with it; starting that process also imports torch and Megatron once more, 3 to 13 s.
    """
    import megatron.core.dist_checkpointing.strategies.filesystem_async as filesystem_async

    for name in ("_get_write_results_queue", "get_write_results_queue"):  # 0.16 / >= 0.17
        if hasattr(filesystem_async, name):
            setattr(filesystem_async, name, lambda *_, **__: ResultFile())


class TorchDistReader:
    """Random access to the ``tensors`` of a ``torch_dist`` checkpoint, whose other keys are ``objects``.

    Raises:
        InputError: the folder is not such a checkpoint, or its ``.metadata`` would call what is not listed.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / ".metadata").is_file():
            raise InputError(f"{folder}: no .metadata there -> name the folder of a torch_dist checkpoint (step-...)")
        check_folder(self.folder, (".metadata", "*.distcp", "*.pt", "*.json"))
        self.metadata = read_metadata(self.folder / ".metadata")
        self._reader = dcp.FileSystemReader(self.folder)
        self._reader.set_up_storage_reader(self.metadata, is_coordinator=True)
        stored = self.metadata.state_dict_metadata
        self.tensors = {key: entry for key, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}
        self.objects = stored.keys() - self.tensors.keys()
        self._stacked: dict[str, dict[int, TensorStorageMetadata]] = {}

    def read(self, key: str, index: tuple[int, ...], rows: tuple[int, int]) -> torch.Tensor:
        """Rows of ``key[index]``, [rows, ...]. Raises InputError where a data file is missing or damaged."""
        entry = self.tensors[key]
        part = StoredTensor(key, tuple(entry.size), entry.properties.dtype, index, rows)
        target = torch.empty(part.sizes, dtype=part.dtype)
        wanted = ChunkStorageMetadata(torch.Size(part.offsets), torch.Size(part.sizes))
        items = create_read_items_for_chunk_list(key, self._near(key, index), [wanted])
        covered = sum(prod(item.lengths) for item in items)
        if covered != target.numel():
            raise InputError(f"{self.folder}: {key}{list(index)} is stored only in part -> use another checkpoint")
        try:
            self._reader.read_data(LoadPlan(items), _IntoTensor(target)).wait()
        except Exception as error:  # of damaged bytes torch's, zip's and pickle's readers raise anything
            file = self._reader.storage_data[items[0].storage_index].relative_path
            raise InputError(f"{self.folder / file}: damaged or missing ({error}) -> use another checkpoint") from error
        return target.view(part.sizes[len(index) :])

    def file_of(self, key: str, index: tuple[int, ...]) -> Path:
        """The file with the beginning of ``key[index]``."""
        offset = self._near(key, index).chunks[0].offsets
        return self.folder / self._reader.storage_data[MetadataIndex(key, offset)].relative_path

    def _near(self, key: str, index: tuple[int, ...]) -> TensorStorageMetadata:
        """The metadata of ``key`` with the chunks of one layer only: torch compares all of them on every read."""
        entry = self.tensors[key]
        if not index:
            return entry
        if key not in self._stacked:
            layers: dict[int, TensorStorageMetadata] = {}
            for chunk in entry.chunks:
                for layer in range(chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]):
                    layers.setdefault(layer, dataclasses.replace(entry, chunks=[])).chunks.append(chunk)
            self._stacked[key] = layers
        return self._stacked[key].get(index[0], dataclasses.replace(entry, chunks=[]))

    def chunk_rows(self, key: str, index: tuple[int, ...]) -> Iterator[tuple[int, int]]:
        """Row ranges that read ``key[index]`` in moderate pieces, along the stored chunks where they are small."""
        entry = self.tensors[key]
        shape = tuple(entry.size)[len(index) :]
        itemsize = entry.properties.dtype.itemsize
        # Reading less of a stored chunk would read it several times over.
        largest = max(prod(chunk.sizes) for chunk in entry.chunks) * itemsize
        yield from row_chunks(shape[0], prod(shape[1:]) * itemsize, max(CHUNK_BYTES, largest))


class _IntoTensor(DefaultLoadPlanner):
    """Delivers the read items of a ready plan into one tensor."""

    def __init__(self, target: torch.Tensor):
        super().__init__()
        self.target = target

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self.target
