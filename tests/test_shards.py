"""Group shards: what goes in comes out, bulk arrays agree, any damage is found, nothing partial is readable."""

from __future__ import annotations

import gc
import hashlib
import logging
import os
import pickle
import re
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from group_shards import STAMP, write_shard
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from ranks import run_ranks

from megatron_gft.errors import InputError, InputErrors
from megatron_gft.groups import SOURCES, GroupRecord, ResponseRecord
from megatron_gft.shards import (
    GroupShard,
    GroupShardWriter,
    check_sets,
    expand_shards,
    verification,
    verify_shards,
)
from megatron_gft.shards import manifest as manifests
from megatron_gft.shards.encoded import EncodedGroups
from megatron_gft.shards.manifest import ShardSet, file_entry, read_manifest, write_manifest
from megatron_gft.shards.verification import verify_at_start


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
    shard = GroupShard(tmp_path / "a")
    flip_bit(tmp_path / "a.meta.bin", 3)  # in the name of a key, after the shard was opened
    flip_bit(tmp_path / "a.bin", 3, 7)
    for read in (lambda: shard.meta(0), lambda: shard.encoded(0, 5), lambda: shard[0]):
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
    encoded = []
    for i in range(3):
        expert = ResponseRecord("", "expert", token_ids=[i, 2])
        own = ResponseRecord("", "self", i, token_ids=[i, i, 2], logprobs=[-1.0 * i, -2])
        encoded.append(([9, i], GroupRecord(f"g{i}", "", [expert, own])))
    groups = EncodedGroups.of_groups(encoded)
    chosen = groups.select(np.array([True, False, True]))
    assert chosen.tokens.tolist() == [9, 0, 0, 2, 0, 0, 2, 9, 2, 2, 2, 2, 2, 2]
    assert chosen.group_sizes.tolist() == [3, 3] and nan_equal(chosen.rewards, [np.nan, 0, np.nan, 2])
    assert nan_equal(chosen.logprobs, [np.nan] * 2 + [0, -2, np.nan] + [np.nan] * 2 + [-2, -2, np.nan])
    assert [b'"g0"' in chosen.metas[0], b'"g2"' in chosen.metas[1]] == [True, True]


def verify_all(prefix: Path, stamps: Path | None = None) -> None:
    """What a start of training does; alone, without a process group."""
    verify_at_start([GroupShard(prefix)], stamps or prefix.with_name("stamps.json"))


@pytest.mark.parametrize("every", [1, 13], ids=["start", "inspect"])
def test_every_flipped_byte_of_every_file_is_found(tmp_path, every):
    write_shard(tmp_path / "a", groups=2)
    check = verify_all if every == 1 else lambda prefix: verify_shards([prefix])
    rng = np.random.default_rng(3)
    for path in sorted(tmp_path.glob("a.*")):
        content = path.read_bytes()
        for position in range(0, len(content), every):
            flip_bit(path, position, int(rng.integers(8)))
            with pytest.raises(InputError, match=re.escape(str(tmp_path / "a"))) as caught:
                check(tmp_path / "a")
            assert path.name in str(caught.value) or path.suffix == ".json"
        path.write_bytes(content)
    check(tmp_path / "a")


def reseal(prefix: Path, **counts) -> None:
    """A manifest whose hashes are those of the files as they are now: only contents can tell that they are damaged."""
    old = read_manifest(prefix)
    files = {name: file_entry(prefix.with_name(name)) for name in old.files}
    new = {"files": files, "counts": old.counts.model_copy(update=counts)}
    write_manifest(prefix, old.model_copy(update=new))


def edit_index(path: Path, part: str, change) -> None:
    """Let ``change`` edit one array of an ``.idx``: lengths, pointers, documents or modes."""
    content = bytearray(path.read_bytes())
    sequences, documents = struct.unpack_from("<QQ", content, 18)
    starts = np.cumsum([34, 4 * sequences, 8 * sequences, 8 * documents]).tolist()
    kinds = {"lengths": "<i4", "pointers": "<i8", "documents": "<i8", "modes": "<i1"}
    number = list(kinds).index(part)
    change(np.frombuffer(content, kinds[part], documents if part == "documents" else sequences, starts[number]))
    path.write_bytes(content)


def swap(array: np.ndarray) -> None:
    other = int(np.flatnonzero(array != array[1])[-1])
    array[[1, other]] = array[[other, 1]]


def setting(where, value):
    return lambda array: array.__setitem__(where, value)


def shift(array: np.ndarray) -> None:
    array[2:] += 4


def save(name: str, change):
    def damage(prefix: Path) -> None:
        path = prefix.with_name(f"{prefix.name}.{name}.npy")
        np.save(path, change(np.load(path)))

    return damage


def in_index(suffix: str, part: str, change):
    return lambda prefix: edit_index(prefix.with_name(f"{prefix.name}{suffix}.idx"), part, change)


def add_meta(prefix: Path) -> None:
    """One more group in the sidecar of ids."""
    data = IndexedDataset(f"{prefix}.meta")
    texts = [data[i].copy() for i in range(len(data))] + [np.frombuffer(b'{"id":"more","answer":null}', np.uint8)]
    builder = IndexedDatasetBuilder(f"{prefix}.meta.bin", dtype=np.uint8)
    for text in texts:
        builder.add_document(text, [len(text)])
    builder.finalize(f"{prefix}.meta.idx")


def large_token(prefix: Path) -> None:
    tokens = np.fromfile(f"{prefix}.bin", "<i4")
    tokens[-1] = 10**9
    tokens.tofile(f"{prefix}.bin")


DAMAGES = {
    "ptrshift": (in_index("", "pointers", shift), r"a\.idx: .*pointers"),
    "pointers backwards": (in_index("", "pointers", swap), r"a\.idx: .*pointers"),
    "pointer below 0": (in_index("", "pointers", setting(0, -4)), r"a\.idx: .*pointers"),
    "lenswap": (in_index("", "lengths", swap), r"a\.idx: .*pointers"),
    "length 0": (in_index("", "lengths", setting(0, 0)), r"a\.idx: .*without length"),
    "last length": (in_index("", "lengths", setting(-1, 10**6)), r"a\.idx: .*pointers"),
    "modeswap": (in_index("", "modes", swap), r"a\.idx: (modes|holds)"),
    "mode 5": (in_index("", "modes", setting(-1, 5)), r"a\.idx: modes"),
    "a second prompt": (in_index("", "modes", setting(-1, -1)), r"a\.idx: modes"),
    "another source": (in_index("", "modes", lambda m: m.__setitem__(-1, (m[-1] + 1) % 3)), r"a\.idx: holds"),
    "documents": (in_index("", "documents", setting(1, 10**9)), r"a\.idx: .*documents"),
    "documents backwards": (in_index("", "documents", swap), r"a\.idx: damaged index"),
    "meta pointers": (in_index(".meta", "pointers", shift), r"a\.meta\.idx: .*pointers"),
    "meta lengths": (in_index(".meta", "lengths", swap), r"a\.meta\.idx: .*pointers"),
    "one more group": (add_meta, r"a\.meta\.idx: .*documents"),
    "one more reward": (save("rewards", lambda r: np.append(r, r[:1])), r"a\.rewards\.npy: .*expected float32"),
    "infinite reward": (save("rewards", lambda r: np.where(np.arange(len(r)) == 2, np.inf, r)), "infinite rewards"),
    "rewards float64": (save("rewards", lambda r: r.astype(np.float64)), r"a\.rewards\.npy: float64"),
    "outcome codes": (save("outcomes", lambda o: o + np.int8(9)), r"codes in a\.outcomes\.npy"),
    "logprobs cut": (save("logprobs", lambda v: v[:-1]), r"a\.logprobs\.npy: float32"),
    "token id 1e9": (large_token, r"a\.bin: has token id 1000000000, the manifest says at most"),
}


@pytest.mark.parametrize("sealed", [False, True], ids=["", "resealed"])
@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_named_even_under_right_hashes(tmp_path, damage, message, sealed):
    write_shard(tmp_path / "a", groups=6)
    damage(tmp_path / "a")
    if sealed:
        reseal(tmp_path / "a")
    with pytest.raises(InputError) as caught:
        verify_all(tmp_path / "a")
    if sealed and "infinite" not in message:
        assert re.search(message, str(caught.value))
    with pytest.raises(InputError):
        verify_shards([tmp_path / "a"])


def test_files_that_changed_places_are_found(tmp_path):
    """Of one shard, of two shards, and other values of the same size."""
    for seed, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        write_shard(tmp_path / name / "a", groups=3, seed=seed)
    first, second = tmp_path / "a", tmp_path / "b"
    for path in sorted(first.iterdir()):
        content = path.read_bytes()
        others = [other for other in (*first.iterdir(), second / path.name) if other != path]
        for other in others:
            path.write_bytes(other.read_bytes())
            with pytest.raises(InputError, match=re.escape(str(first / "a"))):
                verify_all(first / "a", tmp_path / "stamps")
        path.write_bytes(content)
    verify_all(first / "a", tmp_path / "stamps")


@pytest.mark.parametrize("name", ["../a.bin", "a.\0", "b.bin", "a.rewards.npy"])
def test_a_manifest_of_odd_or_absent_names_is_refused(tmp_path, name):
    write_shard(tmp_path / "a", groups=1)
    manifest = read_manifest(tmp_path / "a")
    files = {known: entry for known, entry in manifest.files.items() if known != name}
    if len(files) == len(manifest.files):
        files[name] = manifest.files["a.bin"]
    write_manifest(tmp_path / "a", manifest.model_copy(update={"files": files}))
    with pytest.raises(InputError, match=r"a\.json: lists no file"):
        GroupShard(tmp_path / "a")


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".rewards.npy", ".json"])
def test_a_pipe_is_no_file_of_a_shard(tmp_path, suffix):
    write_shard(tmp_path / "a", groups=1)
    path = tmp_path / f"a{suffix}"
    path.unlink()
    os.mkfifo(path)
    for check in (verify_all, lambda prefix: verify_shards([prefix])):
        with pytest.raises(InputError, match=rf"a{re.escape(suffix)}: not a file"):
            check(tmp_path / "a")


def start(prefixes: list[str], stamps: str) -> tuple[str, str]:
    """Error and log of a start on this rank, with blocks of 64 bytes."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    verification.logger.addHandler(handler)
    verification.logger.setLevel(logging.INFO)
    verification.BLOCK_BYTES = manifests.BLOCK_BYTES = 64
    try:
        verify_at_start([GroupShard(prefix) for prefix in prefixes], Path(stamps))
    except InputError as error:
        return str(error), ""
    return "", said[0]


def test_ranks_share_the_blocks_and_stop_together(tmp_path, monkeypatch):
    for module in (verification, manifests):
        monkeypatch.setattr(module, "BLOCK_BYTES", 64)
    prefixes = [str(tmp_path / "s" / name) for name in ("a", "b")]
    for seed, prefix in enumerate(prefixes):
        write_shard(Path(prefix), groups=12, seed=seed)
    assert read_manifest(prefixes[0]).bulk_files == ["a.bin", "a.logprobs.npy"]
    blocks = len(read_manifest(prefixes[0]).files["a.bin"].blocks)
    assert blocks > 4
    verify_shards(prefixes)
    stamps = str(tmp_path / "stamps.json")
    (tmp_path / "s").chmod(0o555)  # where the shards are nothing need be written
    first, second = (run_ranks(2, start, prefixes, stamps) for _ in range(2))
    (tmp_path / "s").chmod(0o755)
    size = sum(path.stat().st_size for path in (tmp_path / "s").glob("*") if re.search(r"/.\.(bin|logp)", str(path)))
    for results, now, before in ((first, size, 0), (second, 0, size)):
        assert [error for error, _ in results] == ["", ""]
        assert all(f"{now / 1e9:.3f} GB are as written, {before / 1e9:.3f} GB unchanged" in log for _, log in results)
    content = Path(f"{prefixes[0]}.bin").read_bytes()
    swapped = content[64:128] + content[:64] + content[128:]  # two blocks
    Path(f"{prefixes[0]}.bin").write_bytes(swapped)
    flip_bit(Path(f"{prefixes[1]}.logprobs.npy"), 200)
    results = run_ranks(2, start, prefixes, stamps)
    assert results[0] == results[1]
    for place in ("a.bin: content differs from the manifest in block 0", "a.bin: content .* in block 1 of"):
        assert re.search(place + (r" of \d+ \(bytes 0 to 64\)" if place.endswith("0") else ""), results[0][0])
    assert re.search(r"b\.logprobs\.npy: content differs from the manifest in block 3 of", results[0][0])
    os.utime(f"{prefixes[0]}.bin", ns=(0, 0))
    with pytest.raises(InputErrors, match=r"a\.bin: content differs .* block 0 of(?s:.)*block 1 of"):
        verify_shards(prefixes)


def test_copies_on_machines_are_each_read_whole(tmp_path, monkeypatch):
    """Two ranks that see other inodes: the damage of the second one's copy is found, whoever would share that block."""
    for name in ("0", "1"):
        write_shard(tmp_path / name / "a", groups=12)
    flip_bit(tmp_path / "1" / "a.bin", 3)
    results = run_ranks(2, own_copy, str(tmp_path))
    assert results[0] == results[1] and "1/a.bin: content differs" in results[0]


def own_copy(folder: str) -> str:
    prefix = Path(folder) / os.environ["RANK"] / "a"
    return start([str(prefix)], f"{folder}/stamps.json")[0]


@pytest.mark.parametrize("stamps", ["", "[", "{}", "[1]", "\udcff"])
def test_damaged_stamps_spare_nothing(tmp_path, stamps):
    write_shard(tmp_path / "a", groups=2)
    (tmp_path / "stamps.json").write_text(stamps, encoding="utf-8", errors="surrogateescape")
    flip_bit(tmp_path / "a.bin", 5)
    with pytest.raises(InputError, match=r"a\.bin: content differs"):
        verify_all(tmp_path / "a")


def test_a_change_of_the_same_size_and_time_is_found(tmp_path):
    write_shard(tmp_path / "a", groups=2)
    verify_all(tmp_path / "a")
    times = (tmp_path / "a.bin").stat()
    flip_bit(tmp_path / "a.bin", 5)
    os.utime(tmp_path / "a.bin", ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(InputError, match=r"a\.bin: content differs"):
        verify_all(tmp_path / "a")


def paces(prefix: str, stamps: str) -> list[tuple[float, float]]:
    """(CPU, wall) seconds of verifying a shard on two ranks, and of hashing a rank's share in memory; best of 5."""
    shard, memory = GroupShard(prefix), bytes(16 << 20)
    share = shard.manifest.files[shard.manifest.tokens_file].bytes // dist.get_world_size()
    seconds: list[list[tuple[float, float]]] = [[], []]
    for attempt in range(5):
        stamp = Path(f"{stamps}-{attempt}")
        hashing = (lambda stamp=stamp: verify_at_start([shard], stamp), lambda: sha256_of(memory, share))
        for measured, run in zip(seconds, hashing, strict=True):
            dist.barrier()
            begin = time.process_time(), time.perf_counter()
            run()
            measured.append((time.process_time() - begin[0], time.perf_counter() - begin[1]))
    return [(min(cpu for cpu, _ in measured), min(wall for _, wall in measured)) for measured in seconds]


def sha256_of(memory: bytes, count: int) -> None:
    digest = hashlib.sha256()
    for _ in range(count // len(memory)):
        digest.update(memory)


@pytest.mark.slow
def test_verification_takes_as_long_as_hashing(tmp_path):
    tokens = np.arange(128 << 20, dtype=np.int32) % 90  # 512 MiB: 8 blocks
    lengths, modes = np.array([1, len(tokens) - 1], np.int32), np.array([-1, 2], np.int8)
    meta, reward = [b'{"id":"x","answer":null}'], np.array([1.0], np.float32)
    with GroupShardWriter(tmp_path / "a", STAMP) as writer:
        writer.add(EncodedGroups(tokens, lengths, modes, np.array([2], np.int32), reward, [None], None, meta))
    for verified, hashed in run_ranks(2, paces, str(tmp_path / "a"), str(tmp_path / "stamps")):
        print(f"verified in {verified}, sha256 alone {hashed}, ratios {np.array(verified) / hashed}")
        assert verified[0] <= 1.2 * hashed[0]  # of CPU seconds: wall ones need an idle machine
