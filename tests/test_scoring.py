"""The killable pool, and scoring of group files (restart included)."""

import json
import time

import pytest

from megatron_gft.errors import InputError
from megatron_gft.groups import GroupRecord, ResponseRecord, iter_group_file, write_group_file
from megatron_gft.scoring.judging import ScoringOptions
from megatron_gft.scoring.score import score_group_file
from megatron_gft.scoring.verifier_pool import VerifierPool
from megatron_gft.scoring.verifiers import Case, Verdict
from tools import score_groups

NASTY = """
import os, time
CALLS = os.path.join(os.path.dirname(__file__), "calls")

def judge(case, log=""):
    said = case.response
    if log:
        with open(CALLS, "a") as file:
            file.write(said + "\\n")
    if said == "compute for ever":
        while True:
            pass
    if said == "sleep for ever":
        time.sleep(1000)
    if said == "exit":
        os._exit(3)
    if said == "system exit":
        raise SystemExit(1)
    if said == "memory":
        return len(bytearray(1 << 40)) > 0
    if said == "raise":
        raise ValueError("no")
    if said == "nan":
        return float("nan")
    return said == case.answer
"""


@pytest.fixture
def nasty(tmp_path, monkeypatch):
    """Folder of a module ``nasty_rewards`` that the workers can import."""
    (tmp_path / "nasty_rewards.py").write_text(NASTY)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_a_hang_or_crash_costs_one_verdict_and_no_order(nasty):
    expected = {
        "compute for ever": "timeout",
        "sleep for ever": "timeout",
        "exit": "error",
        "system exit": "error",
        "memory": "error",
        "raise": "error",
        "nan": "error",
        "yes": "correct",
        "no": "wrong",
    }
    said = [*expected, *["yes", "no"] * 200, *expected]
    with VerifierPool(ScoringOptions("nasty_rewards:judge", workers=2, time_limit=0.5, memory_limit_gib=4)) as pool:
        began = time.monotonic()
        verdicts = list(pool.judge(Case(text, "yes") for text in said))
        assert time.monotonic() - began < 60
    assert [verdict.outcome for verdict in verdicts] == [expected[text] for text in said]
    assert [verdict.reward for verdict in verdicts] == [float(text == "yes") for text in said]
    assert pool.replaced == 8  # four that never end, and each of two that exit is tried twice
    assert verdicts[2].detail == "worker died with exit code 3" and verdicts[5].detail == "ValueError: no"


def test_sympy_itself_may_hang():
    cases = [Case(r"\boxed{9!!!!!}", "3"), Case(r"\boxed{2^{1/2}}", r"\sqrt{2}")]
    with VerifierPool(ScoringOptions("math", time_limit=2)) as pool:
        assert [verdict.outcome for verdict in pool.judge(cases)] == ["timeout", "correct"]


def test_verdicts_among_the_cases_pass_through_and_reading_is_bounded():
    read = 0

    def items():
        nonlocal read
        for i in range(20_000):
            read += 1
            yield Verdict("error", 0.0, str(i)) if i % 3 == 0 else Case(f"#### {i}", f"{i}")

    with VerifierPool(ScoringOptions("math", workers=2)) as pool:
        furthest = 0
        for index, verdict in enumerate(pool.judge(items())):
            furthest = max(furthest, read - index)
            assert verdict.outcome == ("error" if index % 3 == 0 else "correct")
            assert index % 3 or verdict.detail == str(index)
    assert index == 19_999 and furthest <= 2 * 32 * 64 + 65


def groups(count=6):
    """Groups with one right expert and two self responses, one right and one wrong."""
    return [
        GroupRecord(
            f"g{i}",
            f"What is {i} + {i}?",
            [
                ResponseRecord(f"#### {2 * i}", "expert", finish_reason="stop", extra={"note": i}),
                ResponseRecord(f"I say {2 * i}", "self", finish_reason="stop", model="m", sampling={"seed": i}),
                ResponseRecord(f"I say {2 * i + 1}", "self", finish_reason="length"),
            ],
            f"{2 * i}",
            {"level": i},
        )
        for i in range(count)
    ]


def write(path, records):
    write_group_file(path, records)
    return str(path)


def test_scores_are_added_and_nothing_else_changes(tmp_path):
    source = write(tmp_path / "in.jsonl", groups())
    summary = score_group_file([source], tmp_path / "out.jsonl.gz", ScoringOptions(workers=2), progress=False)
    scored = [record for record, _ in iter_group_file(tmp_path / "out.jsonl.gz")]
    assert [[r.reward for r in record.responses] for record in scored] == [[1.0, 1.0, 0.0]] * 6
    assert [[r.outcome for r in record.responses] for record in scored] == [["correct", "correct", "wrong"]] * 6
    for record in scored:
        assert record.meta.pop("verifier")["name"] == "math"
        for response in record.responses:
            response.reward = response.outcome = None
    assert scored == groups()
    assert summary.outcomes["self"] == {"correct": 6, "wrong": 6} and summary.responses == 18
    assert "0.5000" in summary.table()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl.gz"]


@pytest.mark.parametrize("answer", [None, "", " \n"])
def test_rewards_by_outcome_and_groups_without_answer(tmp_path, answer):
    records = groups(2)
    records[1].answer = answer
    records[1].responses[0].reward = 0.7
    source, out = write(tmp_path / "in.jsonl", records), tmp_path / "out.jsonl"
    with pytest.raises(InputError, match=r"in.jsonl:2: group 'g1' has no gold answer"):
        score_group_file([source], out, ScoringOptions(), progress=False)
    assert not out.exists()
    options = ScoringOptions(rewards={"wrong": -1.0, "correct": 2.0}, missing_answer="null")
    summary = score_group_file([source], out, options, progress=False)
    first, second = (record for record, _ in iter_group_file(out))
    assert [r.reward for r in first.responses] == [2.0, 2.0, -1.0]
    assert [(r.reward, r.outcome) for r in second.responses] == [(None, None)] * 3
    assert summary.without_answer == 1 and "such groups had before, removed: 1" in summary.table()


def test_a_broken_run_continues_without_judging_twice(nasty, tmp_path):
    source = write(tmp_path / "in.jsonl", groups(1000))
    options = ScoringOptions(verifier="nasty_rewards:judge", verifier_options={"log": "1"}, missing_answer="null")
    lines = (tmp_path / "in.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "in.jsonl").write_text("".join([*lines[:900], "{not JSON\n", *lines[900:]]))
    with pytest.raises(InputError, match="in.jsonl:901"):
        score_group_file([source], tmp_path / "out.jsonl", options, progress=False)
    assert not (tmp_path / "out.jsonl").exists()
    judged = (nasty / "calls").read_text().count("\n")
    (tmp_path / "in.jsonl").write_text("".join(lines))
    summary = score_group_file([source], tmp_path / "out.jsonl", options, progress=False)
    again = (nasty / "calls").read_text().count("\n") - judged
    assert summary.responses == 3000 and 3000 <= judged + again
    assert again <= 3000 - (judged - 3 - 64), "what the first run had judged is judged once"
    undisturbed = tmp_path / "undisturbed.jsonl"
    score_group_file([source], undisturbed, options, progress=False)
    assert undisturbed.read_bytes() == (tmp_path / "out.jsonl").read_bytes()


def test_another_verifier_does_not_continue_the_journal(tmp_path):
    source = write(tmp_path / "in.jsonl", [*groups(800), GroupRecord("x", "?", [ResponseRecord("a", "self")])])
    exact = ScoringOptions(verifier="exact")
    with pytest.raises(InputError, match="no gold answer"):
        score_group_file([source], tmp_path / "out.jsonl", exact, progress=False)
    with pytest.raises(InputError, match="another verifier"):
        score_group_file([source], tmp_path / "out.jsonl", ScoringOptions(), progress=False)


@pytest.mark.parametrize(
    "changes, inputs, output, message",
    [
        ({"verifier": "maths"}, ["in.jsonl"], "out.jsonl", "did you mean math"),
        ({"verifier_options": {"percnt": "off"}}, ["in.jsonl"], "out.jsonl", "no option 'percnt'"),
        ({"memory_limit_gib": 0.001}, ["in.jsonl"], "out.jsonl", "verifier"),
        ({}, ["in.jsonl"], "out.txt", "out.txt: unknown kind of group file"),
        ({}, ["in.jsonl"], "folder.jsonl", "folder.jsonl: exists and is no file"),
        ({}, ["in.jsonl"], "in.jsonl", "is an input too"),
        ({}, ["in.jsonl"], "in.jsonl/out.jsonl", "cannot be written"),
        ({}, ["in.jsonl", "./in.jsonl"], "out.jsonl", "input named twice"),
    ],
)
def test_what_cannot_work_is_said_at_once_and_leaves_no_journal(tmp_path, changes, inputs, output, message):
    write(tmp_path / "in.jsonl", groups(2))
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(InputError, match=message):
        paths = [f"{tmp_path}/{name}" for name in inputs]
        score_group_file(paths, tmp_path / output, ScoringOptions(**changes), progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.jsonl", "in.jsonl"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rewards": {"wrong": float("nan")}}, "reward wrong=nan"),
        ({"rewards": {"wrong": float("inf")}}, "reward wrong=inf"),
        ({"rewards": {"wrong": 1e39}}, "not a finite float32"),
        ({"time_limit": 1e9}, "time limit of 1000000000.0 s"),
        ({"time_limit": float("nan")}, "time limit of nan"),
        ({"time_limit": 0}, "time limit of 0"),
        ({"memory_limit_gib": float("inf")}, "memory limit of inf"),
        ({"workers": 0}, "workers=0"),
        ({"rewards": {"rong": 1.0}}, "unknown outcome 'rong'"),
        ({"missing_answer": "nil"}, "missing_answer='nil'"),
    ],
)
def test_limits_and_rewards_are_numbers_that_can_be(changes, message):
    with pytest.raises(InputError, match=message):
        ScoringOptions(**changes)


def test_a_verifier_noted_by_somebody_else_is_kept(tmp_path):
    records = groups(2)
    records[0].meta["verifier"] = "human: Ann"
    first = write(tmp_path / "in.jsonl", records)
    summary = score_group_file([first], tmp_path / "a.jsonl", ScoringOptions(), progress=False)
    assert "now meta.verifier_before: 1" in summary.table()
    summary = score_group_file([tmp_path / "a.jsonl"], tmp_path / "b.jsonl", ScoringOptions("exact"), progress=False)
    assert summary.verifiers_moved == 0
    metas = [record.meta for record, _ in iter_group_file(tmp_path / "b.jsonl")]
    assert [meta["verifier"]["name"] for meta in metas] == ["exact", "exact"]
    assert [meta.get("verifier_before") for meta in metas] == ["human: Ann", None]


def test_the_tool(tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", groups(3))
    target = str(tmp_path / "out.jsonl")
    arguments = ["--input", source, "--output", target, "--workers", "1", "--quiet", "--reward", "wrong=-0.5"]
    assert score_groups.main(arguments) == 0
    assert "3 groups, 9 responses" in capsys.readouterr().out
    scored = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    assert scored["responses"][2]["reward"] == -0.5
    assert scored["meta"]["verifier"]["name"] == "math" and scored["meta"]["verifier"]["rewards"] == {"wrong": -0.5}
    for wrong, message in (
        ([*arguments, "--reward", "wrong=x"], "--reward"),
        ([*arguments, "--option", "percnt=off"], "no option 'percnt'"),
        ([*arguments, "--option", "percent"], "not of the form"),
        ([*arguments, "--reward", "correct=nan"], "reward correct=nan"),
        ([*arguments, "--reward", "wrong=1"], "given twice"),
        (["--input", str(tmp_path / "none.jsonl"), "--output", target], "no such group file"),
    ):
        assert score_groups.main(wrong) == 2
        assert message in capsys.readouterr().err
