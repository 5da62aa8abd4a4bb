"""The data benchmarks compare like with like: same text, same tokens."""

from __future__ import annotations

from tools.bench.data import (
    bench_open,
    bench_preprocess_workers,
    bench_shard_reading,
    compare_preprocessing,
    synthetic_records,
    synthetic_tokenizer,
)
from tools.bench.timing import lockstep_seconds


def test_both_ways_write_the_same_tokens_of_flat_text(tmp_path):
    records = synthetic_records(20, 1)
    folder = synthetic_tokenizer(tmp_path / "tokenizer", records, vocab_size=500)
    flat = compare_preprocessing(records, folder, "none", repeats=1)
    assert flat["responses"] == 20 and flat["speed_up"] > 0
    assert 0.98 < flat["token_ratio"] < 1.02  # a prompt ends in a token of its own
    grouped = compare_preprocessing(synthetic_records(5, 8), folder, "none", repeats=1)
    assert grouped["token_ratio"] < 0.8


def test_lockstep_takes_turns_until_both_have_ended():
    turns = []

    def run(name, steps):
        for _ in range(steps):
            turns.append(name)
            yield

    durations = lockstep_seconds({"a": lambda: run("a", 3), "b": lambda: run("b", 1)}, repeats=2, warmup=1)
    assert turns == ["b", "a", "a", "a"] * 3
    assert all(len(values) == 2 and min(values) > 0 for values in durations.values())


def test_workers_are_compared_with_processes_apart():
    result = bench_preprocess_workers(groups=6, repeats=2)
    assert result["workers"] == 2 and result["wall_seconds"].keys() == {"one", "several", "apart"}
    assert result["speed_up"] > 0 and result["ceiling"] > 0


def test_reading_and_opening(tmp_path):
    reading = bench_shard_reading(groups=60, responses=2, mean_length=10)
    assert reading["groups_per_cpu_second"].keys() == {"shard", "dataset", "table of 128 groups"}
    assert bench_open(groups=1000, responses=3)["open_seconds"] < 1
