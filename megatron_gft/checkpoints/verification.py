"""Whether a checkpoint's files are what was written: the one check on every way in (resume, init_from, conversion)."""

import itertools
import logging
from collections.abc import Sequence
from pathlib import Path

from megatron_gft.atomic import fsync_path, sha256_file, sha256_json, write_json
from megatron_gft.checkpoints.history import FILES_FILE, STATE_FILE, FileFacts, Files, find_damage, newest_checkpoint
from megatron_gft.checkpoints.torch_dist import Backends
from megatron_gft.errors import refuse
from megatron_gft.hf.files import HASHED_SINCE, read_source_record
from megatron_gft.hf.safetensors_io import SafetensorsFolder
from megatron_gft.hf.shared_folder import gather_results, process_rank_and_count
from megatron_gft.reading import read_json

logger = logging.getLogger(__name__)


def describe_files(folder: Path, files: Sequence[Path]) -> Files:
    """Size and sha256 of ``files``, flushed to the disk, by their names within ``folder``."""
    described = {}
    for path in files:
        fsync_path(path)
        described[str(path.relative_to(folder))] = FileFacts(path.stat().st_size, sha256_file(path))
    return described


def write_file_hashes(folder: Path) -> None:
    """Write ``files.json`` of a folder that is complete, every process hashing a share of its files. Collective."""
    rank, count = process_rank_and_count()
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / FILES_FILE)
    files = gather_results(lambda: found)[0]  # another machine may not see all of them yet
    shares = gather_results(lambda: describe_files(folder, files[rank::count]), folder)
    if rank == 0:
        write_json(folder / FILES_FILE, {name: entry for share in shares for name, entry in share.items()})


def model_hash(origin: str) -> str:
    """Hex sha256 that is the identity of what ``checkpoint.init_from`` names: of a checkpoint's files.json, or of the
    hashes of the files (of a Hugging Face folder: config.json and weights), by name. Collective.

    Raises:
        InputError: there is no such model.
    """
    if origin.startswith("hf:"):
        folder = Path(origin.removeprefix("hf:"))
        files = [folder / "config.json", *{info.file for info in SafetensorsFolder(folder).tensors.values()}]
    else:
        folder = newest_checkpoint(Path(origin), "checkpoint.init_from")
        if (folder / FILES_FILE).is_file():
            return sha256_file(folder / FILES_FILE)
        files = [path for path in folder.rglob("*") if path.is_file()]
    rank, count = process_rank_and_count()
    shares = gather_results(lambda: {str(p.relative_to(folder)): sha256_file(p) for p in sorted(files)[rank::count]})
    return sha256_json({name: sha256 for share in shares for name, sha256 in share.items()})


def verify_checkpoint(path: Path, remedy: str = "restore these files, or take another checkpoint") -> None:
    """Compare a checkpoint with its ``files.json``, every process a share of the files. Collective.

    A checkpoint without that file, from another program or converted by an earlier version, passes with a warning.

    Raises:
        InputErrors: on all processes, with each file that is missing or differs.
    """
    rank, count = process_rank_and_count()
    found = gather_results(lambda: _damages(path, rank, count))
    refuse(f"{path}: damaged -> {remedy}", dict.fromkeys(itertools.chain(*found)))
    read_json(path / "metadata.json", "use another checkpoint", Backends)


def _damages(path: Path, rank: int, count: int) -> list[str]:
    if (path / FILES_FILE).is_file():
        return find_damage(path, part=rank, parts=count)
    record = read_source_record(path)
    if (path / STATE_FILE).exists() or (record is not None and record.get("format", 1) >= HASHED_SINCE):
        return [f"{FILES_FILE} is missing"]
    if rank == 0 and path.is_dir():
        logger.warning("%s: has no %s, so its bytes are taken as they are", path, FILES_FILE)
    return []
