"""Multi-rank tests in about a second: fork ranks from a parent that has imported torch and Megatron.

Rules that keep this sound: one thread per process, no process group in the parent, children leave by
``os._exit``, every case has its own rendezvous file and a time limit.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist

torch.set_num_threads(1)

from megatron_gft import cpu  # noqa: E402

cpu.install()


def _child(rank: int, world_size: int, folder: Path, fn: Callable, args: tuple, timeout: float) -> None:
    code = 1
    try:
        faulthandler.dump_traceback_later(timeout, exit=True, file=open(folder / f"error{rank}", "w"))
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


def run_ranks(world_size: int, fn: Callable, *args: Any, timeout: float = 120) -> list[Any]:
    """Fork ``world_size`` gloo ranks, run ``fn(*args)`` in each, return their results in rank order.

    Results must pickle. The first rank that fails ends the others and its traceback is raised here.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        running = {}
        sys.stdout.flush()
        sys.stderr.flush()
        for rank in range(world_size):
            pid = os.fork()
            if pid == 0:
                _child(rank, world_size, folder, fn, args, timeout)
            running[pid] = rank
        failed, deadline = None, time.monotonic() + timeout
        while running and failed is None and time.monotonic() < deadline:
            for pid in list(running):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    rank = running.pop(pid)
                    failed = rank if status else failed
            time.sleep(0.003)
        timed_out = bool(running) and failed is None
        for pid in running:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        if failed is not None or timed_out:
            errors = [path.read_text() for path in sorted(folder.glob("error*"))]
            heading = f"timed out after {timeout} s" if timed_out else f"rank {failed} of {world_size} failed"
            raise RuntimeError("\n".join([heading, *errors])[-8000:])
        return [pickle.loads((folder / f"result{rank}").read_bytes()) for rank in range(world_size)]
