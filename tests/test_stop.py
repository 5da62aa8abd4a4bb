"""A stop that comes while a run starts: from the first line on, in C code, alone and with ranks that were not asked."""

import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import ranks  # noqa: F401  (imports torch once, for all children)

from megatron_gft.errors import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_REQUEUE
from megatron_gft.runtime import REQUEUE_FILE, StopRequest, meet

GONE = os.WEXITED | os.WNOHANG | os.WNOWAIT
ROOT = Path(__file__).resolve().parents[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Ranks:
    """Forked ranks that run ``fn(stop)`` between the first line and training."""

    def __init__(self, folder: Path, size: int, fn: Callable[[StopRequest], None], only: tuple[int, ...] = (0, 1, 2)):
        self.folder, self.pids = folder, {}
        port = str(free_port())
        for rank in range(size):
            if rank not in only:
                continue
            pid = os.fork()
            if pid == 0:
                code = 99
                try:
                    for name in ("SLURM_NTASKS", "TORCHELASTIC_RUN_ID", REQUEUE_FILE):
                        os.environ.pop(name, None)
                    os.dup2(os.open(folder / f"error-{rank}", os.O_WRONLY | os.O_CREAT), 2)
                    if size > 1:
                        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
                    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))
                    StopRequest.GRACE_SECONDS = 3
                    stop = StopRequest()
                    stop.release = (folder / f"released-{rank}").touch
                    fn(stop)
                    code = 98
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(code)
            self.pids[rank] = pid
        for rank in self.pids:
            while not (folder / f"ready-{rank}").exists() and not os.waitid(os.P_PID, self.pids[rank], GONE):
                time.sleep(0.01)

    def end(self, asked: dict[int, signal.Signals]) -> list[int]:
        """Exit codes after these signals; at most 15 s later."""
        for rank, number in asked.items():
            os.kill(self.pids[rank], number)
        deadline, codes = time.monotonic() + 15, {}
        while len(codes) < len(self.pids) and time.monotonic() < deadline:
            for rank, pid in self.pids.items():
                if rank not in codes and (done := os.waitpid(pid, os.WNOHANG))[0]:
                    codes[rank] = os.waitstatus_to_exitcode(done[1])
            time.sleep(0.02)
        for rank in self.pids.keys() - codes.keys():
            os.kill(self.pids[rank], signal.SIGKILL)
            os.waitpid(self.pids[rank], 0)
        return [codes.get(rank, -9) for rank in sorted(self.pids)]


@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 0), ("SIGUSR1", EXIT_REQUEUE), ("SIGINT", EXIT_INTERRUPTED)])
@pytest.mark.parametrize("asked", [(0,), (1,), (0, 1, 2)])
def test_ranks_that_have_met_end_together(tmp_path, number, code, asked):
    """Each waits in C code for something that never comes; whoever is asked, all end, with one message."""

    def load(stop):
        store = meet(5, stop)
        (tmp_path / f"ready-{os.environ['RANK']}").touch()
        store.get("never")

    codes = Ranks(tmp_path, 3, load).end(dict.fromkeys(asked, signal.Signals[number]))
    assert codes == [code] * 3
    said = [(tmp_path / f"error-{rank}").read_text() for rank in range(3)]
    assert said[0].startswith(f"stopped by {number} before the first step") and said[1:] == ["", ""]
    assert len(list(tmp_path.glob("released-*"))) == 3


@pytest.mark.parametrize(("size", "seconds"), [(1, 0), (2, 2.5)])
def test_a_rank_that_meets_nobody_ends_by_itself(tmp_path, size, seconds):
    """A process of its own at once; one of several waits a while for the others (they would wait for it)."""

    def imports(stop):
        (tmp_path / "ready-0").touch()
        time.sleep(60)

    started = time.monotonic()
    assert Ranks(tmp_path, size, imports, only=(0,)).end({0: signal.SIGUSR1}) == [EXIT_REQUEUE]
    assert time.monotonic() - started >= seconds
    assert "stopped by SIGUSR1" in (tmp_path / "error-0").read_text()


def test_a_stop_before_all_have_met_is_told_when_they_meet(tmp_path):
    def late(stop):
        (tmp_path / f"ready-{os.environ['RANK']}").touch()
        time.sleep(1.0 if os.environ["RANK"] == "1" else 0.2)
        store = meet(5, stop)
        store.get("never")

    assert Ranks(tmp_path, 2, late).end({1: signal.SIGTERM}) == [0, 0]


def test_a_stop_in_training_ends_nobody_at_once(tmp_path):
    """Rank 0 trains already: rank 1, which is asked, follows it there, where all agree."""

    def train(stop):
        rank = os.environ["RANK"]
        store = meet(5, stop)  # noqa: F841  rank 0 serves it
        if rank == "0":
            stop.training_begins()
            (tmp_path / "began").touch()
        while not (tmp_path / "began").exists():
            time.sleep(0.01)
        (tmp_path / f"ready-{rank}").touch()
        time.sleep(4 if rank == "0" else 2.5)
        stop.training_begins()
        os._exit(50 + stop.received)

    codes = Ranks(tmp_path, 2, train).end({1: signal.SIGUSR1})
    assert codes == [50, 50 + signal.SIGUSR1] and not list(tmp_path.glob("released-*"))


def test_the_end_of_rank_0_ends_the_others(tmp_path):
    def load(stop):
        store = meet(5, stop)  # noqa: F841
        (tmp_path / f"ready-{os.environ['RANK']}").touch()
        time.sleep(60)

    assert Ranks(tmp_path, 2, load).end({0: signal.SIGKILL}) == [-9, EXIT_FAILED]


def test_a_second_interrupt_does_not_wait_and_children_do_not_tell(tmp_path):
    def train(stop):
        stop.training_begins()
        if (child := os.fork()) == 0:  # a checkpoint's writer
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert stop.received == 0
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            stop.ended()
            os.kill(os.getpid(), signal.SIGTERM)
            (tmp_path / "ready-0").touch()
            os._exit(42)

    assert Ranks(tmp_path, 1, train).end({}) == [42]


def catches(pid: int, number: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(status.partition("SigCgt:")[2].split()[0], 16) >> (number - 1) & 1)


@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 0), ("SIGUSR1", EXIT_REQUEUE), ("SIGINT", EXIT_INTERRUPTED)])
@pytest.mark.parametrize("way", ["module", "script"])
def test_a_stop_in_the_first_lines(tmp_path, way, number, code):
    """A real start, and the signal as soon as the process can take it: nothing of torch is there yet."""
    arguments = ["launch/gft_7b.sh"] if way == "script" else ["-m", "megatron_gft.train", "--config", "none.yaml"]
    for _ in range(5):  # on a busy machine the configuration, which is wrong, may be read and refused first
        process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and not catches(process.pid, signal.SIGUSR1):
            pass
        if process.poll() is None:
            assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text()
            process.send_signal(signal.Signals[number])
        _, error = process.communicate(timeout=60)
        if process.returncode != EXIT_BAD_INPUT:
            break
    assert process.returncode == code
    assert error == f"stopped by {number} before the first step -> the same command begins again\n"
