"""A function applied to a stream by several processes, results in order, memory bounded.

Items go round robin to forked processes, a few ahead each, and results are taken in the same order; so nothing
depends on timing. Processes inherit the function by fork: nothing large is pickled but items and results. They end
with their parent, however it ends.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import queue
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

ITEMS_AHEAD = 3  # per worker: enough to never wait for the parent, few enough to keep memory small
POLL_SECONDS = 2.0


class WorkerError(RuntimeError):
    """A worker process failed; the message has its traceback or how it ended."""


class OrderedWorkers(Generic[Item, Result]):
    """Context manager around ``count`` processes that run ``function``.

    Start it before the parent has threads of its own (fork copies only the calling thread).
    """

    def __init__(self, function: Callable[[Item], Result], count: int):
        context = multiprocessing.get_context("fork")
        self._tasks: list[Any] = [context.Queue() for _ in range(count)]
        self._results: list[Any] = [context.Queue() for _ in range(count)]
        self._processes = [
            context.Process(target=_work, args=(function, tasks, results, os.getpid()), daemon=True)
            for tasks, results in zip(self._tasks, self._results, strict=True)
        ]

    def __enter__(self) -> OrderedWorkers[Item, Result]:
        for process in self._processes:
            process.start()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.terminate()
            process.join()
        for channel in (*self._tasks, *self._results):
            channel.cancel_join_thread()
            channel.close()

    def map(self, items: Iterable[Item]) -> Iterator[Result]:
        """Results in the order of the items, taken from the stream only as fast as results are used.

        Raises:
            WorkerError: the function raised, or a process died (for want of memory, say).
        """
        waiting: deque[int] = deque()
        for number, item in enumerate(items):
            if len(waiting) == ITEMS_AHEAD * len(self._processes):
                yield self._receive(waiting.popleft())
            worker = number % len(self._processes)
            self._tasks[worker].put(item)
            waiting.append(worker)
        while waiting:
            yield self._receive(waiting.popleft())

    def _receive(self, worker: int) -> Result:
        while True:
            try:
                failure, result = self._results[worker].get(timeout=POLL_SECONDS)
            except queue.Empty:
                code = self._processes[worker].exitcode
                if code is not None:
                    how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
                    raise WorkerError(
                        f"worker process {worker} ended {how} -> fewer workers need less memory"
                    ) from None
                continue
            if failure is not None:
                raise WorkerError(f"worker {worker} failed:\n{failure}")
            return result


def _work(function: Callable[[Any], Any], tasks: Any, results: Any, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    gc.freeze()  # what came with the fork (torch, transformers) is never garbage: do not look at it again and again
    while True:
        try:
            item = tasks.get(timeout=POLL_SECONDS)
        except queue.Empty:
            if os.getppid() != parent:  # it was killed: nobody will ever ask again
                return
            continue
        try:
            results.put((None, function(item)))
        except Exception:
            results.put((traceback.format_exc(), None))
