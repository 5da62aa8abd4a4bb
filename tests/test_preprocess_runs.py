"""Runs of preprocessing beside each other and one after another: parts, BOS, leftovers, names, empty outputs."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from group_files import random_records
from tiny_tokenizers import byte_level_folder, sentencepiece_file

from megatron_gft.dataset import build_group_datasets
from megatron_gft.errors import InputError
from megatron_gft.groups import GroupRecord, ResponseRecord, write_group_file
from megatron_gft.groups.problems import parse_policies
from megatron_gft.preprocess import run as preprocessing
from megatron_gft.preprocess.run import PreprocessOptions, preprocess
from megatron_gft.preprocess.staging import Staging
from megatron_gft.shards import GroupShard, GroupShardWriter, TokenizerStamp


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return byte_level_folder(tmp_path_factory.mktemp("tokenizer") / "hf")


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "tools"))
    import preprocess_groups

    return preprocess_groups.main


def write_records(path: Path, count: int) -> set[str]:
    """Groups with ids ``<stem>-0``, ...; the ids."""
    records = [replace(record, id=f"{path.stem}-{i}") for i, record in enumerate(random_records(count))]
    write_group_file(path, records)
    return {record.id for record in records}


def ids_of(prefixes: list[str]) -> list[str]:
    return [shard.meta(i)["id"] for shard in map(GroupShard, prefixes) for i in range(len(shard))]


# --- parts ----------------------------------------------------------------------------------------------------------


def test_parts_beside_their_inputs_take_each_row_once(tmp_path, folder):
    """What one part writes into the folder of the inputs changes nothing for the next."""
    expected = write_records(tmp_path / "a.jsonl", 5) | write_records(tmp_path / "z.jsonl", 6)
    options = PreprocessOptions([f"{tmp_path}/*.jsonl"], str(folder), str(tmp_path / "train"))
    runs = [preprocess(replace(options, part=(i, 3)), progress=False) for i in (1, 2, 3)]
    found = ids_of([prefix for run in runs for prefix in run.prefixes])
    assert len(found) == 11 and set(found) == expected
    assert len({GroupShard(run.prefixes[0]).manifest.provenance["input_set"] for run in runs}) == 1


def test_another_file_moves_no_row_to_another_part_and_is_told_by_provenance(tmp_path, folder):
    names = [str(tmp_path / f"{name}.jsonl") for name in "amz"]
    ids = [write_records(Path(name), 7) for name in names]
    options = PreprocessOptions(names, str(folder), str(tmp_path / "out" / "train"))
    first = preprocess(replace(options, inputs=[names[2], names[0]], part=(1, 2)), progress=False).prefixes
    second = preprocess(replace(options, part=(2, 2)), progress=False).prefixes
    found = ids_of(first + second)
    assert len(found) == len(set(found)) and set(found) > ids[0] | ids[2]
    sets = [GroupShard(prefix).manifest.provenance["input_set"] for prefix in (*first, *second)]
    assert sets[0] != sets[1]
    with pytest.raises(InputError, match="parts of different inputs: rows may be missing"):
        build_group_datasets([str(tmp_path / "out" / "train*")])


def test_small_files_are_spread_over_parts(tmp_path, folder):
    for number in range(60):
        write_records(tmp_path / f"part-{number:05d}.jsonl", 1)
    options = PreprocessOptions([f"{tmp_path}/part*.jsonl"], str(folder), str(tmp_path / "out" / "train"), part=(1, 3))
    assert 10 <= preprocess(options, progress=False).groups <= 30


def test_an_empty_part_ends_well(tmp_path, folder, tool, capsys):
    write_records(tmp_path / "in.jsonl", 4)
    command = ["--input", str(tmp_path / "in.jsonl"), "--tokenizer", str(folder), "--quiet"]
    command += ["--output-prefix", str(tmp_path / "out" / "train")]
    assert [tool([*command, "--part", f"{i}/6"]) for i in range(1, 7)] == [0] * 6
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 4 and shown.err.count("of the input has no group: nothing to write") == 2
    empty = sorted((tmp_path / "out").glob("*.empty"))
    assert len(empty) == 2 and all(len(list(tmp_path.glob(f"out/{path.stem}*"))) == 2 for path in empty)
    assert not list(tmp_path.glob("out/.*"))
    inputs = GroupShard(shown.out.splitlines()[0]).manifest.provenance["input_set"]
    assert all(json.loads(path.read_text())["input_set"] == inputs for path in empty)
    write_records(tmp_path / "in.jsonl", 12)
    assert len(build_group_datasets([str(tmp_path / "out" / "train*")]).train) == 4  # no part is missing
    number = int(empty[0].stem.partition("part")[2][:5])
    assert tool([*command, "--part", f"{number}/6"]) == 0  # now there is something for this part
    assert sorted((tmp_path / "out").glob("*.empty")) == empty[1:]


def test_a_part_of_which_everything_is_dropped_is_empty_too(tmp_path, folder):
    (tmp_path / "in.jsonl").write_text("nope\n" * 4)
    options = PreprocessOptions([str(tmp_path / "in.jsonl")], str(folder), str(tmp_path / "train"), part=(1, 2))
    summary = preprocess(replace(options, policies=parse_policies(["invalid_json=drop"])), progress=False)
    assert summary.prefixes == [] and summary.problems == {"invalid_json": {"drop": 2}}
    assert len(Path(summary.report).read_text().splitlines()) == 2


def test_an_empty_input_is_an_error(tmp_path, folder):
    (tmp_path / "in.jsonl").write_text("")
    options = PreprocessOptions([str(tmp_path / "in.jsonl")], str(folder), str(tmp_path / "train"))
    with pytest.raises(InputError, match="no group is left to write -> the input has no rows"):
        preprocess(options, progress=False)


# --- BOS ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def with_bos(tmp_path):
    write_records(tmp_path / "in.jsonl", 8)
    model = sentencepiece_file(tmp_path / "sp.model")
    return PreprocessOptions(
        [str(tmp_path / "in.jsonl")],
        str(model),
        str(tmp_path / "out" / "train"),
        chat_template="none",
        rows_per_chunk=2,
        max_groups_per_shard=2,
    )


def test_a_run_with_another_choice_of_bos_begins_anew(with_bos, monkeypatch):
    add = Staging.add

    def add_two(staging, shard):
        add(staging, shard)
        if len(staging.done) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Staging, "add", add_two)
    with pytest.raises(KeyboardInterrupt):
        preprocess(with_bos, progress=False)
    monkeypatch.undo()
    prefixes = preprocess(replace(with_bos, add_bos=False), progress=False).prefixes
    shards = list(map(GroupShard, prefixes))
    assert len(shards) == 4 and all(s[0].prompt[0] != s.manifest.tokenizer.bos_id for s in shards)
    assert {s.manifest.tokenizer.chat_template for s in shards} == {"none"}


def test_appending_with_another_choice_of_bos_is_refused(with_bos):
    (prefix, *_) = preprocess(with_bos, progress=False).prefixes
    assert GroupShard(prefix).manifest.tokenizer.chat_template == "none+bos"
    with pytest.raises(InputError, match="another tokenizer, chat template or choice of BOS"):
        preprocess(replace(with_bos, append=True, add_bos=False), progress=False)


# --- what is there already ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("append", [False, True])
def test_shards_after_a_gap_are_found_before_the_work(append, tmp_path, folder):
    write_records(tmp_path / "in.jsonl", 8)
    options = PreprocessOptions(
        [str(tmp_path / "in.jsonl")],
        str(folder),
        str(tmp_path / "out" / "train"),
        rows_per_chunk=2,
        max_groups_per_shard=2,
    )
    prefixes = preprocess(options, progress=False).prefixes
    for path in (tmp_path / "out").glob(f"{Path(prefixes[1 if append else 0]).name}.*"):
        path.unlink()
    before = sorted((tmp_path / "out").iterdir())
    with pytest.raises(InputError, match="left of an earlier run, a shard before it is missing -> remove"):
        preprocess(replace(options, append=append, inputs=[str(write_more(tmp_path))]), progress=False)
    assert sorted((tmp_path / "out").iterdir()) == before


def write_more(folder: Path) -> Path:
    write_records(folder / "more.jsonl", 2)
    return folder / "more.jsonl"


def test_renaming_many_duplicates_takes_linear_time(tmp_path, folder, monkeypatch):
    groups = [GroupRecord("same", "what?", [ResponseRecord("gold", "expert", 1.0)]) for _ in range(400)]
    write_group_file(tmp_path / "in.jsonl", groups)
    calls = 0

    def counted(group_id, digest=preprocessing.id_digest):
        nonlocal calls
        calls += 1
        return digest(group_id)

    monkeypatch.setattr(preprocessing, "id_digest", counted)
    options = PreprocessOptions([str(tmp_path / "in.jsonl")], str(folder), str(tmp_path / "train"))
    prefixes = preprocess(replace(options, policies=parse_policies(["duplicate_id=fix"])), progress=False).prefixes
    assert ids_of(prefixes) == ["same", *(f"same#{i}" for i in range(2, 401))] and calls <= 4 * 400


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ("", "a folder -> add a name, as in 'train'"),
        (".", "a folder -> add a name, as in './train'"),
        ("..", "a folder -> add a name"),
        ("{tmp}/dir/", "a folder -> add a name, as in '{tmp}/dir/train'"),
        ("{tmp}/x.json", "-> another prefix, such as {tmp}/x"),
        ("{tmp}/x.meta", "-> another prefix, such as {tmp}/x"),
        ("{tmp}/in.jsonl/below/train", "cannot be written in {tmp}/in.jsonl (Not a directory)"),
        ("/proc/none/train", "cannot be written"),
    ],
)
def test_bad_prefixes_are_refused(prefix, message, tmp_path, folder, tool, capsys):
    write_records(tmp_path / "in.jsonl", 1)
    before = sorted(tmp_path.iterdir())
    command = ["--input", str(tmp_path / "in.jsonl"), "--tokenizer", str(folder), "--quiet", "--output-prefix"]
    assert tool([*command, prefix.format(tmp=tmp_path)]) == 2
    assert message.format(tmp=tmp_path) in capsys.readouterr().err and sorted(tmp_path.iterdir()) == before


def test_a_place_without_rights_is_refused(tmp_path, folder, monkeypatch):
    def refuse(dir):  # a test run by root has every right
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("megatron_gft.atomic.tempfile.TemporaryFile", refuse)
    with pytest.raises(InputError, match="(?s)cannot be written in .*Permission denied.*workers=0"):
        preprocess(PreprocessOptions(["x"], str(folder), str(tmp_path / "train"), workers=0), progress=False)


def test_bos_is_chosen_only_without_a_template(tmp_path, folder):
    options = PreprocessOptions(["x"], str(folder), str(tmp_path / "train"), add_bos=False)
    with pytest.raises(InputError, match="BOS False with a chat template, which spells BOS itself"):
        preprocess(options, progress=False)


# --- log-probs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unknown_first", [0, 3, 1 << 20])
def test_streamed_logprobs_are_the_file_that_numpy_saves(unknown_first, tmp_path):
    stamp = TokenizerStamp(fingerprint="f", vocab_size=10, eos_id=2, bos_id=None, chat_template="none")
    known = np.linspace(-3, 0, 5, dtype=np.float32)
    with GroupShardWriter(tmp_path / "a", stamp) as writer:
        group = {"prompt": [7], "sources": ["self"], "rewards": [1.0]}
        for count in range(0, unknown_first, 1 << 19):
            length = min(1 << 19, unknown_first - count)
            writer.add_group(**group, responses=[[5] * length], group_id=f"g{count}")
        writer.add_group(**group, responses=[[5] * 5], group_id="known", logprobs=[known.tolist()])
        writer.add_group(**group, responses=[[5] * 2], group_id="later")
    np.save(tmp_path / "expected", np.concatenate([np.full(unknown_first, np.nan), known, [np.nan] * 2]).astype("<f4"))
    name = GroupShard(tmp_path / "a").manifest.logprobs
    assert name and (tmp_path / name).read_bytes() == (tmp_path / "expected.npy").read_bytes()
