"""One job in one run folder: a file there names the process that trains, and its age says whether that lives."""

import contextlib
import json
import logging
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import TypeAdapter

from megatron_gft.errors import EXIT_FAILED, InputError
from megatron_gft.runtime import StopRequest

logger = logging.getLogger(__name__)

LOCK_FILE = "running.json"
HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 300.0
READ_BACK_SECONDS = 2.0


@dataclass(frozen=True)
class Holder:
    """A process that trains. ``started`` is the kernel's count at its start: pids are given again.

    ``machine`` tells where the pid means something: containers share host names, and all begin with pid 1.
    """

    host: str
    pid: int
    started: str | None
    machine: str
    job: str
    restart: int
    token: str = field(default_factory=lambda: os.urandom(8).hex())

    @classmethod
    def this_process(cls) -> "Holder":
        machine = ""
        with contextlib.suppress(OSError):
            machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
        job, restart = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_RESTART_COUNT", "")
        pid = os.getpid()
        restarts = int(restart) if restart.isdecimal() else 0
        return cls(socket.gethostname(), pid, _start_of(pid), machine, job, restarts)

    def __str__(self) -> str:
        job = f", Slurm job {self.job} restarted {self.restart} times" if self.job else ""
        return f"process {self.pid} on {self.host}{job}"


def _start_of(pid: int) -> str | None:
    """When a process of this machine started; None when there is none, "" when it is hidden from us."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]
    except OSError:
        try:
            os.kill(pid, 0)
        except (ProcessLookupError, OverflowError):
            return None
        except PermissionError:
            pass
        return ""


@contextlib.contextmanager
def run_lock(folder: Path, stop: StopRequest) -> Iterator[None]:
    """Hold ``folder`` for this job while the block runs; by rank 0 for all. InputError where another job holds it.

    It works by exclusive creation, replacement and reading back, which network file systems have; not by flock.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    path, mine, ended = folder / LOCK_FILE, Holder.this_process(), threading.Event()

    def release() -> None:
        ended.set()
        with contextlib.suppress(OSError):
            if _read(path) == mine:
                path.unlink()

    stop.release = release
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _take(path, mine)
    except OSError as error:
        raise InputError(f"train.output={folder}: cannot be written ({error.strerror})") from None
    threading.Thread(target=_beat, args=(path, mine, ended), daemon=True).start()
    try:
        yield
    finally:
        release()


def _read(path: Path) -> Holder | None:
    """Who the file names; None when it is damaged, or being written."""
    try:
        return TypeAdapter(Holder).validate_json(path.read_bytes(), strict=True)
    except ValueError:
        return None


def _create(path: Path, mine: Holder) -> Path:
    with open(path, "x") as file:
        try:
            file.write(json.dumps(asdict(mine)))
            file.flush()
            os.fsync(file.fileno())
        except OSError:  # a full disk
            path.unlink()
            raise
    return path


def _take(path: Path, mine: Holder) -> None:
    while True:
        try:
            _create(path, mine)
        except FileExistsError:
            if path.is_symlink():  # one that leads nowhere can be neither made nor read
                raise InputError(f"{path}: a link, which is no run's lock -> remove it") from None
            with contextlib.suppress(FileNotFoundError):
                holder = _read(path)
                _wait_for_its_end(path, holder, mine)
                if _read(path) == holder:  # of several that come here the last one stays
                    _create(path.with_name(f".{LOCK_FILE}-{mine.token}"), mine).replace(path)
                    time.sleep(READ_BACK_SECONDS)
        with contextlib.suppress(FileNotFoundError):
            if _read(path) == mine:
                return


def _wait_for_its_end(path: Path, holder: Holder | None, mine: Holder) -> None:
    """Return when the holder is gone. Whether it lives is asked of this machine, or seen from its heartbeat."""
    refusal = InputError(
        f"{path}: {holder or 'a process'} trains into this folder -> wait for its end, or choose another train.output; "
        "if you know that it has ended, remove this file"
    )
    same_job = False
    if holder is not None:
        same_job = bool(mine.job) and holder.job == mine.job
        if same_job and mine.restart > holder.restart:
            return  # Slurm ended the job before it started it again
        if mine.machine and (holder.machine, holder.host) == (mine.machine, mine.host):
            if _start_of(holder.pid) in (holder.started, ""):
                raise refusal
            return
    beat = path.stat().st_mtime
    with tempfile.TemporaryFile(dir=path.parent) as probe:  # machines' clocks differ; the file system has one
        probe.write(b"x")
        probe.flush()
        age = max(os.fstat(probe.fileno()).st_mtime - beat, 0)
    rest = 2 * HEARTBEAT_SECONDS if same_job else max(STALE_SECONDS - age, 2 * HEARTBEAT_SECONDS)
    logger.warning("%s: %s; waiting up to %.0f s for its sign of life", path, holder or "a process", rest)
    deadline = time.monotonic() + rest
    while time.monotonic() < deadline:
        time.sleep(0.5)
        if path.stat().st_mtime != beat or _read(path) != holder:
            raise refusal


def _beat(path: Path, mine: Holder, ended: threading.Event) -> None:
    """Thread: show that this process lives. It ends at once when another one, believing it dead, took over."""
    while not ended.wait(HEARTBEAT_SECONDS):
        with contextlib.suppress(OSError):  # a network file system that is away for a while
            try:
                holder = _read(path)
                os.utime(path)
            except FileNotFoundError:
                if not ended.is_set():  # removed by hand
                    _create(path, mine)
                continue
            if holder not in (mine, None) and not ended.is_set():
                text = f"error: {path}: now held by {holder}; this process ends without saving\n"
                os.write(sys.stderr.fileno(), text.encode())
                os._exit(EXIT_FAILED)
