"""The process around a run: process group, logging, signals, and the watchdog over hung ranks.

Nothing here imports torch before it is called: :class:`StopRequest` is made in a process's first lines.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import datetime
import faulthandler
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from megatron_gft.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_REQUEUE, InputError, shown
from megatron_gft.launchers import find_launcher

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

REQUEUE_FILE = "GFT_REQUEUE_FILE"
Value = TypeVar("Value")


def meet(timeout_minutes: int, stop: StopRequest | None = None) -> dist.Store:
    """Where the ranks of this job exchange addresses, and hear of a ``stop`` from here on.

    Raises:
        InputError: its place is taken, or nobody is there.
    """
    import torch.distributed as dist

    if os.environ.get("WORLD_SIZE", "1") == "1":
        return dist.HashStore()
    place, port, rank, size = (os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"))
    serves = rank == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun's agent does
    minutes = datetime.timedelta(minutes=timeout_minutes)
    try:
        store = dist.TCPStore(place, int(port), int(size), serves, minutes, wait_for_workers=False, multi_tenant=True)
    except (dist.DistError, ValueError) as error:
        raise InputError(
            f"MASTER_ADDR={place} MASTER_PORT={port}: rank {rank} cannot {'open' if serves else 'reach'} it ({error}) "
            "-> on all ranks the machine of rank 0, and a port that is free there"
        ) from error
    if stop is not None and not _may_restart():
        stop.store = store.clone()  # type: ignore[attr-defined]  # waiting at one does not block the other
    return store


def _may_restart() -> bool:
    """torchrun may start the workers again, with the same store: a stop that is told there would stop those too."""
    return os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"


def start_process_group(timeout_minutes: int, store: dist.Store | None = None) -> torch.device:
    """Join the default process group (NCCL on GPUs, gloo on CPUs; ``store`` of :func:`meet`); this process's device.

    Raises:
        InputError: more processes on this machine than GPUs.
    """
    import torch
    import torch.distributed as dist

    from megatron_gft import cpu

    cpu.install()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise InputError(
                f"LOCAL_RANK {local_rank}: this machine has {torch.cuda.device_count()} GPUs -> start at most as many "
                "processes per machine (torchrun --nproc-per-node)"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=store or meet(timeout_minutes),
        rank=int(os.environ.get("RANK", "0")),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        timeout=datetime.timedelta(minutes=timeout_minutes),
    )
    return device


def set_up_logging(rank: int) -> None:
    """Rank 0 reports; other ranks only errors, which carry the rank. Megatron's and torch's chatter is left out."""
    prefix = "" if rank == 0 else f"rank {rank}: "
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.ERROR,
        format=f"{prefix}%(message)s",
        stream=sys.stderr,
        force=True,
    )
    for handler in logging.getLogger().handlers:
        handler.addFilter(_show)
    for name in ("megatron", "torch", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _show(record: logging.LogRecord) -> bool:
    record.msg, record.args = shown(record.getMessage()), None
    return True


class StopRequest:
    """SIGTERM, SIGUSR1 and Ctrl-C from a process's first lines on, before torch is imported.

    While a run starts, a thread ends the process, whatever C code the main thread waits in; ranks that have met end
    together. In training the request is "finish this step, save, leave", agreed by all ranks; a second Ctrl-C does not
    wait. SIGTERM leaves with code 0, SIGUSR1 (sent by Slurm before the time limit) with :data:`EXIT_REQUEUE`.

    Attributes:
        store: of :func:`meet`, where "gft/start" says whether the ranks train or with which signal they end.
        failing: this process has an error to report and meets nobody.
        release: called before the thread ends the process.
    """

    CODES = {signal.SIGTERM: 0, signal.SIGUSR1: EXIT_REQUEUE, signal.SIGINT: EXIT_INTERRUPTED}
    GRACE_SECONDS = 20.0  # for the others to come and meet; schedulers kill 30 s after SIGTERM

    def __init__(self) -> None:
        self.received, self.starting, self.failing = 0, True, False
        self.store: dist.Store | None = None
        self.release: Callable[[], None] = lambda: None
        self._heard, self._written = os.pipe()
        os.set_blocking(self._written, False)
        self._left_store = threading.Event()
        for number in self.CODES:
            if signal.getsignal(number) is not signal.SIG_IGN or number != signal.SIGINT:  # a shell's background job
                signal.signal(number, self._receive)
        signal.set_wakeup_fd(self._written, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # a child's signals are not ours
        threading.Thread(target=self._watch, daemon=True).start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.CODES)  # launch.py starts workers with them blocked

    def _receive(self, number: int, _frame: Any) -> None:
        if number == self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def _watch(self) -> None:
        asked, until = 0, 0.0
        while self.starting:
            heard = os.read(self._heard, 1)[0] if select.select([self._heard], [], [], 1.0)[0] else 0
            if heard in self.CODES and not asked:
                alone = os.environ.get("WORLD_SIZE", "1") == "1" and find_launcher(os.environ) is None
                asked, until = (
                    heard,
                    time.monotonic() + (0 if alone or self.failing or _may_restart() else self.GRACE_SECONDS),
                )
            if self.store is not None:
                self._watch_store(self.store, asked)
            elif asked and (self.failing or time.monotonic() >= until):
                self._leave(asked, silent=self.failing)
        self._left_store.set()
        while True:  # a thread of this process that blocks no signal
            os.read(self._heard, 1)

    def _watch_store(self, store: dist.Store, asked: int) -> None:
        """End if this rank or another one was asked to; not if one of them trains already: then all agree there."""
        first = os.environ["RANK"] == "0"
        try:
            if asked:
                store.compare_set("gft/start", "", str(asked))
            decided = store.get("gft/start") if store.check(["gft/start"]) else b"training"
            if decided == b"training":
                return
            store.add("gft/left", 1)
            deadline = time.monotonic() + self.GRACE_SECONDS / 2
            while first and store.add("gft/left", 0) < int(os.environ["WORLD_SIZE"]) and time.monotonic() < deadline:
                time.sleep(0.1)  # the others read from this process
        except RuntimeError as error:  # torch's: the store is gone, and rank 0 with it
            time.sleep(self.GRACE_SECONDS / 4)  # if it was bad input, this rank says so too
            os.write(2, f"rank {os.environ['RANK']}: rank 0 ended while the run started ({error})\n".encode())
            self.release()
            os._exit(EXIT_FAILED)
        self._leave(int(decided), silent=not first)

    def _leave(self, number: int, silent: bool = False) -> None:
        if not self.starting:
            return
        name = signal.Signals(number).name
        if not silent:
            os.write(2, f"stopped by {name} before the first step -> the same command begins again\n".encode())
        self.release()
        os._exit(process_exit_code(self.CODES[signal.Signals(number)]))

    def training_begins(self) -> None:
        """From here on a request waits for the end of a step: on all ranks, or on none and there is no return."""
        while self.store is not None and self.store.compare_set("gft/start", "", "training") != b"training":
            time.sleep(1)
        self.starting = False
        os.write(self._written, b"\0")
        # A thread that is in torch's C++ code when Python shuts down aborts the process.
        self._left_store.wait(self.GRACE_SECONDS)

    def ended(self) -> None:
        """Later signals do not change the exit code: while Python shuts down they would kill."""
        for number in self.CODES:
            signal.signal(number, signal.SIG_IGN)

    def agreed(self) -> int:
        """The signal that some rank received, 0 for none; collective."""
        import torch
        import torch.distributed as dist

        value = torch.full((1,), self.received, dtype=torch.int32, device="cuda")
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return int(value)


def process_exit_code(code: int) -> int:
    """What to end with: torchrun's agent takes anything but 0 for a failure, so a file of it asks to requeue."""
    if code == EXIT_REQUEUE and REQUEUE_FILE in os.environ:
        Path(os.environ[REQUEUE_FILE]).touch()
        return 0
    return code


def prefetch(values: Iterable[Value], *begin: Any) -> Generator[Value, None, None]:
    """Yield ``values``, making the next one in a thread while the caller works on the last; never two ahead. ``begin``
    is what the thread calls first, and its arguments."""
    iterator: Iterator[Any] = iter(values)
    end: Any = object()
    with concurrent.futures.ThreadPoolExecutor(1, "ahead", begin[0] if begin else None, begin[1:]) as thread:
        following = thread.submit(next, iterator, end)
        while (value := following.result()) is not end:
            following = thread.submit(next, iterator, end)
            yield value


class Watchdog:
    """Ends the process when it makes no progress for ``minutes``, with the stack of every thread on stderr.

    A rank that hangs in a collective looks alive to torchrun; without this the job burns its allocation. The timer is
    ``faulthandler``'s, a thread in C: it fires also while other C code holds the interpreter's lock. It can say nothing
    but stacks, so what this process was doing stands in ``file``, which only a process that ends in order removes.
    """

    def __init__(self, minutes: float, label: str, file: Path):
        self.seconds, self.label, self.path = minutes * 60, label, file
        file.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(file, "wb", buffering=0)
        self.doing("starting")

    def doing(self, activity: str) -> None:
        """Count from now, for what comes next."""
        faulthandler.dump_traceback_later(self.seconds, exit=True)
        text = f"{self.label}: {activity}, since {datetime.datetime.now():%Y-%m-%d %H:%M:%S}\n"
        with contextlib.suppress(OSError):  # a full disk is for the checkpoint to report
            self.file.seek(0)
            self.file.write(text.encode())
            self.file.truncate()

    def stop(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self.file.close()
        with contextlib.suppress(OSError):  # the folder goes with the last rank's file
            self.path.unlink()
            self.path.parent.rmdir()
