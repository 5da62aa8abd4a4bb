"""Folders that come from elsewhere: nothing outside them is read, and nothing in them is run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_gft.errors import InputError, InputErrors
from megatron_gft.reading import refuse_damage

MODEL_FILES = tuple("*.json *.jinja *.model *.tiktoken *.txt *.safetensors *.bin *.py *chat_templates".split())


def is_inner_name(name: object) -> bool:
    """Whether this names something below a folder: no way up, no root, nothing that a terminal would obey."""
    return isinstance(name, str) and all(
        part not in ("", ".", "..") and part.isprintable() and "\\" not in part for part in name.split("/")
    )


def file_problem(path: Path, *folders: Path) -> str | None:
    """Why ``path`` is not read: a link that leaves all ``folders`` (and the blobs of the hub's cache), or no file."""
    roots = [Path(os.path.realpath(folder)) for folder in folders]
    roots += [root.parents[1] / "blobs" for root in roots if root.parent.name == "snapshots"]
    target = Path(os.path.realpath(path))
    if not any(target.is_relative_to(root) for root in roots):
        return f"{path}: a link out of its folder, to {target} -> put the file itself there"
    if target.exists() and not (target.is_file() or target.is_dir()):
        return f"{path}: neither a file nor a folder -> remove it"
    return None


def check_folder(folder: Path, patterns: Iterable[str]) -> None:
    """Raise InputErrors for links out of the folder, FIFOs, devices and sockets among what matches, and below it."""
    found = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    special = (path for match in found for path in _files(match) if path.is_symlink() or not path.is_file())
    if problems := list(filter(None, (file_problem(path, folder) for path in special))):
        raise InputErrors(f"{folder}: holds what is not read", problems)


def _files(path: Path) -> Iterator[Path]:
    yield path
    if not path.is_symlink():
        for folder, folders, names in os.walk(path):  # which follows no links
            yield from (Path(folder) / name for name in [*folders, *names])


def from_folder(
    loader: Any, folder: str | Path, problem: str, remedy: str, trust_remote_code: bool, **options: Any
) -> Any:
    """``loader.from_pretrained(folder)``, which asks nothing and runs no code of the folder unless it is trusted.

    Whatever transformers raises becomes an InputError with ``problem`` and ``remedy``; a damaged file is named.
    """
    check_folder(Path(folder), MODEL_FILES)
    try:
        return loader.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=trust_remote_code, **options
        )
    except Exception as error:  # of a damaged file, whatever its reader raises: of pickle, struct, safetensors, ...
        if "trust_remote_code" in str(error):
            problem, error = f"{problem} without its own code", ValueError("auto_map names Python files")
            remedy = "read them; to run them: --trust-remote-code (in a source: trust_remote_code=true)"
        else:
            refuse_damage(folder)
        raise InputError(f"{folder}: {problem} ({error or type(error).__name__}) -> {remedy}") from error
