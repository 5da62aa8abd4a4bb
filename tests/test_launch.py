"""The launch scripts as a user starts them, for real, on CPU processes; under Slurm in test_slurm.py."""

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

import psutil
import pytest
from group_shards import write_recipe

from megatron_gft.commands.launch import Job, apply_environment, commands
from megatron_gft.errors import EXIT_REQUEUE, InputError
from megatron_gft.launchers import name_rank
from megatron_gft.run_lock import LOCK_FILE, run_lock
from megatron_gft.runtime import StopRequest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("gft_70b.sh", "gft_7b.sh", "gft_local.sh")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
LIMIT = 240


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """A two-layer Llama, a shard of random groups, and a configuration cut over two tensor ranks."""
    return write_recipe(tmp_path_factory.mktemp("tiny"), tp=2)


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


def start_script(way: str, script: str, recipe: Path, run: Path, *overrides: str) -> subprocess.Popen:
    """Start ``launch/script`` on two processes by bash or torchrun."""
    target = [f"launch/{script}", f"train.output={run}", *overrides]
    if way == "bash":
        return start(["bash", *target], **environment(recipe, GPUS_PER_NODE="2"))
    return start([*TORCHRUN, "--nproc-per-node", "2", "--standalone", *target], **environment(recipe))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["bash", "torchrun"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_in_every_way(script, way, recipe, tmp_path):
    finish(start_script(way, script, recipe, tmp_path / "run"))
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


@pytest.mark.slow  # waits for steps of torchrun's ranks; test_stop.py has the signals, the Slurm script's are below
def test_bash_passes_signals_on_and_reports_the_stop(recipe, tmp_path):
    run = tmp_path / "run"
    process = start_script("bash", "gft_local.sh", recipe, run, "train.max_steps=null", "train.epochs=1000")
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


@pytest.mark.parametrize(
    ("asked", "moment", "srun", "expected"),
    [
        (None, "in srun", 0, 0),
        (None, "in srun", 2, 2),
        (None, "in srun", 75, "requeued"),  # asked by someone else than the script
        ("SIGUSR1", "before srun", 0, "requeued"),
        ("SIGTERM", "before srun", 0, 0),
        ("SIGUSR1", "in srun", 75, "requeued"),
        ("SIGUSR1", "in srun", 138, "requeued"),  # a task, or srun itself, died of it
        ("SIGUSR1", "before its tasks", 75, "requeued"),  # srun has nobody to hand it to: said again
        ("SIGUSR1", "in srun", 0, 0),  # the run was at its end
        ("SIGUSR1", "in srun", 1, 1),
        ("SIGTERM", "in srun", 0, 0),
        ("SIGTERM", "in srun", 143, 0),
        ("SIGTERM", "in srun", 1, 1),
    ],
)
def test_slurm_script_answers_signals_and_exit_codes(tmp_path, asked, moment, srun, expected):
    """Needs no Slurm: ``srun`` only hears the signal that the script passes on, and ends with a code."""
    now = f"touch {tmp_path}/now; sleep 0.5" if asked else ":"
    commands = {
        "srun": ("trap : USR1\n" if moment == "before its tasks" else f"trap 'exit {srun}' USR1 TERM\n")
        + f"{now}\n"
        + (f"sleep 20 >/dev/null 2>&1 & wait; trap 'exit {srun}' USR1; wait" if asked else f"exit {srun}"),
        "scontrol": f'[ "$1" = requeue ] && touch {tmp_path}/requeued-$2 && exit\n'
        + (f"{now}; " if moment == "before srun" else "")
        + "echo 127.0.0.1",
    }
    for name, text in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    variables = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1"}
    variables |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG_DIR": str(tmp_path / "logs")}
    process = start(["bash", "launch/slurm.sbatch", "launch/gft_7b.sh"], **environment(None, **variables))
    if asked:
        while not (tmp_path / "now").exists():
            time.sleep(0.02)
        process.send_signal(signal.Signals[asked])
    finish(process, 0 if expected == "requeued" else expected)
    assert (tmp_path / "requeued-4711").exists() == (expected == "requeued")


def test_slurm_script_refuses_other_tasks_than_gpus():
    variables = environment(None, GPUS_PER_NODE="4", SLURM_NTASKS_PER_NODE="8")
    result = subprocess.run(
        ["bash", "launch/slurm.sbatch", "x"], cwd=ROOT, capture_output=True, text=True, env=variables
    )
    assert result.returncode == 2 and "--ntasks-per-node=4 --gpus-per-node=4" in result.stderr


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
        ({"CONFIG": "no/such.yaml"}, "no/such.yaml: cannot be read"),
    ],
)
def test_bash_refuses_before_starting_anything(variables, message):
    output = finish(start(["bash", "launch/gft_70b.sh"], **environment(None, CUDA_VISIBLE_DEVICES="", **variables)), 2)
    assert message in output and "Traceback" not in output


def test_config_errors_are_said_once(recipe, tmp_path):
    process = start_script("torchrun", "gft_7b.sh", recipe, tmp_path / "run", "parallel.pp=3")
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


def test_a_second_start_is_refused(recipe, tmp_path):
    run = tmp_path / "run"
    with run_lock(run, StopRequest()):
        command = [sys.executable, "-m", "megatron_gft.train", "--config", str(recipe), "parallel.tp=1"]
        output = finish(start([*command, f"train.output={run}"], **environment(None)), 2)
        assert f"error: {run / LOCK_FILE}: process {os.getpid()} on {socket.gethostname()} trains into" in output
        assert [path.name for path in run.iterdir()] == [LOCK_FILE] and "Traceback" not in output


@pytest.mark.slow
def test_pods_of_one_job_meet(recipe, tmp_path):
    """One run of two ranks, not two runs of one into the same folder."""
    port, processes = str(free_port()), []
    for rank in ("0", "1"):
        variables = {"WORLD_SIZE": "2", "RANK": rank, "MASTER_ADDR": "127.0.0.1", "GPUS_PER_NODE": "1"}
        command = ["bash", "launch/gft_local.sh", f"train.output={tmp_path / 'run'}"]
        processes.append(start(command, **environment(recipe, MASTER_PORT=port), **variables))
    for process in processes:
        finish(process)
    assert steps(tmp_path / "run") == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.3, 1.0, 3.0])
def test_workers_of_a_script_take_a_stop_while_they_start(recipe, tmp_path, delay):
    """From the moment when the agent has them, before their interpreter is up."""
    process = start_script("bash", "gft_local.sh", recipe, tmp_path / "run", "train.epochs=1000")

    def is_worker(child: psutil.Process) -> bool:
        try:
            return "TORCHELASTIC_RUN_ID" in child.environ()
        except psutil.Error:  # short-lived helpers of the agent end between the listing and the look
            return False

    while not any(map(is_worker, psutil.Process(process.pid).children())):
        assert process.poll() is None, "the agent ended before it had workers"
        time.sleep(0.02)
    time.sleep(delay)
    process.send_signal(signal.SIGUSR1)
    output = finish(process, EXIT_REQUEUE)
    assert "Traceback" not in output and "ChildFailedError" not in output
    assert not (tmp_path / "run" / LOCK_FILE).exists()


SRUN = {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0"}
MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
PMI = {"PMI_SIZE": "4", "PMI_RANK": "3"}
MEET = {"MASTER_ADDR": "a"}
PODS = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "23456"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "8"}, None),  # a shell of salloc
        ({"RANK": "0", "WORLD_SIZE": "1", **SRUN}, "0 1 - - 29500"),  # one of a sweep
        ({**SRUN, "SLURM_STEP_NODELIST": "node[03-05,9],other7"}, "1 2 0 node03 29577"),
        ({**SRUN, "SLURM_STEP_NODELIST": "gpu-a1,b[2-3]"}, "1 2 0 gpu-a1 29577"),
        ({**SRUN, "SLURM_STEP_NODELIST": "n1", **MEET, "MASTER_PORT": "5"}, "1 2 0 a 5"),
        ({**SRUN, "SLURM_NTASKS": "1", "SLURM_PROCID": "0", **MEET}, "0 1 0 a 29577"),
        ({**SRUN, "SLURM_NTASKS": "1", "SLURM_PROCID": "0", **PODS}, "1 2 - a 23456"),  # a step per machine, by hand
        ({**MPI, **MEET}, "3 4 1 a 29500"),
        ({**MPI, **SRUN, **MEET, "SLURM_PROCID": "0"}, "3 4 1 a 29500"),  # orted is a task of srun
        ({**PMI, **MEET, "MPI_LOCALRANKID": "1"}, "3 4 1 a 29500"),
        (PODS, "1 2 - a 23456"),  # a process per pod
        ({**SRUN, **PODS, "LOCAL_RANK": "0"}, "1 2 0 a 23456"),
        (SRUN, "RANK=1, WORLD_SIZE=2, LOCAL_RANK=0, no MASTER_ADDR: the processes have no place to meet"),
        (MPI, "no MASTER_ADDR: the processes have no place to meet"),
        ({**PMI, **MEET}, "no LOCAL_RANK, MASTER_ADDR=a: mpiexec started 4 processes, this is 3"),
        ({"WORLD_SIZE": "2"}, "no RANK, WORLD_SIZE=2"),
        ({"RANK": "1"}, "RANK=1, no WORLD_SIZE"),
        (MEET, "no RANK, no WORLD_SIZE, no LOCAL_RANK, MASTER_ADDR=a"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "no MASTER_ADDR: the processes have no place"),
        ({"WORLD_SIZE": "2", "RANK": "2", **MEET}, "RANK=2, WORLD_SIZE=2"),
        ({"WORLD_SIZE": "two", "RANK": "0", **MEET}, "WORLD_SIZE=two"),
        ({**SRUN, **PODS, "RANK": "0", "LOCAL_RANK": "0"}, "srun started 2 processes, this is 1"),
        ({**SRUN, **PODS, "WORLD_SIZE": "4", "LOCAL_RANK": "0"}, "srun started 2 processes, this is 1"),
        (dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"), ""), None),
        ({**PODS, "LOCAL_RANK": "", "MASTER_PORT": ""}, "1 2 - a 29500"),
        ({**SRUN, **MEET, "SLURM_JOB_ID": "77_1"}, "1 2 0 a 29500"),
        ({**PODS, "LOCAL_RANK": "one"}, "LOCAL_RANK=one"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1"),
    ],
)
def test_a_process_knows_its_rank_or_refuses(variables, expected):
    named = dict(variables)
    if expected is not None and not re.match(r"\d+ \d+ ", expected):
        with pytest.raises(InputError, match=re.escape(expected) + ".* -> .*RANK=0 WORLD_SIZE=1"):
            name_rank(named)
        return
    name_rank(named)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    assert expected == (" ".join(named.get(name, "-") for name in names) if "RANK" in named else None)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "1 1 None"),
        (PODS, "2 1 1"),
        ({**PODS, "GPUS_PER_NODE": "8"}, "2 8 1"),
        ({**PODS, "WORLD_SIZE": "16", "PET_NNODES": "2", "PET_NPROC_PER_NODE": "8", "PET_NODE_RANK": "1"}, "2 8 1"),
        ({**PODS, "PET_NNODES": "2", "PET_NPROC_PER_NODE": "auto"}, "2 1 1"),
        ({**PODS, "NNODES": "2", "NODE_RANK": "0"}, "2 1 0"),
        ({**SRUN, **MEET, "NNODES": "2"}, "2 1 None"),  # srun --ntasks-per-node=1 bash launch/...
        ({**SRUN, "SLURM_PROCID": "0"} | {"SLURM_STEP_ID": ""}, "srun started 2"),
        ({name: SRUN[name] for name in ("SLURM_NTASKS", "SLURM_PROCID")}, "1 1 None"),  # the batch script
        ({**PODS, "NNODES": "1"}, "WORLD_SIZE=2: neither the number of machines (1) nor that of processes (1)"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "no MASTER_ADDR"),
        ({"WORLD_SIZE": "two", "RANK": "1"}, "WORLD_SIZE=two"),
        (SRUN, "srun started 2 of this script, each for a job of 1 machines"),
        (MPI, "mpirun started 4 of this script"),
    ],
)
def test_a_script_counts_the_machines_or_refuses(variables, expected, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    if not expected[0].isdigit():
        with pytest.raises(InputError, match=re.escape(expected)):
            Job.from_environment(variables)
        return
    job = Job.from_environment(variables)
    assert f"{job.nnodes} {job.gpus_per_node} {job.node_rank}" == expected


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
