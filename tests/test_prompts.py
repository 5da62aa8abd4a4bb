"""Prompts from rows and folders: groups among them, messages, gold answers, splits, and what is refused."""

from __future__ import annotations

import datetime
import json
import math
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest
from group_files import write_parquet

from megatron_gft.errors import InputError
from megatron_gft.evaluation.run import reference_texts
from megatron_gft.groups import GroupRecord, ResponseRecord, iter_group_file, write_group_file
from megatron_gft.sampling.prompts import PromptColumns, PromptSet, prompt_files
from megatron_gft.sampling.responses import ColumnResponses
from megatron_gft.sampling.sources import load_sources

USER = {"role": "user", "content": "2+2?"}
EXPERT = {"text": "It is 4.", "source": "expert"}


def rows_file(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path, split="train", **columns):
    return list(PromptSet([path], PromptColumns(**columns), split))


def read_rows(tmp_path, *rows, **columns):
    return read(rows_file(tmp_path / "p.jsonl", rows), **columns)


# --- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_each_row_says_itself_whether_it_is_a_group(tmp_path, suffix):
    path = tmp_path / f"mixed{suffix}"
    if suffix == ".jsonl":
        first = {"id": "0", "prompt": "a", "answer": "1", "responses": [], "meta": {"x": 1}}
        rows_file(path, [first, {"id": "1", "prompt": "b", "responses": [EXPERT], "meta": {"y": 2}, "level": 3}])
    else:
        write_parquet(
            path,
            [
                GroupRecord("0", "a", [], "1", {"x": 1}),
                GroupRecord("1", "b", [ResponseRecord(**EXPERT)], None, {"y": 2, "level": 3}),
            ],
        )
    empty, group = read(path)
    assert (empty.id, empty.prompt, empty.answer, empty.responses, empty.meta) == ("0", "a", "1", [], {"x": 1})
    assert (group.id, group.prompt, group.answer) == ("1", "b", None)
    assert group.responses == [ResponseRecord("It is 4.", "expert")] and group.meta == {"y": 2, "level": 3}
    assert [row.place for row in (empty, group)] == [f"{path}:1", f"{path}:2"]


@pytest.mark.parametrize("responses", [[], [EXPERT]])
@pytest.mark.parametrize(
    "option", [{"prompt": "prompt"}, {"answer": "answer"}, {"id": "id"}, {"template": "X {prompt}"}]
)
def test_options_that_would_do_nothing_for_a_group_are_refused(tmp_path, option, responses):
    group = {"id": "0", "prompt": "a", "answer": "1", "responses": responses}
    with pytest.raises(InputError, match=rf"p.jsonl:1: a group .*\(given: {next(iter(option))}\) -> leave them out"):
        read_rows(tmp_path, group, **option)


def test_a_broken_group_is_refused_without_a_policy_that_the_tool_lacks(tmp_path):
    with pytest.raises(InputError, match="p.jsonl:2: id '1' response 0 missing_field: no 'source'") as caught:
        read_rows(tmp_path, {"prompt": "a"}, {"id": "1", "prompt": "b", "responses": [{"text": "x"}]})
    assert "missing_field=" not in str(caught.value)
    (tmp_path / "bad.jsonl").write_text("{nope\n")
    with pytest.raises(InputError, match="bad.jsonl:1: invalid_json") as caught:
        read(tmp_path / "bad.jsonl")
    assert "invalid_json=" not in str(caught.value)


ANSWER = {"role": "assistant", "content": "The answer is 4."}


@pytest.mark.parametrize(
    "row,message",
    [
        ({"messages": [USER, ANSWER]}, "messages .* ends with the assistant's answer"),
        (
            {"id": "1", "prompt": [USER, ANSWER], "responses": []},
            "prompt .* ends with the assistant's answer",
        ),
        (
            {"id": "1", "prompt": [USER, ANSWER], "responses": [EXPERT]},
            "id '1' wrong_type: .* ends with the assistant",
        ),
        ({"messages": [{"role": "user", "content": None}]}, "messages is neither text nor messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "text": "hi"}]}]},
            "messages is .* a part that",
        ),
        ({"messages": [{"role": None, "content": "hi"}]}, "messages is neither text nor messages"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages is neither text nor messages"),
        ({"messages": [USER, "text"]}, "messages is neither text nor messages"),
        ({"messages": []}, "messages is neither text nor messages"),
        ({"prompt": " "}, "prompt is neither text nor messages"),
    ],
)
def test_what_cannot_be_sampled_from_or_written_is_refused_at_once(tmp_path, row, message):
    with pytest.raises(InputError, match=f"p.jsonl:2: {message}"):
        read_rows(tmp_path, {"prompt": "good"}, row)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_fields_of_messages_reach_the_group_file_and_null_ones_do_not(tmp_path, suffix):
    messages = [{"role": "system", "content": "Be brief.", "name": None}, {**USER, "name": "bob"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": messages}]), tmp_path / "in.parquet")
    (row,) = read(tmp_path / "in.parquet")
    assert row.prompt == [{"role": "system", "content": "Be brief."}, {**USER, "name": "bob"}]
    write = write_parquet if suffix == ".parquet" else write_group_file
    write(tmp_path / f"out{suffix}", [GroupRecord(row.id, row.prompt, [ResponseRecord(**EXPERT)])])
    ((record, _),) = iter_group_file(tmp_path / f"out{suffix}")
    assert record.prompt == row.prompt
    (again,) = read(tmp_path / f"out{suffix}")
    assert (again.id, again.digest()) == (row.id, row.digest())


@pytest.mark.parametrize(
    "value,text", [("so\n#### 1,042", "1042"), (2, "2"), (1.5, "1.5"), (None, None), (math.nan, None)]
)
def test_gold_answers_are_text_or_numbers(tmp_path, value, text):
    (row,) = read_rows(tmp_path, {"prompt": "a", "gold": value}, answer="gold")
    assert row.answer == text


@pytest.mark.parametrize("column", ["answer", "id"])
@pytest.mark.parametrize("value", [["2"], True, {"value": 2}])
def test_other_answers_and_ids_are_refused(tmp_path, column, value):
    with pytest.raises(InputError, match=rf"p.jsonl:1: column '{column}' holds .*\({type(value).__name__}\)"):
        read_rows(tmp_path, {"prompt": "a", column: value})


def test_an_id_that_is_no_number_is_no_id(tmp_path):
    (row, other) = read_rows(tmp_path, {"prompt": "a", "id": math.nan}, {"prompt": "a"})
    assert row.id == other.id and len(row.id) == 16
    with pytest.raises(InputError, match="p.jsonl:1: no id in column id -> set --id-column"):
        read_rows(tmp_path, {"prompt": "a", "id": math.nan}, id="id")


def test_columns_template_and_messages(tmp_path):
    rows = [{"nr": 7, "text": "2+2", "gold": 4}, {"nr": 8, "text": [USER], "gold": None}]
    first, second = read_rows(tmp_path, *rows, prompt="text", answer="gold", id="nr", template="Solve {prompt}.")
    assert (first.id, first.prompt, first.answer) == ("7", "Solve 2+2.", "4")
    assert (second.id, second.prompt, second.answer) == ("8", [USER], None)
    with pytest.raises(InputError, match=r"p.jsonl:1: no column prompt, question.* set --prompt-column"):
        read_rows(tmp_path, *rows)
    with pytest.raises(InputError, match=r"p.jsonl:1: no column anser -> set --answer-column"):
        read_rows(tmp_path, *rows, prompt="text", answer="anser")


VERL = {
    "prompt": [USER],
    "reward_model": {"style": "rule", "ground_truth": 0.5},
    "extra_info": {"index": 3, "said": "so"},
}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_column_may_be_a_field_inside_of_another(tmp_path, suffix):
    path = tmp_path / f"verl{suffix}"
    if suffix == ".jsonl":
        rows_file(path, [VERL, {**VERL, "reward_model.ground_truth": "exact name"}])
    else:
        structs = pyarrow.struct([("style", pyarrow.string()), ("ground_truth", pyarrow.float32())])
        schema = pyarrow.Table.from_pylist([VERL]).schema
        schema = schema.set(schema.get_field_index("reward_model"), pyarrow.field("reward_model", structs))
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([VERL], schema=schema), path)
    named = {"answer": "reward_model.ground_truth", "id": "extra_info.index"}
    first, *rest = read(path, **named)
    assert (first.id, first.prompt, first.answer) == ("3", [USER], "0.5")
    assert [row.answer for row in rest] == ["exact name"] * (suffix == ".jsonl")
    (source,) = load_sources(["kind=column column=extra_info.said"])
    assert not list(source.problems(first))
    (response,) = ColumnResponses(source, 0).records(first, None, None)
    assert response.text == "so"
    assert list(reference_texts(first, "extra_info.said")) == ["so"]
    (again,) = [row for row in read(path, **named, prompt="prompt.0.content")][:1]
    assert again.prompt == "2+2?"
    for wrong in ("reward_model.gold", "reward_model.style.x", "prompt.1.content", "prompt.x"):
        with pytest.raises(InputError, match=f"verl{suffix}:1: no column {wrong} -> set --answer-column"):
            read(path, answer=wrong)
        with pytest.raises(InputError, match=f"verl{suffix}:1: no column '{wrong}'"):
            list(reference_texts(first, wrong))


def test_an_empty_cell_is_no_worked_answer(tmp_path):
    (row,) = read_rows(tmp_path, {"prompt": "a", "said": math.nan})
    assert row.meta == {}
    with pytest.raises(InputError, match="no column 'said'"):
        list(reference_texts(row, "said"))


def test_a_template_without_the_prompt_is_refused():
    with pytest.raises(InputError, match=r"--prompt-template 'Solve: \{question\}': all prompts would be this text"):
        PromptColumns(template="Solve: {question}")


def test_duplicates_are_kept_dropped_or_numbered_in_all_files_of_a_run(tmp_path):
    first = rows_file(tmp_path / "a.jsonl", [{"id": i, "prompt": "same"} for i in ("x", "x#2", "x", "y")])
    second = rows_file(tmp_path / "b.jsonl", [{"id": "x", "prompt": "other"}])

    def ids(duplicates):
        seen: Counter[str] = Counter()
        columns = PromptColumns(duplicates=duplicates)
        return [row.id for row in PromptSet([first, second], columns).rows(seen)], seen

    assert ids("error")[0] == ["x", "x#2", "x", "y", "x"]
    found, seen = ids("drop")
    assert found == ["x", "x#2", "y"] and seen.total() - len(seen) == 2
    assert ids("number")[0] == ["x", "x#2", "x#3", "y", "x#4"]
    plain = rows_file(tmp_path / "c.jsonl", [{"problem": "p"}] * 3)
    found = [row.id for row in read(plain, duplicates="number")]
    assert found == [found[0], found[0] + "#2", found[0] + "#3"]


# --- files -----------------------------------------------------------------------------------------------------------


def folder_of(path, *names):
    """Each file has one row: its name."""
    for name in names:
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        row = {"question": name}
        if name.endswith(".parquet"):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), file)
        else:
            rows_file(file, [row])
    return path


def test_all_kinds_of_input_give_the_same_prompts(tmp_path):
    rows = [{"question": f"q{i}", "answer": f"a\n#### 1,00{i}", "level": i} for i in range(4)]
    table = pyarrow.Table.from_pylist(rows)
    hub = tmp_path / "hub" / "data"
    hub.mkdir(parents=True)
    (tmp_path / "j.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    pyarrow.parquet.write_table(table, tmp_path / "p.parquet")
    for name, part in (("train-00000-of-00002", table[:3]), ("train-00001-of-00002", table[3:]), ("test-0", table[:1])):
        pyarrow.parquet.write_table(part, hub / f"{name}.parquet")
    found = [read(tmp_path / name) for name in ("j.jsonl", "p.parquet", "hub")]
    for prompts in found:
        assert [(row.prompt, row.answer, row.meta) for row in prompts] == [
            (f"q{i}", f"100{i}", {"level": i}) for i in range(4)
        ]
        assert [row.id for row in prompts] == [row.id for row in found[0]] and len({row.id for row in prompts}) == 4
    assert [row.prompt for row in read(tmp_path / "hub", "test")] == ["q0"]
    with pytest.raises(InputError, match="set --split"):
        read(tmp_path / "hub", "valid")


@pytest.mark.parametrize(
    "names,split,chosen",
    [
        ("gsm8k-train.jsonl gsm8k-test.jsonl", "train", [0]),
        ("gsm8k-train.jsonl gsm8k-test.jsonl", "test", [1]),
        ("train-00000-of-00002.parquet train-00001-of-00002.parquet test-00000-of-00001.parquet", "train", [0, 1]),
        ("data/train-00000-of-00001-0123456789abcdef.parquet data/test-00000-of-00001.parquet", "train", [0]),
        ("data/train_sft-00000-of-00001.parquet data/train_gen-00000-of-00001.parquet", "train_gen", [1]),
        ("train1.jsonl train2.jsonl contest.jsonl", "train", [0, 1]),
        ("train/0000.parquet train/0001.parquet test/0000.parquet", "test", [2]),
        ("dev.jsonl validation.jsonl", "dev", [0]),
        ("train.parquet train.jsonl", "train", [0]),
    ],
)
@pytest.mark.parametrize("name", ["plain", "[1]*"])
def test_files_of_a_split(tmp_path, name, names, split, chosen):
    found = read(folder_of(tmp_path / name, *names.split()), split)
    assert [row.prompt for row in found] == [names.split()[i] for i in chosen]


@pytest.mark.parametrize(
    "names,split,message",
    [
        ("data/train_sft-0-of-1.parquet data/train_gen-0-of-1.parquet", "train", "train_gen or train_sft"),
        (
            "data/cot-00000-of-00001.parquet data/tir-00000-of-00001.parquet",
            "train",
            "files: cot, tir; .* -> set --split",
        ),
        ("validation.jsonl train.jsonl", "valid", "files: train, validation;"),
        ("algebra.jsonl geometry.jsonl", "train", "files: algebra, geometry;"),
        ("part-0.parquet", "test", "of the split 'test' in this folder .files: part-0.parquet;"),
        ("gsm8k-test.jsonl", "train", "files: gsm8k-test; .* -> set --split"),
        ("contest.jsonl", "test", "files: contest;"),
        ("main/train-0.parquet socratic/train-0.parquet", "train", "folders: main, socratic"),
    ],
)
def test_no_split_is_guessed(tmp_path, names, split, message):
    with pytest.raises(InputError, match=message):
        prompt_files(folder_of(tmp_path / "set", *names.split()), split)


def test_cells_of_parquet_files(tmp_path):
    """Dates become text; bad UTF-8 names its row."""
    path = tmp_path / "p.parquet"

    def write(table):
        pyarrow.parquet.write_table(table, path)
        return path

    (row,) = read(write(pyarrow.table({"question": ["q"], "day": [datetime.date(2020, 1, 2)]})))
    assert row.meta == {"day": "2020-01-02"} and row.columns == {"question": "q", "day": "2020-01-02"}
    bad = pyarrow.array([b"ok", b"\xff\xfe"]).view(pyarrow.string())
    with pytest.raises(InputError, match=f"{path.name}:2: invalid_utf8"):
        read(write(pyarrow.table({"question": bad})))
    with pytest.raises(InputError, match=f"{path.name}:1: question is neither text nor messages"):
        read(write(pyarrow.table({"question": pyarrow.array([b"text?"])})))
    path.write_bytes(b"PAR1, but damaged")
    with pytest.raises(InputError, match=f"{path.name}: not a readable"):
        read(path)
