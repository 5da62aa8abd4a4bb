"""The process around a run: process group, logging by rank, signals, and the watchdog over hung ranks."""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_gft import cpu
from megatron_gft.errors import EXIT_REQUEUE, InputError


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
