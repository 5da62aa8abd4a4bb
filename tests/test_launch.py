"""The launch scripts as a user starts them, for real, on CPU processes; Slurm's commands are stand-ins."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import fake_slurm
import pytest
from group_shards import TokenizerStamp, write_shard
from tiny_models import write_tiny_model

from megatron_gft.commands.launch import Job, apply_environment, commands
from megatron_gft.errors import EXIT_REQUEUE, InputError
from megatron_gft.tokenizer import tokenizer_fingerprint

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("gft_70b.sh", "gft_7b.sh", "gft_local.sh")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
LIMIT = 240


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """A two-layer Llama, a shard of random groups, and a configuration cut over two tensor ranks."""
    folder = tmp_path_factory.mktemp("tiny")
    model = write_tiny_model(folder / "hf", "llama3", num_hidden_layers=2)
    stamp = TokenizerStamp(
        fingerprint=tokenizer_fingerprint(model), vocab_size=256, eos_id=2, bos_id=None, chat_template="none"
    )
    write_shard(folder / "groups", groups=40, stamp=stamp)
    config = {
        "model": {"config": str(model), "precision": "fp32"},
        "parallel": {"tp": 2},
        "data": {"train": [str(folder / "groups")], "groups_per_step": 8, "max_tokens_per_pack": 128},
        "objective": {"name": "sft", "sources": ["expert", "teacher", "self"]},
        "train": {"max_steps": 2},
        "checkpoint": {"init_from": f"hf:{model}"},
        "logging": {"progress_bar": False, "tensorboard": False},
    }
    path = folder / "tiny.yaml"
    path.write_text(json.dumps(config))
    return path


def environment(recipe: Path | None, **variables: str) -> dict[str, str]:
    """The test's environment without traces of launchers, with this Python."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM", "TORCHELASTIC", "GFT_"))
        and name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    }
    kept |= {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **variables}
    return kept | ({"CONFIG": str(recipe)} if recipe else {})


def start(command: list[str], **variables) -> subprocess.Popen:
    """Start a command at the repository's root."""
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen, expected: int = 0) -> str:
    """Wait for an exit code and return the output."""
    try:
        output, _ = process.communicate(timeout=LIMIT)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # whatever is left of it
    assert process.returncode == expected, output
    return output


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def steps(run: Path) -> list[int]:
    """Steps in ``metrics.jsonl``."""
    path = run / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_step(run: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + LIMIT
    while not steps(run):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "no step in time"
        time.sleep(0.1)


def start_script(way: str, script: str, recipe: Path, run: Path, folder: Path, *overrides: str) -> subprocess.Popen:
    """Start ``launch/script`` on two processes in one of the three ways."""
    target = [f"launch/{script}", f"train.output={run}", *overrides]
    if way == "bash":
        return start(["bash", *target], **environment(recipe, GPUS_PER_NODE="2"))
    if way == "torchrun":
        return start([*TORCHRUN, "--nproc-per-node", "2", "--standalone", *target], **environment(recipe))
    path = f"{fake_slurm.install(folder / 'bin')}:{os.environ['PATH']}"
    variables = {"PATH": path, "FAKE_NODES": "2", "GPUS_PER_NODE": "1", "LOG_DIR": str(folder / "logs")}
    variables["MASTER_PORT"] = str(free_port())
    return start(["sbatch", "launch/slurm.sbatch", *target], **environment(recipe, **variables))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["bash", "torchrun", "sbatch"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_in_every_way(script, way, recipe, tmp_path):
    finish(start_script(way, script, recipe, tmp_path / "run", tmp_path))
    assert steps(tmp_path / "run") == [1, 2]


def test_scripts_differ_only_in_what_they_run():
    """So that running one of them in a way tests that way for all; and they are valid bash."""
    bodies = set()
    for script in SCRIPTS:
        text = (ROOT / "launch" / script).read_text()
        assert len(text.splitlines()) <= 30
        body = re.sub(r"(?m)^#.*$", "", text)
        bodies.add(re.sub(r'recipe="[^"]+", gpus=\d+', "", body))
        recipe, gpus = re.search(r'recipe="([^"]+)", gpus=(\d+)', text).groups()
        assert (ROOT / recipe).is_file() and recipe.endswith(f"gpus-{gpus}.yaml")
        subprocess.run(["bash", "-n", ROOT / "launch" / script], check=True)
        assert os.access(ROOT / "launch" / script, os.X_OK)
    assert len(bodies) == 1
    subprocess.run(["bash", "-n", ROOT / "launch" / "slurm.sbatch"], check=True)


def test_bash_passes_signals_on_and_reports_the_stop(recipe, tmp_path):
    run = tmp_path / "run"
    process = start_script("bash", "gft_local.sh", recipe, run, tmp_path, "train.max_steps=null", "train.epochs=1000")
    wait_for_step(run, process)
    process.send_signal(signal.SIGUSR1)
    finish(process, EXIT_REQUEUE)
    assert list((run / "checkpoints").iterdir())


@pytest.mark.slow
def test_two_torchrun_agents_meet(recipe, tmp_path):
    flags = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--local-addr", "127.0.0.1"]
    flags += ["--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    target = ["launch/gft_70b.sh", f"train.output={tmp_path / 'run'}"]
    agents = [start([*TORCHRUN, *flags, *target], **environment(recipe)) for _ in range(2)]
    for agent in agents:
        finish(agent)
    assert steps(tmp_path / "run") == [1, 2]


@pytest.mark.slow  # three starts of torchrun; its flags are tested without starting
def test_bare_torchrun_starts_over_with_the_sizes_of_the_environment(recipe, tmp_path):
    """On two machines: two bare torchruns become two agents that meet at the user's MASTER_ADDR."""
    variables = {"NNODES": "2", "GPUS_PER_NODE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    variables["LOG_DIR"] = str(tmp_path / "logs")
    target = ["launch/gft_70b.sh", f"train.output={tmp_path / 'run'}"]
    agents = [start([*TORCHRUN, *target], **environment(recipe, **variables)) for _ in range(2)]
    for agent in agents:
        finish(agent)
    assert steps(tmp_path / "run") == [1, 2]
    assert len(list((tmp_path / "logs").rglob("stderr.log"))) == 2


def stop_before_the_time_limit(recipe: Path, run: Path, folder: Path) -> int:
    """Run under Slurm until the signal of ``--signal=B:USR1@300`` comes; the last finished step."""
    process = start_script("sbatch", "gft_7b.sh", recipe, run, folder, "train.max_steps=null", "train.epochs=1000")
    wait_for_step(run, process)
    process.send_signal(signal.SIGUSR1)
    output = finish(process)
    assert (folder / "bin" / "requeued").read_text() == "4711\n", output
    return steps(run)[-1]


def test_slurm_requeues_before_the_time_limit(recipe, tmp_path):
    done = stop_before_the_time_limit(recipe, tmp_path / "run", tmp_path)
    logs = sorted((tmp_path / "logs" / "4711" / "restart-0").iterdir())
    assert [log.name for log in logs] == ["rank-0.log", "rank-1.log"]
    assert f"step {done}/" in logs[0].read_text()


@pytest.mark.slow
def test_requeued_job_resumes(recipe, tmp_path):
    run = tmp_path / "run"
    done = stop_before_the_time_limit(recipe, run, tmp_path)
    options = [f"train.max_steps={done + 2}", "train.epochs=1000"]
    finish(start_script("sbatch", "gft_7b.sh", recipe, run, tmp_path, *options))
    assert steps(run) == list(range(1, done + 3))
    assert (tmp_path / "bin" / "requeued").read_text() == "4711\n"


def test_slurm_script_needs_a_script():
    result = subprocess.run(["bash", "launch/slurm.sbatch"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and "name a script" in result.stderr


def test_bare_torchrun_without_sizes_prints_the_command():
    output = finish(start([*TORCHRUN, "launch/gft_70b.sh", "optimizer.lr=2e-6"], **environment(None)), expected=1)
    assert "needs 32 (tp 4 x pp 8 x cp 1)" in output
    assert re.search(r"torchrun --nnodes 8 --nproc-per-node 8 .*launch/gft_70b.sh optimizer.lr=2e-6", output)
    assert re.search(r"exitcode\s*: 2", output), "the script itself ends with 2; torchrun turns that into 1"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "needs a multiple of 32 processes"),
        ({"NNODES": "8", "GPUS_PER_NODE": "8"}, "no MASTER_ADDR"),
        ({"NNODES": "eight"}, "NNODES=eight"),
        ({"NNODES": "1", "GPUS_PER_NODE": "48"}, "= 32 does not divide the world size 48"),
        ({"CONFIG": "no/such.yaml"}, "no/such.yaml: cannot read"),
    ],
)
def test_bash_refuses_before_starting_anything(variables, message):
    output = finish(start(["bash", "launch/gft_70b.sh"], **environment(None, CUDA_VISIBLE_DEVICES="", **variables)), 2)
    assert message in output and "Traceback" not in output


def test_config_errors_are_said_once(recipe, tmp_path):
    process = start_script("torchrun", "gft_7b.sh", recipe, tmp_path / "run", tmp_path, "parallel.pp=3")
    output = finish(process, expected=1)
    assert output.count("2 layers do not divide by PP 3") == 1


def test_job_reads_its_environment():
    job = Job.from_environment(
        {"NNODES": "2", "GPUS_PER_NODE": "4", "MASTER_ADDR": "a", "NODE_RANK": "1", "MAX_RESTARTS": "3", "JOB_ID": "7"}
    )
    assert job.world_size == 8 and job.named
    flags = " ".join(job.torchrun_flags())
    for part in ("--nnodes 2", "--nproc-per-node 4", "a:29500", "--rdzv-id 7", "is_host=0", "--max-restarts 3"):
        assert part in flags
    assert "--standalone" in Job.from_environment({"GPUS_PER_NODE": "4"}).torchrun_flags()
    with pytest.raises(InputError, match="MASTER_PORT=x"):
        Job.from_environment({"MASTER_PORT": "x"})


def test_commands_name_every_way(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    text = commands("launch/gft_70b.sh", ["data.train=[a b]"], 64)
    assert "--nnodes 16 --nproc-per-node 4" in text and "'data.train=[a b]'" in text
    assert "sbatch --nodes 16 launch/slurm.sbatch launch/gft_70b.sh" in text
    assert "--nproc-per-node 1 launch/x.sh" in commands("launch/x.sh", [], 1)


def test_environment_keeps_what_is_set(monkeypatch):
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    apply_environment(ROOT / "launch" / "env.sh")
    assert os.environ["NCCL_DEBUG"] == "INFO"
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"


def test_every_setting_has_a_reason():
    paragraphs = (ROOT / "launch" / "env.sh").read_text().split("\n\n")
    for paragraph in paragraphs:
        if "\ndefault " in paragraph:
            assert paragraph.startswith("#"), paragraph
