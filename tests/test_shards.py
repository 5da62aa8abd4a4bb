"""Group shards: what goes in comes out, bulk arrays agree, any damage is found, nothing partial is readable."""

from __future__ import annotations

import gc
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from group_shards import STAMP, write_shard
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_gft.errors import InputError, InputErrors
from megatron_gft.groups import SOURCES
from megatron_gft.shards import (
    GroupShard,
    GroupShardWriter,
    check_sets,
    expand_shards,
    verify_shards,
)
from megatron_gft.shards.encoded import GroupEncoder
from megatron_gft.shards.manifest import ShardSet, read_manifest


def nan_equal(array: np.ndarray, expected: list) -> bool:
    return np.array_equal(array, np.array(expected, dtype=np.float32), equal_nan=True)


def flip_bit(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def open_all(prefixes) -> None:
    for prefix in prefixes:
        GroupShard(prefix)


def read_all(prefix: Path) -> None:
    shard = GroupShard(prefix)
    for i in range(len(shard)):
        shard[i], shard.meta(i), shard.outcomes(i)
    shard.table()
    shard.encoded(0, len(shard))


def test_groups_come_back(tmp_path):
    content = write_shard(tmp_path / "a")
    shard = GroupShard(tmp_path / "a")
    assert len(shard) == len(content)
    for i, expected in enumerate(content):
        group = shard[i]
        assert group.prompt.dtype == np.int32 and group.prompt.tolist() == expected["prompt"]
        assert [r.tolist() for r in group.responses] == expected["responses"]
        assert [SOURCES[code] for code in group.sources] == expected["sources"]
        assert nan_equal(group.rewards, [np.nan if r is None else r for r in expected["rewards"]])
        for logprobs, response, known in zip(group.logprobs, expected["responses"], expected["logprobs"], strict=True):
            known = known or []
            assert nan_equal(logprobs, known + [np.nan] * (len(response) - len(known)))
        assert shard.meta(i)["id"] == expected["group_id"] and shard.meta(i)["answer"] == expected["answer"]
        assert shard.outcomes(i) == expected["outcomes"]
    with pytest.raises(IndexError):
        shard[len(shard)]


@pytest.mark.parametrize("chosen", [None, [3], [7, 0, 19, 7, 7]])
def test_a_table_agrees_with_single_groups(tmp_path, chosen):
    write_shard(tmp_path / "a")
    shard = GroupShard(tmp_path / "a")
    table = shard.table(chosen and np.array(chosen))
    for row, i in enumerate(chosen or range(len(shard))):
        group, span = shard[i], slice(*table.offsets[row : row + 2])
        assert table.prompt_lengths[row] == len(group.prompt)
        assert table.response_lengths[span].tolist() == [len(r) for r in group.responses]
        assert table.sources[span].tolist() == group.sources.tolist()
        assert np.array_equal(table.rewards[span], group.rewards, equal_nan=True)
        assert table.response_counts[row] == len(group.responses)


def test_it_is_a_plain_megatron_indexed_dataset(tmp_path):
    content = write_shard(tmp_path / "a")
    data = IndexedDataset(str(tmp_path / "a"), multimodal=True)
    first, end = data.document_indices[3], data.document_indices[4]
    sequences, modes = data[int(first) : int(end)]
    assert [s.tolist() for s in sequences] == [content[3]["prompt"], *content[3]["responses"]]
    assert modes.tolist() == [-1, *(SOURCES.index(s) for s in content[3]["sources"])]


def test_manifest_counts(tmp_path):
    content = write_shard(tmp_path / "a", provenance={"models": ["m"]})
    verify_shards([tmp_path / "a"])
    manifest = read_manifest(tmp_path / "a")
    counts = manifest.counts
    responses = [r for group in content for r in group["responses"]]
    rewards = [r for group in content for r in group["rewards"]]
    assert counts.groups == 20 and counts.responses == len(responses)
    assert counts.response_tokens == sum(map(len, responses)) and counts.max_response_tokens == max(map(len, responses))
    assert counts.max_sequence_tokens == max(len(g["prompt"]) + max(map(len, g["responses"])) for g in content)
    assert counts.by_source == {s: sum(g["sources"].count(s) for g in content) for s in SOURCES}
    assert counts.truncated == 0 and counts.max_token_id == max(
        max(g["prompt"] + r) for g in content for r in g["responses"]
    )
    stats = manifest.judgement.stats
    assert stats.missing == rewards.count(None) and stats.rewarded == len(rewards) - rewards.count(None)
    assert stats.zero_variance_groups == sum(
        len(g["rewards"]) > 1 and None not in g["rewards"] and len(set(g["rewards"])) == 1 for g in content
    )
    expert = [
        r for g in content for r, s in zip(g["rewards"], g["sources"], strict=True) if s == "expert" and r is not None
    ]
    assert stats.mean["expert"] == pytest.approx(np.mean(expert))
    assert manifest.provenance == {"models": ["m"]}


def test_same_groups_give_the_same_bytes(tmp_path):
    for name in ("x/a", "y/a"):
        write_shard(tmp_path / name)
    files = sorted(p.name for p in (tmp_path / "x").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "y").iterdir()) and len(files) == 8
    assert all((tmp_path / "x" / n).read_bytes() == (tmp_path / "y" / n).read_bytes() for n in files)


def test_shard_without_logprobs_and_logprobs_that_begin_late(tmp_path):
    content = write_shard(tmp_path / "a", logprobs=False)
    assert GroupShard(tmp_path / "a")[0].logprobs is None
    with GroupShardWriter(tmp_path / "b", STAMP) as writer:
        writer.add_group(**content[0])
        writer.add_group(**{**content[1], "logprobs": [[-0.5] for _ in content[1]["responses"]]})
    first, second = (GroupShard(tmp_path / "b")[i] for i in range(2))
    assert all(np.isnan(values).all() for values in first.logprobs)
    assert all(values[0] == np.float32(-0.5) for values in second.logprobs)


@pytest.mark.parametrize("named", ["a", "a*"])
def test_any_changed_or_missing_byte_is_found(tmp_path, named):
    """By its name, or by a glob that must not pass over it; beside a sound shard."""
    write_shard(tmp_path / "a", groups=4)
    write_shard(tmp_path / "a-00001", groups=1)
    read = [lambda: verify_shards(expand_shards(tmp_path / named)), lambda: open_all(expand_shards(tmp_path / named))]
    rng = np.random.default_rng(1)
    for path in sorted(tmp_path.glob("a.*")):
        content = path.read_bytes()
        for position in {0, 20, len(content) - 1, *rng.integers(0, len(content), 20).tolist()}:
            flip_bit(path, position, int(rng.integers(8)))
            with pytest.raises(InputError):
                read[0]()
            path.write_bytes(content)
        for broken in (content[:-1], content + b"\n", b"", None):
            path.unlink() if broken is None else path.write_bytes(broken)
            for check in read:
                with pytest.raises(InputError, match=re.escape(path.name)):
                    check()
        path.write_bytes(content)
    for check in read:
        check()


def test_a_changed_line_end_of_the_manifest_is_found(tmp_path):
    write_shard(tmp_path / "a", groups=1)
    path = tmp_path / "a.json"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r", 1))
    with pytest.raises(InputError, match="not match its own hash"):
        read_manifest(tmp_path / "a")


def test_manifests_that_changed_places_are_refused(tmp_path):
    for seed, name in enumerate("ab"):
        write_shard(tmp_path / name, groups=2, seed=seed)
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)
    with pytest.raises(InputErrors) as caught:
        verify_shards([tmp_path / "a", tmp_path / "b"])
    assert ["files of another prefix" in problem for problem in caught.value.problems] == [True, True]


@pytest.mark.filterwarnings("ignore:Data type alias", "error::pytest.PytestUnraisableExceptionWarning")
def test_reading_a_damaged_shard_names_it(tmp_path):
    """A flipped bit is a value read wrong or one message: never another exception."""
    write_shard(tmp_path / "a", groups=5)
    rng = np.random.default_rng(2)
    refused = dict.fromkeys(("idx", "meta.bin", "meta.idx", "outcomes", "rewards", "logprobs"), 0)
    for path in sorted(tmp_path.glob("a.*")):
        kind = path.name[2:].removesuffix(".npy")
        content = path.read_bytes()
        for position in rng.integers(0, len(content), 60 if kind in refused else 0).tolist():
            flip_bit(path, position, int(rng.integers(8)))
            try:
                read_all(tmp_path / "a")
            except InputError as error:
                refused[kind] += 1
                assert str(tmp_path / "a") in str(error)
            path.write_bytes(content)
    assert all(refused.values())
    flip_bit(tmp_path / "a.meta.bin", 3)  # in the name of a key
    for read in (lambda: GroupShard(tmp_path / "a").meta(0), lambda: GroupShard(tmp_path / "a").encoded(0, 5)):
        with pytest.raises(InputError, match="damaged shard .*inspect_groups.py .*a --verify"):
            read()


def test_several_shards_report_every_damage_together(tmp_path):
    names = [tmp_path / name for name in "abcde"]
    for index, name in enumerate(names):
        write_shard(name, groups=2, seed=index, shard_set=ShardSet(id="s", index=index, count=5))
    verify_shards(names)
    flip_bit(tmp_path / "a.bin", 5)
    (tmp_path / "b.meta.idx").unlink()
    flip_bit(tmp_path / "d.json", 200)
    with pytest.raises(InputErrors) as caught:
        verify_shards(names[:4])
    found = caught.value.problems
    assert [problem.split(":")[0] for problem in found] == [
        f"{tmp_path}/{name}" for name in ("a.bin", "b.meta.idx", "d.json", "a")
    ]
    assert "content differs" in found[0] and "missing" in found[1] and "3 of its 5 shards" in found[3]


def test_interrupted_writing_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), GroupShardWriter(tmp_path / "a", STAMP) as writer:
        writer.add_group([3], [[4, 2]], ["self"], [1.0], group_id="x")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="no group to write"), GroupShardWriter(tmp_path / "a", STAMP):
        pass
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="no such group shard"):
        GroupShard(tmp_path / "a")


@pytest.mark.parametrize("name", ["a", "a.meta", "a.json", "b.meta"])
def test_a_prefix_with_files_of_another_shard_is_refused(tmp_path, name):
    write_shard(tmp_path / "a")
    message = "exists already" if name == "a" else f"such as {tmp_path}/{name[0]}$"
    with pytest.raises(InputError, match=message):
        GroupShardWriter(tmp_path / name, STAMP)
    verify_shards([tmp_path / "a"])
    assert len(list(tmp_path.iterdir())) == 8


def test_fingerprint_is_of_everything_that_training_reads(tmp_path):
    def fingerprint(name: str, **changed) -> str:
        group = {"prompt": [7], "responses": [[8, 2]], "sources": ["self"], "rewards": [1.0], "logprobs": [[-0.5]]}
        with GroupShardWriter(tmp_path / name, STAMP) as writer:
            writer.add_group(**{**group, **changed}, group_id=name)  # ids and names of shards are not part of it
        return GroupShard(tmp_path / name).manifest.fingerprint

    assert fingerprint("same") == fingerprint("other.name")
    different = [dict(prompt=[6]), dict(responses=[[9, 2]]), dict(rewards=[0.0]), dict(logprobs=[[-0.25]])]
    different += [dict(logprobs=None), dict(sources=["expert"]), dict(prompt=[7, 8], responses=[[2]])]
    assert len({fingerprint("same again"), *(fingerprint(f"x{n}", **of) for n, of in enumerate(different))}) == 8


def test_groups_without_tokens_or_responses_are_our_bug(tmp_path):
    for prompt, responses in (([], [[2]]), ([3], [[]]), ([3], [])):
        with pytest.raises(ValueError, match="needs a"), GroupShardWriter(tmp_path / "a", STAMP) as writer:
            writer.add_group(prompt, responses, ["self"] * len(responses), [None] * len(responses), group_id="x")


def test_a_shard_that_an_earlier_version_judged_anew_is_read(tmp_path):
    """``old_shard/judged`` was written by version c172e60, then judged twice; names of sidecars held hashes then."""
    prefix = Path(__file__).parent / "old_shard" / "judged"
    shard = GroupShard(prefix)
    verify_shards([prefix])
    assert [j.verifier for j in shard.manifest.judgements] == [{}, {"name": "second"}, {"name": "third"}]
    assert shard.manifest.judgement.verifier == {"name": "third"} and shard.manifest.judgement.stats.missing == 1
    assert nan_equal(shard.rewards, [np.nan if i == 1 else i / 4 for i in range(10)])
    said = ["correct", "wrong", None] * 4
    assert [shard.outcomes(i) for i in range(3)] == [said[:5], said[5:6], said[6:10]]
    assert shard.manifest.fingerprint == "6098f62c8ea35ae4838d0f431776a0d51ad97ad7f1c9d9dd50657e237a882adf"
    content = write_shard(tmp_path / "now", groups=3)
    for i, group in enumerate(content):
        assert [response.tolist() for response in shard[i].responses] == group["responses"]
        for known, again in zip(shard[i].logprobs, GroupShard(tmp_path / "now")[i].logprobs, strict=True):
            assert np.array_equal(known, again, equal_nan=True)
    assert {path.name for path in tmp_path.iterdir()} == {
        f"now.{end}" for end in "bin idx json meta.bin meta.idx rewards.npy outcomes.npy logprobs.npy".split()
    }


def test_globs_and_incomplete_sets(tmp_path):
    names = ["train", "train-00001", "train-00002"]
    for index, name in enumerate(names):
        write_shard(tmp_path / name, groups=2, seed=index, shard_set=ShardSet(id="s", index=index, count=3))
    (tmp_path / "train-other.json").write_text("{}")
    for suffix in (".idx", ".bin"):
        (tmp_path / f"train-other_text_document{suffix}").write_bytes(b"")  # a plain data set of Megatron
    prefixes = expand_shards(tmp_path / "train*")
    assert prefixes == [str(tmp_path / name) for name in names]
    check_sets((p, GroupShard(p).manifest) for p in prefixes)
    with pytest.raises(InputError, match="2 of its 3 shards are given, missing number 1"):
        check_sets((p, GroupShard(p).manifest) for p in (prefixes[0], prefixes[2]))
    with pytest.raises(InputError, match="no group shard matches"):
        expand_shards(tmp_path / "valid*")
    with pytest.raises(InputError, match="named twice"):
        expand_shards([tmp_path / "train", tmp_path / "train*"])


def test_one_shard_under_two_spellings_is_named_twice(tmp_path, monkeypatch):
    write_shard(tmp_path / "a", groups=1)
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    for other in ("a", "./a", "a.json", "link/a", "a*", str(tmp_path / "a")):
        with pytest.raises(InputError, match=r"named twice \(as a before\)"):
            expand_shards(["a", other])


def test_a_glob_misses_no_part(tmp_path):
    tmp_path = tmp_path / "x-part00001-of-00009"  # names of folders do not count
    for part in (1, 2, 3):
        write_shard(tmp_path / f"train-part{part:05d}-of-00003", groups=1, seed=part)
    write_shard(tmp_path / "train-part00002-of-00003-00001", groups=1, seed=4)
    assert len(expand_shards(tmp_path / "train*")) == 4
    for path in tmp_path.glob("train-part00003*"):
        path.unlink()
    with pytest.raises(InputError, match=r"train: 2 of 3 parts, missing 3"):
        expand_shards(tmp_path / "train*")
    second = tmp_path / "train-part00002-of-00003"
    assert expand_shards(f"{second}*") == [str(second), f"{second}-00001"]
    assert expand_shards([f"{tmp_path}/train-part00001-of-00003", second]) == [
        f"{tmp_path}/train-part00001-of-00003",
        str(second),
    ]


def test_shard_survives_pickling(tmp_path):
    content = write_shard(tmp_path / "a")
    shard = pickle.loads(pickle.dumps(GroupShard(tmp_path / "a")))
    assert shard[5].prompt.tolist() == content[5]["prompt"]
    assert len(pickle.dumps(shard)) < 1000


def test_a_span_of_groups_comes_back_as_it_was_written(tmp_path):
    write_shard(tmp_path / "a", logprobs=False)
    shard = GroupShard(tmp_path / "a")
    with GroupShardWriter(tmp_path / "b", STAMP) as writer:
        writer.add(shard.encoded(0, 7))
        writer.add(shard.encoded(7, 99))
    for suffix in (".bin", ".idx", ".meta.bin", ".meta.idx"):
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()
    assert GroupShard(tmp_path / "b").manifest.fingerprint == shard.manifest.fingerprint
    assert [GroupShard(tmp_path / "b").outcomes(i) for i in range(20)] == [shard.outcomes(i) for i in range(20)]


def test_a_group_outlives_its_shard(tmp_path):
    content = write_shard(tmp_path / "a")
    group = GroupShard(tmp_path / "a")[3]
    gc.collect()
    assert group.prompt.tolist() == content[3]["prompt"] and group.logprobs is not None
    assert [len(p) for p in group.logprobs] == [len(r) for r in content[3]["responses"]]
    assert [SOURCES[code] for code in group.sources] == content[3]["sources"]


def test_select_keeps_whole_groups():
    encoder = GroupEncoder()
    for i in range(3):
        logprobs = [None, [-1.0 * i, -2]]
        encoder.add([9, i], [[i, 2], [i, i, 2]], ["expert", "self"], [None, i], group_id=f"g{i}", logprobs=logprobs)
    groups = encoder.take()
    chosen = groups.select(np.array([True, False, True]))
    assert chosen.tokens.tolist() == [9, 0, 0, 2, 0, 0, 2, 9, 2, 2, 2, 2, 2, 2]
    assert chosen.group_sizes.tolist() == [3, 3] and nan_equal(chosen.rewards, [np.nan, 0, np.nan, 2])
    assert nan_equal(chosen.logprobs, [np.nan] * 2 + [0, -2, np.nan] + [np.nan] * 2 + [-2, -2, np.nan])
    assert [b'"g0"' in chosen.metas[0], b'"g2"' in chosen.metas[1]] == [True, True]
