"""Stages of a pipeline: commands that run once, are skipped while their output stands, and say why they failed.

A stage has a key: the hash of its command, of the bytes of its input files and of the keys of the stages it needs.
Beside the outputs lies a stamp, ``STAMPS/NAME.json``, with the key and the size of every output file. A stage whose
stamp carries its key and whose outputs are all there is skipped; changed settings, inputs or earlier stages make
another key, and the stage runs again. Outputs that no stamp accounts for are somebody else's and are never removed.
"""

from __future__ import annotations

import errno
import json
import os
import pty
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from megatron_gft.atomic import sha256_file, sha256_json, write_json
from megatron_gft.errors import InputError

LINES_SHOWN = 15
# Passive: threads that wait for each other sleep, for spinning costs a busy machine more than it gains an idle one.
ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore"}


class StageFailed(RuntimeError):
    """A stage's command failed, or left no output."""


@dataclass(frozen=True)
class Stage:
    """One command.

    Args:
        name: in the order of the pipeline, unique.
        command: what follows ``python``.
        outputs: files and folders that the command makes.
        stamps: folder of the stamp.
        needs: stages whose outputs the command reads.
        inputs: files from outside of the pipeline.
        resumes: the command goes on from its own unfinished outputs, so these are kept.
        threads: OMP_NUM_THREADS of each of its processes.
    """

    name: str
    command: tuple[str, ...]
    outputs: tuple[Path, ...]
    stamps: Path
    needs: tuple[str, ...] = ()
    inputs: tuple[Path, ...] = ()
    resumes: bool = False
    threads: int = 1

    @property
    def stamp(self) -> Path:
        """Where the stage's record lies."""
        return self.stamps / f"{self.name}.json"

    def shown(self) -> str:
        """The command as a user would type it."""
        python = os.path.relpath(sys.executable) if Path(sys.executable).is_relative_to(Path.cwd()) else sys.executable
        return f"OMP_NUM_THREADS={self.threads} {python} {shlex.join(self.command)}"


@dataclass
class Pipeline:
    """Runs stages in order and keeps their times in ``timings``.

    Args:
        logs: folder of ``NAME.log``, everything that a stage printed.
        total: number of stages, for the headings.
        timings: file that holds seconds and CPU seconds of every stage.
    """

    logs: Path
    total: int
    timings: Path
    keys: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, dict[str, Any]] = field(default_factory=dict)

    def run(self, stage: Stage) -> None:
        """Run ``stage`` unless its outputs stand.

        Raises:
            StageFailed: which stage, why, and the log to look at.
            InputError: something that the pipeline did not make is in the way.
        """
        key = self._key(stage)
        self.keys[stage.name] = key
        stamp = _read_stamp(stage.stamp)
        heading = f"[{len(self.keys)}/{self.total}] {stage.name}"
        if stamp is not None and stamp["key"] == key and _is_complete(stage, stamp):
            say(f"{heading}: done before, skipped")
            self._note(stage.name, stamp["seconds"] | {"skipped": True})
            return
        say(f"\n{heading}\n$ {stage.shown()}")
        _make_way(stage, stamp, key)
        write_json(stage.stamp, {"key": key, "done": False, "command": stage.command})
        spent = self._execute(stage)
        write_json(
            stage.stamp,
            {
                "key": key,
                "done": True,
                "command": stage.command,
                "outputs": _sizes(stage.outputs),
                "seconds": spent,
            },
        )
        self._note(stage.name, spent | {"skipped": False})
        say(f"{heading}: {spent['wall']:.0f} s ({spent['cpu']:.0f} CPU s)")

    def _key(self, stage: Stage) -> str:
        return sha256_json(
            {
                "command": stage.command,
                "inputs": {str(path): sha256_file(path) for path in stage.inputs},
                "needs": {name: self.keys[name] for name in stage.needs},
            }
        )

    def _execute(self, stage: Stage) -> dict[str, float]:
        log = self.logs / f"{stage.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        started, cpu = time.perf_counter(), _children_cpu_seconds()
        code = run_logged(
            [sys.executable, *stage.command], log, {"OMP_NUM_THREADS": str(stage.threads), "PYTHONUNBUFFERED": "1"}
        )
        spent = {"wall": time.perf_counter() - started, "cpu": _children_cpu_seconds() - cpu}
        missing = [str(path) for path in stage.outputs if not path.exists()]
        if code == 0 and not missing:
            return spent
        raise StageFailed(f"stage {stage.name} failed: {_reason(code, missing)}; log: {log}\n{last_lines(log)}")

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


def run_logged(command: list[str], log: Path, environment: dict[str, str]) -> int:
    """Run a command, copy what it prints to stderr and to ``log``, return its exit code.

    On a terminal the command gets a terminal of its own, so that its progress bars stay bars. The first interrupt
    asks the command to end (training finishes its step and saves), a second one kills it.
    """
    reader, writer = pty.openpty() if sys.stderr.isatty() else os.pipe()
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=writer, stderr=writer, env=os.environ | environment
    )
    os.close(writer)
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


def last_lines(log: Path, count: int = LINES_SHOWN) -> str:
    """The end of a log, indented; of a progress bar only its last state."""
    lines = log.read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n").split("\n")
    visible = [line.rstrip("\r").rsplit("\r", 1)[-1].rstrip() for line in lines]
    return "\n".join(f"    {line}" for line in [line for line in visible if line][-count:])


def _make_way(stage: Stage, stamp: dict[str, Any] | None, key: str) -> None:
    """Remove outputs of other settings, and unfinished ones that the command cannot go on from."""
    there = [path for path in stage.outputs if path.exists()]
    if stamp is None and there:
        raise InputError(
            f"{there[0]}: in the way of stage {stage.name} and not made by it -> remove it, or choose another --output"
        )
    if stamp is not None and stamp["key"] == key and stage.resumes:
        return
    if there:
        say(f"  unfinished, or of other settings, so made again: {', '.join(map(str, there))}")
    for path in there:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _read_stamp(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise InputError(f"{path}: not a stamp of this program -> remove it") from None


def _is_complete(stage: Stage, stamp: dict[str, Any]) -> bool:
    present = stamp["done"] and all(path.exists() for path in stage.outputs)
    return present and _sizes(stage.outputs) == stamp["outputs"]


def _sizes(outputs: tuple[Path, ...]) -> dict[str, int]:
    """Size of every output file."""
    sizes = {}
    for output in outputs:
        for path in sorted(output.rglob("*")) if output.is_dir() else [output]:
            if path.is_file():
                sizes[str(path)] = path.stat().st_size
    return sizes


def _children_cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
