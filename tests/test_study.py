"""The study of examples/study: its task and verifier, the choice of rates, restart, and that it is the product."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest

from examples.study import __main__ as study
from examples.study import countdown, report, settings, smollm2
from megatron_gft.config import load_config
from megatron_gft.errors import InputError
from megatron_gft.scoring.verifiers import Case


@pytest.mark.parametrize(
    ("prompt", "response", "right"),
    [
        ("3,7,4>25:", "7*3=21,21+4=25", True),
        ("3,7,4>25:", "7*3>21;21+4>25", True),  # the experts' style
        ("3,7,4>25:", "4+21=25,7*3=21", False),  # a number that is not there yet
        ("3,7,4>25:", "7*3=21,21+4=24", False),
        ("3,7,4>25:", "7*3=21", False),  # one number is left
        ("3,7,4>25:", "7*3=21,21+4=25,25+0=25", False),
        ("3,7,4>25:", "7*3=21,21+4=25,", False),
        ("3,7,4>25:", "7*3=22,22+3=25", False),  # wrong arithmetic, and a number twice
        ("3,7,4>25:", "", False),
        ("3,3,4>13:", "3*3=9,9+4=13", True),  # a number that is there twice
        ("5,3,4>13:", "3*3=9,9+4=13", False),
        ("12,3,7<:", "3,7,12", True),
        ("12,3,7<:", "3,12,7", False),
    ],
)
def test_the_verifier(prompt, response, right):
    assert countdown.judge(Case(response, None, prompt)) is right


def test_writers_are_right_as_often_as_they_say_and_shares_are_disjoint():
    shares = {"right": 0.6, "rare": 0.05, "side": 0.1, "larger": 0.25}
    rows = list(countdown.pretraining_rows(2000, 0, **shares))
    assert rows == list(countdown.pretraining_rows(2000, 0, **shares))
    solved = [row for row in rows if "<" not in row["prompt"]]
    assert len(rows) - len(solved) == pytest.approx(200, abs=45)
    assert np.mean([row["responses"][0]["reward"] for row in solved]) == pytest.approx(0.62, abs=0.05)
    assert np.mean([">" in row["responses"][0]["text"] for row in solved]) == pytest.approx(0.05, abs=0.02)
    found: dict[tuple, set[str]] = {}
    for share in countdown.SHARES:
        for row in countdown.problem_rows(share, 100, 0, teachers=3):
            numbers, target = row["prompt"].rstrip(":").split(">")
            found.setdefault((*sorted(map(int, numbers.split(","))), int(target)), set()).add(share)
            assert row["responses"][0]["reward"] == 1 and ">" in row["responses"][0]["text"]
            assert set(row["prompt"] + row["responses"][0]["text"]) <= set(countdown.CHARACTERS)
    assert {len(shares) for shares in found.values()} == {1}
    problem, right, wrong = countdown.draw(random.Random(0), "test", least_ways=6)
    assert len(right) >= 6 and all(countdown.is_right(problem.prompt, countdown.written(steps)) for steps in right)
    assert not any(countdown.is_right(problem.prompt, countdown.written(steps)) for steps in wrong)


def test_every_arm_is_a_configuration_and_no_other():
    arms = {arm for axis in settings.axes() for arm in axis.sizes.arms}
    sections = {arm: load_config([], ["model.config=m", *settings.objective(arm)]).objective for arm in arms}
    assert len({json.dumps(section.model_dump(), sort_keys=True) for section in sections.values()}) == len(arms) == 13
    assert sections["gft_scaled_0.1"].negative_scale == 0.1 and sections["gft_no_rectification"].coefficient == "none"
    keys = {axis.name: axis.key for axis in settings.axes()}
    assert keys["negative-scale"] == keys["study"] and len(set(keys.values())) == len(keys) - 1


def test_rates_are_chosen_on_whole_seeds_and_on_validation_only():
    lrs = (1e-4, 1e-3)
    results = {
        "seed-0/gft/lr-0.0001": {"valid": [3, 2], "test": [0, 0]},
        "seed-0/gft/lr-0.001": {"valid": [2, 2], "test": [9, 9]},
        "seed-1/gft/lr-0.0001": {"failed": "the loss is nan"},
    }
    assert report.chosen_rate(results, "gft", lrs, 2) == 1e-4
    results["seed-1/gft/lr-0.001"] = {"valid": [4, 0]}
    assert report.chosen_rate(results, "gft", lrs, 2) == 1e-3  # the failed run counts as none right
    assert report.chosen_rate({}, "gft", lrs, 2) is None


def test_the_bootstrap_draws_problems_and_seeds():
    rng = np.random.default_rng(1)
    of_problems, of_seeds = rng.normal(0.3, 0.1, size=(1, 200)), rng.normal(0.3, 0.1, size=(50, 1))
    for values, independent in ((of_problems.repeat(5, 0), 200), (of_seeds.repeat(20, 1), 50)):
        mean, low, high = report.bootstrap(values)
        assert low < mean < high and high - low == pytest.approx(4 * values.std() / independent**0.5, rel=0.15)
    noise = rng.normal(0.3, 0.1, size=(5, 200))  # crossed draws are wider than noise alone needs, never narrower
    assert 1 < (np.diff(report.bootstrap(noise)[1:]) / (4 * 0.1 / 1000**0.5)).item() < 1.8
    assert report.bootstrap(np.full((3, 10), 0.1)) == pytest.approx((0.1, 0.1, 0.1))


def test_a_result_of_other_settings_is_refused(tmp_path):
    runner = study.Runner(settings.TINY, tmp_path, None)
    made = study.Task("a/b", 1.0, lambda: {"valid": [1]})
    runner.lab = type("Lab", (), {"check_stop": lambda self: None})()
    said = []
    runner.run([made], lambda task, result: said.append(task.name))
    runner.run([replace(made, make=lambda: pytest.fail("made twice"))], lambda task, result: said.append(task.name))
    assert said == ["a/b"] and runner.result("a/b")["valid"] == [1]
    other = replace(settings.TINY, world=replace(settings.TINY.world, rare=0.5))
    with pytest.raises(InputError, match="other settings"):
        study.Runner(other, tmp_path, None).result("a/b")
    file = runner.result_file("a/b")
    file.write_text(file.read_text()[:-3])
    for read in (lambda: runner.result("a/b"), lambda: report.read(runner.folder)):
        with pytest.raises(InputError, match=f"{file}.*remove it"):
            read()


@pytest.mark.filterwarnings("error::RuntimeWarning", "error:No artists")
def test_a_study_that_has_only_begun_has_a_report(tmp_path):
    """Without bases, with one, with one cell, and with rounds that have no curve: no warning, no failure."""
    runner = study.Runner(settings.TINY, tmp_path, None)
    runner.lab = type("Lab", (), {"check_stop": lambda self: None})()
    made = {"prepare": {"sizes": asdict(runner.sizes)}, "seed-0/base": {"valid": [1, 0]}}
    made |= {"seed-0/gft/lr-0.001": {"valid": [1]}, "seed-0/rounds/base/lr-0.0001": {"valid": [1], "curve": []}}
    for name, result in made.items():
        runner.run([study.Task(name, 1.0, lambda result=result: result)], lambda task, result: None)
        assert (report.write(runner.folder) / "tables.md").is_file()


def test_the_second_look_at_smollm2(tmp_path, monkeypatch, capsys):
    """Its problems, its choice of prompts and rates, its stages and what a kill leaves; the tools are played."""
    sizes = smollm2.Sizes(asked=9, groups=3, valid=2, test=4)
    monkeypatch.setattr(smollm2, "Sizes", lambda: sizes)
    rows = [row["question"] for part in smollm2.problems(smollm2.Sizes()).values() for row in part]
    assert len(set(rows)) == len(rows) == 15
    numbers = lambda text: (re.sub(r"[A-Z]\w+", "", text), *re.findall(r"\d+", text))  # noqa: E731
    of_quickstart = {numbers(problem.question) for problem in smollm2.problem_sets(1, 100, 1)[1]}
    assert not of_quickstart & set(map(numbers, rows))
    assert smollm2.detectable(400, changed=0.25) == pytest.approx(0.07)

    ran, stop_at = [], "rft-lr2e-05-seed1-evaluate"

    def played(pipeline, stage):
        pipeline.keys[stage.name] = ""
        if stage.outputs[0].exists():
            return
        if stage.name == stop_at:
            raise KeyboardInterrupt
        ran.append(stage.name)
        output, kind = stage.outputs[0], stage.name.split("-")[-1]
        if kind == "score":
            rewards = [[0] * 8, [1] * 8, *([1] * right + [0] * (8 - right) for right in range(1, 8))]
            selves = [[{"source": "self", "reward": reward} for reward in row] for row in rewards]
            groups = [{"responses": [{"source": "expert", "reward": 1}, *row]} for row in selves]
            output.write_text("".join(json.dumps(group) + "\n" for group in groups))
        elif kind in ("base", "evaluate"):
            right = 1 if kind == "base" else 2 + ("2e-05" in stage.name) + ("dft_correct" in stage.name)
            output.parent.mkdir(parents=True, exist_ok=True)
            outcomes = ["correct"] * right + ["wrong"] * (6 - right)
            output.write_text(json.dumps({"greedy": {"by_problem": outcomes}}))
        else:
            output.mkdir(parents=True)

    monkeypatch.setattr(smollm2.Pipeline, "run", played)
    command = ["--output", str(tmp_path), "--model", "m"]
    assert smollm2.main(command) == 130
    printed = capsys.readouterr()
    assert "45 of 45 cells to do" in printed.err and "smallest detectable difference" in printed.err
    assert "'dead, %': 11.1" in printed.err and "'groups': 3" in printed.err
    kept = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert [[int(r["reward"]) for r in group["responses"]] for group in kept] == [
        *([1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1])
    ]
    assert "| gft | 100.0 (1) | not run | not run | 2e-05 | 25.0 [" in printed.out
    before, stop_at = len(ran), ""
    assert smollm2.main([*command, "--part", "0/2"]) == 2
    assert smollm2.main([*command, "--part", "2/2"]) == 0 and len(ran) == 4 + 3 * (2 + 22)
    assert smollm2.main([*command, "--part", "1/2"]) == 0
    assert len(set(ran)) == len(ran) == 4 + 3 * 45 and ran[before] == "rft-lr2e-05-seed1-evaluate"
    assert smollm2.main([*command, "--report"]) == 0 and len(ran) == 4 + 3 * 45
    chosen = json.loads((tmp_path / "summary.json").read_text())["arms"]["dft_correct"]
    assert chosen["rate"] == 2e-5 and chosen["rates"]["2e-05"]["seeds"] == 3 and chosen["change"][0] == 0.5
    assert chosen["to_gft"][0] == 0.25
    damaged = tmp_path / "cells" / "rft-lr6e-05-seed3" / "evaluation.json"
    damaged.write_text(damaged.read_text()[:-9])
    capsys.readouterr()
    assert smollm2.main(command) == 2 and f"{damaged}: not valid JSON" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_sweep_is_the_product(tmp_path, monkeypatch):
    """Same shard, seed and steps: the losses of each step and the greedy answers under torchrun, alone and at tp 2."""
    from examples.study import lab, product

    monkeypatch.chdir(product.ROOT)
    command = ["-m", "examples.study", "--size", "tiny", "--output", str(tmp_path)]
    product.run_tool(command, tmp_path / "log")
    runner = study.Runner(settings.TINY, tmp_path, None)
    assert all(runner.result(task.name) for task in study.all_tasks(runner))
    report_files = {path.name for path in (runner.folder / "report").iterdir()}
    plots = {"learning-rates.png", "entropy-and-pass-at-k.png", "after-grpo.png"}
    assert report_files == {"tables.md", "summary.json", "results.parquet", *plots}
    again = subprocess.run([sys.executable, *command], cwd=product.ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and " 0 to do" in again.stderr and "[1]" not in again.stderr

    lr = runner.chosen("gft", runner.sizes.lrs)
    swept, of_test = runner.result(f"seed-0/gft/lr-{lr:g}"), runner.result(f"seed-0/gft/test-lr-{lr:g}")
    rows = runner.problems("test", runner.sizes.test)
    prompts = [row["prompt"] for row in rows]
    texts = lab.answer(lab.open_model(runner.export(0, "gft", f"lr-{lr:g}")), prompts, 0, "").texts
    assert len(set(texts)) > len(prompts) / 2
    for ranks in (1, 2):
        folder = tmp_path / f"torchrun-{ranks}"
        product.write_problems(folder / "test.jsonl", rows)
        train = ["-m", "megatron_gft.train", "--config", str(lab.TRAIN_CONFIG), *runner.tune_settings(0, "gft", lr)]
        train += [f"model.config={runner.model}", f"parallel.tp={ranks}", f"train.output={folder}/run"]
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        product.run_tool([*torchrun, *train], tmp_path / "log")
        losses = [json.loads(line)["loss"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        assert len(losses) == settings.TINY.tune_steps and losses == pytest.approx(swept["losses"], rel=0, abs=1e-6)
        assert ranks > 1 or losses == swept["losses"]
        export = max(folder.glob("run/export/step-*"))
        assert lab.answer(lab.open_model(export), prompts, 0, "").texts == texts
        product.run_tool(product.evaluate_command(folder, export, 2), tmp_path / "log")
        judged = json.loads((folder / "evaluation.json").read_text())["greedy"]["by_problem"]
        assert [int(outcome == "correct") for outcome in judged] == of_test["greedy"]
