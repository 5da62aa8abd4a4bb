"""Inspection: numbers agree with the data, groups are shown as they are, the page stands alone and escapes text."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from group_files import random_records
from tiny_tokenizers import byte_level_folder

from megatron_gft.data.inspection import PackingQuestion, inspect_group_files, inspect_shards
from megatron_gft.data.inspection_sources import open_source
from megatron_gft.data.inspection_view import group_text, html_page, report_text, view_tokens
from megatron_gft.data.preprocessing import PreprocessOptions, preprocess
from megatron_gft.errors import InputError
from megatron_gft.groups import GroupRecord, ResponseRecord, write_group_file
from megatron_gft.planning import GroupLengths, plan_step
from megatron_gft.shards import GroupShard, GroupShardWriter, add_rewards_sidecar
from megatron_gft.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Some good groups and one with several oddities, as a file and as a shard."""
    base = tmp_path_factory.mktemp("inspect")
    folder = byte_level_folder(base / "hf")
    odd = [ResponseRecord("same <b>&text</b> é", "self", 0.0, "wrong"), ResponseRecord("gold", "expert", 0.0, "wrong")]
    odd.append(ResponseRecord("same <b>&text</b> é", "teacher", 0.0, "wrong", "length"))
    lonely = GroupRecord(
        "lonely", "no expert here", [ResponseRecord("a", "self", 1.0), ResponseRecord("b", "self", 0.0)]
    )
    records = [*random_records(20), GroupRecord("odd", "<script>alert(1)</script>", odd, "7"), lonely]
    write_group_file(base / "in.jsonl", records)
    preprocess(PreprocessOptions([str(base / "in.jsonl")], str(folder), str(base / "train")), progress=False)
    return base, folder, records


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "tools"))
    import inspect_groups

    return inspect_groups.main


def test_report_of_a_shard_has_the_right_numbers(case):
    base, _, records = case
    report = inspect_shards([str(base / "train")])
    responses = [response for record in records for response in record.responses]
    shard = GroupShard(base / "train")
    assert report["groups"] == 22 and report["responses"] == len(responses)
    assert report["total_response_length"] == shard.manifest.counts.response_tokens
    assert report["response_length"]["max"] == shard.manifest.counts.max_response_tokens
    assert report["prompt_length"]["mean"] == pytest.approx(shard.prompt_lengths.mean())
    assert sum(report["response_length"]["histogram"]["counts"]) == len(responses)
    expert = [r.reward for r in responses if r.source == "expert"]
    assert report["by_source"]["expert"]["mean_reward"] == pytest.approx(np.mean(expert))
    assert report["by_source"]["expert"]["outcomes"] == {"correct": 20, "wrong": 1}
    truncated = sum(r.finish_reason == "length" for r in responses)
    assert report["problems"]["truncated"] == truncated == sum(s["truncated"] for s in report["by_source"].values())
    assert report["zero_variance_groups"] == report["problems"]["equal_rewards"] == 1
    assert report["problems"]["no_expert"] == 1 and report["examples"]["no_expert"] == [f"{base}/train id 'lonely'"]
    assert report["problems"]["expert_wrong"] == 1
    json.dumps(report, allow_nan=False)


def test_duplicates_and_inner_end_markers_are_found(case, tmp_path):
    base, folder, _ = case
    eos = load_tokenizer(folder).eos_id
    record = random_records(1)[0]
    record.responses.append(record.responses[0])
    write_group_file(tmp_path / "a.jsonl", [record])
    preprocess(PreprocessOptions([str(tmp_path / "a.jsonl")], str(folder), str(tmp_path / "a")), progress=False)
    report = inspect_shards([str(base / "train"), str(tmp_path / "a")])
    assert report["problems"]["duplicate_response"] == 1 and report["problems"]["duplicate_id"] == 1
    assert "special_tokens" not in report["problems"]
    with GroupShardWriter(tmp_path / "b", GroupShard(tmp_path / "a").manifest.tokenizer) as writer:
        writer.add_group([5], [[6, eos, 7, eos], [6, eos]], ["self", "self"], [0.0, 1.0], group_id="inner")
        writer.add_group([5, eos, 5], [[6, eos]], ["self"], [0.0], group_id="prompt may have them")
        writer.add_group([5], [[0, 6, eos]], ["self"], [0.0], group_id="bos")
    found = inspect_shards([str(tmp_path / "b")])
    assert found["problems"]["special_tokens"] == 2
    assert [line.split("id ")[1] for line in found["examples"]["special_tokens"]] == ["'inner'", "'bos'"]


def test_file_with_the_tokenizer_and_its_shard_agree(case):
    base, folder, _ = case
    of_file = inspect_group_files([str(base / "in.jsonl")], load_tokenizer(folder))
    of_shard = inspect_shards([str(base / "train")])
    same = ["unit", "groups", "responses", "prompt_length", "response_length", "by_source", "zero_variance_groups"]
    assert {name: of_file[name] for name in same} == {name: of_shard[name] for name in same}
    assert of_file["problems"]["duplicate_response"] == 1  # as text; in the shard the cut-off one differs by its EOS


def test_file_without_tokenizer_is_measured_in_characters_and_bad_rows_are_counted(case, tmp_path):
    base, _, records = case
    lines = (base / "in.jsonl").read_bytes()
    (tmp_path / "bad.jsonl").write_bytes(b"nope\n" + lines + lines.splitlines()[0] + b"\n" + b'{"id": 1}\n')
    report = inspect_group_files([str(tmp_path / "bad.jsonl")])
    assert report["unit"] == "characters" and report["groups"] == 23
    assert report["prompt_length"]["max"] == max(len(record.prompt) for record in records)
    assert report["problems"]["invalid_json"] == 1 and report["problems"]["missing_field"] == 1
    assert report["problems"]["duplicate_id"] == 1
    assert report["examples"]["invalid_json"][0].startswith(f"{tmp_path}/bad.jsonl:1: invalid_json")
    assert "Problems" in report_text(report) and "duplicate_id" in report_text(report)


def test_a_file_without_any_group(tmp_path):
    (tmp_path / "bad.jsonl").write_bytes(b"nope\n")
    report = inspect_group_files([str(tmp_path / "bad.jsonl")], None, PackingQuestion(100))
    assert report["groups"] == 0 and report["problems"] == {"invalid_json": 1}
    assert "invalid_json" in report_text(report) and "<svg" not in html_page(report)


def test_packing_is_that_of_the_planner(case):
    base, _, _ = case
    report = inspect_shards([str(base / "train")], PackingQuestion(max_tokens_per_pack=256, groups_per_step=32))
    shard = GroupShard(base / "train")
    lengths = [GroupLengths(p, tuple(r)) for p, r in map(shard.lengths, range(len(shard)))]
    for form in ("packed", "shared_prefix"):
        plan = plan_step(lengths, 1, 256, packing=form)
        assert report["packing"]["fill"][form] == pytest.approx(plan.fill, abs=0.08)
    packed = sum(g.prompt + r - 1 for g in lengths for r in g.responses)
    shared = sum(g.prompt + sum(r - 1 for r in g.responses) for g in lengths)
    assert report["packing"]["token_ratio"] == pytest.approx(packed / shared, rel=0.15)
    assert report["packing"]["token_ratio"] > 1.2
    assert inspect_shards([str(base / "train")], PackingQuestion(20))["packing"]["unfit_groups"] == 22


def test_new_judgement_shows(case, tmp_path):
    base, folder, _ = case
    preprocess(PreprocessOptions([str(base / "in.jsonl")], str(folder), str(tmp_path / "t")), progress=False)
    count = GroupShard(tmp_path / "t").manifest.counts.responses
    add_rewards_sidecar(tmp_path / "t", np.ones(count), outcomes=["timeout"] * count, verifier={"name": "x"})
    report = inspect_shards([str(tmp_path / "t")])
    assert report["zero_variance_groups"] == 22 and report["by_source"]["self"]["outcomes"].keys() == {"timeout"}
    assert report["shards"][0]["verifier"] == {"name": "x"}


def test_tokens_add_up_to_the_text(case):
    _, folder, _ = case
    tokenizer = load_tokenizer(folder)
    prompt = tokenizer.encode(tokenizer.render_prompt("what is é + 漢?"))
    ids = [*tokenizer.encode_response("it is 😀 and 漢字\n#### 4"), tokenizer.eos_id]
    views = view_tokens(tokenizer, prompt, ids)
    assert [view.id for view in views] == ids and views[-1].special and views[-1].text == "<|im_end|>"
    assert "".join(view.text for view in views) == "it is 😀 and 漢字\n#### 4<|im_end|>"
    assert "".join(v.text for v in view_tokens(tokenizer, [], prompt)) == tokenizer.decode(prompt)


@pytest.mark.parametrize("source", ["train", "in.jsonl"])
def test_one_group_for_the_terminal(case, tool, capsys, source):
    base, folder, records = case
    command = [str(base / source), "--tokenizer", str(folder), "--group", "0"]
    assert tool([*command, "--color", "never"]) == 0
    plain = capsys.readouterr().out
    assert records[0].prompt in plain.replace("|", "") and "gold answer: " + records[0].answer in plain
    for k, response in enumerate(records[0].responses):
        end = "cut off, no EOS" if response.finish_reason == "length" else "ends with EOS"
        assert re.search(rf"response {k}: {response.source}, reward {response.reward:g} .*{end}", plain)
    assert tool([*command, "--color", "always"]) == 0
    coloured = capsys.readouterr().out
    assert "\033[32m" in coloured and "\033[31m" in coloured and "\033[7m<|im_end|>" in coloured
    assert re.sub(r"\033\[\d+m", "", coloured) == re.sub(r"(?<!<)\|(?!im_|>)", "", plain).replace("||", "|")


class _Page(HTMLParser):
    """Collects tags and text; any script, or reference to another place, is remembered."""

    def __init__(self):
        super().__init__()
        self.tags, self.text, self.outside = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.outside += [value for name, value in attrs if name in ("src", "href")] + [tag] * (tag == "script")

    def handle_data(self, data):
        self.text.append(data)


def test_page_stands_alone_and_escapes_the_data(case, tool, tmp_path):
    base, folder, _ = case
    command = [str(base / "train"), "--tokenizer", str(folder), "--max-tokens-per-pack", "300"]
    assert tool([*command, "--html", str(tmp_path / "r.html"), "--group", "20", "--group", "1"]) == 0
    page = _Page()
    page.feed((tmp_path / "r.html").read_text(encoding="utf-8"))
    text = "".join(page.text)
    assert page.outside == [] and page.tags.count("svg") == 6 and page.tags.count("script") == 0
    assert "<script>alert(1)</script>" in text and "same <b>&text</b> é" in text
    assert "shared prefix: fewer tokens" in text and "id odd" in text and "id q1" in text


def test_json_and_verify_and_exit_codes(case, tool, capsys, tmp_path):
    base, folder, _ = case
    assert tool([str(base / "train"), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["groups"] == 22
    assert tool([str(base / "tra*"), "--verify"]) == 0
    assert "every byte is as written" in capsys.readouterr().out
    for path in base.glob("train*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content = bytearray((tmp_path / "train.bin").read_bytes())
    content[100] ^= 1
    (tmp_path / "train.bin").write_bytes(content)
    assert tool([str(tmp_path / "train")]) == 0  # sizes agree, so it opens
    assert tool([str(tmp_path / "train"), "--verify"]) == 2
    assert "train.bin: content differs" in capsys.readouterr().err
    bad = [
        ([str(base / "train"), "--group", "0"], "needs --tokenizer"),
        ([str(base / "train"), "--group", "22", "--tokenizer", str(folder)], "there are groups 0 to 21"),
        ([str(base / "in.jsonl"), "--group", "22", "--tokenizer", str(folder)], "there are groups 0 to 21"),
        ([str(base / "in.jsonl"), "--verify"], "no manifest"),
        ([str(base / "in.jsonl"), str(base / "train")], "at once"),
        ([str(base / "absent")], "no such group shard"),
        ([str(base / "train"), "--max-tokens-per-pack", "0"], "at least 1"),
    ]
    for command, message in bad:
        assert tool(command) == 2
        assert message in capsys.readouterr().err


def test_another_tokenizer_is_refused(case, tmp_path):
    base, _, _ = case
    other = byte_level_folder(tmp_path / "other", vocab_size=300)
    write_group_file(tmp_path / "a.jsonl", random_records(2))
    preprocess(PreprocessOptions([str(tmp_path / "a.jsonl")], str(other), str(tmp_path / "a")), progress=False)
    with pytest.raises(InputError, match="of different tokenizers"):
        inspect_shards([str(base / "train"), str(tmp_path / "a")])
    with pytest.raises(InputError, match="made with another tokenizer"):
        open_source([str(base / "train")], str(other), None).group(0)


def test_group_text_marks_boundaries_without_colour(case):
    base, folder, _ = case
    view = open_source([str(base / "train")], str(folder), None).group(0)
    assert "|" in group_text(view, colour=False) and "\033" not in group_text(view, colour=False)
