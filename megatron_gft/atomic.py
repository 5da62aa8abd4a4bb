"""Outputs appear whole or not at all: temporary name in the same folder, fsync, rename, fsync of the folder."""

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_gft.errors import InputError


def fsync_path(path: Path) -> None:
    """Flush a file or a folder entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_name(path: Path) -> Path:
    """Name beside ``path`` that readers ignore (leading dot) and that two processes do not share."""
    return path.with_name(f".{path.name}.tmp-{os.getpid()}")


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path to write; it replaces ``path`` on success and is removed on failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        yield temporary
        fsync_path(temporary)
        os.replace(temporary, path)
        fsync_path(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary folder to fill; it becomes ``path`` on success and is removed on failure.

    Raises:
        InputError: ``path`` exists already; an existing output is never overwritten.
    """
    path = Path(path)
    if path.exists():
        raise InputError(f"{path}: output folder exists already -> remove it or choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for folder, _, files in os.walk(temporary):
            for name in files:
                fsync_path(Path(folder) / name)
            fsync_path(Path(folder))
        os.rename(temporary, path)
        fsync_path(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def working_folder(output: Path) -> Iterator[Path]:
    """A folder beside ``output`` for what is being made: this process's alone, gone afterwards. What killed processes
    left there goes first; a living one that makes ``output`` is an InputError."""
    prefix = f".{output.name}.tmp-"
    folder = output.with_name(prefix + "work")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.stat(folder / "lock")  # gone: that run ended just now
        except (BlockingIOError, FileNotFoundError):
            raise InputError(f"{output}: in use by another run -> wait for it, or choose another output") from None
        old = [left for left in output.parent.glob(glob.escape(prefix) + "*") if left != folder]  # named by process
        for left in [folder / "made", *(left for left in old if not Path("/proc", left.name[len(prefix) :]).exists())]:
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
        try:
            (folder / "made").mkdir()
            yield folder / "made"
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write ``value``, which may hold dataclasses, as indented JSON, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False, default=asdict) + "\n", encoding="utf-8")


def check_output(path: str | os.PathLike) -> None:
    """Raise InputError for what a file could not be written to, before there is something to write: it is no file, or
    its folder can be neither written to nor made. Leaves nothing behind."""
    target = Path(path)
    if target.exists() and not target.is_file():
        raise InputError(f"{target}: exists and is no file -> choose another output")
    folder = next(parent for parent in target.absolute().parents if parent.exists())
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        reason = error.strerror
        raise InputError(f"{target}: cannot be written in {folder} ({reason}) -> choose another output") from None


@contextlib.contextmanager
def writing(path: str | os.PathLike, kept: str = "") -> Iterator[None]:
    """Any OSError as an InputError that names the file, and what of it a further run finds (``kept``)."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror or error}) -> see to it (room on the disk, limits, rights), "
            f"then run the same command again{kept and '; ' + kept}"
        ) from error


def sha256_file(path: str | os.PathLike) -> str:
    """Hex sha256 of a file's bytes, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hex sha256 of a JSON value in canonical form (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
