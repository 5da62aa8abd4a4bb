"""Checkpoints of a run: Megatron's distributed format, any layout to any layout, complete or absent.

Layout of ``RUN/checkpoints``::

    step-00000200/        a complete checkpoint: *.distcp, .metadata, metadata.json, common.pt (Megatron's),
                          state.json (our cursor and data fingerprint), files.json (size and sha256 of each file)
    .step-00000400/       one that is being written, or was when the job died; never read
    latest                name of the newest complete one, replaced atomically

A save is written to the hidden folder, in the background by default, renamed when every rank is done, and only
then named in ``latest``.
"""

from __future__ import annotations

import concurrent.futures
import inspect
import json
import logging
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import (
    get_default_load_sharded_strategy,
    get_default_save_sharded_strategy,
    load_sharded_metadata,
)
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from megatron_gft.atomic import atomic_file, fsync_path, sha256_file, write_json
from megatron_gft.errors import InputError, InputErrors
from megatron_gft.hf_files import MODEL_FILES_FOLDER, write_model_files
from megatron_gft.model import unwrap
from megatron_gft.parallel import Parallel

logger = logging.getLogger(__name__)

# The only format that changes layout in every dimension; Megatron's default is not.
OPTIMIZER_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}

STATE_FILE, FILES_FILE, LATEST_FILE = "state.json", "files.json", "latest"
_STEP_FOLDER = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class RunState:
    """Where a run stands. Independent of the layout, equal on all ranks.

    ``step`` counts finished optimizer steps, which is also the cursor into the order of the groups;
    ``data_fingerprint`` identifies shards, weights, split and seed; ``consumed_groups`` is for people.
    """

    step: int = 0
    data_fingerprint: str = ""
    groups_per_step: int = 0
    consumed_groups: int = 0
    skipped_steps: int = 0


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [path for path in folder.glob("step-*") if _STEP_FOLDER.fullmatch(path.name)]
    return sorted(path for path in found if (path / FILES_FILE).is_file())


def find_checkpoint(folder: Path, which: str) -> Path | None:
    """``latest`` or ``previous`` complete checkpoint of ``RUN/checkpoints``; None when there is none.

    Raises:
        InputError: ``latest`` names a checkpoint that is not there.
    """
    complete = list_checkpoints(folder)
    if which == "previous":
        return complete[-2] if len(complete) > 1 else None
    pointer = folder / LATEST_FILE
    if not pointer.is_file():
        return None
    path = folder / pointer.read_text().strip()
    if path not in complete:
        raise InputError(
            f"{pointer}: names {path.name}, which is missing or incomplete -> set checkpoint.resume=previous "
            "or restore the folder"
        )
    return path


def verify_files(path: Path, *, hashes: bool) -> None:
    """Compare a checkpoint with its list of files: presence and size, and with ``hashes`` every sha256.

    Raises:
        InputErrors: naming each missing or changed file.
    """
    expected = json.loads((path / FILES_FILE).read_text())
    problems = []
    for name, entry in expected.items():
        file = path / name
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != entry["bytes"]:
            problems.append(f"{name} has {file.stat().st_size} bytes, {entry['bytes']} were written")
        elif hashes and sha256_file(file) != entry["sha256"]:
            problems.append(f"{name}: the content differs from what was written")
    if problems:
        raise InputErrors(f"{path}: damaged -> set checkpoint.resume=previous, or restore these files", problems)


def read_state(path: Path) -> RunState:
    """The run state stored with a checkpoint."""
    return RunState(**json.loads((path / STATE_FILE).read_text()))


def model_state(chunks: list[torch.nn.Module]) -> dict[str, Any]:
    """Sharded state of the model chunks under Megatron's keys: ``model``, or ``model0``, ``model1``..."""
    if len(chunks) == 1:
        return {"model": unwrap(chunks[0]).sharded_state_dict()}
    return {f"model{index}": unwrap(chunk).sharded_state_dict() for index, chunk in enumerate(chunks)}


def load_model_state(chunks: list[torch.nn.Module], loaded: dict[str, Any]) -> None:
    """Put what :func:`model_state`'s keys loaded into the chunks."""
    keys = ["model"] if len(chunks) == 1 else [f"model{index}" for index in range(len(chunks))]
    for chunk, key in zip(chunks, keys, strict=True):
        unwrap(chunk).load_state_dict(loaded[key], strict=False)


class Checkpointer:
    """Saves and restores one run. Every method is collective: all ranks call it."""

    def __init__(
        self,
        folder: Path,
        chunks: list[torch.nn.Module],
        optimizer: MegatronOptimizer | None,
        parallel: Parallel,
        *,
        keep_last: int,
        background: bool,
        model_files: Path,
    ):
        """
        Args:
            folder: ``RUN/checkpoints``.
            model_files: Hugging Face folder whose configuration and tokenizer go into each checkpoint, so that an
                export needs nothing else.
        """
        self.folder, self.chunks, self.optimizer, self.parallel = folder, chunks, optimizer, parallel
        self.keep_last, self.background = keep_last, background
        self.model_files = model_files
        self.queue = AsyncCallsQueue()
        self.pending: tuple[RunState, Path] | None = None

    def save(self, state: RunState) -> None:
        """Write a checkpoint of ``state``; returns once the weights are copied, unless ``background`` is off."""
        self.wait()
        partial = self.folder / f".step-{state.step:08d}"
        if self.parallel.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / MODEL_FILES_FOLDER).mkdir(parents=True)
            write_model_files(self.model_files, partial / MODEL_FILES_FOLDER)
        dist.barrier()
        request = dist_checkpointing.save(
            self._sharded_state(),
            str(partial),
            FullyParallelSaveStrategyWrapper(get_default_save_sharded_strategy(), self.parallel.dp_cp_group),
            async_sharded_save=True,
            content_metadata=OPTIMIZER_METADATA,
            **_async_strategy(dist_checkpointing.save),
        )
        assert request is not None
        self.pending = (state, partial)
        if self.background:
            self.queue.schedule_async_request(request)
        else:
            request.execute_sync()
            self._commit()

    def poll(self) -> bool:
        """Finish a background save whose writers are done; True when it failed and has to be made again."""
        return self._finalize(blocking=False)

    def wait(self) -> bool:
        """Return when no save is outstanding; True when it failed and has to be made again."""
        return self._finalize(blocking=True)

    def _finalize(self, *, blocking: bool) -> bool:
        if self.pending is None:
            return False
        try:
            if self.queue.maybe_finalize_async_calls(blocking=blocking):
                self._commit()
        except CheckpointException as error:  # raised on all ranks when a writer failed on one
            self._give_up(error)
            return True
        return False

    def _give_up(self, error: BaseException) -> None:
        """Report a failed background save. From here on saves run in front, where an error ends the run."""
        assert self.pending is not None
        state, partial = self.pending
        self.pending = None
        self.queue = AsyncCallsQueue()
        self.background = False
        if self.parallel.rank == 0:
            logger.error("checkpoint of step %d failed, trying again without the background: %s", state.step, error)
            shutil.rmtree(partial, ignore_errors=True)

    def _commit(self) -> None:
        assert self.pending is not None
        state, partial = self.pending
        self.pending = None
        final = self.folder / f"step-{state.step:08d}"
        if self.parallel.rank == 0:
            write_json(partial / STATE_FILE, asdict(state))
            write_json(partial / FILES_FILE, _describe_files(partial))
            fsync_path(partial)
            shutil.rmtree(final, ignore_errors=True)
            os.rename(partial, final)
            fsync_path(self.folder)
            with atomic_file(self.folder / LATEST_FILE) as temporary:
                temporary.write_text(final.name + "\n")
            for old in list_checkpoints(self.folder)[: -self.keep_last]:
                shutil.rmtree(old, ignore_errors=True)
        dist.barrier()

    def _sharded_state(self, *, loading: bool = False, with_optimizer: bool = True) -> dict[str, Any]:
        state = model_state(self.chunks)
        if self.optimizer is not None and with_optimizer:
            state["optimizer"] = self.optimizer.sharded_state_dict(
                state, is_loading=loading, metadata=OPTIMIZER_METADATA
            )
        return state

    def load(self, path: Path, *, with_optimizer: bool) -> RunState:
        """Restore weights (and optimizer) from a complete checkpoint written at any layout.

        Raises:
            InputErrors: a file is missing or has another size than was written.
            InputError: the checkpoint does not hold what this model needs.
        """
        if (path / FILES_FILE).is_file():
            verify_files(path, hashes=False)
        loaded = _load(path, self._sharded_state(loading=True, with_optimizer=with_optimizer), self.parallel)
        load_model_state(self.chunks, loaded)
        if with_optimizer and self.optimizer is not None:
            with torch.no_grad():  # the loader of one of Megatron's formats writes into leaf views
                self.optimizer.load_state_dict(loaded["optimizer"])
        elif self.optimizer is not None:
            self.optimizer.reload_model_params()
        return read_state(path)


def newest_checkpoint(path: Path) -> Path:
    """``path`` itself when it is a checkpoint, else the newest one of the run folder that it is.

    Raises:
        InputError: neither.
    """
    if (path / "metadata.json").is_file():
        return path
    for folder in (path, path / "checkpoints"):
        if (found := find_checkpoint(folder, "latest")) is not None:
            return found
    raise InputError(
        f"checkpoint.init_from={path}: neither a Megatron checkpoint nor a run folder with one -> for Hugging Face "
        f"weights write hf:{path}"
    )


def load_weights(path: Path, chunks: list[torch.nn.Module], parallel: Parallel) -> None:
    """Weights only, from a checkpoint of any layout: a run's, a converted one, or one with another layer spec.

    Raises:
        InputError: the checkpoint does not hold what this model needs.
    """
    load_model_state(chunks, _load(path, model_state(chunks), parallel))


def _load(path: Path, state: dict[str, Any], parallel: Parallel) -> dict[str, Any]:
    strategy = FullyParallelLoadStrategyWrapper(get_default_load_sharded_strategy(str(path)), parallel.dp_cp_group)
    try:
        return dist_checkpointing.load(_present(path, state), str(path), strategy)
    except CheckpointingException as error:
        raise InputError(f"{path}: does not fit this model and optimizer: {error}") from error


def _present(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Without the ``_extra_state`` objects that the checkpoint lacks: Transformer Engine's layers have some that
    the local ones do not."""
    metadata = load_sharded_metadata(str(path))
    have = {item.unique_key if isinstance(item, ShardedObject) else item.key for item in metadata.values()}

    def keep(name: str, value: Any) -> bool:
        return not (isinstance(value, ShardedObject) and "_extra_state" in name and value.unique_key not in have)

    return {
        part: {name: value for name, value in values.items() if keep(name, value)}
        if part.startswith("model")
        else values
        for part, values in state.items()
    }


def _async_strategy(save: Any) -> dict[str, str]:
    """From 0.17 on the default asks for NVIDIA's resiliency extension; Megatron's own needs nothing."""
    return {"async_strategy": "mcore"} if "async_strategy" in inspect.signature(save).parameters else {}


def _describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file, hashed by a few threads (hashing releases the interpreter lock)."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        hashes = list(pool.map(sha256_file, files))
    return {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(files, hashes, strict=True)
    }
