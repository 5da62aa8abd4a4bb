"""The process around a run: process group, logging by rank, signals, and the watchdog over hung ranks."""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from megatron_gft import cpu
from megatron_gft.errors import EXIT_REQUEUE, InputError

EXIT_HUNG = 76
"""Exit code of a process that its watchdog ended."""


def world_size_from_environment() -> int:
    """Processes of the job as torchrun announces them; 1 when started alone."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start_process_group(timeout_minutes: int) -> torch.device:
    """Join the default process group (NCCL on GPUs, gloo on CPUs) and return this process's device.

    Raises:
        InputError: more processes on this machine than GPUs.
    """
    cpu.install()
    timeout = datetime.timedelta(minutes=timeout_minutes)
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
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
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
    for name in ("megatron", "torch", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


class StopRequest:
    """Turns SIGTERM and SIGUSR1 into "finish this step, save, leave", agreed by all ranks.

    SIGTERM leaves with code 0; SIGUSR1 (sent by Slurm before the time limit) with :data:`EXIT_REQUEUE`.
    """

    CODES = {signal.SIGTERM: 0, signal.SIGUSR1: EXIT_REQUEUE}

    def __init__(self) -> None:
        self.received = 0
        for number in self.CODES:
            signal.signal(number, self._receive)

    def _receive(self, number: int, _frame: Any) -> None:
        self.received = number

    def agreed(self, device: torch.device) -> int:
        """The signal that some rank received, 0 for none; collective."""
        value = torch.tensor([self.received], dtype=torch.int32, device=device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return int(value)


class Watchdog:
    """Ends the process when it makes no progress for ``minutes``: says what it was doing, and where it stands.

    A rank that hangs in a collective looks alive to torchrun; without this the job burns its allocation.
    """

    def __init__(self, minutes: float, label: str):
        self.limit, self.label = minutes * 60, label
        self.activity, self.since = "starting", time.monotonic()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        self.thread.start()

    @contextlib.contextmanager
    def doing(self, activity: str) -> Iterator[None]:
        """Mark the start of an activity; also counts as progress."""
        previous = self.activity
        self.activity, self.since = activity, time.monotonic()
        try:
            yield
        finally:
            self.activity, self.since = previous, time.monotonic()

    def _watch(self) -> None:
        while not self.stopped.wait(min(self.limit / 4, 10.0)):
            idle = time.monotonic() - self.since
            if idle > self.limit:
                print(
                    f"{self.label}: no progress for {idle:.0f} s while {self.activity} (train.watchdog_minutes "
                    f"{self.limit / 60:g}); another rank may have died or hung -> see its log. Stacks follow.",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback(all_threads=True)
                sys.stderr.flush()
                os._exit(EXIT_HUNG)

    def stop(self) -> None:
        """End the watch."""
        self.stopped.set()
