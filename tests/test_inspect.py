"""Inspection: numbers agree with the data, groups are shown as they are, the page stands alone and escapes text."""

from __future__ import annotations

import glob
import io
import json
import math
import re
import shutil
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from group_files import random_records
from group_shards import write_shard
from tiny_tokenizers import byte_level_folder

from megatron_gft.errors import InputError
from megatron_gft.groups import GroupRecord, ResponseRecord, iter_group_file, write_group_file
from megatron_gft.groups.problems import parse_policies
from megatron_gft.inspection.inputs import open_source
from megatron_gft.inspection.output import html_page, report_text
from megatron_gft.inspection.statistics import _summary, estimate_packing
from megatron_gft.inspection.views import view_tokens
from megatron_gft.planning import DEFAULT_FLOP_MODEL
from megatron_gft.preprocess.run import PreprocessOptions, preprocess
from megatron_gft.shards import GroupShard, GroupShardWriter
from megatron_gft.shards.manifest import ShardSet, write_manifest
from megatron_gft.tokenizer import load_tokenizer


def report_of(*inputs, tokenizer=None, packing=()):
    """Report on shards or group files; ``packing`` = (max_tokens_per_pack, groups_per_step)."""
    return open_source(list(map(str, inputs)), tokenizer and str(tokenizer)).report(*packing)


def write_both(base, records, tokenizer, name="train"):
    """Groups as a file (``in.jsonl``) and as the shard that preprocessing makes of it."""
    write_group_file(base / "in.jsonl", records)
    preprocess(PreprocessOptions([str(base / "in.jsonl")], str(tokenizer), str(base / name)), progress=False)


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
    write_both(base, records, folder)
    return base, folder, records


@pytest.fixture(scope="module")
def generated(tmp_path_factory, case):
    """Groups as generation writes them, with ids and log-probs, as a file and as a shard; the log-probs by response."""
    base, (_, folder, _) = tmp_path_factory.mktemp("generated"), case
    tokenizer = load_tokenizer(folder)
    known, records = [], []
    for g, texts in enumerate((["one", "two \ufffd \ufffd"], ["three four", "\ufffd", ""])):
        responses = []
        for k, text in enumerate(texts):
            ids = tokenizer.encode("漢")[:1] if text == "\ufffd" else tokenizer.encode_response(text)
            cut_off = k == 1
            ids = ids if cut_off else [*ids, tokenizer.eos_id] if text else [tokenizer.eos_id]
            known.append(
                [-(100 * g + 10 * k + i + 1) / 1000 - 3 * (i % 3 == 2) for i in range(len(ids))]
            )  # p > tau or not
            reward, outcome = ((1.0, "correct"), (0.0, "wrong"), (0.0, "unparsed"))[k]
            response = ResponseRecord(text, "self", reward, outcome, "length" if cut_off else "stop")
            response.tokenizer, response.token_ids, response.logprobs = tokenizer.fingerprint, ids, known[-1]
            responses.append(response)
        records.append(GroupRecord(f"made{g}", "how\tmany?", responses, "7"))
    write_both(base, records, folder)
    return base, folder, known


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "tools"))
    import inspect_groups

    return inspect_groups.main


def test_report_of_a_shard_has_the_right_numbers(case):
    base, _, records = case
    report = report_of(base / "train")
    responses = [response for record in records for response in record.responses]
    shard = GroupShard(base / "train")
    assert report["groups"] == 22 and report["responses"] == len(responses)
    assert report["total_response_length"] == shard.manifest.counts.response_tokens
    assert report["response_length"]["max"] == shard.manifest.counts.max_response_tokens
    assert report["prompt_length"]["mean"] == pytest.approx(shard.table().prompt_lengths.mean())
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
    write_both(tmp_path, [record], folder, "a")
    report = report_of(base / "train", tmp_path / "a")
    assert report["problems"]["duplicate_response"] == 1 and report["problems"]["duplicate_id"] == 1
    assert "special_tokens" not in report["problems"]
    with GroupShardWriter(tmp_path / "b", GroupShard(tmp_path / "a").manifest.tokenizer) as writer:
        writer.add_group([5], [[6, eos, 7, eos], [6, eos]], ["self", "self"], [0.0, 1.0], group_id="inner")
        writer.add_group([5, eos, 5], [[6, eos]], ["self"], [0.0], group_id="prompt may have them")
        writer.add_group([5], [[0, 6, eos]], ["self"], [0.0], group_id="bos")
    found = report_of(tmp_path / "b")
    assert found["zero_variance_groups"] == 0  # one response alone has nothing to be equal to
    assert found["problems"]["special_tokens"] == 2
    assert [line.split("id ")[1] for line in found["examples"]["special_tokens"]] == ["'inner'", "'bos'"]


def test_file_with_the_tokenizer_and_its_shard_agree(case):
    base, folder, _ = case
    of_file = report_of(base / "in.jsonl", tokenizer=folder)
    of_shard = report_of(base / "train")
    same = ["unit", "groups", "responses", "prompt_length", "response_length", "by_source", "zero_variance_groups"]
    assert {name: of_file[name] for name in same} == {name: of_shard[name] for name in same}
    assert of_file["problems"]["duplicate_response"] == 1  # as text; in the shard the cut-off one differs by its EOS


def test_file_without_tokenizer_is_measured_in_characters_and_bad_rows_are_counted(case, tmp_path):
    base, _, records = case
    lines = (base / "in.jsonl").read_bytes()
    (tmp_path / "bad.jsonl").write_bytes(b"nope\n" + lines + lines.splitlines()[0] + b"\n" + b'{"id": 1}\n')
    report = report_of(tmp_path / "bad.jsonl")
    assert report["unit"] == "characters" and report["groups"] == 23
    assert report["prompt_length"]["max"] == max(len(record.prompt) for record in records)
    assert report["problems"]["invalid_json"] == 1 and report["problems"]["missing_field"] == 1
    assert report["problems"]["duplicate_id"] == 1
    assert report["examples"]["invalid_json"][0].startswith(f"{tmp_path}/bad.jsonl:1: invalid_json")
    assert "Problems" in report_text(report) and "duplicate_id" in report_text(report)


def test_a_file_without_any_group(tmp_path):
    (tmp_path / "bad.jsonl").write_bytes(b"nope\n")
    report = report_of(tmp_path / "bad.jsonl", packing=(100,))
    assert report["groups"] == 0 and report["problems"] == {"invalid_json": 1}
    assert "invalid_json" in report_text(report) and "<svg" not in html_page(report)


@pytest.mark.parametrize("groups_per_step, steps", [(32, 1), (8, 3)])
def test_packing_of_groups_that_fill_one_pack_a_step(case, groups_per_step, steps):
    base, _, _ = case
    limit = 100_000
    packing = report_of(base / "train", packing=(limit, groups_per_step))["packing"]
    shard = GroupShard(base / "train")
    groups = [shard[i] for i in range(len(shard))]
    lengths = [(len(group.prompt), [len(r) for r in group.responses]) for group in groups]
    packed = sum(prompt + r - 1 for prompt, responses in lengths for r in responses)
    shared = sum(prompt + sum(r - 1 for r in responses) for prompt, responses in lengths)
    assert packing["fill"] == pytest.approx({"packed": packed / limit / steps, "shared_prefix": shared / limit / steps})
    assert packing["token_ratio"] == pytest.approx(packed / shared) and packed > 1.2 * shared
    assert packing["sampled_groups"] == 22 and packing["unfit_groups"] == 0

    def flops(rows: int, before: int = 0, loss_rows: int = 0) -> float:
        return DEFAULT_FLOP_MODEL.flops(rows, DEFAULT_FLOP_MODEL.pairs(rows, before), loss_rows)

    packed_flops = sum(flops(prompt + r - 1, 0, r) for prompt, responses in lengths for r in responses)
    shared_flops = sum(flops(p) + sum(flops(r - 1, p, r) for r in responses) for p, responses in lengths)
    assert packing["flop_ratio"] == pytest.approx(packed_flops / shared_flops, rel=1e-9)


def test_groups_that_fit_no_pack_are_counted_among_all_not_in_the_sample():
    prompts, counts = np.full(6000, 5, np.int32), np.tile([1, 2], 3000)
    lengths = np.full(counts.sum(), 6, np.int32)
    lengths[[4999, 8999]] = 997  # 5 + 997 - 1 rows
    estimate = estimate_packing(prompts, counts, lengths, 1000)
    assert estimate["unfit_groups"] == 2 and estimate["sampled_groups"] == 2048
    assert estimate_packing(prompts, counts, lengths, 1001)["unfit_groups"] == 0
    nothing = estimate_packing(prompts, counts, lengths, 9)
    assert nothing["unfit_groups"] == 6000 and nothing["token_ratio"] is None


def test_generated_file_without_tokenizer_has_no_problem_of_its_token_ids(generated):
    base, folder, known = generated
    report = report_of(base / "in.jsonl")
    assert set(report["problems"]) == {"no_expert", "truncated"}
    assert report["responses"] == len(known) == 5 and report["by_source"]["self"]["truncated"] == 2
    assert report["total_response_length"] == len("one.") + len("two ? ?") + len("three four.") + 1 + 1
    with_tokenizer = report_of(base / "in.jsonl", tokenizer=folder)
    assert with_tokenizer["problems"] == report["problems"]
    assert with_tokenizer["total_response_length"] == sum(map(len, known))


@pytest.mark.parametrize("reward", [0.0, 1e15, 1e17, -3e38])
def test_rewards_all_equal_make_a_histogram(tmp_path, reward):
    responses = [ResponseRecord("a", "expert", reward), ResponseRecord("b", "self", reward)]
    write_group_file(tmp_path / "a.jsonl", [GroupRecord("1", "p", responses)])
    report = report_of(tmp_path / "a.jsonl")
    assert sum(report["rewards"]["histogram"]["counts"]) == 2 and "<svg" in html_page(report)


def test_the_judgement_shows(case, tmp_path):
    base, folder, _ = case
    records = [record for record, _ in iter_group_file(base / "in.jsonl")]
    for record in records:
        record.meta["verifier"] = {"name": "x"}
        for response in record.responses:
            response.reward, response.outcome = 1.0, "timeout"
    write_both(tmp_path, records, folder, "t")
    report = report_of(tmp_path / "t")
    assert report["zero_variance_groups"] == 22 and report["by_source"]["self"]["outcomes"].keys() == {"timeout"}
    assert report["shards"][0]["verifier"] == {"group_files": [{"verifier": {"name": "x"}, "groups": 22}]}


def test_tokens_add_up_to_the_text(case):
    _, folder, _ = case
    tokenizer = load_tokenizer(folder)
    prompt = tokenizer.encode(tokenizer.render_prompt("what is é + 漢?"))
    ids = [*tokenizer.encode_response("it is 😀 and 漢字\n#### 4"), tokenizer.eos_id]
    views = view_tokens(tokenizer, prompt, ids)
    assert [view.id for view in views] == ids and views[-1].special and views[-1].text == "<|im_end|>"
    assert "".join(view.text for view in views) == "it is 😀 and 漢字\n#### 4<|im_end|>"
    assert "".join(v.text for v in view_tokens(tokenizer, [], prompt)) == tokenizer.decode(prompt)


@pytest.mark.parametrize(
    "text", ["a\ufffd", "\ufffd", "\ufffdb", "a\ufffd\ufffdb \ufffd", "\ufffd" * 20, "é\ufffd漢", ""]
)
@pytest.mark.parametrize("ends", [True, False])
def test_a_literal_replacement_character_is_shown(case, text, ends):
    tokenizer = load_tokenizer(case[1])
    prompt = tokenizer.encode("what is \ufffd")
    views = view_tokens(tokenizer, prompt, [*tokenizer.encode_response(text), *([tokenizer.eos_id] if ends else [])])
    assert "".join(view.text for view in views) == text + ("<|im_end|>" if ends else "")
    assert not ends or views[-1].text == "<|im_end|>"
    cut_short = view_tokens(tokenizer, prompt, tokenizer.encode_response("漢")[:1])
    assert "".join(view.text for view in cut_short) == "\ufffd"


@pytest.mark.parametrize("source", ["train", "in.jsonl"])
def test_one_group_for_the_terminal(case, tool, capsys, source):
    base, folder, records = case
    command = [str(base / source), "--tokenizer", str(folder), "--group", "0"]
    assert tool([*command, "--color", "never"]) == 0
    plain = capsys.readouterr().out
    assert "|" in plain and "\033" not in plain
    assert records[0].prompt in plain.replace("|", "") and "gold answer: " + records[0].answer in plain
    for k, response in enumerate(records[0].responses):
        end = "cut off, no EOS" if response.finish_reason == "length" else "ends with EOS"
        judged = rf"reward {response.reward:g} \({response.outcome}\)"
        assert re.search(rf"response {k}: {response.source}, {judged}, .*{end}", plain)
    assert tool([*command, "--color", "always"]) == 0
    coloured = capsys.readouterr().out
    blocks = coloured.split("\033[1mresponse ")[1:]
    assert re.search(r"\033\[(4;)?7;\d+m<\|im_end\|>", coloured) and len(blocks) == len(records[0].responses)
    green, red, grey = "32m", "31m", "90m"
    for block, response in zip(blocks, records[0].responses, strict=True):
        assert {c for c in (green, red, grey) if c in block} == {green if response.reward else red}
    assert re.sub(r"\033\[[\d;]+m", "", coloured) == re.sub(r"(?<!<)\|(?!im_|>)", "", plain).replace("||", "|")


def test_a_group_says_what_was_left_out_of_it(case, tool, capsys, tmp_path):
    _, folder, _ = case
    records = random_records(2)
    records[1].responses.append(ResponseRecord("", "self", 0.0))
    name, prefix = str(tmp_path / "in.jsonl"), str(tmp_path / "train")
    write_group_file(name, records)
    options = PreprocessOptions([name], str(folder), prefix, policies=parse_policies(["empty_response=drop"]))
    preprocess(options, progress=False)
    for source in (name, prefix):
        views = open_source([source], str(folder)).groups([0, 1])
        assert [view.title.partition("id ")[2][:37] for view in views] == [
            "q0",
            "q1; drop: response 4 empty_response: ",
        ]
        assert [len(view.responses) for view in views] == [4, 4]
    report = tmp_path / "train.report.ndjson"
    report.write_text('{"id": "q1"}\n')
    assert tool([prefix, "--tokenizer", str(folder), "--group", "1"]) == 2
    assert "train.report.ndjson: cannot be read" in capsys.readouterr().err
    report.unlink()  # what is not known is not said
    assert tool([prefix, "--tokenizer", str(folder), "--group", "1"]) == 0


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


@pytest.mark.parametrize("source", ["train", "in.jsonl"])
def test_log_probs_outcomes_and_roles_are_those_of_their_response(generated, tool, tmp_path, source):
    base, folder, known = generated
    out = [str(tmp_path / "new" / name) for name in ("r.html", "r.json")]
    command = [str(base / source), "--tokenizer", str(folder), "--group", "1", "--group", "0"]
    assert tool([*command, "--html", out[0], "--json", out[1]]) == 0
    views = json.loads(Path(out[1]).read_text(encoding="utf-8"))["views"]
    responses = [response for view in (views[1], views[0]) for response in view["responses"]]
    assert [[round(t["logprob"], 6) for t in r["tokens"]] for r in responses] == known
    assert [r["outcome"] for r in responses] == ["correct", "wrong", "correct", "wrong", "unparsed"]
    assert [r["advantage"] > 0 for r in responses] == [True, False, True, False, False]
    page = Path(out[0]).read_text(encoding="utf-8")
    assert page.index("id made1") < page.index("id made0")
    shown = re.findall(r'class="(plus|minus)[^"]*" style="[^"]*" title="id \d+, log-prob (-\S+), A\*u\*c (\S+)"', page)
    advantages = [response["advantage"] for response in responses]
    expected = [
        (
            "plus" if advantage > 0 else "minus",
            f"{p:.3f}",
            f"{advantage * (1 if p > math.log(0.1) else math.exp(p)):+.3f}",
        )
        for advantage, row in zip(advantages, known, strict=True)
        for p in row
    ]
    assert sorted(shown) == sorted(expected)


def test_json_goes_to_stdout(case, tool, capsys):
    assert tool([str(case[0] / "train"), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["groups"] == 22


@pytest.mark.parametrize(
    "command, message",
    [
        ("{}/train --group 0", "needs --tokenizer"),
        ("{}/in.jsonl --group 0", "needs --tokenizer"),
        ("{}/train --tokenizer {}/hf --group 22", "there are groups 0 to 21"),
        ("{}/in.jsonl --tokenizer {}/hf --group 22", "there are groups 0 to 21"),
        ("{}/in.jsonl --verify", "no manifest"),
        ("{}/in.jsonl {}/train", "at once"),
        ("{}/absent", "no such group shard"),
    ],
)
def test_bad_command_lines_are_refused(case, tool, capsys, command, message):
    assert tool(command.replace("{}", str(case[0])).split()) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--group=-1", "--max-tokens-per-pack=0"])
def test_numbers_without_meaning_are_refused(tool, capsys, option):
    with pytest.raises(SystemExit) as ended:
        tool(["in.jsonl", option])
    assert ended.value.code == 2 and f"{option.partition('=')[2]!r} -> an integer from" in capsys.readouterr().err


@pytest.mark.parametrize(
    "output, message",
    [
        ("--html {}/in.jsonl/x.html", "in.jsonl (Not a directory)"),
        ("--html {}", "exists and is no file"),
        ("--json {}", "exists and is no file"),
        ("--html -", "needs a file"),
    ],
)
def test_outputs_are_checked_before_the_work(case, tool, capsys, monkeypatch, output, message):
    monkeypatch.setattr("megatron_gft.inspection.inputs.open_source", lambda *_: pytest.fail("too late"))
    assert tool([str(case[0] / "train"), *output.replace("{}", str(case[0])).split()]) == 2
    assert message in capsys.readouterr().err


def test_verify_names_every_damage_and_leaves_stdout_to_the_json(case, tool, capsys, tmp_path):
    base, _, _ = case
    assert tool([str(base / "tra*"), "--verify"]) == 0
    assert "every byte is as written" in capsys.readouterr().out
    assert tool([str(base / "train"), "--verify", "--json", "-"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["groups"] == 22 and "every byte is as written" in captured.err
    for i in range(3):
        write_shard(tmp_path / f"s-{i}", groups=3, seed=i, shard_set=ShardSet(id="s", index=i, count=4))
    _flip(tmp_path / "s-0.bin", 8, 0x01)
    assert tool([str(tmp_path / "s-0")]) == 0  # another token: only hashing tells
    assert "missing number 1, 2, 3" in capsys.readouterr().out
    (tmp_path / "s-1.meta.bin").write_bytes(b"")
    assert tool([str(tmp_path / "s-*"), "--verify"]) == 2
    error = capsys.readouterr().err
    assert "s-0.bin: content differs" in error and "s-1.meta.bin: 0 bytes" in error and "missing number 3" in error


def copy_shard(base: Path, target: Path) -> None:
    for path in base.glob("train*"):
        (target / path.name).write_bytes(path.read_bytes())


def _flip(path: Path, position: int, bits: int = 0xC0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= bits
    path.write_bytes(content)


@pytest.mark.parametrize(
    "suffix, position, options, message",
    [
        (".bin", 3, ["--group", "0"], "train.bin: content differs"),  # a negative token
        (".meta.bin", 3, ["--group", "0"], "--verify"),
        (".meta.bin", 3, [], "--verify"),
        (".idx", 48, [], "--verify"),
    ],
)
def test_damage_is_named_when_it_is_run_into(case, tool, capsys, tmp_path, suffix, position, options, message):
    base, folder, _ = case
    copy_shard(base, tmp_path)
    _flip(tmp_path / f"train{suffix}", position)
    assert tool([str(tmp_path / "train"), "--tokenizer", str(folder), *options]) == 2
    assert message in capsys.readouterr().err


def test_a_bug_of_ours_is_not_called_damage(case, monkeypatch):
    monkeypatch.setattr("megatron_gft.inspection.inputs.Statistics", lambda *_: {}["bug"])
    with pytest.raises(KeyError, match="bug"):
        open_source([str(case[0] / "train")]).report()


def test_group_numbers_count_what_the_report_counts(case, tool, capsys, tmp_path):
    base, folder, _ = case
    lines = (base / "in.jsonl").read_text(encoding="utf-8").splitlines()
    name = str(tmp_path / "blank.jsonl")
    Path(name).write_text("\n".join(["", lines[0], "", "not json", *lines[1:]]) + "\n", encoding="utf-8")
    drop = parse_policies(["invalid_json=drop"])
    options = PreprocessOptions([name], str(folder), str(tmp_path / "train"), policies=drop)
    preprocess(options, progress=False)
    assert report_of(name)["groups"] == report_of(tmp_path / "train")["groups"] == 22
    of_file, of_shard = (open_source([source], str(folder)) for source in (name, str(tmp_path / "train")))
    for view, twin in zip(of_file.groups([21, 0, 1]), of_shard.groups([21, 0, 1]), strict=True):
        assert (view.prompt, view.responses) == (twin.prompt, twin.responses)
    assert of_file.groups([1])[0].title == f"{name}:5 group 1, id q1"
    second = str(tmp_path / "second.jsonl")
    write_group_file(second, random_records(1))
    titles = [view.title for view in open_source([name, second], str(folder)).groups([22, 1])]
    assert titles == [f"{second}:1 group 22, id q0", f"{name}:5 group 1, id q1"]
    Path(name).write_text("\nnot json\n")
    assert tool([name, "--tokenizer", str(folder), "--group", "0"]) == 2
    assert "--group 0: there is no usable group" in capsys.readouterr().err


def test_text_of_models_does_not_steer_the_terminal(case, tool, capsys, tmp_path, monkeypatch):
    _, folder, _ = case
    responses = [ResponseRecord("\x1b[31mred\x9b2J\r\n\tnext 漢", "self", 1.0, "bad\x1b[2J")]
    name = str(tmp_path / "a.jsonl")
    write_group_file(name, [GroupRecord("\x1b]0;title\x07", "\x1b[2Jp", responses, "\x1b[0m")])
    command = [name, "--tokenizer", str(folder)]
    assert tool([*command, "--group", "0", "--color", "never"]) == 0 and tool(command) == 0
    shown = capsys.readouterr().out
    assert {c for c in shown if ord(c) < 32 or 127 <= ord(c) < 160} == {"\n", "\t"}
    plain = shown.replace("|", "")
    for spelled in ("\\x1b[31mred\\x9b2J\\x0d\n\tnext 漢", "\\x1b]0;title\\x07", "(bad\\x1b[2J)", "answer: \\x1b[0m"):
        assert spelled in plain
    assert "bad\\x1b[2J 1" in plain  # an outcome, in the table of sources
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    assert tool([*command, "--group", "0"]) == 0
    ascii_only.flush()
    assert b"\\u6f22" in ascii_only.buffer.getvalue()


@pytest.mark.parametrize("colour", [True, False])
def test_a_narrow_terminal_folds_the_report_and_loses_nothing(tmp_path, colour):
    """What looks like markup or an emoji's name is text; wide characters take two columns."""
    outcome = "[bold]x[/bold]:smile:" + "漢" * 40 + "end"
    write_group_file(tmp_path / "a.jsonl", [GroupRecord("1", "p", [ResponseRecord("a", "self", 1.0, outcome)])])
    report = report_of(tmp_path / "a.jsonl")
    wide = report_text(report)
    assert f"{outcome} 1" in wide and "\033" not in wide
    shown = report_text(report, colour, columns=70)
    assert ("\033[1m" in shown) == colour
    lines = re.sub(r"\033\[[\d;]+m", "", shown).splitlines()
    assert max(sum(1 + (c == "漢") for c in line) for line in lines) <= 70
    assert sorted("".join("".join(lines).split())) == sorted("".join(wide.split()))


def test_any_file_of_a_shard_stands_for_it(case, tool, capsys, tmp_path):
    base, _, _ = case
    copy_shard(base, tmp_path)
    expanded = sorted(glob.glob(str(tmp_path / "train*")))  # as a shell does; with the report of preprocessing
    assert len(expanded) > 6
    for inputs in (expanded, *([name] for name in expanded if ".report." not in name)):
        assert tool([*inputs, "--json", "-"]) == 0
        assert json.loads(capsys.readouterr().out)["inputs"] == [str(tmp_path / "train")]
    assert tool([name for name in expanded if ".report." in name]) == 2
    assert "no such group shard" in capsys.readouterr().err
    (tmp_path / "train.json").unlink()
    assert tool([str(tmp_path / "train.bin")]) == 2
    assert "no manifest of a shard is beside it" in capsys.readouterr().err
    (tmp_path / "lines.json").write_bytes((base / "in.jsonl").read_bytes())
    for name in ("lines.json", "line*.json"):
        assert open_source([str(tmp_path / name)]).report()["groups"] == 22


def test_another_tokenizer_is_refused(case, tmp_path):
    base, _, _ = case
    other = byte_level_folder(tmp_path / "other", vocab_size=300)
    write_both(tmp_path, random_records(2), other, "a")
    with pytest.raises(InputError, match="of different tokenizers"):
        report_of(base / "train", tmp_path / "a")
    with pytest.raises(InputError, match="made with another tokenizer"):
        open_source([str(base / "train")], str(other)).groups([0])


def test_page_opens_with_three_whole_groups_and_counts_on_the_axes(case, tool, tmp_path):
    base, folder, records = case
    for source in ("train", "in.jsonl"):
        assert tool([str(base / source), "--tokenizer", str(folder), "--html", str(tmp_path / "r.html")]) == 0
        text = (tmp_path / "r.html").read_text(encoding="utf-8")
        groups, rest = text.split("<h2>Distributions</h2>")
        assert re.findall(r"<h2>.* group (\d+), id (\S+)</h2>", groups) == [(str(g), f"q{g}") for g in range(3)]
        page = _Page()
        page.feed(groups)
        for record in records[:3]:
            assert record.prompt in "".join(page.text)
            for response in record.responses:
                assert response.text in "".join(page.text)
                assert re.search(
                    f"{response.source}, reward {response.reward:g} .{response.outcome}.", "".join(page.text)
                )
        sizes = Counter(len(record.responses) for record in records)
        if source == "train":  # a file keeps responses that are the same
            assert f">{max(sizes.values())}</text>" in rest
        assert rest.count(">tokens</text>") == 4 and rest.count(">groups</text>") == 2  # axes of lengths; of counts


def test_page_of_a_file_without_tokenizer_shows_whole_texts(case, tool, tmp_path):
    base, _, records = case
    write_group_file(tmp_path / "in.jsonl", records[-2:])
    assert tool([str(tmp_path / "in.jsonl"), "--html", str(tmp_path / "r.html")]) == 0
    page = _Page()
    page.feed((tmp_path / "r.html").read_text(encoding="utf-8"))
    text = "".join(page.text)
    assert page.outside == [] and "script" not in page.tags and "<script>alert(1)</script>" in text
    assert "same <b>&text</b> é" in text and page.tags.count("span") == 2 + sum(len(r.responses) for r in records[-2:])
    assert f"{len('no expert here')} characters" in text


def test_log_probs_of_another_name_than_sampled_colour_the_page(generated, tmp_path):
    base, folder, known = generated
    manifest = GroupShard(base / "train").manifest
    name = manifest.logprob_files["sampled"]
    for path in base.glob("train.*"):
        shutil.copy(path, tmp_path / path.name)
    write_manifest(tmp_path / "train", manifest.model_copy(update={"logprobs": {"base": name}}))
    source = open_source([str(tmp_path / "train")], str(folder))
    views = source.first(3)
    assert [view.logprobs for view in views] == ["base", "base"] and "(base)" in html_page(source.report(), views)
    assert [[round(t.logprob, 6) for t in r.tokens] for view in views for r in view.responses] == known


def test_bars_of_whole_numbers_stand_at_them_and_others_between_edges():
    whole = _summary(np.array([3, 5, 5]))["histogram"]
    assert whole == {"edges": [2.5, 3.5, 4.5, 5.5], "counts": [1, 0, 2]}
    assert len(_summary(np.array([0.0, 0.5, 1.0]))["histogram"]["counts"]) == 24
    assert len(_summary(np.arange(1000))["histogram"]["counts"]) == 24
