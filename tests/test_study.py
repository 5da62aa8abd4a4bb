"""The study of examples/study: its task and verifier, the choice of rates, restart, and that it is the product."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import numpy as np
import pytest

from examples.study import __main__ as study
from examples.study import countdown, report, settings
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
