"""Offline conversion, no model built: Hugging Face folder <-> Megatron ``torch_dist`` checkpoint.

Both directions stream: a chunk (to Megatron) or a tensor (to Hugging Face) is made while the last one is written,
so memory does not grow with the model. Started under torchrun, processes share the tensors by bytes. Every tensor
is hashed on its way, the output is read back through the mapping and compared, and only then gets its name.

A converted checkpoint carries ``hf/`` (configuration, tokenizer, chat template) and ``hf_source.json`` (hashes of
the configuration and of every tensor, tokenizer fingerprint), so exporting needs nothing else.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Literal

import torch

from megatron_gft.atomic import write_json
from megatron_gft.checkpoints.torch_dist import StoredTensor, TorchDistReader, prefetch, row_chunks, write_torch_dist
from megatron_gft.errors import EXIT_BAD_INPUT, InputError, InputErrors
from megatron_gft.hf.files import (
    MODEL_FILES_FOLDER,
    SOURCE_FILE,
    ExportStream,
    check_tensors,
    compare_hashes,
    read_source_record,
    scatter_rows,
    source_record,
    write_model_files,
)
from megatron_gft.hf.mapping import Entry, HfMapping
from megatron_gft.hf.safetensors_io import (
    DEFAULT_SHARD_BYTES,
    SafetensorsFolder,
    TensorLayout,
    layout_bytes,
    plan_shards,
    tensor_bytes,
    write_index,
)
from megatron_gft.hf.shape import read_model_shape
from megatron_gft.hf.shared_folder import gather_results, process_rank_and_count, shared_directory

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], object]
"""Called with the bytes of tensor data just made and those that this process has to make, on every process."""

Verify = Literal["hash", "logits", "off"]
"""Read the output back and compare every tensor's sha256; also run both models on a text; neither."""

_MODEL_KEYS = ("embedding.", "decoder.", "output_layer.")


class RowHashes:
    """sha256 of tensors whose rows arrive in order but interleaved with other tensors' rows."""

    def __init__(self) -> None:
        self._digests: dict[str, hashlib._Hash] = {}

    def update(self, name: str, rows: torch.Tensor) -> None:
        self._digests.setdefault(name, hashlib.sha256()).update(tensor_bytes(rows))

    def hexdigests(self) -> dict[str, str]:
        return {name: digest.hexdigest() for name, digest in self._digests.items()}


def total_bytes(entries: Sequence[Entry], dtypes: Mapping[str, torch.dtype]) -> int:
    """Bytes of the Hugging Face tensors of these entries; ``dtypes`` by Hugging Face name."""
    return sum(
        layout_bytes((size, dtypes[name]))
        for entry in entries
        for name, size in zip(entry.sources, entry.source_shapes, strict=True)
    )


def split_entries(entries: Sequence[Entry], dtypes: Mapping[str, torch.dtype], parts: int) -> list[list[Entry]]:
    """Consecutive runs of about equal bytes, one for each process."""
    whole, done = total_bytes(entries, dtypes), 0
    runs: list[list[Entry]] = [[] for _ in range(parts)]
    for entry in entries:
        size = total_bytes([entry], dtypes)
        runs[min(parts - 1, (2 * done + size) * parts // max(1, 2 * whole))].append(entry)
        done += size
    return runs


def check_free_space(output: Path, needed: int) -> None:
    """Raise InputError when the file system of ``output`` has less than ``needed`` bytes free."""
    parent = next(folder for folder in Path(output).absolute().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise InputError(f"{output}: needs {needed / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free -> free space")


def run_logits_check(hf_dir: Path, checkpoint: Path, text: str | None) -> None:
    """:func:`megatron_gft.conversion.verify.verify_logits` in a process of its own: it needs its own process group.

    Raises:
        InputError: the logits differ.
    """
    arguments = ["--hf", str(hf_dir), "--checkpoint", str(checkpoint), *([] if text is None else ["--text", text])]
    alone = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        [sys.executable, "-m", "megatron_gft.conversion.verify", *arguments], env=alone, capture_output=True, text=True
    )
    if done.returncode == EXIT_BAD_INPUT:
        raise InputError(done.stderr.strip().rsplit("error: ", 1)[-1])
    if done.returncode:
        raise RuntimeError(f"the logits check failed:\n{done.stderr[-4000:]}")
    logger.info("%s", done.stdout.strip())


# --- Hugging Face to Megatron ---------------------------------------------------------------------------------------


def hf_to_megatron(
    hf_dir: str | Path,
    output: str | Path,
    *,
    dtype: torch.dtype | None = None,
    verify: Verify = "hash",
    text: str | None = None,
    progress: Progress = lambda done, total: None,
) -> None:
    """Convert a Hugging Face folder to a Megatron checkpoint of any layout. Collective under torchrun.

    Args:
        dtype: of the written tensors; None keeps them.
        verify: see :data:`Verify`; ``text`` is what ``logits`` runs on.

    Raises:
        InputError: unsupported model, weights that do not fit it, an output that exists, disk full, or a
            difference on reading back. Nothing is left behind.
    """
    hf_dir, output = Path(hf_dir), Path(output)
    mapping = HfMapping(read_model_shape(hf_dir))
    weights = SafetensorsFolder(hf_dir)
    check_tensors(weights, mapping)
    entries = list(mapping.entries.values())
    dtypes = {name: dtype or weights.tensors[name].dtype for name in mapping.hf_shapes}
    _check_one_dtype_per_key(hf_dir, entries, dtypes)
    rank, count = process_rank_and_count()
    mine = split_entries(entries, dtypes, count)[rank]
    check_free_space(output, total_bytes(entries, dtypes))
    with shared_directory(output) as folder:
        results = gather_results(
            lambda: _write_megatron(folder, mapping, mine, weights, dtypes, verify != "off", progress), output
        )
        if rank == 0:
            if verify == "logits":
                run_logits_check(hf_dir, folder, text)
            hashes = {name: digest for result in results for name, digest in result.items()}
            (folder / MODEL_FILES_FOLDER).mkdir()
            write_model_files(hf_dir, folder / MODEL_FILES_FOLDER, dtype)
            write_json(folder / SOURCE_FILE, source_record(hf_dir, hashes))


def _check_one_dtype_per_key(hf_dir: Path, entries: Sequence[Entry], dtypes: Mapping[str, torch.dtype]) -> None:
    """Megatron stacks layers: one dtype for all of them."""
    found: dict[str, set[torch.dtype]] = {}
    for entry in entries:
        found.setdefault(entry.checkpoint_key, set()).update(dtypes[source] for source in entry.sources)
    problems = [
        f"{key}: its tensors are {', '.join(sorted(map(str, kinds)))} -> choose one with --dtype"
        for key, kinds in found.items()
        if len(kinds) > 1
    ]
    if problems:
        raise InputErrors(f"{hf_dir}: a Megatron tensor holds one dtype", problems)


def stored_shape(mapping: HfMapping, entry: Entry) -> tuple[int, ...]:
    """Shape of the checkpoint tensor that holds this entry, stacked over layers and experts; vocabulary unpadded."""
    axes = (mapping.shape.num_layers, mapping.shape.num_moe_experts or 0)[: len(entry.index)]
    return (*axes, *mapping.shard(entry).shape)


def plan_parts(mapping: HfMapping, entries: Sequence[Entry], dtypes: Mapping[str, torch.dtype]) -> list[StoredTensor]:
    """The chunks in which these entries are stored."""
    parts = []
    for entry in entries:
        shape, dtype = stored_shape(mapping, entry), dtypes[entry.sources[0]]
        rows, *rest = shape[len(entry.index) :]
        for chunk in row_chunks(rows, prod(rest) * dtype.itemsize):
            parts.append(StoredTensor(entry.checkpoint_key, shape, dtype, entry.index, chunk))
    return parts


def _write_megatron(
    folder: Path,
    mapping: HfMapping,
    entries: Sequence[Entry],
    weights: SafetensorsFolder,
    dtypes: Mapping[str, torch.dtype],
    verify: bool,
    progress: Progress,
) -> dict[str, str]:
    """Write and check this process's entries; sha256 of each of their Hugging Face tensors."""
    hashes = RowHashes()
    parts = plan_parts(mapping, entries, dtypes)
    write_torch_dist(folder, parts, _read_parts(mapping, entries, weights, dtypes, hashes, progress))
    weights.close()
    expected = hashes.hexdigests()
    if verify:
        compare_hashes(folder, expected, _hash_checkpoint(TorchDistReader(folder), mapping, entries))
    return expected


def _read_parts(
    mapping: HfMapping,
    entries: Sequence[Entry],
    weights: SafetensorsFolder,
    dtypes: Mapping[str, torch.dtype],
    hashes: RowHashes,
    progress: Progress,
) -> Iterator[torch.Tensor]:
    """The data of :func:`plan_parts`, read from safetensors and hashed by source tensor."""
    total = total_bytes(entries, dtypes)
    for entry in entries:
        shard = mapping.shard(entry)
        dtype = dtypes[entry.sources[0]]
        row_shape = shard.shape[1:]
        for start, stop in row_chunks(shard.shape[0], prod(row_shape) * dtype.itemsize):
            buffer = torch.empty((stop - start, *row_shape), dtype=dtype)
            for piece in shard.within(start, stop):
                name = entry.sources[piece.source]
                rows = buffer[piece.offset - start : piece.offset - start + piece.rows]
                rows.copy_(weights.read(name, (piece.start, piece.stop)))
                hashes.update(name, rows)
            progress(buffer.nbytes, total)
            yield buffer


def _hash_checkpoint(reader: TorchDistReader, mapping: HfMapping, entries: Sequence[Entry]) -> dict[str, str]:
    """sha256 of Hugging Face tensors as they are read back through the mapping."""
    hashes = RowHashes()
    for entry in entries:
        shard = mapping.shard(entry)
        for start, stop in reader.chunk_rows(entry.checkpoint_key, entry.index):
            rows = reader.read(entry.checkpoint_key, entry.index, (start, stop))
            for piece in shard.within(start, stop):
                at = piece.offset - start
                hashes.update(entry.sources[piece.source], rows[at : at + piece.rows])
    return hashes.hexdigests()


# --- Megatron to Hugging Face ---------------------------------------------------------------------------------------


def model_files_of(checkpoint: Path, hf_dir: str | Path | None) -> Path:
    """Folder with the config.json and tokenizer of a checkpoint: ``hf_dir`` if given, else what it carries.

    Raises:
        InputError: neither is there.
    """
    folder = Path(hf_dir) if hf_dir is not None else checkpoint / MODEL_FILES_FOLDER
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no config.json -> name the Hugging Face folder of this model with --hf")
    return folder


def megatron_to_hf(
    checkpoint: str | Path,
    output: str | Path,
    *,
    hf_dir: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    verify: Verify = "hash",
    text: str | None = None,
    progress: Progress = lambda done, total: None,
) -> None:
    """Convert a Megatron checkpoint, converted or saved in training at any layout, to a Hugging Face folder.

    Collective under torchrun: every process writes its own shards.

    Args:
        hf_dir: configuration and tokenizer, where the checkpoint carries none.
        dtype: of the written tensors; None keeps them.
        verify: see :data:`Verify`; ``text`` is what ``logits`` runs on. A checkpoint that came from Hugging Face
            unchanged must also give the hashes that it recorded.

    Raises:
        InputError: a checkpoint that is damaged or does not fit its config.json, an output that exists, disk full,
            or a difference on reading back. Nothing is left behind.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    model_files = model_files_of(checkpoint, hf_dir)
    mapping = HfMapping(read_model_shape(model_files))
    reader = TorchDistReader(checkpoint)
    places = locate_entries(reader, mapping)
    entries = list(mapping.entries.values())
    dtypes = {
        source: dtype or reader.tensors[places[entry.name][0]].properties.dtype
        for entry in entries
        for source in entry.sources
    }
    rank, count = process_rank_and_count()
    runs = split_entries(entries, dtypes, count)
    plans = plan_shards((_layouts(run, dtypes) for run in runs), max_shard_bytes)
    recorded = read_source_record(checkpoint) if dtype is None and verify != "off" else None
    check_free_space(output, total_bytes(entries, dtypes))

    def write() -> None:
        total = total_bytes(runs[rank], dtypes)
        stream = ExportStream(folder, plans[rank])
        for entry, tensors in prefetch(_read_entries(reader, mapping, runs[rank], places, dtypes)):
            for name, tensor in zip(entry.sources, tensors, strict=True):
                stream.write(name, tensor)
                progress(tensor.nbytes, total)
        stream.finish(verify=verify != "off")
        if recorded is not None:
            mine = {name: recorded["tensors_sha256"][name] for name in stream.hashes}
            compare_hashes(checkpoint, mine, stream.hashes)

    with shared_directory(output) as folder:
        gather_results(write, output)
        if rank == 0:
            write_index(folder, [plan for run in plans for plan in run])
            write_model_files(model_files, folder, dtypes[entries[0].sources[0]])
            if verify == "logits":
                run_logits_check(folder, checkpoint, text)


def _layouts(entries: Sequence[Entry], dtypes: Mapping[str, torch.dtype]) -> dict[str, TensorLayout]:
    return {
        name: (size, dtypes[name])
        for entry in entries
        for name, size in zip(entry.sources, entry.source_shapes, strict=True)
    }


def _read_entries(
    reader: TorchDistReader,
    mapping: HfMapping,
    entries: Sequence[Entry],
    places: Mapping[str, tuple[str, tuple[int, ...]]],
    dtypes: Mapping[str, torch.dtype],
) -> Iterator[tuple[Entry, list[torch.Tensor]]]:
    """The Hugging Face tensors of each entry."""
    for entry in entries:
        key, index = places[entry.name]
        outputs = [
            torch.empty(size, dtype=dtypes[name]) for name, size in zip(entry.sources, entry.source_shapes, strict=True)
        ]
        for start, stop in reader.chunk_rows(key, index):
            scatter_rows(outputs, mapping.shard(entry), reader.read(key, index, (start, stop)), start)
        yield entry, outputs


def locate_entries(reader: TorchDistReader, mapping: HfMapping) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Where a checkpoint holds each entry: canonical name -> (key, index along its stacked axes).

    Megatron writes layers stacked, or one key a layer (``non_homogeneous_layers``); its local MoE spec gives the
    norm before the MLP the name of a fused one.

    Raises:
        InputErrors: every absent tensor, wrong shape, and model tensor without a place.
    """
    problems, places, used = [], {}, set()
    for entry in mapping.entries.values():
        candidates = [c for c in mapping.checkpoint_places(entry) if c[0] in reader.tensors]
        if not candidates:
            problems.append(f"{entry.checkpoint_key} is missing -> this checkpoint is of another model")
            continue
        key, index = candidates[0]
        found, expected = tuple(reader.tensors[key].size), stored_shape(mapping, entry)
        expected = expected[len(entry.index) - len(index) :]
        padded = entry.operation == "vocab" and found[0] >= expected[0] and found[1:] == expected[1:]
        if found != expected and not padded:
            problems.append(f"{key} is {list(found)}, config.json makes it {list(expected)}")
        places[entry.name] = (key, index)
        used.add(key)
    problems += [
        f"{key} has no place in {mapping.shape.architecture}"
        for key in reader.tensors
        if key.startswith(_MODEL_KEYS) and key not in used and not key.endswith("_extra_state")
    ]
    if problems:
        raise InputErrors(f"{reader.folder}: does not fit config.json", sorted(set(problems)))
    return places
