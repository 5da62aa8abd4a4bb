"""The checkpoints of a run as folders: which are complete, which is the newest, which ones go. Knows files only.

Layout of ``RUN/checkpoints``::

    step-00000200/        a complete checkpoint: *.distcp, .metadata, metadata.json, common.pt (Megatron's),
                          state.json (our cursor and data fingerprint), files.json (size and sha256 of each file)
    .step-00000400/       one that is being written, or was when the job died; never read
    .old-step-00000100/   one that is being removed
    latest                name of the newest complete one, replaced atomically

Every change is one rename or one replacement of ``latest``, so a process may die between any two of them.
"""

import itertools
import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from megatron_gft.atomic import atomic_file, fsync_path, sha256_file
from megatron_gft.errors import InputError
from megatron_gft.folders import file_problem, is_inner_name
from megatron_gft.progress import ProgressBar
from megatron_gft.reading import read_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FileFacts:
    """Of a file that was written."""

    bytes: int
    sha256: str


Files = dict[str, FileFacts]
"""Size and sha256 of each file of a checkpoint, by its name in the folder."""

STATE_FILE, FILES_FILE, LATEST_FILE = "state.json", "files.json", "latest"
_STEP_FOLDER = re.compile(r"step-(\d{8})")


def step_of(path: Path) -> int:
    """Finished steps of a checkpoint, by its name."""
    return int(path.name.removeprefix("step-"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, by step."""
    return [path for path in _step_folders(folder) if (path / FILES_FILE).is_file()]


def _step_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if _STEP_FOLDER.fullmatch(path.name))


def find_checkpoint(folder: Path, which: str) -> Path | None:
    """``latest`` or ``previous`` complete checkpoint of ``RUN/checkpoints``; None when the folder holds none.

    Without the file ``latest`` the newest step counts: its writer died before it could name it.

    Raises:
        InputError: ``latest`` names a checkpoint that is not there; no checkpoint came before it; all are incomplete.
    """
    complete = list_checkpoints(folder)
    named = _named(folder)
    if named is None and not complete:
        if halves := _step_folders(folder):  # a run from step 0 would overwrite them
            raise InputError(f"{halves[-1]}: incomplete, it has no {FILES_FILE} -> restore the folder, or remove it")
        return None
    latest = complete[-1] if named is None else folder / named
    if which == "previous":
        earlier = [path for path in complete if path.name < latest.name]
        if not earlier:
            raise InputError(
                f"{folder}: checkpoint.resume=previous, and there is no checkpoint before {latest.name[:40]} -> "
                "restore that one, or begin anew with another train.output"
            )
        return earlier[-1]
    if latest not in complete:
        raise InputError(
            f"{folder / LATEST_FILE}: names {str(named)[:40]!r}, which is not there -> restore that folder, or remove "
            f"{LATEST_FILE}: then the newest one counts"
        )
    return latest


def publish(partial: Path, step: int, keep_last: int) -> Path:
    """Make the finished folder ``partial`` the newest checkpoint, and remove those that are not wanted any more:
    all but the last ``keep_last``, and those of later steps, which belong to a past that was given up. Its new name.
    """
    folder, final = partial.parent, partial.with_name(f"step-{step:08d}")
    fsync_path(partial)
    if final.exists() and not (final / FILES_FILE).is_file():  # half a copy, perhaps the only one there is
        aside = next(path for n in itertools.count(1) if not (path := folder / f"incomplete-{n}-{final.name}").exists())
        os.rename(final, aside)
        logger.warning("%s: had no %s, so no run wrote it whole; it is %s now", final, FILES_FILE, aside.name)
    elif final.exists():  # of a past that was given up; ``latest`` must not name it while it is gone
        earlier = [path for path in list_checkpoints(folder) if step_of(path) < step]
        if earlier and _named(folder) == final.name:
            _point_to(earlier[-1])
        _remove(final)
    os.rename(partial, final)
    fsync_path(folder)
    _point_to(final)
    complete = list_checkpoints(folder)
    kept = [path for path in complete if step_of(path) <= step][-keep_last:]
    for path in complete:
        if path not in kept:
            _remove(path)
    for leftover in folder.glob(".old-step-*"):  # of a process that died here
        shutil.rmtree(leftover, ignore_errors=True)
    return final


def _named(folder: Path) -> str | None:
    """What ``latest`` says; None without that file."""
    pointer = folder / LATEST_FILE
    try:
        return pointer.read_bytes().decode("utf-8", "replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise InputError(
            f"{pointer}: cannot be read ({error.strerror}) -> correct that, or remove it: then the newest one counts"
        ) from None


def _point_to(path: Path) -> None:
    with atomic_file(path.parent / LATEST_FILE) as temporary:
        temporary.write_text(path.name + "\n")


def _remove(path: Path) -> None:
    """First out of sight, then away: half of a checkpoint is never seen under its name."""
    doomed = path.with_name(f".old-{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def find_damage(path: Path, *, part: int = 0, parts: int = 1) -> list[str]:
    """Compare part ``part`` of ``parts`` of a checkpoint's files with their recorded size and sha256."""
    try:
        expected = read_json(path / FILES_FILE, kind=Files)
    except InputError as error:
        return [str(error)]
    problems = []
    files = sorted(expected)[part::parts]
    for name in ProgressBar(files, f"verifying {path.name}", unit="file", show=part == 0, leave=False):
        file, entry = path / name, expected[name]
        inner = is_inner_name(name)
        if problem := file_problem(file, path) if inner else f"{FILES_FILE}: {name!r} is no file in the folder":
            problems.append(problem)
        elif not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != entry.bytes:
            problems.append(f"{name} has {file.stat().st_size} bytes, {entry.bytes} were written")
        elif sha256_file(file) != entry.sha256:
            problems.append(f"{name}: the content differs from what was written")
    return problems


def newest_checkpoint(path: Path, option: str) -> Path:
    """``path`` itself when it is a checkpoint, else the newest one of the run folder that it is.

    Raises:
        InputError: neither; the message names the ``option`` that gave the path.
    """
    if (path / "metadata.json").is_file():
        return path
    for folder in (path, path / "checkpoints"):
        if (found := find_checkpoint(folder, "latest")) is not None:
            return found
    tracker = path / "latest_checkpointed_iteration.txt"  # of Megatron-LM's own programs: a number, or "release"
    if tracker.is_file():
        name = tracker.read_text(encoding="utf-8", errors="replace").strip()
        folder = path / (name if name == "release" else f"iter_{name.zfill(7)}")
        if (folder / "metadata.json").is_file():
            return folder
    raise InputError(
        f"{option}={path}: neither a Megatron checkpoint nor a run folder with one -> name one of these (Hugging Face "
        f"weights for checkpoint.init_from: hf:{path})"
    )
