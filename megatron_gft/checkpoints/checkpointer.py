"""Checkpoints of a run: Megatron's distributed format, any layout to any layout, complete or absent.

A save is written to a hidden folder, in the background by default. When every rank is done it is published
(:mod:`megatron_gft.checkpoints.history`).
"""

import concurrent.futures
import contextlib
import inspect
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.serialization import (
    get_default_load_sharded_strategy,
    get_default_save_sharded_strategy,
)
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from megatron_gft.atomic import write_json
from megatron_gft.checkpoints.compat import asked_for, loadable_sharded_state_dict, misfits
from megatron_gft.checkpoints.history import FILES_FILE, STATE_FILE, Files, publish
from megatron_gft.checkpoints.starts import CONFIG_FILE
from megatron_gft.checkpoints.torch_dist import replace_results_queue
from megatron_gft.checkpoints.verification import describe_files, verify_checkpoint
from megatron_gft.config import Config
from megatron_gft.errors import InputError, refuse
from megatron_gft.hf.files import MODEL_FILES_FOLDER, ModelFiles
from megatron_gft.hf.safetensors_io import refuse_nonfinite
from megatron_gft.hf.shared_folder import gather_results
from megatron_gft.model import unwrap
from megatron_gft.optimizer import check_optimizer_state, complete_state, load_optimizer_state, saves_on_hosts
from megatron_gft.parallel import Parallel
from megatron_gft.reading import read_json

logger = logging.getLogger(__name__)

# The only format that changes layout in every dimension; Megatron's default is not.
OPTIMIZER_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


@pydantic.dataclasses.dataclass(frozen=True, config={"extra": "forbid"})
class RunState:
    """Where a run stands. Independent of the layout, equal on all ranks.

    ``step`` counts finished optimizer steps, which is also the cursor into the order of the groups;
    ``total_steps`` are those of the whole run, as the latest start saw it; ``data_fingerprint`` identifies shards,
    weights, split and seed; ``consumed_groups`` is for people.
    """

    step: int = 0
    data_fingerprint: str = ""
    groups_per_step: int = 0
    consumed_groups: int = 0
    skipped_steps: int = 0
    total_steps: int = 0


class SaveFailed(InputError):
    """A checkpoint could not be written; earlier ones are as they were."""


@dataclass
class _Pending:
    """A checkpoint on its way: being written while ``hashes`` is None, then being hashed."""

    state: RunState
    folder: Path
    hashes: concurrent.futures.Future[Files] | None = None


def model_state(chunks: list[torch.nn.Module]) -> dict[str, Any]:
    """Sharded state of the model chunks under Megatron's keys: ``model``, or ``model0``, ``model1``..."""
    return {key: unwrap(chunk).sharded_state_dict() for key, chunk in _by_key(chunks)}


def _by_key(chunks: list[torch.nn.Module]) -> Iterator[tuple[str, torch.nn.Module]]:
    for index, chunk in enumerate(chunks):
        yield f"model{index}" if len(chunks) > 1 else "model", chunk


class Checkpointer:
    """Saves and restores one run. Every method is collective: all ranks call it."""

    def __init__(
        self,
        folder: Path,
        chunks: list[torch.nn.Module],
        optimizer: MegatronOptimizer | None,
        parallel: Parallel,
        *,
        config: Config,
        model_files: ModelFiles,
    ):
        """``folder`` is ``RUN/checkpoints``; ``config`` and ``model_files`` go into each checkpoint, for exports."""
        self.folder, self.chunks, self.optimizer, self.parallel = folder, chunks, optimizer, parallel
        self.config, self.background = config, config.checkpoint.async_save
        self.model_files = model_files
        replace_results_queue()
        self.queue = AsyncCallsQueue()
        self.pending: _Pending | None = None
        self.hasher = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint-hash")

    def save(self, state: RunState) -> None:
        """Write a checkpoint of ``state``; returns once the weights are copied, unless ``background`` is off. Raises
        SaveFailed."""
        self.wait()
        partial = self.folder / f".step-{state.step:08d}"
        try:
            gather_results(lambda: self._prepare(partial), partial)
        except InputError as error:
            raise self._failed(state, partial, error) from error
        # From 0.17 on the default asks for NVIDIA's resiliency extension; Megatron's own needs nothing.
        chooses = "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
        with self._alone(state, partial):
            request = dist_checkpointing.save(
                self._sharded_state(),
                str(partial),
                FullyParallelSaveStrategyWrapper(get_default_save_sharded_strategy(), self.parallel.dp_cp_group),
                async_sharded_save=True,
                content_metadata=OPTIMIZER_METADATA,
                **({"async_strategy": "mcore"} if chooses else {}),
            )
        assert request is not None
        self.pending = _Pending(state, partial)
        if self.background:
            self.queue.schedule_async_request(request)
            return
        try:
            with self._alone(state, partial):
                request.execute_sync()
        except CheckpointException as error:
            cause = self._abandon(error)
            raise SaveFailed(f"checkpoint of step {state.step} could not be written: {cause}") from error
        self.pending.hashes = self._start_hashing(partial)
        self._commit()

    def wait(self, *, blocking: bool = True) -> bool:
        """Finish a background save (unless ``blocking``: a written one); True: it failed and is to be made again."""
        pending = self.pending
        if pending is None:
            return False
        if pending.hashes is None:
            try:
                with self._alone(pending.state, pending.folder):
                    if not self.queue.maybe_finalize_async_calls(blocking=blocking):
                        return False
            except CheckpointException as error:  # raised on all ranks when a writer failed on one
                cause = self._abandon(error)
                if self.parallel.rank == 0:
                    logger.error("checkpoint of step %d failed, once more in front: %s", pending.state.step, cause)
                # From here on saves run in front, where an error ends the run.
                self.queue, self.background = AsyncCallsQueue(), False
                return True
            pending.hashes = self._start_hashing(pending.folder)
        done = torch.tensor([int(pending.hashes.done())], dtype=torch.int32, device=torch.cuda.current_device())
        if not blocking:
            dist.all_reduce(done, op=dist.ReduceOp.MIN)
        if blocking or done:
            self._commit()
        return False

    def _abandon(self, error: CheckpointException) -> str:
        """Remove what was written; the first failure in one line, on all ranks (only the coordinating one knows it)."""
        assert self.pending is not None
        text = [""]
        if error.failures:
            rank, (failure, _) = next(iter(error.failures.items()))
            free = shutil.disk_usage(self.folder).free / 2**30
            text = [f"rank {rank}: {failure} -> check space ({free:.1f} GiB free) and permissions of {self.folder}"]
        dist.broadcast_object_list(text, src=0)
        if self.parallel.rank == 0:
            shutil.rmtree(self.pending.folder, ignore_errors=True)
        self.pending = None
        return text[0]

    def _prepare(self, partial: Path) -> None:
        """Make the hidden folder with the model's files."""
        if self.parallel.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / MODEL_FILES_FOLDER).mkdir(parents=True)
            self.model_files.write(partial / MODEL_FILES_FOLDER)
            self.config.write(partial / CONFIG_FILE)

    def _start_hashing(self, folder: Path) -> concurrent.futures.Future[Files]:
        """Size and sha256 of this rank's share of the files, in a thread; all files are there and complete."""
        dist.barrier()
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return self.hasher.submit(describe_files, folder, files[self.parallel.rank :: self.parallel.world_size])

    def _commit(self) -> None:
        pending, self.pending = self.pending, None
        assert pending is not None and pending.hashes is not None
        try:
            shares = gather_results(pending.hashes.result, pending.folder)
            gather_results(lambda: self._publish(pending, shares), pending.folder)
        except InputError as error:
            raise self._failed(pending.state, pending.folder, error) from error

    @contextlib.contextmanager
    def _alone(self, state: RunState, partial: Path) -> Iterator[None]:
        """Of common.pt, .metadata and metadata.json, which one rank writes, it alone sees the failure; others die
        with it."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # torch's writer of files
                raise
            raise self._failed(state, partial, InputError(f"{error} -> free space")) from error

    def _failed(self, state: RunState, partial: Path, error: InputError) -> SaveFailed:
        if self.parallel.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        return SaveFailed(f"checkpoint of step {state.step}: {error}")

    def _publish(self, pending: _Pending, shares: list[Files]) -> None:
        if self.parallel.rank == 0:
            partial = pending.folder
            write_json(partial / STATE_FILE, pending.state)
            files = {name: entry for share in shares for name, entry in share.items()}
            write_json(partial / FILES_FILE, files | describe_files(partial, [partial / STATE_FILE]))
            final = publish(partial, pending.state.step, self.config.checkpoint.keep_last)
            self.model_files = ModelFiles(final / MODEL_FILES_FOLDER)  # what the run began with may go, or has gone

    def _sharded_state(self, *, loading: bool = False, with_optimizer: bool = True) -> dict[str, Any]:
        state = model_state(self.chunks)
        if self.optimizer is not None and with_optimizer:
            if not loading:
                complete_state(self.optimizer)
            on_hosts = {"distrib_optim_fully_reshardable_mem_efficient": saves_on_hosts(self.optimizer)}
            state["optimizer"] = self.optimizer.sharded_state_dict(
                state, is_loading=loading, metadata=OPTIMIZER_METADATA | on_hosts
            )
        return state

    def load(self, path: Path, *, with_optimizer: bool) -> RunState:
        """Restore weights (and optimizer) from a complete checkpoint written at any layout.

        Raises:
            InputErrors: a file is missing or differs from what was written.
            InputError: the checkpoint does not hold what this model needs.
        """
        verify_checkpoint(path, "set checkpoint.resume=previous, or restore these files")
        state = self._sharded_state(loading=True, with_optimizer=with_optimizer)
        loaded = _load(path, state, self.chunks, self.parallel)
        if (optimizer := self.optimizer) is not None:
            if with_optimizer:
                gather_results(lambda: check_optimizer_state(optimizer, loaded["optimizer"], path))
                load_optimizer_state(optimizer, loaded["optimizer"])
            else:
                optimizer.reload_model_params()
        return read_json(path / STATE_FILE, "set checkpoint.resume=previous", RunState)


def load_weights(path: Path, chunks: list[torch.nn.Module], parallel: Parallel) -> None:
    """Weights only, from a checkpoint of any layout: a run's, a converted one, or one with another layer spec.

    Raises:
        InputError: the checkpoint is damaged, or does not hold what this model needs.
    """
    verify_checkpoint(path)
    _load(path, model_state(chunks), chunks, parallel)


def _load(path: Path, state: dict[str, Any], chunks: list[torch.nn.Module], parallel: Parallel) -> dict[str, Any]:
    """What ``state`` asks for; the weights in it are put into the chunks."""
    state = loadable_sharded_state_dict(state, path)
    asked = set().union(*gather_results(lambda: asked_for(state)))
    problems = set(misfits(asked, path, unwrap(chunks[0]).shape.vocab_size))
    refuse(f"{path}: its tensors are not those of this model", sorted(problems), shown=12)
    try:
        reading = get_default_load_sharded_strategy(str(path))
        strategy = FullyParallelLoadStrategyWrapper(reading, parallel.dp_cp_group)
        loaded = dist_checkpointing.load(state, str(path), strategy)
    except (CheckpointingException, CheckpointException) as error:  # the latter, torch's, is a BaseException
        # torch's says only on which ranks it failed; this is what happened on the first one
        failures = error.failures if isinstance(error, CheckpointException) else {}
        cause = next(iter(failures.values()))[0] if failures else error
        raise InputError(
            f"{path}: does not fit this model and optimizer, or metadata.json is damaged: {cause}"
        ) from error
    except Exception as error:  # of damaged bytes torch's, zip's and pickle's readers raise anything
        cure = "use another checkpoint"
        raise InputError(f"{path}: metadata.json, common.pt or a *.distcp is damaged ({error}) -> {cure}") from error
    for key, chunk in _by_key(chunks):
        unwrap(chunk).load_state_dict(loaded[key], strict=False)
    gather_results(lambda: _refuse_nonfinite(path, chunks))
    return loaded


def _refuse_nonfinite(path: Path, chunks: list[torch.nn.Module]) -> None:
    for chunk in chunks:
        for name, parameter in unwrap(chunk).named_parameters():
            refuse_nonfinite(parameter, f"{path}: {name}")
