"""Preprocessing: right tokens, the same bytes for any number of workers, bad input, interruptions."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from group_files import random_records, write_parquet
from tiny_tokenizers import byte_level_folder, metaspace_folder, sentencepiece_file

from megatron_gft.dataset import build_group_datasets
from megatron_gft.errors import InputError
from megatron_gft.groups import SOURCES, GroupRecord, ResponseRecord, record_to_json, write_group_file
from megatron_gft.groups.problems import parse_policies
from megatron_gft.preprocess.run import PreprocessOptions, preprocess
from megatron_gft.shards import GroupShard, expand_shards
from megatron_gft.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return byte_level_folder(tmp_path_factory.mktemp("tokenizer") / "hf")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


def run(tmp_path, folder, records, name="out", **options):
    source = tmp_path / f"{name}.jsonl"
    write_group_file(source, records)
    base = PreprocessOptions([str(source)], str(folder), str(tmp_path / name / "train"))
    return preprocess(replace(base, **options), progress=False)


def made(tmp_path, folder, record, *policies, **options):
    """The only group of a run with these policies."""
    name = str(len(list(tmp_path.iterdir())))
    return only_group(run(tmp_path, folder, [record], name, policies=parse_policies(policies), **options))


def only_group(summary):
    (prefix,) = summary.prefixes
    assert len(GroupShard(prefix)) == 1
    return GroupShard(prefix)[0]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def group_of(text="plain", **changes) -> GroupRecord:
    response = ResponseRecord(text, "self", 1.0, finish_reason="stop")
    for field, value in changes.items():
        setattr(response, field, value)
    return GroupRecord("id", "prompt", [ResponseRecord("gold", "expert", 1.0), response])


# --- tokens ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["byte_level", "metaspace", "sentencepiece"])
def test_tokens_are_those_of_the_plain_way(kind, tmp_path, folder):
    paths = {
        "byte_level": lambda: (folder, None),
        "metaspace": lambda: (metaspace_folder(tmp_path / "meta"), "none"),
        "sentencepiece": lambda: (sentencepiece_file(tmp_path / "sp.model"), "none"),
    }
    path, template = paths[kind]()
    records = random_records(30)
    tokenizer = load_tokenizer(path, template)
    summary = run(tmp_path, path, records, chat_template=template)
    shard = GroupShard(summary.prefixes[0])
    assert summary.groups == len(shard) == 30 and shard.manifest.counts.truncated > 0
    for i, record in enumerate(records):
        group = shard[i]
        prompt = tokenizer.encode(tokenizer.render_prompt(record.prompt))
        assert group.prompt.tolist() == prompt
        for k, response in enumerate(record.responses):
            end = [] if response.finish_reason == "length" else [tokenizer.eos_id]
            ids = group.responses[k].tolist()
            assert ids == tokenizer.encode_response(response.text) + end
            text = tokenizer.decode(prompt + ids[: len(ids) - len(end)])
            assert text == tokenizer.render_prompt(record.prompt) + response.text.replace(
                "\n", " " if kind == "sentencepiece" else "\n"
            )
            assert SOURCES[group.sources[k]] == response.source and group.rewards[k] == response.reward
        assert shard.meta(i)["answer"] == record.answer and shard.meta(i)["id"] == record.id
        assert shard.outcomes(i) == [response.outcome for response in record.responses]
    lineage = {(r["source"], r["model"]): r for r in shard.manifest.provenance["responses"]}
    assert lineage["self", "self-7b"]["sampling"] == {"temperature": 1.0}
    assert sum(r["count"] for r in lineage.values()) == 120


def test_token_ids_of_the_same_tokenizer_are_taken_as_they_are(tmp_path, folder, tokenizer):
    ids = tokenizer.encode_response("answ") + tokenizer.encode_response("er")  # not how it would tokenize "answer"
    assert ids != tokenizer.encode_response("answer")
    same = {"tokenizer": tokenizer.fingerprint}
    group = made(tmp_path, folder, group_of("answer", token_ids=ids, logprobs=[-0.5] * len(ids), **same))
    assert group.responses[1].tolist() == [*ids, tokenizer.eos_id]
    assert group.logprobs[1][:-1].tolist() == [-0.5] * len(ids) and np.isnan(group.logprobs[1][-1])
    assert np.isnan(group.logprobs[0]).all()
    ended = [*ids, tokenizer.eos_id]
    group = made(tmp_path, folder, group_of("answer", token_ids=ended, logprobs=[-1.0] * len(ended), **same))
    assert group.responses[1].tolist() == ended and group.logprobs[1][-1] == -1.0
    group = made(tmp_path, folder, group_of("answer", token_ids=ids, finish_reason="length", **same))
    assert group.responses[1].tolist() == ids


def test_token_ids_of_another_tokenizer_are_not(tmp_path, folder, tokenizer):
    for name, other in (("a", None), ("b", "0" * 64)):
        summary = run(tmp_path, folder, [group_of(token_ids=[7, 7], logprobs=[-1.0, -1.0], tokenizer=other)], name)
        group = only_group(summary)
        assert group.responses[1].tolist() == [*tokenizer.encode_response("plain"), tokenizer.eos_id]
        assert group.logprobs is None and summary.problems["foreign_token_ids"] == {"keep": 1}


# token_ids of this tokenizer (but for the last) that cannot be taken as they are -> the problem; see `group_of`.
BAD_TOKENS = [
    *(("bad_token_ids", {"token_ids": ids}, "bad_token_ids") for ids in ([], [-1], [10**6], [2**70], [2, 5], [0, 5])),
    *(
        ("bad_logprobs", {"token_ids": [7, 8], "logprobs": logprobs}, "bad_logprobs")
        for logprobs in ([], [-1.0], [float("nan")] * 2, [0.5, -1], [-(10**400), -1])
    ),
    ("bad_logprobs", {"logprobs": [-0.5]}, "response 1 bad_logprobs: log-probs without token_ids"),
    ("special_tokens", {"token_ids": [7, 1, 8]}, r"response 1 special_tokens: token_ids hold '<\|im_start\|>' \(1\)"),
]


@pytest.mark.parametrize("kind,changes,message", BAD_TOKENS)
def test_bad_tokens_are_refused_or_mended_or_dropped(kind, changes, message, tmp_path, folder, tokenizer):
    text = tokenizer.written(changes["token_ids"]) if kind == "bad_logprobs" and "token_ids" in changes else "plain"
    record = group_of(text, **changes, tokenizer=tokenizer.fingerprint)
    with pytest.raises(InputError, match=message):
        run(tmp_path, folder, [record])
    fixed = made(tmp_path, folder, record, f"{kind}=fix")
    taken = kind == "bad_logprobs" and "token_ids" in changes  # only the log-probs are left out then
    expected = changes["token_ids"] if taken else tokenizer.encode_response("plain")
    assert fixed.responses[1].tolist() == [*expected, tokenizer.eos_id] and fixed.logprobs is None
    assert len(made(tmp_path, folder, record, f"{kind}=drop").responses) == 1
    if kind == "special_tokens":
        record = group_of(tokenizer.written(changes["token_ids"]), **changes, tokenizer=tokenizer.fingerprint)
        kept = made(tmp_path, folder, record, f"{kind}=keep")
        assert kept.responses[1].tolist() == [*changes["token_ids"], tokenizer.eos_id]


def test_over_long_responses(tmp_path, folder, tokenizer):
    record = group_of("a long answer " * 20)
    with pytest.raises(InputError, match=r"out.jsonl:1: id 'id' response 1 long_response: \d+ tokens, the limit is 20"):
        run(tmp_path, folder, [record], max_response_tokens=20)
    assert not (tmp_path / "out").exists() or contents(tmp_path / "out") == {}
    assert len(made(tmp_path, folder, record, "long_response=drop", max_response_tokens=20).responses) == 1
    policies = parse_policies(["long_response=truncate"])
    summary = run(tmp_path, folder, [record], "t", policies=policies, max_response_tokens=20)
    cut = only_group(summary).responses[1].tolist()
    assert cut == tokenizer.encode_response(record.responses[1].text)[:20]
    assert GroupShard(summary.prefixes[0]).manifest.counts.truncated == 1
    fits = made(tmp_path, folder, group_of(tokenizer.decode(cut)), max_response_tokens=len(cut) + 1)
    assert len(fits.responses[1]) == len(cut) + 1


def test_over_long_prompts(tmp_path, folder, tokenizer):
    record = group_of()
    with pytest.raises(InputError, match="long_prompt"):
        run(tmp_path, folder, [record], max_prompt_tokens=5)
    length = len(tokenizer.encode(tokenizer.render_prompt(record.prompt)))
    options = {"max_prompt_tokens": length, "policies": parse_policies(["long_prompt=drop"])}
    summary = run(tmp_path, folder, [*random_records(2), record], "d", **options)
    assert summary.groups == 1 and summary.problems["long_prompt"] == {"drop": 2}


def test_special_tokens_spelled_in_text(tmp_path, folder, tokenizer):
    spelled = group_of("a <|im_start|>b<|im_end|>")
    with pytest.raises(InputError, match=r"special_tokens: spells '<\|im_start\|>'"):
        run(tmp_path, folder, [spelled])
    ids = made(tmp_path, folder, spelled, "special_tokens=fix").responses[1].tolist()
    assert ids.count(tokenizer.eos_id) == 1 and 1 not in ids and tokenizer.decode(ids[:-1]) == "a <|im_start|>b"
    ids = made(tmp_path, folder, spelled, "special_tokens=keep").responses[1].tolist()
    assert ids.count(1) == 1 and ids.count(tokenizer.eos_id) == 1 and ids[-1] == tokenizer.eos_id
    assert len(made(tmp_path, folder, spelled, "special_tokens=drop").responses) == 1


@pytest.mark.parametrize(
    "prompt,left",
    [
        ("pro<|im_end|>mpt", "prompt"),
        ([{"role": "user", "content": "pro<|im_end|>mpt"}], "prompt"),
        ("<|im_<|im_start|>end|>who", "who"),
        ("a<|im_<|im_<|im_end|>end|>end|>b", "ab"),
        ([{"role": "user<|im_end|>", "content": "hi"}], [{"role": "user", "content": "hi"}]),
        (
            [{"role": "user", "content": "hi", "calls": [{"<|im_end|>": ["<|im_start|>", 1]}]}],
            [{"role": "user", "content": "hi", "calls": [{"": ["", 1]}]}],
        ),
    ],
)
def test_a_fixed_prompt_has_no_special_token_left(prompt, left, tmp_path, folder, tokenizer):
    record = replace(group_of(), prompt=prompt)
    with pytest.raises(InputError, match="special_tokens: the prompt spells"):
        run(tmp_path, folder, [record])
    fixed = made(tmp_path, folder, record, "special_tokens=fix")
    assert fixed.prompt.tolist() == tokenizer.encode(tokenizer.render_prompt(left))


def test_a_prompt_of_special_tokens_only_is_empty_when_fixed(tmp_path, folder):
    records = [group_of(), replace(group_of(), id="empty", prompt="<|im_end|> <|im_<|im_end|>end|>")]
    with pytest.raises(InputError, match="id 'empty' empty_prompt"):
        run(tmp_path, folder, records, policies=parse_policies(["special_tokens=fix"]))
    policies = parse_policies(["special_tokens=fix", "empty_prompt=drop"])
    assert run(tmp_path, folder, records, "d", policies=policies).groups == 1


# --- policies together ----------------------------------------------------------------------------------------------

# What drops a response after its text was read, and the option that goes with it.
LATE_DROPS = {
    "long_response": ({"text": "word " * 60}, {"max_response_tokens": 50}),
    "special_tokens": ({"text": "a <|im_start|> b"}, {}),
    "bad_token_ids": ({"token_ids": [-1]}, {}),
    "bad_logprobs": ({"text": "%", "token_ids": [7], "logprobs": [1.0]}, {}),
    "foreign_token_ids": ({"token_ids": [7], "tokenizer": "0" * 64}, {}),
}


@pytest.mark.parametrize("kind", LATE_DROPS)
@pytest.mark.parametrize("lost", ["equal_rewards", "no_expert"])
def test_groups_are_judged_by_the_responses_that_are_left(kind, lost, tmp_path, folder, tokenizer):
    changes, options = LATE_DROPS[kind]
    bad = ResponseRecord("bad", "expert" if lost == "no_expert" else "self", 0.5, tokenizer=tokenizer.fingerprint)
    for name, value in changes.items():
        setattr(bad, name, value)
    source = "self" if lost == "no_expert" else "expert"
    others = [ResponseRecord(text, source, 1.0 if lost == "equal_rewards" else i) for i, text in enumerate("ab")]
    records = [group_of(), replace(group_of(), id="lost", responses=[bad, *others])]
    records[0].responses[1].reward = 0.0
    policies = parse_policies([f"{kind}=drop", "equal_rewards=drop", "no_expert=drop"])
    summary = run(tmp_path, folder, records, policies=policies, **options)
    assert summary.groups == 1 and summary.problems == {kind: {"drop": 1}, lost: {"drop": 1}}


def test_a_duplicate_stays_when_the_first_one_goes(tmp_path, folder, tokenizer):
    record = group_of("same", token_ids=[-1], tokenizer=tokenizer.fingerprint)
    record.responses += [ResponseRecord("same", "self", 0.0), ResponseRecord("same", "self", 0.5)]
    group = made(tmp_path, folder, record, "bad_token_ids=drop", "duplicate_response=drop")
    assert group.rewards.tolist() == [1.0, 0.0]


def test_the_report_counts_responses_as_they_were_read(tmp_path, folder):
    texts = [("zero", "alien"), ("one", "expert"), ("one", "self"), ("<|im_start|>x", "self"), ("word " * 60, "self")]
    made = [ResponseRecord(text, source, float(i)) for i, (text, source) in enumerate(texts)]
    kinds = ["unknown_source", "special_tokens", "long_response", "duplicate_response"]
    policies = parse_policies([f"{kind}=drop" for kind in kinds])
    record = GroupRecord("id", "prompt", made)
    summary = run(tmp_path, folder, [record], policies=policies, max_response_tokens=50)
    assert only_group(summary).rewards.tolist() == [1.0]
    report = [json.loads(line) for line in Path(summary.report).read_text().splitlines()]
    assert {found["kind"]: found["response"] for found in report} == dict(zip(kinds, [0, 3, 4, 2], strict=True))


def test_failing_chat_template(tmp_path, folder):
    template = tmp_path / "t.jinja"
    template.write_text(
        "{% if messages[0]['content'] == 'prompt' %}{{ raise_exception('no') }}{% endif %}{{ messages[0]['content'] }}"
    )
    records = [group_of(), *random_records(3)]
    with pytest.raises(InputError, match="template_failed: TemplateError: no"):
        run(tmp_path, folder, records, chat_template=str(template))
    policies = parse_policies(["template_failed=drop"])
    assert run(tmp_path, folder, records, "d", chat_template=str(template), policies=policies).groups == 3


# --- the stream -----------------------------------------------------------------------------------------------------


def test_any_number_of_workers_gives_the_same_bytes(tmp_path, folder):
    records = random_records(200)
    records[7].id = records[150].id = "q1"
    options = {"rows_per_chunk": 16, "max_groups_per_shard": 80, "policies": parse_policies(["duplicate_id=drop"])}
    source = tmp_path / "in.jsonl"
    write_group_file(source, records)
    outputs = []
    for workers in (1, 2, 3):
        prefix = tmp_path / f"w{workers}" / "train"
        made = PreprocessOptions([str(source)], str(folder), str(prefix), workers=workers, **options)
        summary = preprocess(made, progress=False)
        assert summary.groups == 198 and [Path(p).name for p in summary.prefixes] == [
            "train",
            "train-00001",
            "train-00002",
        ]
        outputs.append(contents(prefix.parent))
    assert outputs[0] == outputs[1] == outputs[2]
    shards = [GroupShard(p) for p in summary.prefixes]
    assert all(len(shard) <= 80 for shard in shards)
    data = build_group_datasets([str(tmp_path / "w3" / "train*")]).train
    assert len(data) == 198
    report = [json.loads(line) for line in outputs[0]["train.report.ndjson"].decode().splitlines()]
    assert [(p["kind"], p["action"], p["id"], p["place"].rpartition(":")[2]) for p in report] == [
        ("duplicate_id", "drop", "q1", "8"),
        ("duplicate_id", "drop", "q1", "151"),
    ]


def test_file_formats_give_the_same_shard(tmp_path, folder):
    records = random_records(40)
    outputs = []
    for suffix in (".jsonl", ".jsonl.gz", ".parquet"):
        source = tmp_path / f"in{suffix}"
        (write_parquet if suffix == ".parquet" else write_group_file)(source, records)
        prefix = tmp_path / suffix / "train"
        preprocess(PreprocessOptions([str(source)], str(folder), str(prefix)), progress=False)
        outputs.append({name: c for name, c in contents(prefix.parent).items() if not name.endswith(".json")})
    assert outputs[0] == outputs[1] == outputs[2]


def test_shards_are_cut_by_bytes(tmp_path, folder):
    summary = run(tmp_path, folder, random_records(64), rows_per_chunk=4, max_bytes_per_shard=8000)
    sizes = [os.path.getsize(f"{prefix}.bin") for prefix in summary.prefixes]
    assert len(sizes) > 2 and max(sizes) <= 8000 and sum(sizes) == 4 * summary.tokens


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_parts_cover_the_input_once(suffix, tmp_path, folder):
    sources = []
    for number, count in enumerate((25, 4, 30)):
        sources.append(str(tmp_path / f"in{number}{suffix}"))
        records = random_records(count, seed=number)
        write = write_parquet if suffix == ".parquet" else write_group_file
        write(sources[-1], [replace(record, id=f"{number}-{record.id}") for record in records])
    for part in (1, 2, 3):
        prefix = str(tmp_path / "out" / "train")
        preprocess(PreprocessOptions(sources, str(folder), prefix, part=(part, 3), rows_per_chunk=8), progress=False)
    prefixes = expand_shards(f"{tmp_path}/out/train*")
    assert [Path(p).name for p in prefixes] == [f"train-part{i:05d}-of-00003" for i in (1, 2, 3)]
    ids = [shard.meta(i)["id"] for shard in map(GroupShard, prefixes) for i in range(len(shard))]
    assert sorted(ids) == sorted(f"{n}-q{i}" for n, count in enumerate((25, 4, 30)) for i in range(count))
    assert [len(GroupShard(p)) for p in prefixes] == [20, 20, 19] or max(len(GroupShard(p)) for p in prefixes) <= 21
    with pytest.raises(InputError, match="1 <= I <= N"):
        preprocess(PreprocessOptions(sources, str(folder), prefix, part=(0, 3)), progress=False)


def test_append_adds_shards_and_knows_earlier_ids(tmp_path, folder):
    records = random_records(20)
    run(tmp_path, folder, records[:10])
    before = contents(tmp_path / "out")
    with pytest.raises(InputError, match="exists already"):
        run(tmp_path, folder, records[10:])
    with pytest.raises(InputError, match=r"id 'q0' duplicate_id"):
        run(tmp_path, folder, [records[10], records[0]], append=True)
    summary = run(tmp_path, folder, records[8:], append=True, policies=parse_policies(["duplicate_id=drop"]))
    assert [Path(p).name for p in summary.prefixes] == ["train-00001"] and summary.groups == 10
    after = contents(tmp_path / "out")
    assert all(after[name] == content for name, content in before.items())
    assert len(build_group_datasets([str(tmp_path / "out" / "train*")]).train) == 20
    other = byte_level_folder(tmp_path / "other", vocab_size=300)
    with pytest.raises(InputError, match="append with the same"):
        run(tmp_path, other, random_records(3), append=True)


def test_duplicate_ids_are_renamed_on_request(tmp_path, folder):
    records = random_records(6)
    for i in (2, 4):
        records[i].id = "q0"
    records[5].id = "q0#2"
    summary = run(tmp_path, folder, records, policies=parse_policies(["duplicate_id=fix"]), rows_per_chunk=2)
    shard = GroupShard(summary.prefixes[0])
    assert [shard.meta(i)["id"] for i in range(6)] == ["q0", "q1", "q0#2", "q3", "q0#3", "q0#2#2"]


def test_errors_name_every_problem_of_a_chunk_and_leave_nothing(tmp_path, folder):
    lines = [record_to_json(record) for record in random_records(10)]
    lines[3], lines[6] = "{broken", lines[6].replace('"prompt"', '"promt"')
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    options = PreprocessOptions([str(tmp_path / "in.jsonl")], str(folder), str(tmp_path / "out" / "train"))
    with pytest.raises(InputError) as caught:
        preprocess(options, progress=False)
    assert "in.jsonl:4: invalid_json" in str(caught.value) and "in.jsonl:7: id 'q6' missing_field" in str(caught.value)
    assert contents(tmp_path / "out") == {}


def test_nothing_left_is_an_error_with_a_report(tmp_path, folder):
    (tmp_path / "in.jsonl").write_text("nope\n")
    options = PreprocessOptions([str(tmp_path / "in.jsonl")], str(folder), str(tmp_path / "out" / "train"))
    with pytest.raises(InputError, match="no group is left to write -> see .*train.report.ndjson"):
        preprocess(replace(options, policies=parse_policies(["invalid_json=drop"])), progress=False)
    assert list(contents(tmp_path / "out")) == ["train.report.ndjson"]


def test_model_vocabulary_must_hold_the_tokenizer(tmp_path, folder, tokenizer):
    for rows, fits in ((tokenizer.vocab_size, True), (tokenizer.vocab_size - 1, False)):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": rows}))
        name = f"v{rows}"
        if fits:
            assert run(tmp_path, folder, random_records(2), name, model=str(tmp_path)).groups == 2
        else:
            with pytest.raises(InputError, match="has an embedding of"):
                run(tmp_path, folder, random_records(2), name, model=str(tmp_path))


def test_bad_options_are_named_together(tmp_path, folder):
    with pytest.raises(InputError, match="workers=0.*\n.*max_groups_per_shard=0"):
        run(tmp_path, folder, random_records(1), workers=0, max_groups_per_shard=0)


# --- the tool -------------------------------------------------------------------------------------------------------


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "tools"))
    import preprocess_groups

    return preprocess_groups.main


def test_the_tool(tmp_path, folder, tool, capsys):
    records = random_records(5)
    for group in records[1:3]:
        group.responses[0].reward = None
    write_group_file(tmp_path / "in.jsonl", records)
    command = ["--input", str(tmp_path / "in.jsonl"), "--tokenizer", str(folder), "--policy", "truncated=drop"]
    command += ["--output-prefix", str(tmp_path / "out" / "train"), "--workers", "2"]
    assert tool(command) == 0
    shown = capsys.readouterr()
    assert shown.out.strip() == str(tmp_path / "out" / "train")
    assert "5 groups" in shown.err and "truncated: 2 drop" in shown.err
    assert "responses (2 without a reward" in shown.err
    assert tool(command) == 2
    assert "exists already" in capsys.readouterr().err


def test_the_tool_refuses_bad_arguments(tmp_path, tool, capsys):
    common = ["--input", "x.jsonl", "--tokenizer", "t", "--output-prefix", str(tmp_path / "p")]
    assert tool([*common, "--policy", "long_respons=drop"]) == 2
    assert tool([*common, "--part", "one"]) == 2
    assert tool(common) == 2
    errors = capsys.readouterr().err
    assert (
        "did you mean 'long_response'" in errors and "--part 'one' -> I/N" in errors and "no such group file" in errors
    )
    with pytest.raises(SystemExit) as left:
        tool(["--help"])
    assert left.value.code == 0 and "long_response" in capsys.readouterr().out
