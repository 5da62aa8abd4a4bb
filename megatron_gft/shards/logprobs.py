"""A further file of log-probs for a shard that stands: made piece by piece, named by the manifest once it is whole.

Pieces are kept in ``PREFIX.logprobs.journal``, which no reader looks at and only one process at a time has open. The
whole file is immutable. Its manifest is replaced last, so a reader sees all of it, or nothing.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_gft.atomic import atomic_file, fsync_path, writing
from megatron_gft.errors import InputError, InputErrors
from megatron_gft.journal import Journal
from megatron_gft.shards.manifest import ShardManifest, file_entry, manifest_path, read_manifest, write_manifest

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def check_name(name: str) -> None:
    """Raise InputError unless log-probs may be called so."""
    if name == "sampled" or not _NAME.fullmatch(name):
        raise InputError(
            f"--name {name!r}: letters, digits, - and _, and not 'sampled' (what the samplers themselves said) -> such "
            "as --name start"
        )


def provenance_of(manifest: ShardManifest, name: str) -> dict[str, Any]:
    """How the log-probs of this name were made; empty for those that came with the samples."""
    made = manifest.provenance.get("logprobs", {})
    return made.get(name, {}) if isinstance(made, dict) else {}


def has_logprobs(prefix: str, name: str, model: str) -> bool:
    """Whether a shard has log-probs of this name, by the model of this hash.

    Raises:
        InputError: it has them by another model, or cannot be given any.
    """
    manifest = read_manifest(prefix)
    if name not in manifest.logprob_files:
        if (path := manifest_path(prefix)).is_symlink():
            raise InputError(f"{path}: a link, beside which files would not be found -> name {os.path.realpath(path)}")
        return False
    made = provenance_of(manifest, name)
    if made.get("model") != model:
        raise InputError(
            f"{prefix}: its log-probs {name!r} are of another model: {made.get('source')}, hash "
            f"{str(made.get('model'))[:12]}; this is {model[:12]} -> another --name, files of a shard do not change"
        )
    return True


class LogprobWriter:
    """Collects the log-probs of one shard; :meth:`publish` makes them part of it. A context manager.

    Args:
        provenance: JSON object for the manifest: model, layout, dtype, ...
        pieces: JSON object that says how the shard is cut into pieces.

    Attributes:
        done: names of the pieces that an earlier, interrupted run left.

    Raises:
        InputError: another process writes, or an unfinished file is of other settings.
    """

    def __init__(self, prefix: str, name: str, provenance: Mapping[str, Any], pieces: Mapping[str, Any]):
        self.prefix, self.name, self.provenance = Path(prefix), name, dict(provenance)
        header = {"name": name, **provenance, "pieces": dict(pieces)}
        self.journal = Journal(f"{prefix}.logprobs.journal", header)
        found = self.journal.header
        if found != header:
            self.journal.close()
            keys = [key for key in {**header, **found} if header.get(key) != found.get(key)]
            raise InputErrors(
                f"{self.journal.path}: log-probs that an interrupted run began with other settings -> finish them with "
                "those, or remove this file",
                [f"{key}: {found.get(key)!r} there, {header.get(key)!r} now" for key in keys],
            )
        self.done = [*self.journal]

    def __enter__(self) -> LogprobWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.journal.close()

    def add(self, key: str, start: int, values: np.ndarray) -> None:
        """Keep a piece: float32 [n], log-probs of the response tokens of the shard from ``start`` on."""
        text = base64.b64encode(values.astype("<f4", copy=False).tobytes()).decode("ascii")
        self.journal.append(key, {"start": start, "logprobs": text})

    def publish(self) -> str:
        """Write the file of all pieces, NaN where there is none, and have the manifest name it. The file's name."""
        count = read_manifest(self.prefix).counts.response_tokens
        staged = self.prefix.with_name(f".{self.prefix.name}.logprobs.npy")
        with writing(staged, "what is computed is kept"):
            with atomic_file(staged) as temporary:
                values = np.lib.format.open_memmap(temporary, "w+", np.float32, (count,))
                values[:] = np.nan
                for key in self.journal:
                    piece = self.journal[key]
                    known = np.frombuffer(base64.b64decode(piece["logprobs"]), "<f4")
                    values[piece["start"] : piece["start"] + len(known)] = known
                unknown = int(np.isnan(values).sum())
                values.flush()
                del values
            entry = file_entry(staged)
            path = self.prefix.with_name(f"{self.prefix.name}.logprobs-{self.name}-{entry.sha256[:12]}.npy")
            os.replace(staged, path)
            fsync_path(path.parent)
            manifest = read_manifest(self.prefix)
            made = {self.name: {**self.provenance, "unknown": unknown}}
            provenance = {**manifest.provenance, "logprobs": {**manifest.provenance.get("logprobs", {}), **made}}
            names = {**manifest.logprob_files, self.name: path.name}
            changes = {"files": {**manifest.files, path.name: entry}, "logprobs": names, "provenance": provenance}
            write_manifest(self.prefix, manifest.model_copy(update=changes))
            self.journal.path.unlink()  # before it is closed: who waits for it finds it in use, or anew
        return path.name
