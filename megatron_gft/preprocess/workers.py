"""A function applied to a stream by several processes, results in order, memory bounded.

Items lie in one queue, a few for each forked process, and whoever is free takes the next: a core that is slow for a
while holds up nobody. Results are given in the order of the items, so nothing depends on timing. Processes inherit the
function by fork: nothing large is pickled but items and results. They end with their parent, however it ends.
"""

import gc
import multiprocessing
import os
import queue
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

from megatron_gft.errors import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")

ITEMS_AHEAD = 3  # per worker: enough to never wait for the parent, few enough to keep memory small
POLL_SECONDS = 2.0


class WorkerError(RuntimeError):
    """The function raised in a worker process; the message has its traceback."""


class WorkerDied(InputError):
    """A worker process was ended from outside, mostly for want of memory."""


class OrderedWorkers(Generic[Item, Result]):
    """Context manager around ``count`` processes that run ``function``; start it before the parent has threads."""

    def __init__(self, function: Callable[[Item], Result], count: int):
        self._function, self._count = function, count
        self._context = multiprocessing.get_context("fork")
        self._tasks = self._context.Queue()
        self._processes: list[Any] = []
        self._results: list[Connection] = []  # a pipe for each: it ends when its process does, with half a result too

    def __enter__(self) -> "OrderedWorkers[Item, Result]":
        for _ in range(self._count):
            reader, writer = self._context.Pipe(duplex=False)
            self._results.append(reader)
            arguments = (self._function, self._tasks, writer, self._results, os.getpid())
            self._processes.append(self._context.Process(target=_work, args=arguments, daemon=True))
            self._processes[-1].start()
            writer.close()  # before the next fork: only this process may hold it
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.terminate()
            process.join()
        for reader in self._results:
            reader.close()
        self._tasks.cancel_join_thread()
        self._tasks.close()

    def map(self, items: Iterable[Item]) -> Iterator[Result]:
        """Results in the order of the items, taken from the stream only as fast as results are used.

        Raises:
            WorkerError: the function raised.
            WorkerDied: a process died.
        """
        early: dict[int, tuple[str | None, Any]] = {}  # results whose turn has not come
        sent = received = 0
        for item in items:
            if sent - received == ITEMS_AHEAD * self._count:
                yield self._receive(received, early)
                received += 1
            self._tasks.put((sent, item))
            sent += 1
        while received < sent:
            yield self._receive(received, early)
            received += 1

    def _receive(self, number: int, early: dict[int, tuple[str | None, Any]]) -> Result:
        while number not in early:
            for reader in wait(self._results):
                assert isinstance(reader, Connection)
                try:
                    done, failure, result = reader.recv()
                except (EOFError, OSError):
                    raise WorkerDied(self._how_it_ended(self._results.index(reader))) from None
                early[done] = failure, result
        failure, result = early.pop(number)
        if failure is not None:
            raise WorkerError(f"a worker failed:\n{failure}")
        return result

    def _how_it_ended(self, worker: int) -> str:
        self._processes[worker].join()
        code = self._processes[worker].exitcode
        how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return f"worker process {worker} ended {how}, for want of memory? -> run again to go on, with fewer workers"


def _work(
    function: Callable[[Any], Any], tasks: Any, out: Connection, readers: Sequence[Connection], parent: int
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the parent ends its workers by it, whatever it does itself
    for reader in readers:  # the parent's: who writes to a dead parent must notice
        reader.close()
    gc.freeze()  # what came with the fork (torch, transformers) is never garbage: do not look at it again and again
    while True:
        try:
            number, item = tasks.get(timeout=POLL_SECONDS)
        except queue.Empty:
            if os.getppid() != parent:  # it was killed: nobody will ever ask again
                return
            continue
        try:
            out.send((number, None, function(item)))
        except BrokenPipeError:
            return
        except Exception as error:  # the parent raises it
            out.send((number, "".join(traceback.format_exception(error)), None))
