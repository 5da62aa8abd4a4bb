"""Jobs on a real Slurm of two nodes (slurm_cluster.py): start, stop, requeue, failure. Run by ``make test-slurm``."""

import json
import re
import signal
import sys
from pathlib import Path

import pytest
from group_shards import write_recipe
from slurm_cluster import NODES, Cluster, missing, start_cluster, wait_for

from megatron_gft.run_lock import LOCK_FILE
from megatron_gft.shards import GroupShard, expand_shards

ROOT = Path(__file__).resolve().parents[1]
ENDLESS = ("train.max_steps=null", "train.epochs=100000")
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600), pytest.mark.skipif(bool(missing()), reason=f"{missing()}")]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("tiny"), tp=1)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with start_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def nothing_is_left(slurm, tmp_path):
    """After each test the nodes are idle, and no process of a job is left."""
    yield
    slurm.run("scancel", "--user=root")
    wait_for(slurm.ready, "idle nodes after the test")
    wait_for(lambda: len(slurm.processes()) == 4, "the daemons alone", 15)


class Run:
    """A job that trains into ``folder / "run"`` by ``launch/slurm.sbatch``."""

    def __init__(self, slurm: Cluster, recipe: Path, folder: Path, *overrides: str, flags: str = "", nodes: int = 2):
        self.slurm, self.folder, self.run, self.logs = slurm, folder, folder / "run", folder / "logs"
        variables = {"CONFIG": str(recipe), "PYTHON": sys.executable, "LOG_DIR": str(self.logs)}
        sizes = f"--parsable --nodes={nodes} --ntasks-per-node=1 --gpus-per-node=1 --output={folder}/job.log {flags}"
        target = ("launch/slurm.sbatch", "launch/gft_local.sh", f"train.output={self.run}", *overrides)
        self.job = slurm.run("sbatch", *sizes.split(), *target, cwd=ROOT, env=slurm.environment | variables).strip()

    @property
    def steps(self) -> list[int]:
        """Steps in ``metrics.jsonl``."""
        path = self.run / "metrics.jsonl"
        return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.run / "checkpoints").glob("step*"))

    def wait(self, *states: str, restarts: int | None = None) -> dict[str, str]:
        try:
            return self.slurm.wait(self.job, *states, restarts=restarts)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.said()}") from None

    def wait_for_step(self, number: int) -> None:
        def reached() -> bool:
            assert self.slurm.job(self.job)["JobState"] in ("PENDING", "CONFIGURING", "RUNNING"), self.said()
            return bool(self.steps) and self.steps[-1] >= number

        wait_for(reached, f"step {number}; {self.said()}")

    def said(self) -> str:
        """The job's output and its ranks' logs."""
        files = [self.folder / "job.log", *sorted(self.logs.rglob("*.log"))]
        return "".join(f"== {file}\n{file.read_text()}" for file in files if file.exists())

    def finishes(self, restarts: int) -> None:
        """The job ends well after so many restarts, with every step once."""
        job = self.wait("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", restarts=restarts)
        assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), self.said()
        assert self.steps == list(range(1, self.steps[-1] + 1)) and not (self.run / LOCK_FILE).exists()
        assert "Traceback" not in self.said()


def test_two_nodes_of_two_ranks_train_to_the_end(slurm, recipe, tmp_path):
    run = Run(slurm, recipe, tmp_path, flags="--ntasks-per-node=2 --gpus-per-node=2")
    run.wait("RUNNING")
    step = wait_for(lambda: re.search(r"CPUs=(\d+) Tasks=4 ", slurm.run("scontrol", "show", "steps", run.job)), "srun")
    run.finishes(restarts=0)
    assert run.steps == [1, 2]
    logs = sorted(path.name for path in (run.logs / run.job / "restart-0").iterdir())
    assert logs == [f"rank-{rank}.log" for rank in range(4)]
    assert step[1] == "32", "--cpus-per-task=8 of the job does not reach its ranks"


def test_requeued_at_the_time_limit_it_resumes(slurm, recipe, tmp_path):
    """Slurm itself sends the signal of ``--signal``; looked at every 30 seconds, from 30 seconds before it is due."""
    run = Run(slurm, recipe, tmp_path, *ENDLESS, flags="--time=60 --signal=B:USR1@10")
    run.wait_for_step(1)
    minutes = int(slurm.job(run.job)["RunTime"].split(":")[1])
    slurm.run("scontrol", "update", f"JobId={run.job}", f"TimeLimit={minutes + 1}")
    run.wait("PENDING", "RUNNING", restarts=1)
    done = run.steps[-1]
    assert run.checkpoints and "requeued" in run.said()
    slurm.run("scontrol", "update", f"JobId={run.job}", "TimeLimit=60")
    run.wait_for_step(done + 1)
    slurm.run("scancel", "--signal=USR1", run.job)  # to the ranks alone, as users do
    run.wait("PENDING", restarts=2)
    assert run.steps == list(range(1, run.steps[-1] + 1)), "a step was lost or done twice"


@pytest.mark.parametrize("moment", ["the script", "Python's first lines", "imports"])
def test_a_stop_while_it_starts_requeues(slurm, recipe, tmp_path, moment):
    run = Run(slurm, recipe, tmp_path, *ENDLESS)
    logs = run.logs / run.job / "restart-0"
    wait_for((logs if moment == "the script" else logs / "rank-1.log").exists, moment)
    if moment == "imports":
        wait_for(lambda: any("libtorch" in m.path for p in ranks(slurm) for m in p.memory_maps()), moment)
    slurm.run("scancel", "--batch", "--signal=USR1", run.job)
    run.wait("PENDING", restarts=1)
    assert not run.steps and not (run.run / LOCK_FILE).exists() and "Traceback" not in run.said()


def ranks(slurm: Cluster) -> list:
    """Training processes."""
    return [process for process in slurm.processes() if process.name().startswith("python")]


def test_scancel_saves_and_does_not_requeue(slurm, recipe, tmp_path):
    run = Run(slurm, recipe, tmp_path, *ENDLESS)
    run.wait_for_step(1)
    slurm.run("scancel", run.job)
    job = run.wait("CANCELLED", restarts=0)
    wait_for(lambda: not ranks(slurm), "the end of its ranks")
    assert run.checkpoints[-1].endswith(f"{run.steps[-1]}") and not (run.run / LOCK_FILE).exists(), job


def test_a_killed_rank_ends_the_job(slurm, recipe, tmp_path):
    """It fails, with the log's place in its output, and is not requeued: the same would happen again."""
    run = Run(slurm, recipe, tmp_path, *ENDLESS)
    run.wait_for_step(1)
    [victim] = [process for process in ranks(slurm) if process.environ()["SLURM_PROCID"] == "1"]
    victim.send_signal(signal.SIGKILL)
    job = run.wait("FAILED", "COMPLETED", "PENDING")
    assert (job["JobState"], job["Restarts"]) == ("FAILED", "0") and job["ExitCode"] != "0:0"
    assert f"logs of all ranks: {run.logs}" in run.said()


@pytest.mark.parametrize("way", ["node down", "requeue"])
def test_what_slurm_requeues_saves_and_resumes(slurm, recipe, tmp_path, way):
    """A node set to down, and what preemption does: Slurm sends SIGTERM to the ranks and starts the job again."""
    run = Run(slurm, recipe, tmp_path, *ENDLESS)
    run.wait_for_step(1)
    down = ("update", f"NodeName={NODES[1]}", "State=DOWN", "Reason=test")
    slurm.run("scontrol", *(down if way == "node down" else ("requeue", run.job)))
    try:
        run.wait("PENDING", restarts=1)
        wait_for(lambda: not ranks(slurm), "the end of its ranks")
        done = run.steps[-1]
        assert run.checkpoints[-1].endswith(f"{done}"), run.said()
    finally:
        if way == "node down":
            slurm.run("scontrol", "update", f"NodeName={NODES[1]}", "State=RESUME")
    run.wait_for_step(done + 1)
    slurm.run("scancel", run.job)
    run.wait("CANCELLED", restarts=1)
    assert run.steps == list(range(1, run.steps[-1] + 1)), "a step was lost or done twice"


def test_a_second_job_into_the_same_folder_is_refused(slurm, recipe, tmp_path):
    first = Run(slurm, recipe, tmp_path, *ENDLESS, nodes=1)
    first.wait_for_step(1)
    (tmp_path / "second").mkdir()
    second = Run(slurm, recipe, tmp_path / "second", *ENDLESS, f"train.output={first.run}", nodes=1)
    job = second.wait("FAILED")
    assert job["ExitCode"] == "2:0" and f"Slurm job {first.job} restarted 0 times trains into" in second.said()
    done = first.steps[-1]
    first.wait_for_step(done + 1)


def test_preprocessing_as_a_job_array(slurm, recipe, tmp_path):
    rows = [
        {"id": f"g{i}", "prompt": "1+1=", "responses": [{"text": "2", "reward": 1.0, "source": "expert"}]}
        for i in range(7)
    ]
    source, model = tmp_path / "groups.jsonl", recipe.parent / "hf"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = f"{sys.executable} tools/preprocess_groups.py --input {source} --tokenizer {model} --chat-template none"
    command += f" --output-prefix {tmp_path}/train --part $SLURM_ARRAY_TASK_ID/2 --quiet"
    slurm.run("sbatch", "--wait", "--array=1-2", f"--output={tmp_path}/%a.log", "--wrap", command, cwd=ROOT)
    prefixes = expand_shards(f"{tmp_path}/train*")
    ids = [shard.meta(i)["id"] for shard in map(GroupShard, prefixes) for i in range(len(shard))]
    assert len(prefixes) == 2 and sorted(ids) == sorted(row["id"] for row in rows)


def test_plain_srun_is_one_run_of_two_ranks(slurm, recipe, tmp_path):
    command = [sys.executable, "-m", "megatron_gft.train", "--config", recipe, f"train.output={tmp_path / 'run'}"]
    output = slurm.run("srun", "--nodes=2", "--ntasks-per-node=1", *command, cwd=ROOT)
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in metrics] == [1, 2], output
