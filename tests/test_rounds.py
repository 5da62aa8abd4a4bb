"""Rounds: killed at any point the same command ends with the same bytes; and what the driver refuses, in words."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import time
import traceback
import types
from pathlib import Path

import pytest
import tool_runs
from test_quickstart import word_problems
from tiny_language_model import language_model_folder

from megatron_gft.commands import rounds as command
from megatron_gft.rounds import stages

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = """
output: run
rounds: 2
model: model
problems: {train: [problems/train.jsonl], held_out: problems/held_out.jsonl}
generate:
  sources:
    - kind=column source=expert column=solution
    - kind=transformers source=self model={model} k=2 max_tokens=8 logprobs=true batch_size=2
score: {arguments: --verifier math --workers 1}
train: {config: [train.yaml]}
carry_optimizer: true
"""
TRAINING = """
model: {config: model, precision: fp32}
data: {groups_per_step: 1, max_tokens_per_pack: 1024}
optimizer: {lr: 1e-3}
checkpoint: {save_every: 2}
logging: {tensorboard: false}
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    language_model_folder(folder / "model")
    word_problems.main(["--output", str(folder / "problems"), "--train", "3", "--held-out", "3"])
    (folder / "train.yaml").write_text(TRAINING)
    (folder / "rounds.yaml").write_text(SETTINGS)
    return folder


@pytest.fixture
def place(inputs, tmp_path, monkeypatch) -> Path:
    """A working directory with the inputs."""
    for path in inputs.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Forked:
    """``subprocess.Popen`` of a Python program, in a fork that has imported what it needs: tenths of seconds each."""

    def __init__(self, program: list[str], stdout: int, env: dict[str, str], **_: object):
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                os.dup2(stdout, 1)
                os.dup2(stdout, 2)
                sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
                os.environ.update(env)
                sys.argv = program[2:] if program[1] == "-m" else program[1:]
                kind = runpy.run_module if program[1] == "-m" else runpy.run_path
                kind(sys.argv[0], run_name="__main__")
            except SystemExit as end:
                code = int(end.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def poll(self) -> int | None:
        return self.returncode

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode


def start(folder: Path, *arguments: str) -> int:
    """The command in a process group of its own, in ``folder``; its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            os.chdir(folder)
            log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
                os.environ.pop(name, None)
            stages.subprocess = types.SimpleNamespace(Popen=Forked, DEVNULL=subprocess.DEVNULL)
            os._exit(command.main(["--config", "rounds.yaml", *arguments]))
        finally:
            traceback.print_exc()
            os._exit(70)
    return pid


def finish(folder: Path) -> None:
    code = os.waitstatus_to_exitcode(os.waitpid(start(folder), 0)[1])
    assert code == 0, (folder / "log").read_text()[-3000:]


def results(folder: Path) -> dict[str, str]:
    """Hashes of all that two runs of one seed have in common: responses, verdicts, shards, weights."""
    files = [path for kind in ("groups", "scored", "shards", "model") for path in folder.glob(f"run/round-*/{kind}/*")]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if not path.name.endswith((".journal", ".report.ndjson"))
    }


def kill_within(folder: Path, stage: str, seconds: float) -> None:
    """Run until ``stage`` has begun, and ``seconds`` more; then SIGKILL to all of its processes."""
    pid, stamp = start(folder), folder / "run" / "stages" / f"{stage}.json"
    while not stamp.exists() and os.waitpid(pid, os.WNOHANG) == (0, 0):
        time.sleep(0.01)
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory) -> Path:
    tool_runs.load()
    folder = tmp_path_factory.mktemp("undisturbed")
    for path in inputs.iterdir():
        (folder / path.name).symlink_to(path)
    finish(folder)
    return folder


def disturb(undisturbed: Path, place: Path, kills: int, seed: int) -> None:
    timings = json.loads((undisturbed / "run" / "timings.json").read_text())["stages"]
    draw = random.Random(seed)
    for name in sorted(draw.choices(list(timings), k=kills)):
        kill_within(place, name, draw.uniform(0, timings[name]["wall"]))
    finish(place)
    assert results(place) == results(undisturbed)
    assert len(results(place)) >= 30


def test_killed_three_times_it_ends_with_the_same_bytes(undisturbed, place):
    disturb(undisturbed, place, kills=3, seed=time.time_ns())


@pytest.mark.soak
def test_killed_twenty_times_it_ends_with_the_same_bytes(undisturbed, place):
    disturb(undisturbed, place, kills=20, seed=time.time_ns())
