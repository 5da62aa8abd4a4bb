"""Verifiers in worker processes that can be killed: a hang, a crash or a memory leak costs one response, not the run.

Time limits inside a verifier cannot be trusted (signals need the main thread and do not interrupt C code), so the
limit is enforced from outside: a worker that gives no verdict in time is killed and replaced, its response gets the
outcome ``timeout``, and the other responses it held go to another worker. A worker that dies gives ``error``.
The verdict must not depend on how busy the machine is: a worker that wants to compute but gets no CPU has longer, and
time in which this process was suspended (Ctrl-Z, a scheduler) is nobody's.

A worker leads a process group, which is killed with it; what has left the group is found below the fork server
(``fork_server.py``): what a verifier has started does not outlive it. What is no message on its pipe costs a worker.

Workers start from a fork server that has imported the verifier's library once, so that replacing one takes
milliseconds. This module stays light, because every worker imports it.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import multiprocessing
import os
import pickle
import resource
import signal
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from types import ModuleType
from typing import Any

import psutil

from megatron_gft.errors import InputError
from megatron_gft.scoring.judging import ScoringOptions
from megatron_gft.scoring.verifiers import Case, Verdict, Verifier, build_verifier

CASES_PER_MESSAGE = 64
WINDOW_PER_WORKER = 32 * CASES_PER_MESSAGE  # verdicts kept back while an earlier one is awaited
START_LIMIT_SECONDS = 120.0
LOOKS_PER_LIMIT = 4  # at a worker, before it may be said to have had its time
STARVED_FACTOR = 10  # at most so many time limits of wall time for a worker that others keep off the CPU
STRAY_ROUNDS = 50
LONGEST_MESSAGE = 1 << 24
GRACE_SECONDS = 5  # for a process to end; a worker whose parent died in the middle of a hang ends itself, too


class VerifierPool(contextlib.AbstractContextManager["VerifierPool"]):
    """``options.workers`` processes that judge cases. Use as a context manager.

    Args:
        options: the verifier and its limits. A worker that is starved of CPU may use ``time_limit`` seconds of CPU time
            within ``STARVED_FACTOR`` times as much wall time.

    Raises:
        InputError: the verifier cannot be built, here or in a worker (one has started when ``__init__`` is done).
    """

    def __init__(self, options: ScoringOptions):
        build_verifier(options.verifier, options.verifier_options)
        self._context = multiprocessing.get_context("forkserver")
        library = "latex2sympy2_extended.latex2sympy2" if options.verifier == "math" else __name__
        self._context.set_forkserver_preload(["megatron_gft.scoring.fork_server", library])
        self._options = options
        self._clock = _Clock(options.time_limit / LOOKS_PER_LIMIT)
        self._workers = [_Worker(self._context, options, self._clock) for _ in range(options.workers)]
        self._fork_server: psutil.Process | None = None
        with contextlib.suppress(psutil.Error):  # a worker has ended already
            parent = psutil.Process(self._workers[0].pid).parent()
            if parent and parent.ppid() == os.getpid():  # else it has died, and its workers are those of init
                self._fork_server = parent
        self.replaced = 0
        self._backlog: deque[tuple[int, Case]] = deque()  # not with a worker yet
        self._verdicts: dict[int, Verdict] = {}  # whose turn has not come
        self._crashed: set[int] = set()  # cases whose worker died once
        try:
            while all(worker.starting for worker in self._workers):
                self._collect(self._workers)
        except BaseException:
            self.close()
            raise

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill every worker, and what they have left behind."""
        for worker in self._workers:
            worker.kill()
        self._end_strays()

    def _end_strays(self) -> None:
        """End what is below the fork server and is no process of this one: its parent has ended."""
        for _ in range(STRAY_ROUNDS):  # they may start others meanwhile
            known = {child.pid for child in multiprocessing.active_children()}
            strays, below, vanished = list[psutil.Process](), list[psutil.Process](), False
            with contextlib.suppress(psutil.Error):
                below = self._fork_server.children() if self._fork_server else []
            for child in below:
                try:
                    if child.pid not in known and child.status() != psutil.STATUS_ZOMBIE:
                        strays += [child, *child.children(recursive=True)]
                except psutil.Error:  # it has ended: what it had started is the fork server's now
                    vanished = True
            if not strays and not vanished:
                return
            for stray in strays:
                with contextlib.suppress(psutil.Error):  # it has ended meanwhile
                    stray.kill()

    def judge(self, cases: Iterable[Case | Verdict]) -> Iterator[Verdict]:
        """One verdict per item, in order; a :class:`Verdict` among them is passed through. Reads a bounded window."""
        fresh = enumerate(cases)
        next_out, window = 0, WINDOW_PER_WORKER * len(self._workers)
        backlog, verdicts, crashed = self._backlog, self._verdicts, self._crashed
        for left in (backlog, verdicts, crashed):
            left.clear()
        while True:
            for worker in self._workers:
                if worker.idle:
                    in_flight = len(backlog) + len(verdicts) + sum(len(other.pending) for other in self._workers)
                    self._refill(fresh, min(CASES_PER_MESSAGE - len(backlog), window - in_flight))
                    worker.send([backlog.popleft() for _ in range(min(CASES_PER_MESSAGE, len(backlog)))])
            if next_out in verdicts:
                while next_out in verdicts:
                    yield verdicts.pop(next_out)
                    next_out += 1
            elif backlog or any(worker.pending for worker in self._workers):
                self._collect([worker for worker in self._workers if not worker.idle])
            elif not self._refill(fresh, 1):
                return

    def _refill(self, fresh: Iterator[tuple[int, Case | Verdict]], count: int) -> int:
        """Take up to ``count`` items: cases wait in the backlog, verdicts are done. How many there were."""
        taken = 0
        for index, item in itertools.islice(fresh, max(0, count)):
            taken += 1
            if isinstance(item, Verdict):
                self._verdicts[index] = item
            else:
                self._backlog.append((index, item))
        return taken

    def _collect(self, busy: list[_Worker]) -> None:
        """Receive what there is, waiting for it up to the next deadline; replace workers that hang or died."""
        timeout = max(0.0, min(worker.deadline for worker in busy) - self._clock.now())
        ready = set(wait([worker.connection for worker in busy], min(timeout, self._clock.longest_step)))
        for worker in busy:
            if worker.connection in ready:
                self._verdicts.update(worker.receive())
                if not worker.closed:
                    continue
                death = Verdict("error", 0.0, f"worker died with exit code {worker.exit_code()}")
            elif self._clock.now() >= worker.deadline and not worker.connection.poll() and not worker.extend():
                death = Verdict("timeout", 0.0, f"no verdict within {self._options.time_limit:g} s")
            else:
                continue
            worker.kill()
            self._end_strays()
            if worker.starting:
                raise InputError(f"verifier worker did not start: {death.detail} -> check the verifier's imports")
            self._workers[self._workers.index(worker)] = _Worker(self._context, self._options, self._clock)
            self.replaced += 1
            if worker.pending:
                index, case = worker.pending.popleft()
                if death.outcome == "error" and index not in self._crashed:  # maybe killed from outside: once more
                    self._crashed.add(index)
                    self._backlog.append((index, case))
                else:
                    self._verdicts[index] = death
            self._backlog.extend(worker.pending)


class _Clock:
    """Seconds that passed while this process was looking.

    Between two looks at most ``longest_step`` seconds count: had there been more, this process was suspended (and its
    workers with it) or busy elsewhere, and cannot say that a worker had the time.
    """

    def __init__(self, longest_step: float):
        self.longest_step = longest_step
        self._now, self._looked_at = 0.0, time.monotonic()

    def now(self) -> float:
        """The time, after one more look."""
        before, self._looked_at = self._looked_at, time.monotonic()
        self._now += min(self._looked_at - before, self.longest_step)
        return self._now


@contextlib.contextmanager
def _without_script() -> Iterator[None]:
    """multiprocessing would run the user's script in every worker: all of it, where no ``if __name__`` keeps it back.
    Nothing of it is needed there."""
    script, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


class _Worker:
    """The parent's side of one process: the cases it holds, oldest first, and the time by which it must answer."""

    def __init__(self, context: Any, options: ScoringOptions, clock: _Clock):
        self.connection, theirs = context.Pipe()
        self._process: ForkServerProcess = context.Process(target=_serve, args=(theirs, options), daemon=True)
        with _without_script():
            self._process.start()
        theirs.close()
        with socket.socket(fileno=os.dup(self.connection.fileno())) as pipe:  # of half a message nobody waits for more
            pipe.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 1, 0))
        self._time_limit, self._clock = options.time_limit, clock
        self.pending: deque[tuple[int, Case]] = deque()
        self.starting, self.closed = True, False
        self._began, self._cpu_before = clock.now(), 0.0  # of the case at hand
        self.deadline = self._began + START_LIMIT_SECONDS

    @property
    def pid(self) -> int:
        return self._process.pid or 0  # never 0: it was started

    @property
    def idle(self) -> bool:
        return not self.pending and not self.starting

    def send(self, batch: list[tuple[int, Case]]) -> None:
        """Hand over cases. Only to an idle worker: it is reading, so that this cannot block for long."""
        if batch:
            self.pending.extend(batch)
            self._restart_clock()
            with contextlib.suppress(OSError):  # a worker that died shows up as a closed connection
                self.connection.send([case for _, case in batch])

    def receive(self) -> Iterator[tuple[int, Verdict]]:
        """All verdicts that have arrived; the deadline moves with each."""
        try:
            while self.connection.poll():
                message, self._cpu_before = self._read()
                self._restart_clock()
                if isinstance(message, Verdict):
                    yield self.pending.popleft()[0], message
                elif message is None:
                    self.starting = False
                else:
                    raise InputError(message)
        except EOFError:
            self.closed = True
        except OSError:  # it may live on
            self.closed = True
            self._process.kill()

    def _read(self) -> tuple[Verdict | str | None, float]:
        """One message of :func:`_serve`; raises OSError when it is none, or the connection is broken."""
        content = self.connection.recv_bytes(LONGEST_MESSAGE)
        try:
            message, cpu = pickle.loads(content)
            if not isinstance(message, Verdict | str | None) or (isinstance(message, Verdict) and not self.pending):
                raise ValueError("nothing that was asked for")
            return message, float(cpu)
        except Exception as error:  # pickle raises whatever the bytes make it raise
            raise OSError(f"no message: {error}") from error

    def _restart_clock(self) -> None:
        self._began = self._clock.now()
        self.deadline = self._began + self._time_limit

    def extend(self) -> bool:
        """Grant more wall time to a worker that is past its deadline without having had its CPU time."""
        now = self._clock.now()
        if self.starting or now - self._began >= STARVED_FACTOR * self._time_limit:
            return False
        try:
            process = psutil.Process(self.pid)
            cpu, status = process.cpu_times(), process.status()
        except psutil.Error:
            return False
        left = self._time_limit - (cpu.user + cpu.system - self._cpu_before)
        if status != psutil.STATUS_RUNNING or left <= 0:
            return False
        self.deadline = now + left
        return True

    def exit_code(self) -> int | None:
        """Of a process whose connection is closed."""
        self._process.join(timeout=GRACE_SECONDS)
        return self._process.exitcode

    def kill(self) -> None:
        """End the process and whatever the verifier has started."""
        with contextlib.suppress(OSError):  # it has not come to lead a group yet, or all of it is gone
            os.killpg(self.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()
        self.connection.close()


def _serve(connection: Connection, options: ScoringOptions) -> None:
    """A worker's life: build the verifier, say so with ``None`` (or why not, with a string), then judge until EOF.

    Every message is a pair with the CPU seconds used so far.
    """
    os.setpgid(0, 0)
    os.closerange(3, connection.fileno())  # the fork server's own pipes: writing there would end it
    os.closerange(connection.fileno() + 1, 1 << 16)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    limit, highest = int(options.memory_limit_gib * 2**30), resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = limit if highest == resource.RLIM_INFINITY else min(limit, highest)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        try:
            verifier = build_verifier(options.verifier, options.verifier_options)
            warm_up = getattr(verifier, "warm_up", None)
            if warm_up is not None:
                warm_up()
        except InputError as error:
            connection.send((str(error), time.process_time()))
        except MemoryError:
            needs = f"its import needs more than {options.memory_limit_gib:g} GiB -> raise the memory limit"
            connection.send((f"verifier {options.verifier!r}: {needs}", time.process_time()))
        else:
            connection.send((None, time.process_time()))
            while True:
                for case in connection.recv():
                    signal.alarm(math.ceil(STARVED_FACTOR * options.time_limit) + GRACE_SECONDS)
                    verdict = judge_one(verifier, case)
                    signal.alarm(0)
                    connection.send((verdict, time.process_time()))
    except (EOFError, OSError):  # the parent is gone
        os.killpg(0, signal.SIGKILL)


def judge_one(verifier: Verifier, case: Case) -> Verdict:
    """The verdict, or outcome ``error`` with the exception; even ``SystemExit`` ends only the case."""
    try:
        return verifier(case)
    except BaseException as error:
        return Verdict("error", 0.0, f"{type(error).__name__}: {error}"[:500])
