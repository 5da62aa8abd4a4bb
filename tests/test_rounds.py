"""Rounds: killed at any point the same command ends with the same bytes; and what the driver refuses, in words."""

import contextlib
import functools
import hashlib
import json
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import tool_runs
from openai_server import FaultyServer, expected_text
from test_quickstart import word_problems
from tiny_language_model import language_model_folder

from megatron_gft.atomic import working_folder
from megatron_gft.commands import generate
from megatron_gft.commands import rounds as command
from megatron_gft.config import load_config, load_tree
from megatron_gft.errors import InputError, InputErrors
from megatron_gft.groups import iter_group_file, write_group_file
from megatron_gft.groups.records import GroupRecord, ResponseRecord
from megatron_gft.rounds import driver, report, servers, stages
from megatron_gft.rounds.driver import Rounds
from megatron_gft.rounds.settings import RoundsConfig, ServeSettings
from megatron_gft.rounds.stages import Pipeline, Stage, StageFailed
from megatron_gft.shards.manifest import read_manifest

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
    def __init__(self, program: Sequence[str], stdout: int, env: Mapping[str, str], **_: object):
        def run() -> None:
            os.environ.update(env)
            sys.argv = program[2:] if program[1] == "-m" else program[1:]
            kind = runpy.run_module if program[1] == "-m" else runpy.run_path
            kind(sys.argv[0], run_name="__main__")

        self.returncode: int | None = None
        self.pid = tool_runs.forked(run, stdout)

    def poll(self) -> int | None:
        return self.returncode

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode


def popen(program: Sequence[str], **options: Any) -> Forked | subprocess.Popen:
    """``subprocess.Popen``; of a tool, in a fork that has imported what it needs: tenths of seconds each."""
    servers = "openai_server.py" in program[1]
    return subprocess.Popen(program, **options) if servers else Forked(program, **options)


def start(folder: Path, *arguments: str) -> int:
    """The command in a process group of its own, in ``folder``; its pid."""

    def run() -> int:
        os.setsid()
        os.chdir(folder)
        driver.write_report = lambda *_: ""  # seconds
        stages.subprocess = types.SimpleNamespace(Popen=popen, DEVNULL=subprocess.DEVNULL)
        return command.main(["--config", "rounds.yaml", *arguments])

    with open(folder / "log", "ab") as log:
        return tool_runs.forked(run, log.fileno())


def finish(folder: Path, *arguments: str) -> None:
    code = os.waitstatus_to_exitcode(os.waitpid(start(folder, *arguments), 0)[1])
    assert code == 0, (folder / "log").read_text()[-3000:]


def results(folder: Path) -> dict[str, str]:
    """Hashes of all that two runs of one seed have in common: responses, verdicts, shards, weights."""
    files = [path for kind in ("groups", "scored", "shards", "model") for path in folder.glob(f"run/round-*/{kind}/*")]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if not path.name.endswith((".journal", ".report.ndjson"))
    }


def kill_within(folder: Path, stage: str, seconds: float, *arguments: str) -> None:
    """Run until ``stage`` has begun, and ``seconds`` more; then SIGKILL to all of its processes."""
    pid, stamp = start(folder, *arguments), folder / "run" / "stages" / f"{stage}.json"
    while not stamp.exists() and os.waitpid(pid, os.WNOHANG) == (0, 0):
        time.sleep(0.01)
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)
    ends = time.monotonic() + 10
    with contextlib.suppress(ProcessLookupError):  # a stage that is not gone yet holds the run
        while time.monotonic() < ends:
            os.killpg(pid, 0)
            time.sleep(0.01)


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory) -> Path:
    tool_runs.load()
    folder = tmp_path_factory.mktemp("undisturbed")
    for path in inputs.iterdir():
        (folder / path.name).symlink_to(path)
    finish(folder)
    return folder


def disturbed(undisturbed: Path, place: Path, kills: int, seed: int) -> dict[str, str]:
    """Results of a run that is killed in random stages, each time begun again."""
    timings = json.loads((undisturbed / "run" / "timings.json").read_text())["stages"]
    draw = random.Random(seed)
    for name in sorted(draw.choices(list(timings), k=kills)):
        kill_within(place, name, draw.uniform(0, timings[name]["wall"]))
    finish(place)
    return results(place)


def test_killed_three_times_it_ends_with_the_same_bytes(undisturbed, place):
    expected = results(undisturbed)
    assert len(expected) >= 30 and disturbed(undisturbed, place, kills=3, seed=time.time_ns()) == expected


@pytest.mark.soak
def test_killed_twenty_times_it_ends_with_the_same_bytes(undisturbed, place):
    expected = results(undisturbed)
    assert len(expected) >= 30 and disturbed(undisturbed, place, kills=20, seed=time.time_ns()) == expected


def test_what_is_done_is_skipped_and_shown(undisturbed, monkeypatch, capfd):
    monkeypatch.chdir(undisturbed)
    assert command.main(["--config", "rounds.yaml"]) == 0
    assert capfd.readouterr().err.count("done before, skipped") == 10
    monkeypatch.setattr(driver, "write_report", None)  # made once
    assert command.main(["--config", "rounds.yaml"]) == 0
    assert command.main(["--config", "rounds.yaml", "--dry-run", "train.arguments=optimizer.lr=2e-3", "rounds=3"]) == 0
    stands = re.findall(r"^\[\d+/15\] (\S+) \(stands\)$", capfd.readouterr().out, re.MULTILINE)
    assert stands == ["01-generate", "01-score", "01-preprocess"]
    page = (undisturbed / "run" / "report.html").read_text()
    assert all(text in page for text in ("<svg", "reward, self", "groups of equal rewards", "seconds: train"))
    assert (undisturbed / "run" / "curves.png").stat().st_size > 10_000


EVERYTHING = """
rounds: 3
logprobs: {}
problems: {draw: 2, drop_settled: true}
train: {arguments: objective=luffy optimizer.lr=1e-2}
evaluate: {arguments: --max-tokens 8 --workers 1 --no-reference}
keep_exports: 1
keep_checkpoints: 1
"""


@pytest.mark.slow
def test_every_key_at_once(place, capfd):
    (place / "more.yaml").write_text(EVERYTHING)
    finish(place, "--config", "more.yaml")
    folders = [place / "run" / f"round-0{number}" for number in (1, 2, 3)]
    for number, folder in enumerate(folders, 1):
        manifest = read_manifest(folder / "shards" / "train")
        assert set(manifest.logprob_files) == {"sampled", "round"} and manifest.counts.groups == 2
        config = load_config([folder / "train" / "config.yaml"])
        assert config.data.logprobs == "round"
        assert config.checkpoint.init_optimizer == (number > 1)
        assert (folder / "model").exists() == (folder / "train" / "checkpoints").exists() == (number == 3)
    gaps = [json.loads((folder / "train" / "metrics.jsonl").read_text().splitlines()[0]) for folder in folders]
    assert max(gap["sampling_gap"] for gap in gaps) < 5e-5
    dropped = [
        json.loads((folder / "groups" / "groups.jsonl.summary.json").read_text())["dropped"] for folder in folders
    ]
    assert dropped == [{"not drawn": 1}, {"not drawn": 1}, {"all wrong 2 times": 1}]  # by the seeds of their draws
    timings = json.loads((place / "run" / "timings.json").read_text())
    table = driver.write_report(place / "run" / "report.html", 3, timings["stages"])
    for row in ("accuracy", "settled prompts left out", "reward, self", "seconds: logprobs", "groups of equal rewards"):
        assert row in table
    samples, result, records = report.measure(folders[0])  # of one name they would be drawn as one curve
    assert samples["equal_rewards"] == 0 and not set(samples) & set(records[0]) - {"groups"}
    assert result["entropy"] == records[-1]["entropy"] and result["accuracy_low"] <= result["accuracy"]
    finish(place, "--config", "more.yaml")
    assert (place / "log").read_text().count("done before, skipped") == 22


SERVED = """
generate: {sources: ["kind=openai source=self model={model} url={url} k=4 max_tokens=16 backoff=0.01 concurrency=2"]}
carry_optimizer: false
train: {arguments: objective=rft}
score: {arguments: --verifier math --workers 1}
"""


@pytest.mark.slow
def test_with_servers_that_fail_and_kills_no_response_counts_twice(inputs, place, port):
    word_problems.main(["--output", "more", "--train", "30", "--held-out", "3"])
    program = f"{shlex.join(server(port, 'MODEL', 'MODEL'))} .2".replace("MODEL", "{model}")
    serve = {"url": f"http://127.0.0.1:{port}/v1", "command": program}
    (place / "server.yaml").write_text(json.dumps({"serve": serve, "problems": {"train": ["more/train.jsonl"]}}))
    (place / "more.yaml").write_text(SERVED)
    arguments = ("--config", "server.yaml", "--config", "more.yaml")
    draw = random.Random(time.time_ns())
    for name in ("01-generate", "01-generate", "02-generate"):
        kill_within(place, name, draw.uniform(0, 1.5), *arguments)
    finish(place, *arguments)
    for number in (1, 2):
        groups = [group for group, _ in iter_group_file(place / f"run/round-0{number}/groups/groups.jsonl")]
        assert len({group.id for group in groups}) == len(groups) == 30
        seeds = [response.sampling["seed"] for group in groups for response in group.responses]
        assert len(set(seeds)) == len(seeds) == 120
        for group in groups:
            prompt = [{"role": "user", "content": group.prompt}]
            assert [r.text for r in group.responses] == [
                expected_text(prompt, r.sampling["seed"]) for r in group.responses
            ]


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("rounds=0", ["rounds", "0"]),
        ("evaluat={}", ["evaluat", "did you mean evaluate"]),
        ("train.process=2", ["train.process", "train.processes"]),
        ("model=nowhere", ["model=nowhere: no such"]),
        ("problems.train=[gone.jsonl]", ["problems.train=gone.jsonl: no such"]),
        ("generate.sources=[kind=colum]", ["generate.sources", "colum"]),
        ("train.arguments=data.train=[x]", ["data.train follows from the round"]),
        ("train.arguments=optimizer.lrr=1", ["optimizer.lr"]),
        ("train.config=[gone.yaml]", ["gone.yaml"]),
        ("max_staleness=-1", ["max_staleness", "-1"]),
        ("problems={train: [problems/train.jsonl]}", []),
        ("score.arguments='--verifier \"math'", ["score.arguments: No closing quotation"]),
        ("score.arguments='--verifier {verifer}'", ["{verifer} is no name here", "values.verifer"]),
        ("serve={url: http://127.0.0.1:1/v1}", ["serve: no source asks it"]),
        (
            "before=[{name: a, command: x, outputs: [a]}, {name: a, command: y, outputs: [b]}]",
            ["two stages of one name"],
        ),
        ("before=[{name: 01-a, command: x, outputs: [a]}]", ["before", "01-a"]),
    ],
    ids=range(16),
)
def test_settings_that_cannot_work_are_refused_before_the_first_stage(place, capsys, override, parts):
    code = command.main(["--config", "rounds.yaml", "--dry-run", override])
    said = capsys.readouterr().err
    assert code == (2 if parts else 0) and all(part in said for part in parts), said


def test_rounds_without_room_on_the_disk_are_refused(place, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    assert command.main(["--config", "rounds.yaml"]) == 2
    said = capsys.readouterr().err
    assert "2 rounds need about" in said and "keep_checkpoints=1" in said and "[1/10]" not in said


def test_a_stage_that_fails_and_a_second_driver_are_told(place, capsys):
    assert command.main(["--config", "rounds.yaml", "generate.command=/bin/false"]) == 1
    assert "stage 01-generate failed: exit code 1" in capsys.readouterr().err
    assert command.main(["--config", "rounds.yaml", "generate.command=no-such-program"]) == 2
    assert "no-such-program: cannot be started" in capsys.readouterr().err
    with working_folder(place / "run" / "rounds"):
        assert command.main(["--config", "rounds.yaml"]) == 2
    assert "in use by another run" in capsys.readouterr().err


def test_training_that_was_asked_to_stop_is_not_finished(place):
    """It saves and ends well, as it does when it is done."""
    pid = start(place, "rounds=1", "train.arguments=train.epochs=500 logging.tensorboard=false")
    metrics = place / "run" / "round-01" / "train" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text()) and psutil.pid_exists(pid):
        time.sleep(0.05)
    (training,) = psutil.Process(pid).children()
    training.send_signal(signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    assert re.search(r"stage 01-train failed: it stopped at step \d+ of 1500 -> ", (place / "log").read_text())
    assert not json.loads((place / "run" / "stages" / "01-train.json").read_text())["done"]
    assert driver.steps_left(place / "another") == "it stopped before its first checkpoint"


def test_self_responses_of_old_models_are_refused(undisturbed, tmp_path, monkeypatch):
    shutil.copytree(undisturbed / "run", tmp_path / "run", symlinks=True)
    for name in ("model", "problems", "train.yaml"):
        (tmp_path / name).symlink_to(undisturbed / name)
    monkeypatch.chdir(tmp_path)

    def refusal(number: int = 2, limit: int | None = 0) -> str:
        rounds = Rounds(load_tree(RoundsConfig, [undisturbed / "rounds.yaml"], [f"max_staleness={json.dumps(limit)}"]))
        try:
            rounds.refuse_stale(number)
        except InputErrors as error:
            return str(error)
        return ""

    shutil.copytree("run/round-02/shards", "run/round-03/shards")
    assert not refusal() and not refusal(3, limit=1) and not refusal(3, limit=None)
    assert "6 self responses by run/round-01/model: 1 rounds old, max_staleness=0" in refusal(3)
    weights = tmp_path / "run" / "round-01" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert "its weights were others" in refusal() and not refusal(limit=None)
    manifest = tmp_path / "run" / "round-02" / "shards" / "train.json"
    manifest.write_text(manifest.read_text().replace("run/round-01/model", "other/model"))
    assert "6 self responses by other/model: no model of this run" in refusal()


EXAMPLES = {"smollm2": ("", 2, 15), "h100-8": ("", 8, 71), "h100-64": ("h100-8", 64, 71)}


@pytest.mark.parametrize(("name", "below", "processes", "stages"), [(name, *of) for name, of in EXAMPLES.items()])
def test_the_examples_can_be_run_and_fit(inputs, monkeypatch, capfd, name, below, processes, stages):
    monkeypatch.chdir(ROOT)
    files = [f"examples/rounds/{file}.yaml" for file in (below, name) if file]
    own = [f"model={inputs / 'model'}", f"problems.train=[{inputs / 'problems/train.jsonl'}]"]
    own.append(f"problems.held_out={inputs / 'problems/held_out.jsonl'}")
    arguments = [word for file in files for word in ("--config", file)]
    assert command.main([*arguments, "--dry-run", *own]) == 0, capfd.readouterr().err
    printed = capfd.readouterr().out
    assert printed.count(f"/{stages}] ") == stages == printed.count("OMP_NUM_THREADS=")
    for file in re.findall(r"(?:examples|tools|launch)/[\w./-]+\.(?:py|yaml|sbatch)", printed):
        assert (ROOT / file).is_file()
    if processes > 2:
        recipes = load_tree(RoundsConfig, files, own).train.config
        options = [word for file in recipes for word in ("--config", file)]
        planned = tool_runs.run(ROOT, "plan", *options, "--world-size", str(processes), "--groups", "1024")
        assert "verdict: fits" in planned.text, planned.text


# --- prompts ---------------------------------------------------------------------------------------------------------


def scored(path: Path, **outcomes: str) -> str:
    """A group file whose self responses are (r)ight or (w)rong."""
    words = {"r": "correct", "w": "wrong"}
    groups = [
        GroupRecord(name, name, [ResponseRecord("x", "self", reward=0.0, outcome=words.get(o)) for o in outcome])
        for name, outcome in outcomes.items()
    ]
    write_group_file(path, groups)
    return str(path)


def test_prompts_that_teach_nothing_twice_are_dropped_and_counted(tmp_path, capsys):
    rows = [{"id": name, "question": name, "solution": name} for name in "abcdef"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [
        scored(tmp_path / "1.jsonl", a="rr", b="ww", c="rw", d="rr", e="ww"),
        scored(tmp_path / "2.jsonl", a="rr", b="ww", c="rr", d="ww"),
        scored(tmp_path / "3.jsonl", c="rw", e="ww"),
    ]
    output = tmp_path / "groups.jsonl"
    arguments = [
        "--input",
        str(tmp_path / "rows.jsonl"),
        "--output",
        str(output),
        "--source",
        "kind=column column=solution",
    ]
    arguments += ["--quiet", "--settled", *files]

    def asked(*more: str) -> set[str]:
        output.unlink(missing_ok=True)
        Path(f"{output}.journal").unlink(missing_ok=True)
        assert generate.main([*arguments, *more]) == 0, capsys.readouterr().err
        return {json.loads(line)["id"] for line in output.read_text().splitlines()}

    assert asked() == set("cdf")
    summary = json.loads(Path(f"{output}.summary.json").read_text())
    assert summary["dropped"] == {"all right 2 times": 1, "all wrong 2 times": 2}
    drawn = [asked("--draw", "2", "--seed", str(seed)) for seed in range(8)]
    assert set.union(*drawn) == set("cdf") and {len(ids) for ids in drawn} == {2}
    assert drawn == [asked("--draw", "2", "--seed", str(seed)) for seed in range(8)]
    assert asked("--draw", "9") == set("cdf")
    all_settled = scored(tmp_path / "4.jsonl", c="rr", d="ww", f="ww")
    assert generate.main([*arguments, all_settled, all_settled]) == 2
    assert "every prompt is settled" in capsys.readouterr().err
    assert generate.main([*arguments, scored(tmp_path / "5.jsonl", a="?")]) == 2
    assert "without an outcome -> name files of tools/score_groups.py" in capsys.readouterr().err


# --- servers ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def served(port: int, command: str, timeout: float = 30) -> ServeSettings:
    return ServeSettings(url=f"http://127.0.0.1:{port}/v1", command=command, timeout=timeout)


def server(port: int, name: object, folder: object) -> list[str]:
    return [sys.executable, str(ROOT / "tests" / "openai_server.py"), str(port), str(name), str(folder)]


def test_a_server_is_started_asked_what_it_serves_and_stopped(inputs, tmp_path, port):
    model, other = inputs / "model", tmp_path / "other"
    shutil.copytree(model, other)
    (other / "config.json").write_text((other / "config.json").read_text() + " ")

    def ask(command: list[str], timeout: float = 30) -> subprocess.Popen | None:
        with servers.serving(served(port, "x", timeout), command, model, tmp_path / "server.log") as process:
            return process

    process = ask(server(port, model, tmp_path / "elsewhere"))
    assert process is not None and process.returncode is not None
    assert ask(server(port, model, model)) is not None  # the port is free again
    for name, folder, said in ((other, other, f"serves {other}, this round samples from"), (model, other, "which is")):
        with pytest.raises(InputError, match=said):
            ask(server(port, name, folder))
    with pytest.raises(InputError, match="no answer -> start a server"):
        ask([])
    with FaultyServer(port=port, models={str(model): str(model)}):
        assert ask([]) is None
        with pytest.raises(InputError, match="the port is taken, by .*model"):
            ask(server(port, model, model))
    with pytest.raises(StageFailed, match=r"ended with code 3 before it answered(.|\n)*no weights"):
        ask(["sh", "-c", "echo no weights; exit 3"])
    with pytest.raises(StageFailed, match="no answer at .* in so many seconds"):
        ask(["sleep", "60"], timeout=0.2)


def test_a_server_that_dies_in_the_middle_ends_the_stage(inputs, tmp_path, port):
    asked = tmp_path / "asked"
    run = shlex.join(server(port, inputs / "model", inputs / "model"))
    dies = ["sh", "-c", f"{run} & until [ -e {asked} ]; do sleep 0.05; done; kill $!; echo out of memory"]
    log = tmp_path / "logs" / "ask.server.log"
    serve = functools.partial(servers.serving, served(port, "x"), dies, inputs / "model", log)
    command = ("sh", "-c", f"touch {asked}; exec sleep 60")
    stage = Stage("ask", command, (tmp_path / "made",), tmp_path / "stages", serve=serve)
    with pytest.raises(StageFailed, match=r"the server died in the middle(.|\n)*out of memory"):
        Pipeline(tmp_path / "logs", 1, tmp_path / "timings.json").run(stage)


def test_a_stage_ends_with_the_driver_that_is_killed(tmp_path):
    pid = os.fork()
    if pid == 0:
        stages.run_logged(["sh", "-c", "echo $$; exec sleep 300"], tmp_path / "log", {})
        os._exit(70)
    while not (tmp_path / "log").exists() or not (written := (tmp_path / "log").read_text()).endswith("\n"):
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    deadline = time.monotonic() + 60
    while psutil.pid_exists(int(written)) and psutil.Process(int(written)).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)
