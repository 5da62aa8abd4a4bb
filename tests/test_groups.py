"""Group records and files: round trips, plain rows, policies, and that no line ever gives a traceback."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import gzip
import itertools
import json
import pickle
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest
from group_files import write_parquet
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_gft.errors import InputError
from megatron_gft.groups import (
    BYTES_PER_CHUNK,
    GroupRecord,
    ResponseRecord,
    expand_inputs,
    gold_answer,
    iter_group_file,
    parse_chunk,
    parse_json_line,
    read_chunks,
    record_from_json,
    record_to_json,
    write_group_file,
)
from megatron_gft.groups.problems import KINDS, ProblemLog, parse_policies, problem_table, report_lines
from megatron_gft.groups.records import MAX_DEPTH, check_group

GROUP = {
    "id": "g1",
    "prompt": "What is 1+1?",
    "answer": "2",
    "responses": [
        {"text": "It is 2.", "source": "expert", "reward": 1.0, "outcome": "correct", "finish_reason": "stop"},
        {"text": "3", "source": "self", "reward": 0, "outcome": "wrong", "token_ids": [5, 6], "logprobs": [-0.5, -1]},
    ],
}


def line(**changes) -> bytes:
    return json.dumps({**GROUP, **changes}).encode() + b"\n"


def response_line(**changes) -> bytes:
    return line(responses=[GROUP["responses"][0], {**GROUP["responses"][1], **changes}])


def parse(rows: bytes, tmp_path, **policies) -> tuple[list[GroupRecord], list]:
    path = tmp_path / "in.jsonl"
    path.write_bytes(rows)
    log = ProblemLog(policies)
    found = [pair for chunk in read_chunks(path) for pair in parse_chunk(chunk, log)]
    return [record for record, place in found if check_group(record, log.of_group(place, record.id))], log.problems


texts = st.text(min_size=1).filter(str.strip)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    st.lists,
    max_leaves=4,
)
responses = st.builds(
    ResponseRecord,
    text=texts,
    source=st.sampled_from(["expert", "teacher", "self"]),
    reward=st.none() | st.floats(-1e30, 1e30),
    outcome=st.none() | st.sampled_from(["correct", "wrong"]),
    finish_reason=st.sampled_from([None, "stop", "length"]),
    model=st.none() | texts,
    tokenizer=st.none() | texts,
    token_ids=st.none() | st.lists(st.integers(0, 2**31 - 1), max_size=5),
    logprobs=st.none() | st.lists(st.floats(-50, 0), max_size=5),
    sampling=st.none() | st.dictionaries(texts, json_values, max_size=2),
    extra=st.dictionaries(st.sampled_from(["seed_of_mine", "zzz"]), json_values, max_size=2),
)
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user"]), "content": texts},
    optional={"name": texts, "extra": texts, "tool_calls": st.lists(json_values, max_size=2)},
)
prompts = texts | st.lists(messages, min_size=1, max_size=3)
records = st.builds(
    GroupRecord,
    id=texts,
    prompt=prompts,
    responses=st.lists(responses, min_size=1, max_size=4),
    answer=st.none() | st.text(),
    meta=st.dictionaries(texts, json_values, max_size=2),
)


@settings(max_examples=60, deadline=None)
@given(record=records)
def test_record_survives_json(record):
    assert record_from_json(record_to_json(record)) == record


json_pieces = st.sampled_from(
    ["1", "-0", "-0.0", "1e5", "1E400", "-1e-400", "NaN", "-Infinity", "01", "1.", ".5", "null", "true", "[", "]", ","]
    + ["9" * 30, "9" * 5000, "1.7976931348623159e308", "2.2250738585072011e-308", " ", "\t", "\x0b", "\ufeff"]
    + ['"\\u00e9"', '"\\ud83d\\ude00"', '"\\ud800"', '"\x01"', '"\x7f"', '"\\/"', '{"b":', "}", "[" * 250 + "]" * 250]
) | st.floats().map(repr)


@settings(max_examples=400, deadline=None)
@given(pieces=st.lists(json_pieces, max_size=5))
def test_a_line_is_read_as_python_reads_json(pieces):
    """Two parsers stand behind one line; nobody may see which one took it."""
    text = '{"a":' + "".join(pieces) + "}"
    log = ProblemLog()
    value = parse_json_line(text.encode(), "here", log)
    try:
        expected = json.loads(text)
    except (ValueError, RecursionError):
        expected = None
    if "ud800" in text and expected is not None:
        assert value is None and log.problems[0].kind == "invalid_utf8"
    else:
        assert repr(value) == repr(expected)  # repr: type, sign of zero and NaN count
        assert bool(log.problems) == (expected is None)


def test_chunks_are_bounded_in_rows_and_in_bytes(tmp_path):
    path = tmp_path / "long.jsonl"
    long, short = line(prompt="x" * (BYTES_PER_CHUNK // 3)), line()
    path.write_bytes(long * 7 + short * 20)
    assert [len(chunk) for chunk in read_chunks(path, 8)] == [3, 3, 8, 8, 5]
    assert [chunk.first_row for chunk in read_chunks(path, 8)] == [1, 4, 7, 15, 23]
    parts = [row for part in range(2) for chunk in read_chunks(path, 8, part=part, parts=2) for row in chunk.rows]
    assert sorted(parts) == sorted(path.read_bytes().splitlines(keepends=True))


def test_chunks_of_parquet_are_bounded_too(tmp_path):
    path = tmp_path / "long.parquet"
    record = record_from_json(line(prompt="x" * (BYTES_PER_CHUNK // 3)))
    write_parquet(path, [dataclasses.replace(record, id=str(i)) for i in range(20)])
    chunks = list(read_chunks(path))
    assert max(map(len, chunks)) <= 3 and chunks[-1].read_fraction == 1.0
    assert all(len(pickle.dumps(chunk.rows)) < 2 * BYTES_PER_CHUNK for chunk in chunks)  # what goes to a worker
    rows = [record.id for chunk in chunks for record, _ in parse_chunk(chunk, ProblemLog())]
    assert rows == [str(i) for i in range(20)]
    assert [chunk.first_row for chunk in chunks] == list(itertools.accumulate(map(len, chunks[:-1]), initial=1))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(groups=st.lists(records, max_size=4))
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_records_survive_files(tmp_path, suffix, groups):
    path = tmp_path / f"groups{suffix}"
    if suffix == ".parquet":
        write_parquet(path, groups)
    else:
        assert write_group_file(path, groups) == len(groups)
    assert [record for record, _ in iter_group_file(path)] == groups


@pytest.mark.parametrize("name", ["out.parquet", "out.json", "out"])
def test_groups_are_written_as_jsonl_only(tmp_path, name):
    with pytest.raises(InputError, match=f"{name}: unknown kind of group file to write -> use .jsonl or .jsonl.gz"):
        write_group_file(tmp_path / name, [record_from_json(line())])
    assert not list(tmp_path.iterdir())


def test_gzip_file_is_the_same_bytes_every_time(tmp_path):
    record = record_from_json(line())
    for name in ("a", "b"):
        write_group_file(tmp_path / f"{name}.jsonl.gz", [record])
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()
    assert json.loads(gzip.decompress((tmp_path / "a.jsonl.gz").read_bytes()))["id"] == "g1"


def test_plain_rows_become_expert_groups(tmp_path):
    row = {"question": "How many?", "answer": "6*7=<<6*7=42>>42\n#### 1,042"}
    math_row = {"problem": "x?", "solution": "so \\boxed{7}", "answer": 7.0, "level": 3}
    (first, second), _ = parse(json.dumps(row).encode() + b"\n\n" + json.dumps(math_row).encode(), tmp_path)
    assert first.answer == "1042" and first.prompt == "How many?" and len(first.id) == 16
    assert first.responses == [ResponseRecord(row["answer"], "expert", finish_reason="stop")]
    assert second.answer == "7.0" and second.responses[0].text == "so \\boxed{7}" and second.meta == {"level": 3}


@pytest.mark.parametrize("given,expected", [(7, "7"), ("seven", "seven"), (0, "0"), (1.5, None), (True, None)])
def test_the_id_of_a_plain_row_is_kept_or_refused(given, expected, tmp_path):
    found, problems = parse(json.dumps({"id": given, "question": "q", "answer": "a"}).encode(), tmp_path)
    assert [record.id for record in found] == ([expected] if expected else [])
    assert [problem.kind for problem in problems] == ([] if expected else ["wrong_type"])


def test_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    found, problems = parse(b"\xef\xbb\xbf" + line() + line(id="g2"), tmp_path)
    assert [record.id for record in found] == ["g1", "g2"] and not problems
    assert parse(b"\xef\xbb\xbf", tmp_path) == ([], [])
    found, problems = parse(line() + b"\xef\xbb\xbf" + line(id="g2"), tmp_path)  # of files put one behind the other
    assert [record.id for record in found] == ["g1", "g2"] and not problems


def test_plain_rows_from_parquet(tmp_path):
    path = tmp_path / "train.parquet"
    rows = [{"question": f"q{i}", "answer": f"a\n#### {i}"} for i in range(3)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    found = list(iter_group_file(path))
    assert [record.answer for record, _ in found] == ["0", "1", "2"]
    assert [place for _, place in found] == [f"{path}:{n}" for n in (1, 2, 3)]


def test_columns_of_others_in_parquet_become_what_json_can_hold(tmp_path):
    path, day = tmp_path / "theirs.parquet", datetime.datetime(2020, 1, 2)
    response = {"text": "E", "source": "expert", "made": day, "extra": '{"zzz": 1}', "blank": None}
    message = {"role": "user", "content": "hi", "name": None, "at": day}
    row = {"id": "1", "messages": [message], "responses": [response], "created": day, "blob": b"x", "meta": {"at": day}}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    ((record, _),) = iter_group_file(path)
    stamp = "2020-01-02 00:00:00"
    assert record.prompt == [{"role": "user", "content": "hi", "at": stamp}]
    assert record.responses[0].extra == {"made": stamp, "zzz": 1}
    assert record.meta == {"created": stamp, "blob": {"base64": "eA=="}, "at": stamp}
    assert record_from_json(record_to_json(record)) == record


@pytest.mark.parametrize(
    "column,kind",
    [
        (pyarrow.array([b"ok", b"\xff\xfe", b"end"]).view(pyarrow.string()), "invalid_utf8"),
        (pyarrow.array([0, 1, 1000], pyarrow.timestamp("ns")), "wrong_type"),
        (pyarrow.array([0, 10**8, 1], pyarrow.date32()), "wrong_type"),
        (pyarrow.array(["{}", "5", "{}"]), "invalid_json"),
    ],
)
def test_cells_that_cannot_be_read_cost_their_row_only(tmp_path, column, kind):
    path = tmp_path / "bad.parquet"
    responses = [[{"text": "E", "source": "expert"}]] * 3
    columns = {"id": ["0", "1", "2"], "prompt": ["p"] * 3}
    if kind == "invalid_json":
        responses = [[{"text": "E", "source": "expert", "extra": extra}] for extra in column.to_pylist()]
    else:
        columns["mine"] = column
    pyarrow.parquet.write_table(pyarrow.table(columns | {"responses": responses}), path)
    log = ProblemLog()
    found = [record.id for chunk in read_chunks(path) for record, _ in parse_chunk(chunk, log)]
    assert found == ["0", "2"] and [(p.kind, p.place) for p in log.problems] == [(kind, f"{path}:2")]
    with pytest.raises(InputError, match=f"bad rows -> correct or remove them.*\n.*{path}:2: {kind}"):
        list(iter_group_file(path))


BAD_TEXT = pyarrow.array([b"a", b"b\xff", b"c"]).view(pyarrow.string())


def _with_bad_text(where: str) -> pyarrow.Table:
    """Three groups; text of the second one, in ``where``, is not UTF-8."""
    names, sources = pyarrow.array(["0", "1", "2"]), pyarrow.array(["expert"] * 3)
    text, prompt = (BAD_TEXT, names) if where == "response" else (names, BAD_TEXT)
    return pyarrow.table(
        {
            "id": names,
            "prompt": prompt,
            "blob": pyarrow.array([b"\xff"] * 3),
            "responses": pyarrow.ListArray.from_arrays(
                [0, 1, 2, 3], pyarrow.StructArray.from_arrays([text, sources], ["text", "source"])
            ),
        }
    )


@pytest.mark.parametrize("where", ["prompt", "response"])
def test_bad_text_of_a_parquet_cell_is_repaired_on_request(where, tmp_path):
    path = tmp_path / "bad.parquet"
    pyarrow.parquet.write_table(_with_bad_text(where), path)
    log = ProblemLog({"invalid_utf8": "fix"})
    found = [record for chunk in read_chunks(path) for record, _ in parse_chunk(chunk, log)]
    texts = [record.prompt if where == "prompt" else record.responses[0].text for record in found]
    assert texts == ["a", "b\ufffd", "c"] and all(record.meta == {"blob": {"base64": "/w=="}} for record in found)
    assert [(p.kind, p.action, p.place) for p in log.problems] == [("invalid_utf8", "fix", f"{path}:2")]


@pytest.mark.parametrize("policy,texts", [("fix", ["t", "\ufffd"]), ("drop", ["t"])])
@pytest.mark.parametrize("column", ["extra", "sampling", "meta"])
def test_half_a_pair_in_a_column_of_json_text(column, policy, texts, tmp_path):
    path = tmp_path / "half.parquet"
    rows = []
    for value in ('{"zzz": "t"}', '{"zzz": "\\ud800"}'):
        row = {"id": value, "prompt": "p", "meta": "{}"}
        response = {"text": "E", "source": "expert", "extra": "{}", "sampling": "{}"}
        (row if column == "meta" else response)[column] = value
        rows.append({**row, "responses": [response]})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    log = ProblemLog({"invalid_utf8": policy})
    found = [record for chunk in read_chunks(path) for record, _ in parse_chunk(chunk, log)]
    values = [record.meta if column == "meta" else getattr(record.responses[0], column) for record in found]
    assert [value["zzz"] for value in values] == texts
    assert [(p.kind, p.action, p.place) for p in log.problems] == [("invalid_utf8", policy, f"{path}:2")]


def test_gold_answer():
    assert gold_answer("no marker") is None
    assert gold_answer("#### 1\nthen #### -2,000.5 ") == "-2000.5"
    for kept in ("3,5", "(1, 2)", "1, 2, 3", "(100,200)", "3,5 kg", "12,34"):
        assert gold_answer(f"so\n#### {kept}") == kept
    assert gold_answer("#### $1,234,567.5 in 1,000 days, 2,000, 3") == "$1234567.5 in 1000 days, 2000, 3"


def test_unknown_fields_are_kept_and_misspelt_ones_refused(tmp_path):
    record = record_from_json(line(dataset="gsm8k"))
    assert record.meta == {"dataset": "gsm8k"}
    with pytest.raises(InputError, match=r"<text>: id 'g1' response 1 wrong_type: unknown field 'finish_resaon'"):
        record_from_json(response_line(finish_resaon="length"))


DEEP: list = []
for _ in range(MAX_DEPTH + 1):
    DEEP = [DEEP]
BAD_LINES = {
    "invalid_json": [b"{nope\n", b"[1]\n", b'{"a": ' + b"[" * 100_000 + b"\n", b'{"id": ' + b"9" * 5000 + b"}\n"],
    "invalid_utf8": [b'{"id": "\xff"}\n', line(prompt="half \ud800 pair")],
    "wrong_type": [
        line(prompt=3),
        line(prompt=["text"]),
        line(responses="text"),
        line(meta=[]),
        line(id=True),
        response_line(reward="1.0"),
        response_line(reward=True),
        response_line(finish_reason="abort"),
        response_line(token_ids=["1"]),
        response_line(logprobs=[None]),
        line(responses=["text"]),
        line(meta={"verifier": DEEP}),
        line(mine={"a": DEEP}),
        line(prompt=[{"role": "user", "content": "hi", "tool_calls": DEEP}]),
        response_line(sampling={"a": DEEP}),
        response_line(mine=DEEP),
        json.dumps({"question": "q", "answer": "a", "mine": DEEP}).encode(),
    ],
    "missing_field": [
        line(id=None),
        line(id=""),
        line(prompt=None),
        line(responses=None),
        line(prompt=[{"role": "user"}]),
        response_line(source=None),
        response_line(text=None),
    ],
    "empty_prompt": [line(prompt=" \n"), line(prompt=[]), line(prompt=[{"role": "user", "content": ""}])],
    "empty_response": [response_line(text="", token_ids=None)],
    "no_responses": [line(responses=[])],
    "nonfinite_reward": [response_line(reward=float(v)) for v in ("nan", "inf", "1e39")]
    + [response_line(reward=10**50)],
    "unknown_source": [response_line(source="student")],
    "duplicate_response": [response_line(text="It is 2.")],
    "truncated": [response_line(finish_reason="length")],
    "no_expert": [line(responses=[GROUP["responses"][1]])],
    "equal_rewards": [response_line(reward=1.0)],
    "expert_wrong": [line(responses=[{"text": "x", "source": "expert", "outcome": "wrong", "reward": 0}])],
}
CASES = [(kind, row) for kind, rows in BAD_LINES.items() for row in rows]


@pytest.mark.parametrize("kind,row", CASES)
def test_each_bad_line_is_found_and_named(kind, row, tmp_path):
    good = line(id="good")
    (found, *_), problems = parse(good + row, tmp_path)
    assert found.id == "good"
    assert kind in {problem.kind for problem in problems}
    assert all(problem.place == f"{tmp_path}/in.jsonl:2" for problem in problems)


@pytest.mark.parametrize("kind,row,policy", [(k, r, p) for k, r in CASES for p in KINDS[k].choices])
def test_policies_do_what_they_say(kind, row, policy, tmp_path):
    others = {name: "keep" for name in KINDS if name != kind and "keep" in KINDS[name].choices}
    found, problems = parse(row, tmp_path, **{**others, kind: policy})
    assert [p.action for p in problems if p.kind == kind] == [policy]
    if policy == "drop" and KINDS[kind].drops == "response" and len(json.loads(row)["responses"]) == 2:
        assert [len(record.responses) for record in found] == [1]
    elif policy in ("error", "drop"):
        assert found == []
    elif kind == "invalid_utf8":
        assert found == [] or "\ufffd" in found[0].prompt
    else:
        assert len(found) == 1


def test_responses_without_text_are_equal_when_their_tokens_are(tmp_path):
    made = [{"text": "", "source": "self", "reward": reward, "token_ids": [5, reward % 2]} for reward in range(3)]
    (record,), problems = parse(line(responses=made), tmp_path, duplicate_response="drop")
    assert [response.reward for response in record.responses] == [0, 1]
    dropped = [(p.response, p.detail) for p in problems if p.kind == "duplicate_response"]
    assert dropped == [(2, "same token_ids as an earlier one")]


def test_fixes(tmp_path):
    (record,), _ = parse(response_line(reward=float("nan")), tmp_path, nonfinite_reward="fix")
    assert record.responses[1].reward is None
    (record,), _ = parse(BAD_LINES["expert_wrong"][0], tmp_path, expert_wrong="fix")
    assert record.responses[0].reward == 1.0


def test_reading_a_bad_file_names_file_and_line(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(line() + b"\n" + line(prompt=None))
    with pytest.raises(InputError, match=rf"{path}:3: id 'g1' missing_field: no 'prompt'"):
        list(iter_group_file(path))
    for name, content in (("t.parquet", b"PAR1 not parquet"), ("t.jsonl.gz", b"\x1f\x8b nonsense"), ("t.txt", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=name):
            list(iter_group_file(tmp_path / name))


def test_inputs_expand_and_missing_ones_are_named(tmp_path):
    for name in ("b.jsonl", "a.jsonl"):
        (tmp_path / name).write_bytes(line())
    assert expand_inputs([tmp_path / "*.jsonl"]) == [f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"]
    with pytest.raises(InputError, match="nothing.jsonl"):
        expand_inputs([tmp_path / "nothing.jsonl"])
    with pytest.raises(InputError, match="named twice"):
        expand_inputs([tmp_path / "a.jsonl", tmp_path / "*.jsonl"])


def test_policies_are_parsed_and_nearest_name_is_given():
    assert parse_policies(["long_response=truncate"])["long_response"] == "fix"
    with pytest.raises(InputError, match="did you mean 'long_response'.*(?s:.*)empty_prompt='keep'"):
        parse_policies(["long_respons=drop", "empty_prompt=keep"])


def test_report_lists_what_changed_and_counts_everything(tmp_path):
    _, problems = parse(response_line(reward=1.0) + b"nope\n", tmp_path, invalid_json="drop")
    counts = Counter((problem.kind, problem.action) for problem in problems)
    assert problem_table(counts) == {"equal_rewards": {"keep": 1}, "invalid_json": {"drop": 1}}
    (entry,) = map(json.loads, report_lines(problems).splitlines())
    assert entry["kind"] == "invalid_json" and entry["place"].endswith("in.jsonl:2")


@pytest.mark.parametrize("written", ["NaN", "Infinity", "1e400", "null"])
def test_numbers_that_data_frames_write_for_nothing_are_no_answers(written, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text(
        f'{{"id": "a", "prompt": "p", "answer": {written}, "responses": [{{"text": "5", "source": "expert"}}]}}\n'
        f'{{"question": "q", "answer": {written}}}\n{{"problem": "q", "solution": {written}, "answer": "5"}}\n'
        f'{{"problem": "q", "solution": "so 5", "answer": {written}}}\n'
    )
    log = ProblemLog()
    found = [record for chunk in read_chunks(path) for record, _ in parse_chunk(chunk, log)]
    assert [record.answer for record in found] == [None, None]
    assert [(p.kind, p.place) for p in log.problems] == [("missing_field", f"{path}:2"), ("missing_field", f"{path}:3")]


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_gold_numbers_of_parquet_are_the_shortest_of_their_own_type(bits, tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    import numpy as np

    values = np.array([0.1, 2.5, np.nan, 1000], dtype=f"float{bits}")
    groups = [{"id": str(i), "prompt": "p", "responses": [{"text": "5", "source": "expert"}]} for i in range(4)]
    table = pyarrow.Table.from_pylist(groups).append_column("answer", pyarrow.array(values))
    parquet.write_table(table, tmp_path / "in.parquet")
    found = [r for chunk in read_chunks(tmp_path / "in.parquet") for r, _ in parse_chunk(chunk, ProblemLog())]
    assert [record.answer for record in found] == ["0.1", "2.5", None, "1000.0"]


# --- rows as people have them ----------------------------------------------------------------------------------------


def read_bytes(path, content) -> list[GroupRecord]:
    path.write_bytes(content)
    return [record for record, _ in iter_group_file(path)]


LINES = [json.loads(line(id=f"g{i}", prompt=f'a "quote", ] }} é \\ {i}' + "x" * 40_000 * (i == 1))) for i in range(3)]
JSONL = "\n".join(json.dumps(row, ensure_ascii=False) for row in LINES)


@pytest.mark.parametrize(
    "name,text",
    {
        "lines": JSONL,
        "crlf": JSONL.replace("\n", "\r\n") + "\r\n",
        "a mark before every line": "\ufeff" + JSONL.replace("\n", "\n\ufeff"),
        "array": json.dumps(LINES),
        "array, indented": "\ufeff \n" + json.dumps(LINES, indent=2, ensure_ascii=False),
        "array, a row a line": "[" + JSONL.replace("\n", ",\n") + "]\n",
        "arrays joined": f"[{json.dumps(LINES[0])}]\n[{json.dumps(LINES[1])}, {json.dumps(LINES[2])}]",
    }.items(),
    ids=lambda value: value if "{" not in value else "text",
)
def test_text_files_of_other_shapes_are_the_same_rows(name, text, tmp_path):
    expected = [record_from_json(json.dumps(row)) for row in LINES]
    for encoding in ("utf-8", "utf-16", "utf-16-le", "utf-16-be"):
        stored = text.lstrip("\ufeff \n") if encoding != "utf-8" else text  # the codec utf-16 writes its own mark
        assert read_bytes(tmp_path / "in.json", stored.encode(encoding)) == expected, encoding
        assert read_bytes(tmp_path / "in.json.gz", gzip.compress(stored.encode(encoding))) == expected, encoding


@pytest.mark.parametrize(
    "text,message",
    [
        (
            '[{"id": "a"',
            "in.json:1: element of a JSON array: Expecting ',' delimiter -> correct the file",
        ),
        (f"[{json.dumps(LINES[0])},\n", "in.json:2: element of a JSON array: the array does not end"),
        (
            f"[{json.dumps(LINES[0])}, nope, {json.dumps(LINES[1])}]",
            "in.json:2: element of a JSON array: Expecting value",
        ),
        ('[{"id": "a' + "x" * 200_000, "in.json:1: element of a JSON array: Unterminated string"),
        ("[" * 200_000, "in.json:1: element of a JSON array: nested too deep"),
        ("[[1], 2]", "in.json:1: invalid_json: a JSON list, not an object"),
    ],
)
def test_a_broken_array_is_refused_whole(text, message, tmp_path):
    with pytest.raises(InputError, match=message):
        read_bytes(tmp_path / "in.json", text.encode())


def test_rows_of_an_array_are_judged_one_by_one(tmp_path):
    """Policies hold for each element; a place is the element's number; text stays as it was stored."""
    (tmp_path / "in.json").write_bytes(b"[" + line(id="a") + b", 5, " + line(id="b").replace(b"1+1", b"\xff") + b"]")
    log = ProblemLog({"invalid_json": "drop", "invalid_utf8": "fix"})
    found = [pair for chunk in read_chunks(tmp_path / "in.json") for pair in parse_chunk(chunk, log)]
    assert [(r.id, place.rpartition(":")[2]) for r, place in found] == [("a", "1"), ("b", "3")]
    assert found[1][0].prompt == "What is \ufffd?"
    assert [problem.kind for problem in log.problems] == ["invalid_json", "invalid_utf8"]


def test_utf16_cut_off_is_refused(tmp_path):
    with pytest.raises(InputError, match="in.json: cannot be read .*truncated data"):
        read_bytes(tmp_path / "in.json", line().decode().encode("utf-16")[:-1])


CALL = {"id": "c1", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
SUNNY = {"role": "tool", "content": "sunny", "tool_call_id": "c1"}
ASK = {"role": "user", "content": "Is it?"}


def test_structs_of_parquet_hold_the_fields_of_their_own_row(tmp_path):
    """Null fields that other rows brought are absent, at every depth; a list keeps its nulls, a map its keys."""
    other = {
        "id": "c2",
        "function": {"name": "date", "arguments": {"day": "monday", "deep": [{"a": 1}, None, {"b": 2}]}},
    }
    rows = [
        line(id="a", prompt=[ASK, CALLED, SUNNY], mine={"x": 1, "list": [1, None]}),
        line(id="b", prompt=[ASK, {**CALLED, "tool_calls": [other, CALL]}, SUNNY, ASK], mine={"y": {"z": 2}}),
        response_line(id="c", extra_field={"q": 1}),
    ]
    rows = [json.loads(row) for row in rows]
    rows[2]["prompt"] = [ASK]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "in.parquet")
    expected = [record_from_json(json.dumps(row)) for row in rows]
    assert [record for record, _ in iter_group_file(tmp_path / "in.parquet")] == expected
    nulls = json.dumps(record_to_json(expected[0])), json.dumps(record_to_json(expected[2]))
    assert "day" not in nulls[0] and "q" not in nulls[0] and "tool_calls" not in nulls[1]


def test_cells_of_every_type_are_as_json_would_hold_them(tmp_path):
    f32, f16, text = pyarrow.float32(), pyarrow.float16(), pyarrow.string()
    cells = [
        ("list", pyarrow.list_(f32), [0.1, None], [0.1, None]),
        ("fixed", pyarrow.list_(f32, 2), [0.1, 0.2], [0.1, 0.2]),
        ("struct", pyarrow.struct([("a", f32), ("b", pyarrow.list_(f32)), ("c", text)]), {"a": 0.3}, {"a": 0.3}),
        ("map", pyarrow.map_(text, f32), [("k", 0.7), ("none", None)], {"k": 0.7, "none": None}),
        ("maps", pyarrow.large_list(pyarrow.map_(pyarrow.int32(), text)), [[(1, "one")]], [{"1": "one"}]),
        ("coded", pyarrow.dictionary(pyarrow.int8(), text), "x", "x"),
        ("large", pyarrow.large_string(), "y", "y"),
        ("view", pyarrow.string_view(), "z", "z"),
        ("tiny", f32, 1e-40, 1e-40),
        ("big", pyarrow.uint64(), 2**64 - 1, 2**64 - 1),
        ("decimal", pyarrow.decimal128(38, 20), decimal.Decimal("0.1"), "0.10000000000000000000"),
        ("flag", pyarrow.bool_(), True, True),
        ("day", pyarrow.date32(), datetime.date(2020, 1, 2), "2020-01-02"),
    ]
    group = json.loads(line())
    responses = pyarrow.array([[{"text": "5", "source": "expert", "reward": 1.0}]])
    columns = {name: pyarrow.array([value], kind) for name, kind, value, _ in cells}
    columns |= {"half": pyarrow.array([0.1]).cast(f32).cast(f16)}
    table = pyarrow.table({"id": [group["id"]], "prompt": [group["prompt"]], "responses": responses} | columns)
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet")
    ((record, _),) = iter_group_file(tmp_path / "in.parquet")
    assert record.meta == {name: expected for name, _, _, expected in cells} | {"half": 0.1}


@pytest.mark.parametrize(
    "value,expected",
    [
        (pyarrow.array([7], pyarrow.int64()), "7"),
        (pyarrow.array([2**63], pyarrow.uint64()), str(2**63)),
        (pyarrow.array([decimal.Decimal("1.10")]), "1.10"),
        (pyarrow.array([datetime.date(2020, 1, 2)]), "2020-01-02"),
        (pyarrow.array([None], pyarrow.timestamp("ns")), None),
        (pyarrow.array([float("nan")], pyarrow.float32()), None),
        (pyarrow.array(["nan"]).cast(pyarrow.float64()).cast(pyarrow.float32()), None),
        (pyarrow.array([None], pyarrow.null()), None),
        (pyarrow.array([True]), InputError),
        (pyarrow.array([["4"]]), InputError),
    ],
    ids=[str(i) for i in range(10)],
)
def test_a_gold_answer_of_parquet_is_exact_absent_or_refused(value, expected, tmp_path):
    columns = {"id": ["a"], "prompt": ["p"], "responses": [[{"text": "5", "source": "expert"}]], "answer": value}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "in.parquet")
    if expected is InputError:
        with pytest.raises(InputError, match="in.parquet:1: id 'a' wrong_type: 'answer' is"):
            list(iter_group_file(tmp_path / "in.parquet"))
    else:
        assert [record.answer for record, _ in iter_group_file(tmp_path / "in.parquet")] == [expected]


def user(content) -> list[dict]:
    return [{"role": "user", "content": content}]


HI = user("hi")


@pytest.mark.parametrize(
    "prompt,expected",
    [
        (json.dumps(HI), HI),
        (" " + json.dumps(HI, indent=1) + "\n", HI),
        (str(HI), HI),
        ("[{'content': 'it\\'s', 'role': 'user', 'name': None}]", [{"content": "it's", "role": "user", "name": None}]),
        (
            "[{'content': 'hi', 'role': 'user'}\n {'content': 'ho', 'role': 'user'}]",
            "printed as text -> store it as a list",
        ),
        (json.dumps(HI) + " What does this say?", json.dumps(HI) + " What does this say?"),
        ('[{"a": 1}]', '[{"a": 1}]'),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
            [{"role": "user", "content": "ab"}],
        ),
        (
            [{"role": "user", "content": ["a", {"text": "b", "type": "input_text"}]}],
            [{"role": "user", "content": "ab"}],
        ),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "u"}]}], "a part that is no text"),
        ([ASK, CALLED, SUNNY], [ASK, CALLED, SUNNY]),
        ([ASK, {"role": "assistant", "tool_calls": [CALL]}, SUNNY], [ASK, CALLED, SUNNY]),
        ([{"role": "user", "content": None}, ASK], "a message has content null, and no tool_calls beside it"),
        ([ASK, {"role": "assistant", "content": None, "tool_calls": []}, ASK], "a message has content null"),
        ([ASK, {"role": "assistant", "content": "The"}], "ends with the assistant's answer"),
        (json.dumps([ASK, CALLED]), "ends with the assistant's answer"),
    ],
    ids=[str(i) for i in range(16)],
)
def test_prompts_in_the_forms_that_people_store(prompt, expected, tmp_path):
    for row in (line(prompt=prompt), line(prompt=None, messages=prompt)):
        (tmp_path / "in.jsonl").write_bytes(row)
        if isinstance(expected, str) and expected != prompt:
            with pytest.raises(InputError, match=f"in.jsonl:1: id 'g1' wrong_type: .*{expected}"):
                list(iter_group_file(tmp_path / "in.jsonl"))
        else:
            ((record, _),) = iter_group_file(tmp_path / "in.jsonl")
            assert record.prompt == expected and "messages" not in record.meta
            assert record_from_json(record_to_json(record)) == record
