"""Real processes killed, hung and starved: what is on the disk stays good, and the run ends up where it would have."""

import errno
import hashlib
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import device_run
import pytest
from ranks import RankGroup, run_ranks
from test_trainer import losses
from tiny_models import write_tiny_model

from megatron_gft.checkpoints.history import find_checkpoint, find_damage, list_checkpoints
from megatron_gft.errors import EXIT_INTERRUPTED, EXIT_REQUEUE

OPTIONS = ["model.precision=fp32", "objective.coefficient=none"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("model") / "hf", "llama_tied_linear", num_hidden_layers=2))


def exported_weights(output: Path) -> dict[str, str]:
    """sha256 of each weight file of the newest export."""
    newest = sorted((output / "export").iterdir())[-1]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(newest.glob("*.safetensors"))}


def run_under_fire(
    model: str, output: Path, world_size: int, options: list[str], kills: int, seed: int
) -> tuple[int, int]:
    """Start the run again and again, killing one random rank (SIGKILL) at a random moment, ``kills`` times; then let
    it finish. Returns the number of kills that hit a running process, and of those that came after steps of that start.
    """
    rng = random.Random(seed)
    hit = in_training = 0
    for attempt in range(10 * kills):
        folder = output.parent / f"attempt-{attempt}"
        folder.mkdir()
        group = RankGroup(folder, world_size, device_run.run, model, str(output), options, timeout=600)
        if hit == kills:
            assert [result["code"] for result in group.wait()] == [0] * world_size
            return hit, in_training
        steps = wait_for_a_moment(group, output / "metrics.jsonl", rng)
        if not group.running:
            return hit, in_training  # finished before its time: the caller's counts are too low for this machine
        group.send(signal.SIGKILL, rng.choice(sorted(group.running.values())))
        hit += 1
        in_training += steps > 0
        group.end()
        for complete in list_checkpoints(output / "checkpoints"):
            assert find_damage(complete) == []
    raise AssertionError("the run never finished")


def wait_for_a_moment(group: RankGroup, metrics: Path, rng: random.Random) -> int:
    """Every other time a moment after the start, else one after some steps; returns how many steps were seen."""

    def written() -> int:
        return metrics.stat().st_size if metrics.exists() else 0

    wanted = rng.choice((0, rng.randint(1, 5)))
    steps, size, until = 0, written(), time.monotonic() + rng.uniform(0.6, 4.0)
    while group.running and group.poll() is None and (steps < wanted or time.monotonic() < until):
        time.sleep(0.005)
        if (now := written()) != size:
            steps, size = steps + (now > size), now
            if steps == wanted:
                until = time.monotonic() + rng.uniform(0, 0.3)
    return steps


def soak(*values):
    return pytest.param(*values, marks=[pytest.mark.soak, pytest.mark.timeout(7200)])


@pytest.mark.parametrize(
    ("layout", "kills", "epochs"),
    [
        (["parallel.tp=2"], 1, 3),
        pytest.param(["parallel.tp=2"], 3, 6, marks=pytest.mark.slow),  # four starts of four processes
        soak(["parallel.tp=2"], 50, 60),
        soak(["parallel.pp=2"], 50, 60),
        soak(["parallel.tp=2", "parallel.pp=2"], 50, 60),
    ],
)
def test_killed_ranks_do_not_change_the_weights(model, tmp_path, layout, kills, epochs):
    """Four processes, what TP and PP leave is DP: bit-equal to an undisturbed run, every named checkpoint whole."""
    options = [*OPTIONS, *layout, "checkpoint.save_every=2", f"train.epochs={epochs}"]
    options += ["checkpoint.export_hf=last", "optimizer.lr=1e-4"]
    run_ranks(4, device_run.run, model, str(tmp_path / "whole"), options, timeout=600)
    (tmp_path / "fire").mkdir()
    hit, in_training = run_under_fire(model, tmp_path / "fire" / "run", 4, options, kills, seed=kills)
    print(f"{hit} kills, {in_training} of them after steps of their start")
    assert hit == kills and in_training >= kills // 4
    assert exported_weights(tmp_path / "fire" / "run") == exported_weights(tmp_path / "whole")
    assert losses(tmp_path / "fire" / "run") == losses(tmp_path / "whole")


def _limited(model: str, output: str, options: list[str], limit_bytes: int) -> dict:
    """A run that cannot write files above a size: what a full disk does, without filling one."""
    from megatron_gft.checkpoints.checkpointer import SaveFailed

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, resource.RLIM_INFINITY))
    try:
        return device_run.run(model, output, options)
    except SaveFailed as error:
        return {"failed": str(error)}


@pytest.mark.parametrize("background", ["true", "false"])
def test_a_full_disk_is_reported_and_earlier_checkpoints_stay(model, tmp_path, background, capfd):
    output = tmp_path / "run"
    options = [*OPTIONS, f"checkpoint.async_save={background}"]
    run_ranks(2, device_run.run, model, str(output), [*options, "train.max_steps=1"])
    good = find_checkpoint(output / "checkpoints", "latest")
    results = run_ranks(2, _limited, model, str(output), options, 100_000)
    for result in results:
        assert "checkpoint of step 4 could not be written: rank " in result["failed"]
        assert "GiB free" in result["failed"] and str(output) in result["failed"]
    assert ("once more in front" in capfd.readouterr().err) == (background == "true")
    assert find_checkpoint(output / "checkpoints", "latest") == good
    assert find_damage(good) == []
    assert not list((output / "checkpoints").glob(".step-*"))
    assert run_ranks(2, device_run.run, model, str(output), options)[0]["code"] == 0


def _no_room_for(model: str, output: str, options: list[str], writer: str) -> dict:
    """A run whose disk is full when the first rank writes one of Megatron's small files."""
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.strategies import common, filesystem_async

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    places = {"common.pt": (common.torch, "save"), "metadata.json": (serialization, "save_config")}
    places[".metadata"] = (filesystem_async.FileSystemWriterAsync, "finish")
    setattr(*places[writer], full)
    return device_run.run(model, output, options)


@pytest.mark.parametrize(
    ("writer", "background"), [("common.pt", "true"), ("metadata.json", "true"), (".metadata", "false")]
)
def test_a_disk_that_is_full_for_one_small_file(model, tmp_path, writer, background):
    output, options = tmp_path / "run", [*OPTIONS, "train.max_steps=1", f"checkpoint.async_save={background}"]
    with pytest.raises(RuntimeError, match="SaveFailed: checkpoint of step 1: .*No space left on device"):
        run_ranks(2, _no_room_for, model, str(output), options, writer)
    assert [path.name for path in (output / "checkpoints").iterdir()] == []


def _hang_at(model: str, output: str, options: list[str], step: int) -> dict:
    """A run whose last rank stops working at a step, without dying."""
    from megatron_gft.trainer import Trainer

    original = Trainer.step

    def hanging(self, batch, packs, seconds):
        if self.state.step + 1 == step and self.parallel.rank == 1:
            time.sleep(600)
        return original(self, batch, packs, seconds)

    Trainer.step = hanging
    return device_run.run(model, output, options)


def test_a_hung_rank_ends_the_job_and_says_where(model, tmp_path, capfd):
    options = [*OPTIONS, "train.watchdog_minutes=0.05"]
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="failed"):
        run_ranks(2, _hang_at, model, str(tmp_path / "run"), options, 3)
    assert time.monotonic() - started < 60
    error = capfd.readouterr().err
    assert "Timeout (0:00:03)!" in error and "hanging" in error, "the stack of the rank that hangs"
    doing = (tmp_path / "run" / "doing" / "rank-1.txt").read_text()
    assert doing.startswith("rank 1 (tp 0, pp 0, cp 0, dp 1, ep 0): training step 3, since ")


HOLDS_THE_LOCK = """
import pathlib, re, sys, threading, time
from megatron_gft.runtime import Watchdog

watchdog = Watchdog(0.02, "rank 3", pathlib.Path(sys.argv[1]))
threading.Thread(target=lambda: (time.sleep(0.3), print("a thread could run", flush=True)), daemon=True).start()
watchdog.doing("training step 7")
re.match("(a+)+$", "a" * 64 + "b")
"""


def test_the_watchdog_fires_while_c_code_holds_the_lock(tmp_path):
    """A regular expression that backtracks for years: no Python thread gets a turn, so none could end the process."""
    file = tmp_path / "doing" / "rank-3.txt"
    ended = subprocess.run(
        [sys.executable, "-c", HOLDS_THE_LOCK, str(file)], capture_output=True, text=True, timeout=100
    )
    assert ended.returncode == 1 and ended.stdout == ""
    assert "Timeout (0:00:01.200000)!" in ended.stderr and "re/__init__.py" in ended.stderr
    assert file.read_text().startswith("rank 3: training step 7, since ")


def test_a_killed_checkpoint_writer_is_noticed(model, tmp_path, capfd):
    """The background writer is a process of its own; its death costs a retry, not the checkpoint."""
    output = tmp_path / "run"
    results = run_ranks(1, _kill_first_writer, model, str(output), [*OPTIONS, "checkpoint.save_every=1"])
    assert results[0]["code"] == 0
    assert "once more in front" in capfd.readouterr().err
    assert find_checkpoint(output / "checkpoints", "latest").name == "step-00000004"


def _kill_first_writer(model: str, output: str, options: list[str]) -> dict:
    from megatron.core.dist_checkpointing.strategies.async_utils import TemporalAsyncCaller

    original, killed = TemporalAsyncCaller.schedule_async_call, []

    def schedule(self, request):
        original(self, request)
        if self.process is not None and not killed:
            killed.append(self.process.pid)
            os.kill(self.process.pid, signal.SIGKILL)

    TemporalAsyncCaller.schedule_async_call = schedule
    result = device_run.run(model, output, options)
    assert killed
    return result


@pytest.mark.parametrize(("name", "code"), [("SIGUSR1", EXIT_REQUEUE), ("SIGTERM", 0), ("SIGINT", EXIT_INTERRUPTED)])
def test_a_signal_to_the_process_group_costs_no_checkpoint(model, tmp_path, capfd, name, code):
    """It comes during the first save in the background; the second one, which the signal asks for, is complete."""
    output = tmp_path / "run"
    result = run_ranks(1, _signal_first_writer, model, str(output), [*OPTIONS, "checkpoint.save_every=1"], name)[0]
    assert result["code"] == code and len(result["loss"]) == 2
    newest = find_checkpoint(output / "checkpoints", "latest")
    assert newest.name == "step-00000002" and find_damage(newest) == []
    assert "once more in front" not in capfd.readouterr().err


def _signal_first_writer(model: str, output: str, options: list[str], name: str) -> dict:
    from megatron.core.dist_checkpointing.strategies.async_utils import TemporalAsyncCaller

    os.setpgid(0, 0)  # what it starts belongs to this group: the writers, and a queue's server if there is one
    original, sent = TemporalAsyncCaller.schedule_async_call, []

    def schedule(self, request):
        original(self, request)
        if not sent:
            sent.append(os.killpg(0, signal.Signals[name]))

    TemporalAsyncCaller.schedule_async_call = schedule
    return device_run.run(model, output, options)
