"""A further file of log-probs for a shard that stands: made piece by piece, named by the manifest once it is whole.

Pieces are kept in ``PREFIX.logprobs.journal``, which no reader looks at and one process at a time has open. The file is
immutable, and the manifest is replaced last: a reader sees all of it, or nothing.
"""

import base64
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_gft.atomic import atomic_file, fsync_path, writing
from megatron_gft.errors import InputError, InputErrors
from megatron_gft.journal import Journal
from megatron_gft.shards.manifest import file_entry, manifest_path, read_manifest, write_manifest


def has_logprobs(prefix: str, name: str, model: str) -> bool:
    """Whether a shard has log-probs of this name, by the model of this hash; InputError when it has them by another
    model, or cannot be given any."""
    manifest, path = read_manifest(prefix), manifest_path(prefix)
    if name not in manifest.logprob_files:
        if path.is_symlink():
            raise InputError(f"{path}: a link, files beside it would not be found -> name {os.path.realpath(path)}")
        return False
    made = manifest.provenance.get("logprobs", {}).get(name, {})
    if made.get("model") != model:
        raise InputError(
            f"{prefix}: its log-probs {name!r} are of another model, {made.get('source')} with hash "
            f"{str(made.get('model'))[:12]}; this one has {model[:12]} -> take another --name"
        )
    return True


def open_pieces(prefix: str, header: Mapping[str, Any]) -> Journal:
    """The pieces that there are of a shard's log-probs; ``header`` says which, and how they are made. InputError when
    another process writes, or an interrupted run had other settings."""
    pieces = Journal(f"{prefix}.logprobs.journal", header)
    if pieces.header != header:
        pieces.close()
        found = {key: pieces.header.get(key) for key in header}
        raise InputErrors(
            f"{pieces.path}: left by a run with other settings -> finish that one, or remove this file",
            [f"{key}: {found[key]!r} there, {value!r} now" for key, value in header.items() if found[key] != value],
        )
    return pieces


def piece(start: int, values: np.ndarray) -> dict[str, Any]:
    """Record of log-probs float32 [n] of the shard's response tokens from ``start`` on."""
    return {"start": start, "logprobs": base64.b64encode(values.astype("<f4", copy=False).tobytes()).decode("ascii")}


def publish(prefix: str, name: str, made: Mapping[str, Any], pieces: Journal, keys: list[str]) -> str:
    """Write the file of all pieces, NaN where there is none, have the manifest name it, and remove them; its name."""
    shard, manifest = Path(prefix), read_manifest(prefix)
    staged = shard.with_name(f".{shard.name}.logprobs.npy")
    with writing(staged, "what is computed is kept"):
        with atomic_file(staged) as temporary:
            count = manifest.counts.response_tokens
            values = np.lib.format.open_memmap(temporary, "w+", np.float32, (count,))
            values[:] = np.nan
            for record in (pieces[key] for key in keys):
                known = np.frombuffer(base64.b64decode(record["logprobs"]), "<f4")
                values[record["start"] : record["start"] + len(known)] = known
            made = {name: {**made, "unknown": int(np.isnan(values).sum())}}
            values.flush()
        entry = file_entry(staged)
        path = shard.with_name(f"{shard.name}.logprobs-{name}-{entry.sha256[:12]}.npy")
        os.replace(staged, path)
        fsync_path(path.parent)
        changes = {
            "files": {**manifest.files, path.name: entry},
            "logprobs": {**manifest.logprob_files, name: path.name},
            "provenance": {**manifest.provenance, "logprobs": manifest.provenance.get("logprobs", {}) | made},
        }
        write_manifest(prefix, manifest.model_copy(update=changes))
        pieces.path.unlink()  # before it is closed: who comes now finds it in use, or none
    return path.name
