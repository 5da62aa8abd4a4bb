"""Datasets over shards: blends, splits, length limits, fingerprints, and the traps of Megatron's builder."""

from __future__ import annotations

import math
import pickle
import re
import shutil

import numpy as np
import pytest
import torch
from group_shards import STAMP, write_shard
from ranks import run_ranks

from megatron_gft.dataset import LengthLimits, build_group_datasets
from megatron_gft.errors import InputError
from megatron_gft.shards import GroupShard, GroupShardWriter
from megatron_gft.shards.manifest import ShardSet


@pytest.fixture
def shards(tmp_path):
    for seed, name in enumerate(("math", "math-00001", "code")):
        write_shard(tmp_path / name, groups=(20, 10, 15)[seed], seed=seed)
    return tmp_path


def write_groups(prefix, *groups: tuple[list[int], list[int]]) -> None:
    """A shard of groups of one response each: (prompt, response)."""
    with GroupShardWriter(prefix, STAMP) as writer:
        for i, (prompt, response) in enumerate(groups):
            writer.add_group(prompt, [response], ["expert"], [None], group_id=str(i))


def prompts(split) -> list[list[int]]:
    return [split[i].prompt.tolist() for i in range(len(split))]


def shard_prompts(*prefixes) -> list[list[int]]:
    return [shard[i].prompt.tolist() for shard in map(GroupShard, prefixes) for i in range(len(shard))]


def check_table(split) -> None:
    """Bulk access agrees with single groups, for any selection."""
    for chosen in (np.arange(len(split)), np.random.default_rng(0).integers(0, len(split), 30)):
        table = split.table(chosen)
        for row, i in enumerate(chosen.tolist()):
            item = split[i]
            span = slice(table.offsets[row], table.offsets[row + 1])
            assert table.prompt_lengths[row] == len(item.prompt)
            assert table.response_lengths[span].tolist() == [len(r) for r in item.responses]
            assert table.sources[span].tolist() == item.sources.tolist()
            assert np.array_equal(table.rewards[span], item.rewards, equal_nan=True)


def test_without_weights_every_group_comes_once_in_order(shards):
    data = build_group_datasets([str(shards / "math*"), str(shards / "code")])
    assert data.valid is None
    assert prompts(data.train) == shard_prompts(shards / "math", shards / "math-00001", shards / "code")
    check_table(data.train)
    assert data.train.table().offsets[-1] == sum(len(data.train[i].responses) for i in range(45))
    item = data.train[25]
    assert "math-00001 group 5 (id 'g-5-é')" in data.train.describe(25)
    assert len(item.logprobs) == len(item.responses)


def test_splits_are_disjoint_and_complete(shards):
    data = build_group_datasets([str(shards / "math*")], split="80,20")
    parts = [prompts(split) for split in data]
    assert [len(part) for part in parts] == [24, 6]
    assert sum(parts, []) == shard_prompts(shards / "math", shards / "math-00001")
    assert len({split.fingerprint for split in data}) == 2
    check_table(data.valid)


@pytest.mark.parametrize("weights", [[0.7, 0.3], [1, 9]])
def test_weights_give_shares_of_the_blend(shards, weights):
    data = build_group_datasets([str(shards / "math*"), str(shards / "code")], weights=weights, split="80,20,0", seed=5)
    assert len(data.train) == pytest.approx(24 + 12, abs=1)
    source = np.array(["code group" in data.train.describe(i) for i in range(len(data.train))])
    assert source.mean() == pytest.approx(weights[1] / sum(weights), abs=1.5 / len(source))
    math, code = shard_prompts(shards / "math", shards / "math-00001")[:24], shard_prompts(shards / "code")[:12]
    for which, allowed in ((0, math), (1, code)):
        drawn = [data.train[int(i)].prompt.tolist() for i in np.flatnonzero(source == which)]
        counts = [drawn.count(prompt) for prompt in allowed]
        assert sum(counts) == len(drawn) and max(counts) - min(counts) <= 1  # whole passes before a repeat
    check_table(data.train)
    check_table(data.valid)


def test_one_weighted_entry_is_that_entry(shards):
    data = build_group_datasets([str(shards / "code")], weights=[3.0])
    assert prompts(data.train) == shard_prompts(shards / "code")


def test_separate_validation_shards(shards):
    write_groups(shards / "fits", *[([3, 4], [5, 2])] * 2)
    data = build_group_datasets([str(shards / "math*")], valid=[str(shards / "code")])
    assert len(data.train) == 30 and prompts(data.valid) == shard_prompts(shards / "code")
    check_table(data.valid)
    limits = LengthLimits(max_response_tokens=5, policy="drop")
    limited = build_group_datasets([str(shards / "math*")], valid=[str(shards / "code")], limits=limits)
    alone = build_group_datasets([str(shards / "code")], limits=limits).train.limited
    assert limited.valid.limited == alone != limited.train.limited
    bite_only_there = [
        build_group_datasets([str(shards / "fits")], valid=[str(shards / "code")], limits=some)
        for some in (None, limits)
    ]
    assert len({data.valid.fingerprint for data in bite_only_there}) == 2
    with pytest.raises(InputError, match="beside data.valid"):
        build_group_datasets([str(shards / "math*")], valid=[str(shards / "code")], split="90,10,0")


def test_fingerprint_is_of_content_not_of_paths(shards, tmp_path_factory):
    def fingerprint(*args, **kwargs):
        return build_group_datasets(*args, **kwargs).train.fingerprint

    first = fingerprint([str(shards / "code")])
    other = tmp_path_factory.mktemp("other")
    content = write_shard(other / "renamed", groups=15, seed=2)
    assert fingerprint([str(other / "renamed")]) == first
    different = {
        first,
        fingerprint([str(shards / "code")], seed=1),
        fingerprint([str(shards / "code")], split="90,10,0"),
        fingerprint([str(shards / "code")], limits=LengthLimits(max_response_tokens=5, policy="truncate")),
        fingerprint([str(shards / "code"), str(shards / "math")]),
        fingerprint([str(shards / "code"), str(shards / "math")], weights=[1, 1]),
        fingerprint([str(shards / "code"), str(shards / "math")], weights=[1, 2]),
    }
    assert len(different) == 7
    assert fingerprint([str(shards / "code")], split="90,10") in different  # as when a third share was asked for
    assert fingerprint([str(shards / "code")], limits=LengthLimits(max_response_tokens=50)) == first  # changes nothing
    with GroupShardWriter(other / "rescored", STAMP) as writer:
        for group in content:
            writer.add_group(**{**group, "rewards": [0.0] * len(group["responses"])})
    assert fingerprint([str(other / "rescored")]) not in different


@pytest.mark.parametrize("policy", ["drop", "truncate"])
@pytest.mark.parametrize("limit", [{"max_response_tokens": 5}, {"max_sequence_tokens": 9}, {"max_sequence_tokens": 5}])
def test_limits_drop_or_truncate_what_exceeds(shards, policy, limit):
    limits = LengthLimits(**limit, policy=policy)
    names = [str(shards / "math*")]
    if policy == "truncate" and limits.max_sequence_tokens == 5:  # some prompts alone have more
        with pytest.raises(InputError, match="raise the limit, or data.overlong=drop"):
            build_group_datasets(names, limits=limits)
        return
    expected, changed = [], 0
    for shard in map(GroupShard, (shards / "math", shards / "math-00001")):
        for group in (shard[i] for i in range(len(shard))):
            prompt = len(group.prompt)
            room = min(limits.max_response_tokens or 99, (limits.max_sequence_tokens or 99) - prompt)
            responses = [r.tolist() for r in group.responses]
            changed += sum(len(r) > room for r in responses)
            responses = [r[:room] for r in responses if policy == "truncate" or len(r) <= room]
            if responses:
                expected.append((group.prompt.tolist(), responses))
    train = build_group_datasets(names, limits=limits).train
    found = [(train[i].prompt.tolist(), [r.tolist() for r in train[i].responses]) for i in range(len(train))]
    assert found == expected
    assert all(
        len(a) == len(b) for i in range(len(train)) for a, b in zip(train[i].logprobs, train[i].responses, strict=True)
    )
    check_table(train)
    if policy == "truncate":
        assert train.limited.truncated_responses == changed > 0
    else:
        assert train.limited.dropped_groups == 30 - len(train)


@pytest.mark.parametrize("policy", ["drop", "truncate"])
def test_reading_a_group_under_limits_makes_no_array_of_all_groups(shards, policy, monkeypatch):
    train = build_group_datasets(
        [str(shards / "math")], limits=LengthLimits(max_response_tokens=5, policy=policy)
    ).train
    expected = [[r.tolist() for r in train[i].responses] for i in range(len(train))]
    monkeypatch.setattr(GroupShard, "table", lambda *_: pytest.fail("reads a table"))
    assert [[r.tolist() for r in train[i].responses] for i in range(len(train))] == expected


def test_over_long_responses_are_an_error_that_names_shard_and_group(shards):
    with pytest.raises(InputError, match=r"code: group \d+ \(id 'g-\d+-é'\) has a prompt of \d+ and responses of"):
        build_group_datasets([str(shards / "code")], limits=LengthLimits(max_response_tokens=3))
    long_enough = LengthLimits(max_response_tokens=9, max_sequence_tokens=15)
    assert len(build_group_datasets([str(shards / "code")], limits=long_enough).train) == 15


BAD_WEIGHTS = [[1], [1, 0], [math.inf, 1], [1, math.inf], [math.nan, 1], [1, math.nan], [1e308, 1e308]]


@pytest.mark.parametrize(
    "spelled", ["{0}/code", "{0}/./code", "{0}/code.json", "{0}/../{1}/code", "{0}/cod*", "copy/code"]
)
@pytest.mark.parametrize("where", ["train", "valid"])
def test_no_shard_is_used_twice_however_it_is_named(shards, spelled, where, monkeypatch):
    monkeypatch.chdir(shards)
    shutil.copytree(shards, shards / "copy")
    again, train = [spelled.format(shards, shards.name)], [str(shards / "code"), str(shards / "math")]
    arguments = dict(train=train + again) if where == "train" else dict(train=train, valid=again)
    with pytest.raises(InputError, match="code: the same groups as .*code in data.train or data.valid"):
        build_group_datasets(**arguments)


@pytest.mark.parametrize(
    "limits, named",
    [
        (dict(max_response_tokens=1), "code: max_response_tokens=1 leaves none of 15 groups"),
        (dict(max_response_tokens=1, max_sequence_tokens=9), "code: max_response_tokens=1 leaves"),
        (dict(max_sequence_tokens=2, max_response_tokens=4), "code: max_sequence_tokens=2 leaves"),
    ],
)
@pytest.mark.parametrize("where", ["train", "weighted", "valid"])
def test_limits_that_drop_everything_are_named(tmp_path, limits, named, where):
    write_groups(tmp_path / "code", *[([3, 4], [5, 2])] * 15)
    write_groups(tmp_path / "fits", ([3], [2]))
    names = [str(tmp_path / name) for name in ("fits", "code")]
    arguments = {
        "train": dict(train=names[1:]),
        "weighted": dict(train=names, weights=[1, 1]),
        "valid": dict(train=names[:1], valid=names[1:]),
    }[where]
    with pytest.raises(InputError, match=named):
        build_group_datasets(**arguments, limits=LengthLimits(**limits, policy="drop"))


def test_a_split_emptied_by_limits_says_so(tmp_path):
    write_groups(tmp_path / "a", *(([3], [4] * i + [2]) for i in range(20)))
    with pytest.raises(InputError, match=r"no group of 2 \(18 more were dropped as over-long\) for valid"):
        build_group_datasets(
            [str(tmp_path / "a")], split="90,10,0", limits=LengthLimits(max_response_tokens=2, policy="drop")
        )


def test_what_does_not_fit_is_refused(shards):
    code = [str(shards / "code")]
    other = STAMP.model_copy(update={"fingerprint": "0" * 64})
    write_shard(shards / "foreign", stamp=other)
    write_shard(shards / "set", shard_set=ShardSet(id="s", index=0, count=2))
    cases = [
        (dict(train=[]), "no shards"),
        (dict(train=[str(shards / "absent")]), "no such group shard"),
        (dict(train=[str(shards / "absent*")]), "no group shard matches"),
        (dict(train=code, tokenizer_fingerprint="1" * 64), "do not fit the model.*(?s:.*)made with tokenizer ffff"),
        (dict(train=code, vocab_size=50), r"has token id \d+, the model has 50 ids"),
        (dict(train=code + [str(shards / "foreign")]), "different tokenizers"),
        (dict(train=code, valid=[str(shards / "foreign")]), "different tokenizers"),
        (dict(train=[str(shards / "set")]), "1 of its 2 shards are given"),
        (dict(train=code, split="98,2,0"), "leaves splits empty"),
        *((dict(train=code, split=split), "not two shares") for split in ("0,1", "a,b", "100", "1,1,0,0", "1,inf")),
        (dict(train=code, split="80,10,10"), "nothing reads a third share"),
        *(
            (dict(train=code + [str(shards / "math")], weights=w), "one positive, finite weight each")
            for w in BAD_WEIGHTS
        ),
    ]
    for arguments, message in cases:
        with pytest.raises(InputError, match=message):
            build_group_datasets(**arguments)
    assert build_group_datasets(code, tokenizer_fingerprint=STAMP.fingerprint, vocab_size=100).train is not None
    path = shards / "code.bin"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InputError, match=r"code.bin: \d+ bytes, the manifest says \d+"):
        build_group_datasets(code)


def test_data_loader_workers_read_the_same(shards):
    train = build_group_datasets([str(shards / "math*"), str(shards / "code")], weights=[1, 1]).train
    assert prompts(pickle.loads(pickle.dumps(train))) == prompts(train)
    loader = torch.utils.data.DataLoader(train, batch_size=None, num_workers=1, collate_fn=lambda item: item)
    assert [item.prompt.tolist() for item in loader] == prompts(train)


def _build_on_rank(folder, cache):
    names = [f"{folder}/a", f"{folder}/b"]
    train = build_group_datasets(names, weights=[1, 2], cache=cache).train
    return train.fingerprint, prompts(train)


def test_regenerated_shards_never_meet_a_stale_cache(tmp_path):
    """Same paths and counts, other contents: only the content in the key of the cache tells them apart."""
    cache = tmp_path / "cache"
    results, cached = [], []
    for seed in (0, 1):
        for name in ("a", "b"):
            for path in tmp_path.glob(f"{name}.*"):
                path.unlink()
            write_shard(tmp_path / name, groups=12, seed=seed + 10 * (name == "b"))
        per_rank = run_ranks(2, _build_on_rank, str(tmp_path), str(cache))
        assert per_rank[0] == per_rank[1]
        assert (
            build_group_datasets([f"{tmp_path}/a", f"{tmp_path}/b"], weights=[1, 2]).train.fingerprint == per_rank[0][0]
        )
        results.append(per_rank[0])
        cached.append({path.name for path in cache.iterdir()})
    assert results[0][0] != results[1][0] and len(results[1][1]) == 24
    assert all(prompt in shard_prompts(tmp_path / "a", tmp_path / "b") for prompt in results[1][1])
    assert cached[0] and len(cached[1]) == 2 * len(cached[0])


@pytest.mark.parametrize("where", ["train", "weighted", "valid"])
@pytest.mark.parametrize("prompt", [[3, 4], [3, 5], [3]], ids=["same prompt", "another prompt", "a shorter prompt"])
def test_a_group_is_in_one_shard_only(tmp_path, where, prompt, caplog):
    """By id and prompt, with other responses and at another place; an id alone may be a number in two data sets."""
    write_groups(tmp_path / "a", ([9], [2]), ([8], [2]), ([3, 4], [5, 2]))
    write_groups(tmp_path / "b", ([1], [7, 2]), ([2], [2]), (prompt, [7, 2]))
    write_groups(tmp_path / "c", ([6], [2]), ([7], [2]), ([6, 6], [2]))
    a, b, c = (str(tmp_path / name) for name in "abc")
    arguments = {
        "train": dict(train=[a, c, b]),
        "weighted": dict(train=[a, c, b], weights=[2, 1, 1]),
        "valid": dict(train=[a, c], valid=[b]),
    }[where]
    if prompt == [3, 4]:
        with pytest.raises(InputError, match=rf"{b}: group 2 \(id '2'\) is in {a}, too, with the same prompt"):
            build_group_datasets(**arguments)
    else:
        build_group_datasets(**arguments)
        assert re.search(rf"{a} and {c}: the same ids with other prompts, such as '\d'", caplog.text)


def test_ids_are_compared_as_text(tmp_path):
    """Quotes, backslashes and other writing of the same text."""
    odd = ['a"b', "a\\", 'a\\","answer":', "é\u2028", "", "12"]
    for name in "ab":
        with GroupShardWriter(tmp_path / name, STAMP) as writer:
            for n, group_id in enumerate(odd if name == "a" else ["x", odd[2]]):
                prompt, answer = [3, n if name == "a" else 2], '","answer":'
                writer.add_group(prompt, [[2]], ["self"], [None], group_id=group_id, answer=answer)
    assert GroupShard(tmp_path / "a").ids() == odd
    with pytest.raises(InputError, match=r"b: group 1 \(id .* is in .*a, too"):
        build_group_datasets([str(tmp_path / "a"), str(tmp_path / "b")])


def test_a_shard_with_one_group(tmp_path):
    write_groups(tmp_path / "one", ([3], [2]))
    train = build_group_datasets([str(tmp_path / "one")]).train
    assert len(train) == 1 and np.isnan(train[0].rewards[0])
    with pytest.raises(IndexError):
        train[1]
