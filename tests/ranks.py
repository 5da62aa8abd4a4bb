"""Multi-rank tests in about a second: fork ranks from a parent that has imported torch and Megatron.

Rules that keep this sound: one thread per process, no process group in the parent, children leave by
``os._exit``, every case has its own rendezvous file and a time limit.
"""

import faulthandler
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
from tqdm import tqdm

torch.set_num_threads(1)

from megatron_gft import cpu  # noqa: E402
from megatron_gft.checkpoints.torch_dist import replace_results_queue  # noqa: E402

cpu.install()
replace_results_queue()  # Megatron's server process would outlive a rank for ever, with 200 MB


def _child(rank: int, world_size: int, folder: Path, fn: Callable, args: tuple, timeout: float) -> None:
    code = 1
    try:
        faulthandler.dump_traceback_later(timeout, exit=True, file=open(folder / f"error{rank}", "w"))
        # tqdm's own lock is a semaphore that all forks share: a rank killed while holding it stops every later one.
        tqdm.set_lock(threading.RLock())
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
        store = dist.FileStore(str(folder / "store"), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        result = fn(*args)
        (folder / f"result{rank}").write_bytes(pickle.dumps(result))
        code = 0
    except BaseException:
        (folder / f"error{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class RankGroup:
    """``world_size`` forked gloo ranks running ``fn(*args)``."""

    def __init__(self, folder: Path, world_size: int, fn: Callable, *args: Any, timeout: float = 120):
        self.folder, self.world_size, self.timeout = folder, world_size, timeout
        self.deadline = time.monotonic() + timeout
        self.running: dict[int, int] = {}
        sys.stdout.flush()
        sys.stderr.flush()
        for rank in range(world_size):
            pid = os.fork()
            if pid == 0:
                _child(rank, world_size, folder, fn, args, timeout)
            self.running[pid] = rank

    def poll(self) -> int | None:
        """Collect ranks that ended; the first one that failed, or None."""
        for pid in list(self.running):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                rank = self.running.pop(pid)
                if status:
                    return rank
        return None

    def send(self, number: signal.Signals, rank: int) -> None:
        """Send a signal to one rank, if it still runs."""
        for pid, running in self.running.items():
            if running == rank:
                os.kill(pid, number)

    def end(self) -> None:
        """Kill what is left, as torchrun's agent does after a failure."""
        for pid in self.running:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        self.running = {}

    def wait(self) -> list[Any]:
        """Results in rank order; the first failure ends the others and its traceback is raised."""
        failed = None
        while self.running and failed is None and time.monotonic() < self.deadline:
            failed = self.poll()
            time.sleep(0.003)
        timed_out = bool(self.running) and failed is None
        self.end()
        if failed is not None or timed_out:
            errors = [path.read_text() for path in sorted(self.folder.glob("error*"))]
            heading = f"timed out after {self.timeout} s" if timed_out else f"rank {failed} failed"
            raise RuntimeError("\n".join([heading, *errors])[-8000:])
        return [pickle.loads((self.folder / f"result{rank}").read_bytes()) for rank in range(self.world_size)]


def run_ranks(world_size: int, fn: Callable, *args: Any, timeout: float = 120) -> list[Any]:
    """Fork ``world_size`` gloo ranks, run ``fn(*args)`` in each, return their results in rank order.

    Results must pickle. The first rank that fails ends the others and its traceback is raised here.
    """
    with tempfile.TemporaryDirectory() as name:
        return RankGroup(Path(name), world_size, fn, *args, timeout=timeout).wait()
