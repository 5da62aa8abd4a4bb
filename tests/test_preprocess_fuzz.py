"""Preprocessing of anything at all: a clear error or a whole shard, and each row in it or in the report."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_tokenizers import byte_level_folder

from megatron_gft.errors import InputError
from megatron_gft.groups.problems import DROP, ERROR, FIX, KEEP, KINDS
from megatron_gft.preprocess.run import PreprocessOptions, PreprocessSummary, preprocess
from megatron_gft.shards import GroupShard, verify_shards
from megatron_gft.tokenizer import tokenizer_fingerprint

OURS = "fingerprint of the tokenizer"  # stands for the true one, which is known when the test runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return byte_level_folder(tmp_path_factory.mktemp("tokenizer") / "hf")


@pytest.fixture(scope="module")
def fingerprint(folder):
    return tokenizer_fingerprint(folder)


def _nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["<|im_end|>", "\ud800", "expert", "length", " ", "a <|endoftext|> b", "<|im_<|im_end|>end|>"])
    | st.lists(st.integers(-1, 6), max_size=4)
    | st.just(_nested(300)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


def _some(good: dict[str, st.SearchStrategy]) -> st.SearchStrategy:
    """A good object, or one with up to two fields replaced or removed, or anything at all."""
    known = st.fixed_dictionaries(good)
    changes = st.dictionaries(
        st.sampled_from([*good, "extra", "outcome", "meta", "tokenizer", "sampling"]), json_values, max_size=2
    )
    removed = st.sets(st.sampled_from(list(good)), max_size=1)
    made = st.builds(lambda g, c, r: {k: v for k, v in {**g, **c}.items() if k not in r}, known, changes, removed)
    return st.one_of(*[known] * 3, made, made, json_values)


def _line(group, responses, damage) -> bytes:
    if isinstance(group, dict) and "responses" in group:
        group = {**group, "responses": responses}
    text = json.dumps(group).encode()
    if damage is not None:
        position = damage[0] % (len(text) + 1)
        text = text[:position] + damage[1] + text[position + damage[2] :]
    return text.replace(b"\n", b" ")


groups = _some(
    {
        "id": st.integers(0, 99).map(str),
        "prompt": st.sampled_from(["what?", "why?", [{"role": "user", "content": "who?"}]]),
        "answer": st.just("1"),
        "responses": st.just([]),
    }
)
texts = st.sampled_from(["ok", "other", "ok<|im_end|>", "long " * 30, ""])
responses = _some(
    {"text": texts, "source": st.sampled_from(["self", "expert"]), "reward": st.sampled_from([0.0, 1.0])}
) | _some(
    {
        "text": texts,
        "source": st.sampled_from(["self", "expert"]),
        "reward": st.sampled_from([0.0, 1.0]),
        "finish_reason": st.sampled_from(["stop", "length"]),
        "token_ids": st.sampled_from([[5], [6, 7], [5, 1], [5, 2], [5, 2, 6]]),
        "logprobs": st.sampled_from([None, [-1.0], [-1.0, -0.5]]),
        "tokenizer": st.sampled_from([OURS, OURS, None]),
    }
)
damages = (
    st.none()
    | st.none()
    | st.none()
    | st.none()
    | st.tuples(st.integers(0, 10**6), st.binary(max_size=3), st.integers(0, 5))
)
lines = st.builds(_line, groups, st.lists(responses, max_size=4), damages)
policies = st.fixed_dictionaries({kind: st.sampled_from(KINDS[kind].choices) for kind in KINDS})
MILDEST = {name: next(c for c in (KEEP, FIX, DROP) if c in kind.choices) for name, kind in KINDS.items()}
lenient = st.builds(
    lambda changed: MILDEST | changed,
    st.dictionaries(st.sampled_from(list(KINDS)), st.sampled_from([DROP, FIX]), max_size=6).map(
        lambda changed: {name: policy for name, policy in changed.items() if policy in KINDS[name].choices}
    ),
)


def _preprocessed(source: Path, chosen: dict[str, str], folder: Path) -> PreprocessSummary | None:
    """Only two ends: a clear error that leaves nothing (None), or a shard that is whole."""
    out = source.parent
    options = PreprocessOptions([str(source)], str(folder), str(out / "train"), policies=chosen)
    try:
        summary = preprocess(replace(options, max_prompt_tokens=40, max_response_tokens=12), progress=False)
    except InputError as error:
        assert f"{source.name}:" in str(error) or "no group is left" in str(error)
        assert not list(out.glob("train*.json")) and not list(out.glob("train.bin"))
        return None
    (prefix,) = summary.prefixes
    verify_shards([prefix])
    shard = GroupShard(prefix)
    manifest = shard.manifest
    for i in range(len(shard)):
        group = shard[i]
        assert len(group.prompt) <= 40 and all(1 <= len(r) <= 12 for r in group.responses)
        assert all(0 <= int(r.min()) and int(r.max()) < manifest.tokenizer.vocab_size for r in group.responses)
        assert len(group.responses) == len(group.rewards) == len(group.sources) and not np.isinf(group.rewards).any()
        assert shard.meta(i)["id"]
        rewards = set(group.rewards.tolist())
        assert chosen["equal_rewards"] != DROP or len(group.rewards) == 1 or len(rewards) > 1
        assert chosen["no_expert"] != DROP or 0 in group.sources
    return summary


def _check_nothing_is_lost(summary: PreprocessSummary, rows: dict[int, Any]) -> None:
    """Every row (number -> responses in it, None where unknown) became a group or was dropped, once and for a reason;
    so did every response of a group."""
    found = [json.loads(line) for line in Path(summary.report).read_text().splitlines()]
    dropped = [(int(p["place"].rpartition(":")[2]), p) for p in found if p["action"] == DROP]
    lost = Counter(row for row, problem in dropped if _loses_group(problem))
    assert set(lost.values()) <= {1} and lost.keys() <= rows.keys()
    left = [row for row in rows if row not in lost]
    shard = GroupShard(summary.prefixes[0])
    assert len(left) == len(shard)
    for i, row in enumerate(left):
        without = {problem["response"] for of, problem in dropped if of == row}
        if rows[row] is not None:
            assert len(shard[i].responses) == rows[row] - len(without), row


def _loses_group(problem: dict[str, Any]) -> bool:
    return KINDS[problem["kind"]].drops == "group" or problem["response"] is None  # special tokens in the prompt


def _check_fuzzed(rows: list[bytes], chosen: dict[str, str], folder: Path, fingerprint: str, out: Path) -> None:
    out.mkdir()
    content = b"\n".join(rows).replace(OURS.encode(), fingerprint.encode())
    (out / "in.jsonl").write_bytes(content)
    summary = _preprocessed(out / "in.jsonl", chosen, folder)
    if summary is not None and not content.startswith(b"["):  # else one JSON array, whose places are elements
        filled = {i: line for i, line in enumerate(content.split(b"\n"), 1) if line and not line.isspace()}
        _check_nothing_is_lost(summary, {i: _count_responses(line) for i, line in filled.items()})


def _count_responses(line: bytes) -> int | None:
    try:
        return len(json.loads(line.decode("utf-8", "replace"))["responses"])
    except (ValueError, TypeError, KeyError):  # it is no group, as the report should say
        return None


@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(rows=st.lists(lines, min_size=1, max_size=30), chosen=policies | lenient | lenient)
def test_fuzzed_lines_never_crash(tmp_path_factory, folder, fingerprint, rows, chosen):
    _check_fuzzed(rows, chosen, folder, fingerprint, tmp_path_factory.mktemp("fuzz") / "x")


@pytest.mark.soak
@pytest.mark.timeout(3600)
@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=st.lists(lines, min_size=100, max_size=120), chosen=policies | lenient)
def test_100_000_fuzzed_lines_never_crash(tmp_path_factory, folder, fingerprint, rows, chosen):
    _check_fuzzed(rows, chosen, folder, fingerprint, tmp_path_factory.mktemp("fuzz") / "x")


# What one policy drops changes what the next one sees.
PROMPTS = ["what?", "why?", "<|im_<|im_end|>end|>who?", "<|im_end|>", "long " * 50]
TEXTS = ["ok", "ok", "good", "fine", "ok<|im_end|>", "a<|im_start|>", "long " * 30, ""]
TOKEN_FIELDS: list[dict[str, Any]] = [{}, {}, {"logprobs": [-1.0]}, {"token_ids": [5], "logprobs": [1.0]}] + [
    {"token_ids": ids, "tokenizer": tokenizer, "logprobs": logprobs}
    for ids in ([5], [6, 7], [5, 1], [5, 2], [5, 2, 6], [])
    for tokenizer in (OURS, None)
    for logprobs in (None, [-1.0])
]


def _random_group(rng: random.Random, number: int) -> dict[str, Any]:
    made = [
        {
            "text": rng.choice(TEXTS),
            "source": rng.choice(["self", "teacher", "expert", "alien"]),
            "reward": rng.choice([0.0, 1.0, 1.0, float("nan")]),
            "finish_reason": rng.choice(["stop", "stop", "length"]),
            **rng.choice(TOKEN_FIELDS),
        }
        for _ in range(rng.randrange(1, 6))
    ]
    prompt = PROMPTS[min(int(rng.expovariate(1)), len(PROMPTS) - 1)]
    return {"id": str(number % 250), "prompt": prompt, "responses": made}


@pytest.mark.parametrize("seed", range(8))
def test_policies_together_lose_nothing(seed, tmp_path, folder, fingerprint):
    rng = random.Random(seed)
    rows = [json.dumps(_random_group(rng, number)).encode() for number in range(300)]
    changed = {name: rng.choice([c for c in KINDS[name].choices if c != ERROR]) for name in KINDS}
    chosen = MILDEST | {name: changed[name] for name in rng.sample(list(KINDS), 8)}
    chosen |= {"special_tokens": (KEEP, FIX, DROP)[seed % 3], "equal_rewards": DROP, "no_expert": DROP}
    _check_fuzzed(rows, chosen, folder, fingerprint, tmp_path / "x")
    assert list((tmp_path / "x").glob("train.json"))


# --- parquet ---------------------------------------------------------------------------------------------------------

cell_texts = st.sampled_from(
    [b"ok", b"ok", b"ok", b"other", b"more", b"\xff", b"a\xed\xa0\x80", b"<|im_end|>", b"", b" ", None]
)
json_texts = st.sampled_from(
    [None] * 9
    + ["null", "[1]", "5", "nope", "{}", '{"zzz": 1}', '{"zzz": "\\ud800"}', '{"text": "\\ud800"}']
    + ['{"zzz": ' + "[" * depth + "]" * depth + "}" for depth in (150, 5000)]
)
RESPONSE_CELLS: dict[str, tuple[pyarrow.DataType, st.SearchStrategy]] = {
    "text": (pyarrow.string(), cell_texts),
    "source": (pyarrow.string(), st.sampled_from([b"self", b"expert", b"self", b"expert", b"alien"])),
    "reward": (pyarrow.float64(), st.sampled_from([0.0, 1.0, 1.0, None, float("nan")])),
    "finish_reason": (pyarrow.string(), st.sampled_from([None, b"stop", b"length"])),
    "token_ids": (pyarrow.list_(pyarrow.int64()), st.none() | st.lists(st.integers(-1, 8), max_size=3)),
    "logprobs": (pyarrow.list_(pyarrow.float64()), st.sampled_from([None, None, [-1.0], [1.0]])),
    "tokenizer": (pyarrow.string(), st.sampled_from([None, OURS.encode()])),
    "extra": (pyarrow.string(), json_texts.map(lambda text: text and text.encode())),
    "sampling": (pyarrow.string(), json_texts.map(lambda text: text and text.encode())),
}
ROW_CELLS: dict[str, tuple[pyarrow.DataType, st.SearchStrategy]] = {
    "id": (pyarrow.string(), st.integers(0, 99).map(lambda number: str(number).encode()) | cell_texts),
    "prompt": (pyarrow.string(), cell_texts),
    "meta": (pyarrow.string(), json_texts.map(lambda text: text and text.encode())),
    "verifier": (pyarrow.binary(), st.sampled_from([None, b"\xff"])),
    "at": (pyarrow.timestamp("ns"), st.sampled_from([0, 1000, None] * 5 + [1])),
    "price": (pyarrow.decimal128(5, 2), st.just(None)),
}
cell_responses = st.fixed_dictionaries({name: cells for name, (_, cells) in RESPONSE_CELLS.items()})
cell_rows = st.tuples(
    st.fixed_dictionaries({name: cells for name, (_, cells) in ROW_CELLS.items()}),
    st.lists(cell_responses, max_size=3),
)


def _column(values: list, kind: pyarrow.DataType) -> pyarrow.Array:
    """Text is given as bytes, which need not be UTF-8."""
    if kind == pyarrow.string():
        return pyarrow.array(values, pyarrow.binary()).view(kind)
    return pyarrow.array(values, kind)


def _write_cells(path: Path, rows: list[tuple[dict, list[dict]]], fingerprint: str) -> None:
    made = [response for _, responses in rows for response in responses]
    for response in made:
        response["tokenizer"] = response["tokenizer"] and fingerprint.encode()
    columns = {name: _column([row[name] for row, _ in rows], kind) for name, (kind, _) in ROW_CELLS.items()}
    fields = [_column([response[name] for response in made], kind) for name, (kind, _) in RESPONSE_CELLS.items()]
    ends = np.cumsum([0, *(len(responses) for _, responses in rows)]).astype(np.int32)
    structs = pyarrow.StructArray.from_arrays(fields, list(RESPONSE_CELLS))
    columns["responses"] = pyarrow.ListArray.from_arrays(pyarrow.array(ends), structs)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(rows=st.lists(cell_rows, min_size=1, max_size=30), chosen=lenient | policies)
def test_fuzzed_cells_never_crash(tmp_path_factory, folder, fingerprint, rows, chosen):
    source = tmp_path_factory.mktemp("fuzz") / "in.parquet"
    _write_cells(source, rows, fingerprint)
    summary = _preprocessed(source, chosen, folder)
    if summary is not None:
        _check_nothing_is_lost(summary, {i: len(responses) for i, (_, responses) in enumerate(rows, 1)})
