"""Imports of rows that others stored: the public shapes, what is dropped and why, keys over unsorted rows, memory."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from tiny_tokenizers import byte_level_folder

from megatron_gft.commands.import_groups import main
from megatron_gft.groups import iter_group_file
from megatron_gft.preprocess.run import PreprocessOptions, preprocess
from megatron_gft.scoring.judging import ScoringOptions
from megatron_gft.scoring.score import score_group_file
from megatron_gft.shards import GroupShard

ROOT = Path(__file__).resolve().parents[1]


def rows_file(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def imported(tmp_path, rows, *options, name="out.jsonl"):
    """Groups in short, and the summary that stands beside them."""
    source = rows if isinstance(rows, Path) else rows_file(tmp_path / "in.jsonl", rows)
    output = tmp_path / name
    assert main(["--input", str(source), "--output", str(output), "--quiet", *options]) == 0
    summary = json.loads(Path(f"{output}.summary.json").read_text())
    records = [record for record, _ in iter_group_file(output)]
    assert [summary["groups"], summary["responses"]] == [len(records), sum(len(r.responses) for r in records)]
    groups = [(r.prompt, r.answer, [(s.text, s.source, s.reward) for s in r.responses]) for r in records]
    return groups, summary, records


def turns(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def openr1(**changes):
    row = {
        "problem": "1+1?",
        "solution": "two",
        "answer": "2",
        "uuid": "u1",
        "source": "amc",
        "problem_type": "Algebra",
    }
    row |= {"generations": ["is 2", "is 3", "is"], "correctness_math_verify": [True, False, False]}
    return row | {"finish_reasons": ["stop", "stop", "length"], "is_reasoning_complete": [True, True, False]} | changes


def rated(*ratings):
    return [
        {"response": f"r{i}", "model": f"m{i}", "fine-grained_score": x, "overall_score": 10 - i} for i, x in ratings
    ]


PAIR = [("good", "expert", 1.0), ("bad", "self", 0.0)]
RIGHT_WRONG = [("is 2", "teacher", 1.0), ("is 3", "teacher", 0.0)]
SHAPES = {
    "openr1": ("openr1-math", [openr1()], [("1+1?", "2", RIGHT_WRONG)], {"unfinished": 1}),
    "openr1, reasons null": (
        "openr1-math",
        [openr1(finish_reasons=None)],
        [("1+1?", "2", RIGHT_WRONG)],
        {"unfinished": 1},
    ),
    "openr1, lists of other lengths": (
        "openr1-math",
        [openr1(), openr1(correctness_math_verify=[True])],
        [("1+1?", "2", RIGHT_WRONG)],
        {"list_lengths": 1, "unfinished": 1},
    ),
    "openr1, aborted, empty and alike": (
        "openr1-math",
        [
            openr1(
                generations=["is 2", "is 2", "is 3", " ", "x"], correctness_math_verify=[True, True, False, False, True]
            )
            | {"finish_reasons": ["stop"] * 4 + ["abort"], "is_reasoning_complete": [True] * 5}
        ],
        [("1+1?", "2", RIGHT_WRONG)],
        {"duplicate_response": 1, "empty_response": 1, "ended_otherwise": 1},
    ),
    "deepmath": (
        "deepmath",
        [
            {
                "question": "q",
                "final_answer": 1,
                "difficulty": 5.5,
                "topic": "t",
                "r1_solution_1": "a",
                "r1_solution_2": "b",
            }
            | {"r1_solution_3": None}
        ],
        [("q", "1", [("a", "teacher", None), ("b", "teacher", None)])],
        {"empty_response": 1},
    ),
    "ultrafeedback": (
        "ultrafeedback",
        [{"source": "x", "instruction": "i", "completions": rated((0, 4.25), (1, "2"), (2, "N/A"))}],
        [("i", None, [("r0", "teacher", 4.25), ("r1", "teacher", 2.0)])],
        {"unreadable_reward": 1},
    ),
    "pairs": ("preference", [{"prompt": "p", "chosen": "good", "rejected": "bad"}], [("p", None, PAIR)], {}),
    "pairs of conversations": (
        "preference",
        [
            {"prompt": "p", "chosen": turns("p", "good"), "rejected": turns("p", "bad")},
            {"prompt": turns("p"), "chosen": turns("p", "good"), "rejected": [{"role": "assistant", "content": "bad"}]},
            {"prompt": None, "chosen": turns("p", "a", "q", "good"), "rejected": turns("p", "a", "q", "bad")},
            {"prompt": "p", "chosen": turns("p", "good"), "rejected": turns("another", "bad")},
        ],
        [("p", None, PAIR), (turns("p"), None, PAIR), (turns("p", "a", "q"), None, PAIR)],
        {"other_prompt": 1, "few_responses": 1, "group_dropped": 1},
    ),
    "pairs of conversations without a column prompt": (
        "preference",
        [{"chosen": turns("p", "good"), "rejected": turns("p", "bad")}],
        [(turns("p"), None, PAIR)],
        {},
    ),
    "a row a solution": (
        "openmathinstruct-2",
        [
            {"problem": p, "generated_solution": s, "expected_answer": a, "problem_source": "aug"}
            for p, s, a in [
                ("x", "1", "5"),
                ("y", "1", "6"),
                ("x", "2", "5"),
                ("y", "2", "6"),
                ("x", "3", "7"),
                ("z", "1", "8"),
                (None, "1", "1"),
            ]
        ],
        [
            ("x", "5", [("1", "teacher", None), ("2", "teacher", None)]),
            ("y", "6", [("1", "teacher", None), ("2", "teacher", None)]),
        ],
        {"other_answer": 1, "few_responses": 1, "group_dropped": 1, "no_key": 1},
    ),
    "rollouts": (
        "rollouts",
        [
            {"input": "x", "output": o, "score": s, "step": 1}
            for o, s in [("a", 1), ("b", -0.5), ("c", False), ("d", None)]
        ],
        [("x", None, [("a", "self", 1.0), ("b", "self", -0.5), ("c", "self", 0.0), ("d", "self", None)])],
        {},
    ),
    "rollouts, states of samples": (
        "rollouts --prompt prompt --text response --reward reward --answer label --finish-reason status --group-by g",
        [
            {"g": g, "prompt": turns("x"), "response": str(i), "label": 3, "reward": 1, "status": status}
            for i, (g, status) in enumerate(
                map(str.split, ("b aborted", "a completed", "a truncated", "a completed", "b completed"))
            )
        ],
        [(turns("x"), "3", [("1", "self", 1.0), ("3", "self", 1.0)])],
        {"ended_otherwise": 1, "unfinished": 1, "few_responses": 1, "group_dropped": 1},
    ),
    "rollouts, a list of turns": (
        "rollouts --prompt content.0 --text content.1 --reward rewards --group-by content.0",
        [{"content": [q, a], "rewards": r} for q, a, r in [("x", "1", 1.0), ("y", "1", 0.0), ("x", "2", 0.0)]],
        [("x", None, [("1", "self", 1.0), ("2", "self", 0.0)])],
        {"few_responses": 1, "group_dropped": 1},
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_public_shapes_with_one_command(shape, tmp_path):
    preset, rows, groups, dropped = SHAPES[shape]
    found, summary, records = imported(tmp_path, rows, "--mapping", *preset.split())
    assert found == groups
    assert sum((Counter(counts) for counts in summary["dropped"].values()), Counter()) == dropped
    assert all(reason in summary["first"] and "in.jsonl:" in summary["first"][reason] for reason in dropped)
    assert len({record.id for record in records}) == len(records)


def test_verdicts_models_and_kept_columns_are_in_the_group(tmp_path):
    _, summary, (record,) = imported(tmp_path, [openr1()], "--mapping", "openr1-math", "--unfinished", "keep")
    assert [(s.outcome, s.finish_reason) for s in record.responses] == [
        ("correct", "stop"), ("wrong", "stop"), ("wrong", "length")
    ]  # fmt: skip
    assert (record.id, record.meta) == ("u1", {"problem_type": "Algebra", "source": "amc"})
    assert summary["notes"] == {"no_expert": 1, "truncated": 1} and summary["rewarded"] == 3
    rows = [{"source": "x", "instruction": "i", "completions": rated((0, 1), (1, 2))}]
    _, _, (record,) = imported(
        tmp_path, rows, "--mapping", "ultrafeedback", "--reward", "overall_score", name="b.jsonl"
    )
    assert [(s.model, s.reward) for s in record.responses] == [("m0", 10.0), ("m1", 9.0)]


@pytest.mark.parametrize("suffix", [".json", ".jsonl.gz", ".parquet"])
@pytest.mark.parametrize("shape", ["openr1", "ultrafeedback", "a row a solution", "rollouts"])
def test_every_format_gives_the_same_bytes(shape, suffix, tmp_path):
    preset, rows, _, _ = SHAPES[shape]
    if shape == "ultrafeedback":
        rows = [{**rows[0], "completions": rated((0, 0.1), (1, 2.5))}]
    if shape == "rollouts":
        rows = [{**row, "score": 0.1} for row in rows]
    source = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        table = pyarrow.Table.from_pylist(rows)
        if shape == "rollouts":
            table = table.set_column(2, "score", table["score"].cast(pyarrow.float32()))
        pyarrow.parquet.write_table(table, source)
    else:
        text = json.dumps(rows) if suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
        source.write_bytes(gzip.compress(text.encode()) if suffix.endswith(".gz") else text.encode())
    imported(tmp_path, rows, "--mapping", preset)
    imported(tmp_path, source, "--mapping", *preset.split(), name="other.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "other.jsonl").read_bytes()


def test_options_alone_and_sources_from_a_column(tmp_path):
    rows = [{"q": "x", "gold": {"value": 4}, "sol_1": "a", "sol_2": "b", "who": "human"}]
    options = ["--prompt", "q", "--answer", "gold.value", "--text", "sol_*"]
    assert imported(tmp_path, rows, *options, "--source", "self", "--reward", "0.5")[0] == [
        ("x", "4", [("a", "self", 0.5), ("b", "self", 0.5)])
    ]
    mapping = {"prompt": "q", "sources": {"human": "expert"}, "responses": [{"text": "sol_*", "source": "who"}]}
    (tmp_path / "own.yaml").write_text(json.dumps(mapping))
    own = ["--mapping", str(tmp_path / "own.yaml")]
    assert imported(tmp_path, rows, *own, name="b.jsonl")[0] == [
        ("x", None, [("a", "expert", None), ("b", "expert", None)])
    ]


BAD = {
    "openr1-math --prompt problm": (
        [openr1()],
        "does not fit .this row has: problem, (?s:.)*no row has a column 'problm'",
    ),
    "openr1-math --each answer": ([openr1()], "in.jsonl:1: column 'answer' is '2', no list -> name it as text"),
    "openr1-math --source source": (
        [openr1()],
        "jsonl:1: column 'source' says 'amc', none of expert, .* {amc: teacher}",
    ),
    "openr1-math --answer generations": (
        [openr1()],
        "in.jsonl:1: column 'generations' is .*, neither text nor a number",
    ),
    "openr2": ([openr1()], "--mapping openr2: neither a file nor one of deepmath, openmathinstruct-2"),
    "preference --text x": ([], "text: .*preference.yaml has several places of responses -> write them in a file"),
    "preference": (
        [{"prompt": "p", "chosen": turns("p", "a", "b"), "rejected": "x"}],
        "in.jsonl:1: a conversation that does",
    ),
    "rollouts": (
        [{"input": "x", "output": "a", "score": 1}],
        "no group is left (?s:.*)1 few_responses .first: .*in.jsonl:1",
    ),
    "deepmath": ([], "no row has a column 'question'"),
    "rollouts --finish-reason end": (  # the score is there, though nothing needs it
        [{"input": "x", "output": "a", "score": 1, "end": "abort"}] * 2,
        "no group is left (?s:.*)2 ended_otherwise .first: .*in.jsonl:1",
    ),
}


@pytest.mark.parametrize("options", BAD)
def test_a_mapping_that_does_not_fit_is_refused_and_leaves_nothing(options, tmp_path, capsys):
    rows, message = BAD[options]
    source = rows_file(tmp_path / "in.jsonl", rows)
    command = ["--input", str(source), "--output", str(tmp_path / "out.jsonl"), "--quiet", "--mapping"]
    assert main([*command, *options.split()]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    "mapping,message",
    [
        ("prompt: q\nresponses: [{txt: a}]", "responses.0.txt: unknown key -> text"),
        ("promt: q\nresponses: [{text: a}]", "promt: unknown key -> prompt"),
        ("prompt: q", "responses: Field required"),
        ("responses: []", "responses: List should have at least 1 item"),
        ("responses: [{source: self}]", "set each=COLUMN of lists, or text=COLUMN"),
        ("sources: {a: student}\nresponses: [{text: a}]", "sources.a: Input should be 'expert'"),
        ("responses: [{text: a", "not valid YAML"),
    ],
)
def test_a_wrong_mapping_names_its_key(mapping, message, tmp_path, capsys):
    (tmp_path / "own.yaml").write_text(mapping)
    source = rows_file(tmp_path / "in.jsonl", [openr1()])
    assert (
        main(["--input", str(source), "--output", str(tmp_path / "o.jsonl"), "--mapping", f"{tmp_path}/own.yaml"]) == 2
    )
    assert message in capsys.readouterr().err


def test_outputs_are_never_replaced_and_damage_is_never_skipped(tmp_path, capsys):
    imported(tmp_path, [openr1()], "--mapping", "openr1-math")
    before = (tmp_path / "out.jsonl").read_bytes()
    command = [
        "--input",
        str(tmp_path / "in.jsonl"),
        "--output",
        str(tmp_path / "out.jsonl"),
        "--mapping",
        "openr1-math",
    ]
    assert main(command) == 2 and "out.jsonl: exists -> remove it" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_bytes() == before
    with open(tmp_path / "in.jsonl", "a") as file:
        file.write("{torn")
    command[3] = str(tmp_path / "new.jsonl")
    assert main(command) == 2 and "in.jsonl:2: invalid_json" in capsys.readouterr().err
    assert not list(tmp_path.glob("*new*"))


def solutions(count, seed=0, length=1):
    """Rows of random problems, unsorted; some are empty, alike, unfinished, of another answer."""
    rng = random.Random(seed)
    for i in range(count):
        problem = rng.randrange(max(1, count // 5))
        text = rng.choice(["", "same", f"solution {i} " + "so " * length])
        reason = rng.choice(["stop", "stop", "length", "error"])
        yield {"problem": f"p{problem}", "text": text, "gold": problem % 7 + (rng.random() < 0.1), "end": reason}


OPTIONS = "--prompt problem --answer gold --group-by problem --text text --finish-reason end --source self".split()


def test_every_response_is_written_or_counted_whatever_the_order_and_the_format(tmp_path):
    rows = list(solutions(2000))
    _, summary, records = imported(tmp_path, rows, *OPTIONS)
    assert summary["responses"] + sum(summary["dropped"]["responses"].values()) == summary["rows"] == 2000
    assert set(summary["dropped"]["responses"]) == {
        "empty_response", "duplicate_response", "unfinished", "ended_otherwise", "other_answer", "group_dropped"
    }  # fmt: skip
    seen = dict.fromkeys(row["problem"] for row in rows)
    assert [r.prompt for r in records] == [p for p in seen if p in {r.prompt for r in records}]  # as they first appear
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), packed := tmp_path / "rows.parquet")
    imported(tmp_path, packed, *OPTIONS, name="packed.jsonl")
    assert (tmp_path / "packed.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()


def test_two_groups_of_one_id_are_kept_and_said(tmp_path, capsys):
    rows = [openr1(), openr1(problem="2+2?"), openr1(uuid="u2"), openr1(problem="3+3?")]
    _, summary, records = imported(tmp_path, rows, "--mapping", "openr1-math")
    assert [record.id for record in records] == ["u1", "u1", "u2", "u1"] and summary["notes"]["duplicate_id"] == 2
    assert "note: 2 duplicate_id (first: " in (said := capsys.readouterr().out) and "in.jsonl:2)" in said
    _, summary, _ = imported(tmp_path, [openr1(uuid=None)] * 2, "--mapping", "openr1-math", name="b.jsonl")
    assert summary["notes"]["duplicate_id"] == 1  # one row twice: its hash is its id


def test_what_a_killed_import_left_goes_with_the_next_and_only_that(tmp_path, capsys):
    output, others = tmp_path / "out.jsonl", (".out.jsonl.bak", f".out.jsonl.tmp-{os.getpid()}", ".out.jsonl2.tmp-1")
    for name in others:
        (tmp_path / name).write_text("of another, or of a living process")
    command = ["--input", str(rows_file(tmp_path / "in.jsonl", [openr1()])), "--output", str(output), "--quiet"]
    command += ["--mapping", "openr1-math"]
    code = (
        "import sys; from megatron_gft.commands.import_groups import main; from megatron_gft.groups import importing\n"
    )
    code += f"importing.read_all = lambda files, bar: print(1, flush=True) or sys.stdin.read()\nmain({command})"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen([sys.executable, "-c", code], env=environment, stdin=-1, stdout=-1)
    assert first.stdout is not None and first.stdin is not None
    first.stdout.readline()  # it reads
    assert main(command) == 2 and "out.jsonl: in use by another run" in capsys.readouterr().err
    first.kill()
    first.communicate()
    (tmp_path / ".out.jsonl.tmp-0x1").mkdir()  # as earlier versions named theirs
    (tmp_path / ".out.jsonl.tmp-99999999").write_text("x")
    assert (tmp_path / ".out.jsonl.tmp-work" / "made").is_dir()
    assert main(command) == 0
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"in.jsonl", "out.jsonl", "out.jsonl.summary.json", *others}


def test_from_rows_to_shards(tmp_path):
    """Import, score, preprocess, open: what people have becomes what is trained on."""
    rows = [
        {
            "problem": f"{i}+1?",
            "generated_solution": f"It is \\boxed{{{i + 1 + wrong}}}.",
            "expected_answer": str(i + 1),
        }
        for wrong in (0, 1)
        for i in range(5)
    ]
    imported(tmp_path, rows, "--mapping", "openmathinstruct-2")
    scored = tmp_path / "scored.jsonl"
    score_group_file([tmp_path / "out.jsonl"], scored, ScoringOptions(workers=1), progress=False)
    folder = byte_level_folder(tmp_path / "tokenizer")
    preprocess(PreprocessOptions([str(scored)], str(folder), str(tmp_path / "data" / "train")), progress=False)
    shard = GroupShard(str(tmp_path / "data" / "train"))
    assert len(shard) == 5 and [list(shard[i].rewards) for i in range(5)] == [[1.0, 0.0]] * 5


@pytest.mark.slow
@pytest.mark.parametrize("grouped", [True, False])
def test_memory_does_not_grow_with_the_rows(grouped, tmp_path):
    """300 000 rows, 71 MB of text, take no more memory than 30 000 beyond a database's pages."""
    peaks, environment = [], {**os.environ, "PYTHONPATH": str(ROOT)}
    for count in (30_000, 300_000):
        source = rows_file(tmp_path / f"{count}.jsonl", solutions(count, length=170))
        options = OPTIONS if grouped else [*OPTIONS[:4], "--text", "*", "--source", "self"]
        command = [sys.executable, str(ROOT / "tools" / "import_groups.py"), "--input", str(source), "--quiet"]
        command += ["--output", str(tmp_path / f"{count}.out.jsonl"), *options]
        code = f"import resource, subprocess; subprocess.run({command!r}, check=True, stdout=-3)"
        code += "; print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split()[-1]) / 1024)
    print(f"grouped={grouped}: peak MiB {peaks}")
    assert peaks[1] < peaks[0] + 80
