"""Stages of a pipeline: commands that run once, are skipped while their output stands, and say why they failed.

A stage has a key: the hash of its command, of the bytes of its input files and of the keys of the stages it needs.
A stamp, ``STAMPS/NAME.json``, holds the key and the size of every output file. A stage whose stamp carries its key and
whose outputs are all there is skipped; changed settings, inputs or earlier stages make another key, and the stage runs
again. Outputs that no stamp accounts for are somebody else's and are never removed.
"""

import contextlib
import ctypes
import errno
import os
import pty
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from megatron_gft.atomic import sha256_file, sha256_json, write_json
from megatron_gft.errors import InputError
from megatron_gft.reading import read_json

LINES_SHOWN = 15


class StageFailed(RuntimeError):
    """A stage's command failed, or left no output."""


@dataclass(frozen=True)
class Stage:
    """One command, which makes the files and folders ``outputs``.

    Args:
        needs: stages whose outputs the command reads.
        inputs: files from outside of the pipeline.
        resumes: the command goes on from its own unfinished outputs, so these are kept.
        threads: OMP_NUM_THREADS of each of its processes.
        manifests_change: later stages replace the JSON files among the outputs.
        adds: to outputs of an earlier stage, which are never in its way.
        identity: what of the command decides its outputs, and so the key; default: all of it.
        serve: starts the server that the command asks; gives its process, None for one that is not ours.
        check: refuses (InputError) what the command should not read.
        unfinished: what the outputs of a command that ended well still lack; "" when nothing.
    """

    name: str
    command: tuple[str, ...]
    outputs: tuple[Path, ...]
    stamps: Path
    needs: tuple[str, ...] = ()
    inputs: tuple[Path, ...] = ()
    resumes: bool = False
    threads: int = 1
    manifests_change: bool = False
    adds: bool = False
    identity: tuple[str, ...] = ()
    serve: Callable[[], contextlib.AbstractContextManager[subprocess.Popen | None]] | None = None
    check: Callable[[], None] | None = None
    unfinished: Callable[[], str] = str

    @property
    def stamp(self) -> Path:
        """Where the stage's record lies."""
        return self.stamps / f"{self.name}.json"

    def shown(self) -> str:
        """The command as a user would type it."""
        first, *arguments = self.command
        first = (
            os.path.relpath(first) if Path(first).is_absolute() and Path(first).is_relative_to(Path.cwd()) else first
        )
        return f"OMP_NUM_THREADS={self.threads} {shlex.join([first, *arguments])}"

    def sizes(self) -> dict[str, int]:
        """Size of every output file that later stages leave as it is."""
        files = (file for output in self.outputs for file in ([output] if output.is_file() else output.rglob("*")))
        kept = (file for file in files if not (self.manifests_change and file.suffix == ".json"))
        return {str(file): file.stat().st_size for file in sorted(kept) if file.is_file()}


@dataclass
class Pipeline:
    """Runs ``total`` stages in order; ``logs`` is the folder of what they print, ``timings`` a file of their times."""

    logs: Path
    total: int
    timings: Path
    keys: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, dict[str, Any]] = field(default_factory=dict)

    def stands(self, stage: Stage) -> bool:
        """Whether the outputs of ``stage`` are those of its settings, inputs and earlier stages; notes its key."""
        self.keys[stage.name] = key = sha256_json(
            {
                "command": stage.identity or stage.command,
                "inputs": {str(path): sha256_file(path) for path in stage.inputs if path.exists()},
                "needs": {name: self.keys[name] for name in stage.needs},
            }
        )
        stamp = _read_stamp(stage)
        there = stage.sizes() if stamp and stamp["done"] and stamp["key"] == key else None
        return stamp is not None and there is not None and stamp["outputs"].items() <= there.items()

    def run(self, stage: Stage) -> None:
        """Run ``stage`` unless its outputs stand.

        Raises:
            StageFailed: which stage, why, and the log to look at.
            InputError: something that the pipeline did not make is in the way, or what the stage's check says.
        """
        stands, stamp = self.stands(stage), _read_stamp(stage)
        key = self.keys[stage.name]
        heading = f"[{len(self.keys)}/{self.total}] {stage.name}"
        if stands and stamp is not None:
            say(f"{heading}: done before, skipped")
            self._note(stage.name, stamp["seconds"] | {"skipped": True})
            return
        say(f"\n{heading}\n$ {stage.shown()}")
        if stage.check is not None:
            stage.check()
        _make_way(stage, stamp, key)
        record = {"key": key, "done": False, "command": stage.command}
        write_json(stage.stamp, record)
        spent = self._execute(stage)
        write_json(stage.stamp, record | {"done": True, "outputs": stage.sizes(), "seconds": spent})
        self._note(stage.name, spent | {"skipped": False})
        say(f"{heading}: {spent['wall']:.0f} s ({spent['cpu']:.0f} CPU s)")

    def _execute(self, stage: Stage) -> dict[str, float]:
        log = self.logs / f"{stage.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        started, cpu = time.perf_counter(), _children_cpu_seconds()
        environment = {"OMP_NUM_THREADS": str(stage.threads), "PYTHONUNBUFFERED": "1"}
        with stage.serve() if stage.serve else contextlib.nullcontext() as server:
            code = run_logged(list(stage.command), log, environment, server)
            dead = server is not None and code != 0 and server.poll() is not None
        spent = {"wall": time.perf_counter() - started, "cpu": _children_cpu_seconds() - cpu}
        missing = [str(path) for path in stage.outputs if not path.exists()]
        lacking = "" if code or missing else stage.unfinished()
        if code == 0 and not missing and not lacking:
            return spent
        why = "the server died in the middle" if dead else lacking or _reason(code, missing)
        raise StageFailed(
            f"stage {stage.name} failed: {why} -> see to it and run the same command again: what is finished "
            f"is kept; log: {log}\n{last_lines(server_log(log) if dead else log)}"
        )

    def _note(self, name: str, seconds: dict[str, Any]) -> None:
        self.seconds[name] = seconds | {key: round(seconds[key], 2) for key in ("wall", "cpu")}
        fresh = [entry for entry in self.seconds.values() if not entry["skipped"]]
        write_json(
            self.timings,
            {
                "stages": self.seconds,
                "wall_of_this_run": round(sum(entry["wall"] for entry in fresh), 2),
                "wall_of_all_stages": round(sum(entry["wall"] for entry in self.seconds.values()), 2),
                "cores": len(os.sched_getaffinity(0)),
                "load_average": os.getloadavg(),
            },
        )


def prune(stage: Stage, folder: Path) -> None:
    """Remove ``folder``, of the outputs of a finished stage, which stands without it."""
    stamp = _read_stamp(stage)
    if folder.exists() and stamp is not None and stamp["done"]:
        kept = {name: size for name, size in stamp["outputs"].items() if not Path(name).is_relative_to(folder)}
        write_json(stage.stamp, stamp | {"outputs": kept})
        shutil.rmtree(folder)
        say(f"pruned {folder}")


def _reason(code: int, missing: list[str]) -> str:
    if code == 0:
        return f"it ended without an error but left no {', '.join(missing)}"
    if code > 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


def say(text: str) -> None:
    """A line of the driver, in order with what the stages print."""
    print(text, file=sys.stderr, flush=True)


def started(command: Sequence[str], output: Any, environment: Mapping[str, str] = os.environ) -> subprocess.Popen:
    """A process that is asked to end when this one ends, in whichever way."""

    def end_with_us() -> None:
        ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG of linux/prctl.h

    options = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output, "env": environment}
    return subprocess.Popen(command, preexec_fn=end_with_us, **options)


def run_logged(
    command: list[str], log: Path, environment: dict[str, str], server: subprocess.Popen | None = None
) -> int:
    """Run a command, copy what it prints to stderr and to ``log``, return its exit code; it ends with its ``server``.

    On a terminal the command gets a terminal of its own, so that its progress bars stay bars. The first interrupt
    asks the command to end (training finishes its step and saves), a second one kills it.
    """
    reader, writer = pty.openpty() if sys.stderr.isatty() else os.pipe()
    try:
        process = started(command, writer, os.environ | environment)
    except OSError as error:
        os.close(reader)
        raise InputError(f"{command[0]}: cannot be started ({error.strerror}) -> correct the stage's command") from None
    finally:
        os.close(writer)
    if server is not None:
        threading.Thread(target=_end_with, args=(server, process), daemon=True).start()
    try:
        with open(log, "wb") as file, open(reader, "rb", buffering=0) as stream:
            try:
                _copy(stream, file)
            except KeyboardInterrupt:
                process.terminate()
                _copy(stream, file)
                raise
        return process.wait()
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def _end_with(server: subprocess.Popen, process: subprocess.Popen) -> None:
    server.wait()
    process.terminate()


def _copy(stream: Any, file: BinaryIO) -> None:
    while True:
        try:
            piece = stream.read(1 << 16)
        except OSError as error:
            if error.errno != errno.EIO:  # a terminal ends like this when its last writer has gone
                raise
            return
        if not piece:
            return
        file.write(piece)
        file.flush()
        sys.stderr.buffer.write(piece)
        sys.stderr.flush()


def server_log(log: Path) -> Path:
    """The log of the server that a stage asks, beside the stage's own."""
    return log.with_suffix(".server.log")


def last_lines(log: Path, count: int = LINES_SHOWN) -> str:
    """The end of a log, indented; of a progress bar only its last state."""
    lines = log.read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n").split("\n")
    visible = [line.rstrip("\r").rsplit("\r", 1)[-1].rstrip() for line in lines]
    return "\n".join(f"    {line}" for line in [line for line in visible if line][-count:])


def _make_way(stage: Stage, stamp: dict[str, Any] | None, key: str) -> None:
    """Remove outputs of other settings, and unfinished ones that the command cannot go on from."""
    there = [path for path in stage.outputs if path.exists() and not stage.adds]
    if stamp is None and there:
        raise InputError(
            f"{there[0]}: in the way of stage {stage.name} and not made by it -> remove it, or choose another output"
        )
    if stamp is not None and stamp["key"] == key and stage.resumes:
        return
    if there:
        say(f"  unfinished, or of other settings, so made again: {', '.join(map(str, there))}")
    for path in there:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _read_stamp(stage: Stage) -> dict[str, Any] | None:
    return read_json(stage.stamp, "remove it: the stage is done again") if stage.stamp.exists() else None


def _children_cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
