"""Offline conversion, no model built: Hugging Face folder <-> Megatron ``torch_dist`` checkpoint.

Both directions stream: a chunk (to Megatron) or a tensor (to Hugging Face) is made while the last one is written,
so memory does not grow with the model. Started under torchrun, processes share the tensors by bytes. Every tensor
is hashed on its way, the output is read back through the mapping and compared, and only then gets its name.
"""

import concurrent.futures
import contextlib
import hashlib
import itertools
import logging
import multiprocessing
import shutil
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Literal

import torch

from megatron_gft.atomic import write_json
from megatron_gft.checkpoints.torch_dist import CHUNK_BYTES, StoredTensor, TorchDistReader, write_torch_dist
from megatron_gft.checkpoints.verification import verify_checkpoint, write_file_hashes
from megatron_gft.errors import InputError, refuse
from megatron_gft.hf.files import (
    MODEL_FILES_FOLDER,
    SOURCE_FILE,
    check_tensors,
    compare_hashes,
    file_hashes,
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
    refuse_nonfinite,
    row_chunks,
    tensor_bytes,
    write_index,
    write_shard,
)
from megatron_gft.hf.shape import read_model_shape, shape_differences
from megatron_gft.hf.shared_folder import gather_results, process_rank_and_count, shared_directory
from megatron_gft.progress import ProgressBar
from megatron_gft.runtime import prefetch

logger = logging.getLogger(__name__)

Verify = Literal["hash", "logits", "off"]
"""Read the output back and compare every tensor's sha256; also run both models on a text; neither."""

_MODEL_KEYS = ("embedding.", "decoder.", "output_layer.")


Layouts = Mapping[str, TensorLayout]
"""Shape and dtype of every Hugging Face tensor to write, by name."""

Hashes = defaultdict[str, "hashlib._Hash"]
"""Of tensors whose rows arrive in order but interleaved with other tensors' rows."""


def total_bytes(entries: Iterable[Entry], layouts: Layouts) -> int:
    """Bytes of the Hugging Face tensors of these entries."""
    return sum(layout_bytes(layouts[name]) for entry in entries for name in entry.sources)


def split_entries(entries: Sequence[Entry], layouts: Layouts, parts: int) -> list[list[Entry]]:
    """Consecutive runs of about equal bytes, one for each process."""
    whole, done = total_bytes(entries, layouts), 0
    runs: list[list[Entry]] = [[] for _ in range(parts)]
    for entry in entries:
        size = total_bytes([entry], layouts)
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
    """:func:`megatron_gft.conversion.verify.verify_logits` in a process of its own: it needs its own process group."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        logger.info("%s", process.submit(_compare_logits, hf_dir, checkpoint, text).result())


def _compare_logits(hf_dir: Path, checkpoint: Path, text: str | None) -> str:
    warnings.simplefilter("ignore")  # Megatron-Core's, about optional packages
    from megatron_gft.conversion.verify import verify_logits

    return str(verify_logits(hf_dir, checkpoint, text))


# --- Hugging Face to Megatron ---------------------------------------------------------------------------------------


def hf_to_megatron(
    hf_dir: str | Path,
    output: str | Path,
    *,
    dtype: torch.dtype | None = None,
    verify: Verify = "hash",
    text: str | None = None,
    progress: bool = False,
) -> None:
    """Convert a Hugging Face folder to a Megatron checkpoint of any layout. Collective under torchrun.

    ``dtype`` None keeps that of the tensors; ``text`` is what :data:`Verify` ``logits`` runs on.

    Raises:
        InputError: unsupported model, weights that do not fit it, an output that exists, disk full, or a
            difference on reading back. Nothing is left behind.
    """
    hf_dir, output = Path(hf_dir), Path(output)
    mapping = HfMapping(read_model_shape(hf_dir))
    weights = SafetensorsFolder(hf_dir)
    check_tensors(weights, mapping)
    layouts = {name: (size, dtype or weights.tensors[name].dtype) for name, size in mapping.hf_shapes.items()}
    entries = list(mapping.entries.values())
    _check_one_dtype_per_key(hf_dir, entries, layouts)
    rank, count = process_rank_and_count()
    mine = split_entries(entries, layouts, count)[rank]
    stage = partial(ProgressBar, None, total=total_bytes(mine, layouts), unit="B", show=progress and rank == 0)
    check_free_space(output, total_bytes(entries, layouts))

    def write() -> dict[str, str]:
        """This process's entries, checked; sha256 of each of their Hugging Face tensors."""
        hashes: Hashes = defaultdict(hashlib.sha256)
        parts = [(entry, part) for entry in mine for part in stored_parts(mapping, entry, layouts)]

        def data() -> Iterator[torch.Tensor]:
            with stage("writing") as bar:
                for entry, part in parts:
                    rows = _read_part(mapping, entry, part, weights, hashes)
                    bar.update(rows.nbytes)
                    yield rows

        write_torch_dist(folder, [part for _, part in parts], data())
        given = {name: digest.hexdigest() for name, digest in hashes.items()}
        if verify != "off":
            with stage("reading back") as bar:
                compare_hashes(folder, given, _hash_checkpoint(TorchDistReader(folder), mapping, mine, bar))
        return given

    with shared_directory(output) as folder:
        given = {name: digest for share in gather_results(write, output) for name, digest in share.items()}

        def finish() -> None:
            if rank == 0:
                if verify == "logits":
                    run_logits_check(hf_dir, folder, text)
                (folder / MODEL_FILES_FOLDER).mkdir()
                write_model_files(hf_dir, folder / MODEL_FILES_FOLDER, dtype)
                write_json(folder / SOURCE_FILE, source_record(hf_dir, given))

        gather_results(finish, output)
        write_file_hashes(folder)


def _check_one_dtype_per_key(hf_dir: Path, entries: Sequence[Entry], layouts: Layouts) -> None:
    """Megatron stacks layers: one dtype for all of them."""
    found: dict[str, set[str]] = defaultdict(set)
    for entry in entries:
        found[entry.checkpoint_key].update(str(layouts[source][1]) for source in entry.sources)
    problems = [
        f"{key}: its tensors are {', '.join(sorted(kinds))} -> choose one with --dtype"
        for key, kinds in found.items()
        if len(kinds) > 1
    ]
    refuse(f"{hf_dir}: a Megatron tensor holds one dtype", problems)


def stored_shape(mapping: HfMapping, entry: Entry) -> tuple[int, ...]:
    """Shape of the checkpoint tensor that holds this entry, stacked over layers and experts; vocabulary unpadded."""
    axes = (mapping.shape.num_layers, mapping.shape.num_moe_experts or 0)[: len(entry.index)]
    return (*axes, *mapping.shard(entry).shape)


def stored_parts(mapping: HfMapping, entry: Entry, layouts: Layouts) -> Iterator[StoredTensor]:
    """The chunks in which an entry is stored."""
    shape, dtype = stored_shape(mapping, entry), layouts[entry.sources[0]][1]
    rows, *rest = shape[len(entry.index) :]
    for chunk in row_chunks(rows, prod(rest) * dtype.itemsize, CHUNK_BYTES):
        yield StoredTensor(entry.checkpoint_key, shape, dtype, entry.index, chunk)


def _read_part(
    mapping: HfMapping, entry: Entry, part: StoredTensor, weights: SafetensorsFolder, hashes: Hashes
) -> torch.Tensor:
    """The rows of a stored part [rows, ...], read from safetensors and hashed by source tensor."""
    buffer = torch.empty(part.sizes[len(part.index) :], dtype=part.dtype)
    start, stop = part.rows
    for piece in mapping.shard(entry).within(start, stop):
        name, at = entry.sources[piece.source], piece.offset - start
        rows = buffer[at : at + piece.rows]
        stored = weights.read(name, (piece.start, piece.stop))
        rows.copy_(stored)
        refuse_nonfinite(rows, f"{weights.tensors[name].file}: tensor {name}", [stored])
        hashes[name].update(tensor_bytes(rows))
    return buffer


def _hash_checkpoint(
    reader: TorchDistReader, mapping: HfMapping, entries: Sequence[Entry], bar: ProgressBar
) -> dict[str, str]:
    """sha256 of Hugging Face tensors as they are read back through the mapping."""
    hashes: Hashes = defaultdict(hashlib.sha256)
    for entry in entries:
        for start, stop in reader.chunk_rows(entry.checkpoint_key, entry.index):
            rows = reader.read(entry.checkpoint_key, entry.index, (start, stop))
            bar.update(rows.nbytes)
            for piece in mapping.shard(entry).within(start, stop):
                at = piece.offset - start
                hashes[entry.sources[piece.source]].update(tensor_bytes(rows[at : at + piece.rows]))
    return {name: digest.hexdigest() for name, digest in hashes.items()}


# --- Megatron to Hugging Face ---------------------------------------------------------------------------------------


def megatron_to_hf(
    checkpoint: str | Path,
    output: str | Path,
    *,
    hf_dir: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    verify: Verify = "hash",
    text: str | None = None,
    progress: bool = False,
) -> None:
    """Convert a Megatron checkpoint, converted or saved in training at any layout, to a Hugging Face folder.

    Collective under torchrun: every process writes its own shards.

    Args:
        hf_dir: configuration and tokenizer, where the checkpoint carries none.
        verify: a checkpoint that came from Hugging Face unchanged must also give the hashes that it recorded.

    Raises:
        InputError: a checkpoint that is damaged or does not fit its config.json, an output that exists, disk full,
            or a difference on reading back. Nothing is left behind.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    verify_checkpoint(checkpoint)
    model_files = _model_files(checkpoint, hf_dir)
    mapping = HfMapping(read_model_shape(model_files))
    reader = TorchDistReader(checkpoint)
    places = locate_entries(reader, mapping)
    entries = list(mapping.entries.values())
    layouts = _exported_layouts(reader, entries, places, dtype)
    rank, count = process_rank_and_count()
    runs = split_entries(entries, layouts, count)
    plans = plan_shards(
        [{name: layouts[name] for entry in run for name in entry.sources} for run in runs], max_shard_bytes
    )
    recorded = read_source_record(checkpoint) if dtype is None and verify != "off" else None
    check_free_space(output, total_bytes(entries, layouts))

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for entry in runs[rank]:
            yield from zip(entry.sources, _read_entry(reader, mapping, entry, places[entry.name], layouts), strict=True)

    def write() -> None:
        """This process's shards, checked against the sha256 of each tensor as it was given."""
        hashes, size = {}, total_bytes(runs[rank], layouts)
        stage = partial(ProgressBar, None, total=size, unit="B", show=progress and rank == 0)

        def noted(pair: tuple[str, torch.Tensor]) -> tuple[str, torch.Tensor]:
            hashes[pair[0]] = hashlib.sha256(tensor_bytes(pair[1])).hexdigest()
            bar.update(pair[1].nbytes)
            return pair

        with stage("writing") as bar, contextlib.closing(prefetch(tensors())) as stream:
            for file, planned in plans[rank].items():
                write_shard(folder / file, planned, itertools.islice(map(noted, stream), len(planned)))
        if verify != "off":
            with stage("reading back") as bar:
                compare_hashes(folder, hashes, file_hashes(folder, list(plans[rank]), bar))
        if recorded is not None:
            known = {name: digest for name, digest in recorded["tensors_sha256"].items() if name in hashes}
            compare_hashes(checkpoint, known, hashes)

    with shared_directory(output) as folder:
        gather_results(write, output)
        if rank == 0:
            write_index(folder, dict(itertools.chain.from_iterable(plan.items() for plan in plans)))
            write_model_files(model_files, folder, layouts[entries[0].sources[0]][1])
            if verify == "logits":
                run_logits_check(folder, checkpoint, text)


def _model_files(checkpoint: Path, hf_dir: str | Path | None) -> Path:
    folder = Path(hf_dir) if hf_dir is not None else checkpoint / MODEL_FILES_FOLDER
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no config.json -> name the Hugging Face folder of this model with --hf")
    if folder != (own := checkpoint / MODEL_FILES_FOLDER) and (own / "config.json").is_file():
        differences = shape_differences(read_model_shape(folder), read_model_shape(own))
        refuse(
            f"--hf {folder}: not the config.json of this model -> leave --hf out",
            [f"{key}: {given!r}, {stored!r} by {own}" for key, (given, stored) in differences.items()],
        )
    return folder


def _exported_layouts(
    reader: TorchDistReader,
    entries: Sequence[Entry],
    places: Mapping[str, tuple[str, tuple[int, ...]]],
    dtype: torch.dtype | None,
) -> Layouts:
    """Shape and dtype of each Hugging Face tensor that is written; the checkpoint's dtype where none is asked for."""
    return {
        name: (size, dtype or reader.tensors[places[entry.name][0]].properties.dtype)
        for entry in entries
        for name, size in zip(entry.sources, entry.source_shapes, strict=True)
    }


def _read_entry(
    reader: TorchDistReader, mapping: HfMapping, entry: Entry, place: tuple[str, tuple[int, ...]], layouts: Layouts
) -> list[torch.Tensor]:
    """The Hugging Face tensors of an entry that lies at ``place`` (key, index) in the checkpoint."""
    outputs = [torch.empty(size, dtype=dtype) for size, dtype in map(layouts.__getitem__, entry.sources)]
    for start, stop in reader.chunk_rows(*place):
        scatter_rows(outputs, mapping.shard(entry), reader.read(*place, (start, stop)), start)
    for name, output in zip(entry.sources, outputs, strict=True):
        stored = (reader.read(*place, rows) for rows in reader.chunk_rows(*place))
        refuse_nonfinite(output, f"{reader.file_of(*place)}: {place[0]}{list(place[1])} (tensor {name})", stored)
    return outputs


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
    refuse(f"{reader.folder}: does not fit config.json", sorted(set(problems)), shown=12)
    return places
