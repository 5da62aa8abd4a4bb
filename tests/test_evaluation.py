"""Evaluation: statistics against enumeration and known values, the whole on a tiny model."""

import itertools
import json
import math
import statistics

import numpy as np
import pytest
from tiny_language_model import language_model_folder

from megatron_gft.errors import InputError, InputErrors
from megatron_gft.evaluation import run
from megatron_gft.evaluation.intervals import (
    mean_interval,
    pass_at_k,
    pass_at_k_summary,
    ratio_interval,
    wilson_interval,
)
from megatron_gft.evaluation.run import EvaluationOptions, evaluate, reference_texts, result_table
from megatron_gft.sampling.local_model import LocalModel
from megatron_gft.sampling.prompts import PromptSet
from megatron_gft.sampling.settings import SamplingParams
from megatron_gft.scoring.judging import ScoringOptions
from megatron_gft.scoring.verifiers import Verdict
from tools import evaluate as tool

SCORING = ScoringOptions(verifier="letters_rewards:judge")


def test_wilson_interval_of_known_cases():
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)  # Newcombe 1998, table I
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)
    low, high = wilson_interval(29, 29)
    assert high == 1.0 and low == pytest.approx(1 - wilson_interval(0, 29)[1])


@pytest.mark.parametrize("samples, correct, k", [(5, 2, 1), (5, 2, 3), (6, 0, 4), (6, 6, 2), (7, 3, 7), (4, 1, 4)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(samples, correct, k):
    outcomes = [True] * correct + [False] * (samples - correct)
    draws = list(itertools.combinations(outcomes, k))
    assert pass_at_k(samples, correct, k) == pytest.approx(sum(any(draw) for draw in draws) / len(draws))


def test_pass_at_k_over_problems():
    summary = pass_at_k_summary(4, [4, 0, 2, 1], 2)
    values = [1.0, 0.0, 5 / 6, 1 / 2]
    assert summary["value"] == pytest.approx(statistics.mean(values))
    half = 1.959964 * statistics.stdev(values) / 2
    assert summary["interval"] == pytest.approx((summary["value"] - half, 1.0), abs=1e-6)
    assert pass_at_k_summary(4, [3], 1)["interval"] is None


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        lengths = rng.integers(1, 40, 60)
        sums = [-rng.gamma(2.0, 0.5, n).sum() for n in lengths]  # mean per token: -1
        _, (low, high) = ratio_interval(sums, lengths.tolist())
        covered += low <= -1.0 <= high
    assert 0.92 <= covered / 1000 <= 0.97
    assert mean_interval([1.0, 2.0, 3.0])[0] == 2.0 and mean_interval([2.0])[1] is None


def problem_set(path):
    return PromptSet([path], split="test")


def no_model():
    raise AssertionError("the model is loaded")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return LocalModel(language_model_folder(tmp_path_factory.mktemp("model")), device="cpu")


@pytest.fixture
def problems(tmp_path, monkeypatch):
    """Five problems; the verifier finds a response right when the gold letter is in it."""
    (tmp_path / "letters_rewards.py").write_text("def judge(case):\n    return case.answer in case.response\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = [
        {"question": f"What is {i}?", "answer": letter, "solution": f"It is {letter * i}."}
        for i, letter in enumerate("eaist")
    ]
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_whole_on_a_tiny_model(model, problems):
    options = EvaluationOptions(samples=6, pass_at=(1, 3, 6), max_tokens=12, batch_size=4, scoring=SCORING)
    result = evaluate(lambda: model, problem_set(problems), options, progress=False)
    assert json.loads(json.dumps(result)) and result["num_problems"] == 5
    rows = list(PromptSet([problems]))
    greedy = result["greedy"]
    assert greedy["num_responses"] == 5 and greedy["accuracy"] == greedy["correct"] / 5
    prompt = model.prompt_ids(rows[0].prompt)
    (decoded,) = model.sample([prompt], [0], SamplingParams(0.0, max_tokens=12))
    assert greedy["examples"][0]["text"] == model.response_text(prompt, decoded.ids)
    values = [result["pass_at_k"][k]["value"] for k in ("1", "3", "6")]
    assert values == sorted(values) and values[0] == pytest.approx(result["sampled"]["outcomes"].get("correct", 0) / 30)
    reference = result["reference"]
    pairs = [
        (model.prompt_ids(row.prompt), [*model.tokenizer.encode_response(text), model.tokenizer.eos_id])
        for row in rows
        for text in reference_texts(row, None)
    ]
    sums = [math.fsum(model.response_logprobs([pair])[0]) for pair in pairs]
    assert reference["logprob_per_answer"] == pytest.approx(statistics.mean(sums), rel=1e-5)
    assert [entry["logprob"] for entry in reference["by_answer"]] == pytest.approx(sums, rel=1e-4)
    assert [entry["tokens"] for entry in reference["by_answer"]] == [len(ids) for _, ids in pairs]
    assert reference["logprob_per_token"] == pytest.approx(sum(sums) / sum(len(ids) for _, ids in pairs), rel=1e-5)
    table = result_table(result)
    assert "greedy accuracy" in table and "pass@3" in table and "reference log-prob/token" in table
    assert evaluate(lambda: model, problem_set(problems), options, progress=False) == result  # seeded


def test_verdicts_are_counted_by_outcome(model, problems, monkeypatch):
    said = itertools.cycle([Verdict("correct", 1.0), Verdict("timeout", 0.0), Verdict("wrong", 0.0)])

    class Pool:
        def __enter__(self):
            return self

        def __exit__(self, *exception):
            pass

        def judge(self, cases):
            return (next(said) for _ in cases)

    monkeypatch.setattr(run, "VerifierPool", lambda options: Pool())
    options = EvaluationOptions(max_tokens=3, reference_logprobs=False, scoring=SCORING)
    greedy = evaluate(lambda: model, problem_set(problems), options, progress=False)["greedy"]
    assert greedy["outcomes"] == {"correct": 2, "timeout": 2, "wrong": 1} and greedy["accuracy"] == 0.4
    assert greedy["by_problem"] == ["correct", "timeout", "wrong", "correct", "timeout"]


def test_what_cannot_be_measured_is_said_before_the_model_works(tmp_path):
    (tmp_path / "open.jsonl").write_text('{"prompt": "why?"}\n')
    with pytest.raises(InputError, match=r"open.jsonl:1"):
        evaluate(no_model, problem_set(tmp_path / "open.jsonl"), EvaluationOptions(), progress=False)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"samples": 2, "pass_at": (3,)}, r"pass@\[3\] with 2 samples"),
        ({"samples": 2, "pass_at": (0, 1)}, r"pass@\[0, 1\] with 2 samples"),
        ({"samples": 2, "pass_at": ()}, r"pass@\[\] with 2 samples"),
        ({"samples": 2, "temperature": 0.0}, "samples at temperature 0"),
        ({"greedy": False, "reference_logprobs": False}, "nothing to measure"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"samples": -1}, "samples=-1"),
        ({"samples": 2, "temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"stop": ("",)}, "empty stop text"),
        ({"batch_size": 0, "top_p": 2.0}, r"(?s)\(2\).*batch_size=0.*top_p=2.0"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        EvaluationOptions(**changes)


def test_all_that_is_wrong_is_said_together_before_the_model_is_loaded(tmp_path):
    path = tmp_path / "blank.jsonl"
    path.write_text('{"prompt": "why?", "answer": " "}\n{"prompt": "who?", "answer": "you"}\n')
    options = EvaluationOptions(scoring=ScoringOptions("math", {"percnt": "off"}), reference_column="typo")
    with pytest.raises(InputErrors) as caught:
        evaluate(no_model, problem_set(path), options, progress=False)
    places = ["blank.jsonl:1", "blank.jsonl:1", "blank.jsonl:2", ""]
    wrong = ["no gold answer", "no column 'typo'", "no column 'typo'", "no option 'percnt'"]
    assert len(caught.value.problems) == 4
    for problem, place, message in zip(caught.value.problems, places, wrong, strict=True):
        assert place in problem and message in problem


def test_a_prompt_that_is_too_long_is_said_before_the_model_works(model, problems, monkeypatch):
    with open(problems, "a") as file:
        file.write(json.dumps({"question": "what? " * 500, "answer": "a"}) + "\n")
    monkeypatch.setattr(LocalModel, "sample", None)
    with pytest.raises(InputError, match=r"problems.jsonl:6: prompt of \d+ tokens"):
        evaluate(lambda: model, problem_set(problems), EvaluationOptions(max_tokens=3, scoring=SCORING), progress=False)
    options = EvaluationOptions(template_kwargs={"enable_thinking": False}, scoring=SCORING)
    with pytest.raises(InputError, match="set --chat-template$"):  # the one way out: shorter it need not be
        evaluate(lambda: model, problem_set(problems), options, progress=False)


def test_a_verifier_of_the_users_may_do_without_gold_answers(model, problems, tmp_path):
    (tmp_path / "letters_only.py").write_text("def judge(case):\n    return case.answer is None\n")
    path = tmp_path / "open.jsonl"
    path.write_text('{"prompt": "why?"}\n')
    options = EvaluationOptions(max_tokens=3, scoring=ScoringOptions("letters_only:judge"))
    assert evaluate(lambda: model, problem_set(path), options, progress=False)["greedy"]["accuracy"] == 1.0


def test_the_tool(model, problems, tmp_path, capsys):
    output = tmp_path / "result.json"
    arguments = ["--model", model.path, "--problems", str(problems), "--quiet", "--max-tokens", "5", "--device", "cpu"]
    arguments += ["--verifier", "letters_rewards:judge", "--workers", "1"]
    assert tool.main([*arguments, "--output", str(output)]) == 0
    assert "greedy accuracy" in capsys.readouterr().out
    assert json.loads(output.read_text())["greedy"]["num_responses"] == 5
    assert tool.main([*arguments, "--option", "x"]) == 2
    capsys.readouterr()
    for place in (tmp_path, output / "more.json"):  # before anything is measured
        assert tool.main([*arguments, "--output", str(place)]) == 2
        said = capsys.readouterr()
        assert str(place) in said.err and not said.out
    assert tool.main([*arguments[2:], "--model", str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err
