"""One job in one folder: who holds the lock, who may take it over, and what a holder does that lost it."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_gft import run_lock
from megatron_gft.errors import EXIT_FAILED, InputError
from megatron_gft.run_lock import LOCK_FILE, Holder

DEAD = 2**22 + 1  # above the kernel's largest pid


@pytest.fixture(autouse=True)
def short(monkeypatch):
    for name in ("RANK", "SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(run_lock, "HEARTBEAT_SECONDS", 0.2)
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 1.5)
    monkeypatch.setattr(run_lock, "READ_BACK_SECONDS", 0.1)


@contextlib.contextmanager
def held(folder: Path):
    with run_lock.run_lock(folder, SimpleNamespace(release=None)):
        yield folder / LOCK_FILE


def elsewhere(**changes) -> Holder:
    return replace(Holder.this_process(), host="other", machine="another boot", **changes)


def write(folder: Path, holder: Holder | None, age: float = 0) -> Path:
    path = folder / LOCK_FILE
    path.write_text(json.dumps(asdict(holder)) if holder else "")
    os.utime(path, (time.time() - age, time.time() - age))
    return path


@pytest.mark.parametrize(
    ("case", "taken", "seconds"),
    [
        ("alive here", False, 0),
        ("hidden from us", False, 0),
        ("dead here", True, 0),
        ("pid given again", True, 0),
        ("zombie", True, 0),
        ("alive elsewhere", False, 0.1),
        ("silent elsewhere", True, 1.2),
        ("long silent elsewhere", True, 0.3),
        ("its clock is ahead", True, 1.2),
        ("same pid and host, another container", False, 0.1),
        ("requeued elsewhere", True, 0),
        ("requeued here", True, 0),
        ("same Slurm job, silent", True, 0.3),
        ("same Slurm job, alive elsewhere", False, 0.1),
        ("same Slurm job, alive here", False, 0),
        ("damaged", True, 1.2),
    ],
)
def test_a_folder_with_a_lock(tmp_path, monkeypatch, case, taken, seconds):
    """``seconds``: at least so long it looks; nothing that is plain is waited for."""
    me, job = Holder.this_process(), "4711" if "requeued" in case or "Slurm" in case else ""
    if job:
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1" if "requeued" in case else "0")
    child = subprocess.Popen(["true"])
    if case == "hidden from us":
        monkeypatch.setattr(run_lock, "_start_of", lambda pid: "")
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie until the end of this test
    holder = {
        "alive here": me,
        "dead here": replace(me, pid=DEAD),
        "pid given again": replace(me, started="1"),
        "zombie": replace(me, pid=child.pid),
        "same pid and host, another container": replace(me, machine=me.machine + "0"),
        "requeued here": replace(me, job=job),
        "same Slurm job, alive here": replace(me, job=job),
        "damaged": None,
    }.get(case, me if case == "hidden from us" else elsewhere(job=job))
    age = {"long silent elsewhere": 400, "its clock is ahead": -3600}.get(case, 0)
    path = write(tmp_path, holder, age)
    beats = threading.Timer(0.2, lambda: os.utime(path))
    if seconds == 0.1:
        beats.start()
    started = time.monotonic()
    try:
        if taken:
            with held(tmp_path):
                took = time.monotonic() - started
                assert json.loads(path.read_text())["pid"] == os.getpid()
                assert not list(tmp_path.glob(".*"))
            assert not path.exists()
        else:
            with pytest.raises(InputError, match="trains into this folder") as error, held(tmp_path):
                pass
            took = time.monotonic() - started
            assert str(path) in str(error.value) and f"process {holder.pid} on {holder.host}" in str(error.value)
            assert path.exists()
    finally:
        child.wait()
    assert took >= seconds and (seconds or took < 1)


@pytest.mark.parametrize(
    "odd",
    [{"pid": "7"}, {"pid": 1.5}, {"pid": 10**30}, {"restart": None}, {"restart": "1"}, {"job": 7}, {"token": []}, ()],
)
def test_a_lock_with_odd_values_is_damaged(tmp_path, monkeypatch, odd):
    """It becomes stale as another one does, and nothing else happens."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    path = write(tmp_path, None, 400)
    values = asdict(Holder.this_process())
    path.write_text(json.dumps({**values, "restart": 1, **odd}) if odd else "[" * 100_000)
    with held(tmp_path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_only_the_first_rank_takes_it_and_an_error_gives_it_back(tmp_path, monkeypatch):
    with held(tmp_path) as path:
        monkeypatch.setenv("RANK", "1")
        with held(tmp_path):
            pass
        assert path.exists()
        monkeypatch.delenv("RANK")
        before = path.stat().st_mtime_ns
        time.sleep(0.5)
        assert path.stat().st_mtime_ns > before, "no heartbeat"
        path.unlink()
        time.sleep(0.5)
        assert path.exists(), "removed by hand"
    with pytest.raises(ZeroDivisionError), held(tmp_path):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"), held(tmp_path / "file" / "run"):
        pass


def test_of_many_that_come_at_once_one_trains(tmp_path):
    """Over an empty folder, and over a lock whose holder is gone."""
    for stale in (False, True):
        if stale:
            write(tmp_path, replace(Holder.this_process(), pid=DEAD))
        children = []
        for _ in range(12):
            if (pid := os.fork()) == 0:
                code = 9
                try:
                    with held(tmp_path):
                        time.sleep(1.5)
                        code = 0
                except InputError:
                    code = 2
                finally:
                    os._exit(code)
            children.append(pid)
        codes = sorted(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children)
        assert codes == [0] + [2] * 11
        assert list(tmp_path.iterdir()) == []


def test_a_holder_that_lost_its_folder_ends(tmp_path):
    """It was stopped so long that another one believed it dead: it must not save over that one's checkpoints."""
    if (pid := os.fork()) == 0:
        with held(tmp_path):
            time.sleep(600)  # far longer than it takes to notice, on the busiest machine
        os._exit(9)
    path = tmp_path / LOCK_FILE
    while not path.exists() or not path.read_text():
        time.sleep(0.05)
    os.kill(pid, signal.SIGSTOP)
    winner = elsewhere()
    write(tmp_path, winner)
    os.kill(pid, signal.SIGCONT)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == EXIT_FAILED
    assert json.loads(path.read_text()) == asdict(winner)


def test_the_holder_can_be_found(tmp_path):
    with held(tmp_path) as path:
        content = json.loads(path.read_text())
    assert content["host"] == socket.gethostname() and content["pid"] == os.getpid() and content["started"].isdecimal()


@pytest.mark.parametrize("target", ["nowhere", "elsewhere.json"])
def test_a_link_is_no_lock(tmp_path, target):
    (tmp_path / "elsewhere.json").write_text("{}")
    (tmp_path / LOCK_FILE).symlink_to(target)
    with pytest.raises(InputError, match=f"{LOCK_FILE}: a link.* -> remove it"), held(tmp_path):
        pass
    assert (tmp_path / LOCK_FILE).is_symlink() and (tmp_path / "elsewhere.json").read_text() == "{}"
