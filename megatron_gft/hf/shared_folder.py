"""One output folder written by several processes: it appears whole when all of them succeeded, or not at all."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_gft.atomic import atomic_directory
from megatron_gft.errors import InputError

Result = TypeVar("Result")


def process_rank_and_count() -> tuple[int, int]:
    """(rank, processes) of the default group; (0, 1) without one."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _describe(error: BaseException, path: Path | None = None) -> str:
    """What a user reads: our message as it is; the system's (disk full, read-only folder) with the output's name."""
    if isinstance(error, InputError):
        return str(error)
    if path is None:
        return f"{error} -> check the disk and the permissions"
    return f"{path}: writing failed ({error}) -> free space or correct the permissions; nothing was left behind"


@contextlib.contextmanager
def shared_directory(path: str | Path) -> Iterator[Path]:
    """:func:`megatron_gft.atomic.atomic_directory` for all processes of the default group. Collective.

    The first process makes the temporary folder and renames it after all have left the block without an error;
    an error on one is raised on all, and nothing is left behind. The folder must be on a file system that all
    see. Inside the block a process waits for others only in :func:`gather_results`.

    Raises:
        InputError: ``path`` exists, or a process failed (the message names the first one).
    """
    path, problem = Path(path), None
    stack = contextlib.ExitStack()
    is_first = process_rank_and_count()[0] == 0
    temporary = gather_results(lambda: stack.enter_context(atomic_directory(path)) if is_first else path, path)[0]

    def report() -> None:
        if problem is not None:
            raise InputError(problem)

    with stack:
        try:
            yield temporary
        except (InputError, OSError) as error:
            problem = _describe(error, path)
        gather_results(report)
        # Nothing can undo the rename, so it comes last and its own failure is told to all.
        gather_results(stack.close, path)


def gather_results(action: Callable[[], Result], output: Path | None = None) -> list[Result]:
    """Run ``action``, which writes ``output``, on every process and return all results in rank order. Collective.

    Raises:
        InputError: on all processes, when it failed on one.
    """
    problem, result = None, None
    try:
        result = action()
    except (InputError, OSError) as error:
        problem = _describe(error, output)
    outcomes: list[Any] = [(problem, result)]
    if dist.is_initialized():
        outcomes = [(None, None)] * dist.get_world_size()
        dist.all_gather_object(outcomes, (problem, result))
    problems = {rank: found for rank, (found, _) in enumerate(outcomes) if found is not None}
    if problems:
        lines = [found if len(outcomes) == 1 else f"rank {rank}: {found}" for rank, found in problems.items()]
        raise InputError("\n".join(lines))
    return [result for _, result in outcomes]
