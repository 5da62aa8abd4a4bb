"""The step benchmarks on tiny shapes: they run the real step, and what they report about exactness holds."""

import dataclasses
import math

import pytest
from ranks import run_ranks

from tools.bench import step as bench_step
from tools.bench.step import StepShape

TINY = StepShape(
    layers=1,
    hidden=32,
    heads=4,
    kv_heads=2,
    ffn=48,
    vocab=67,
    groups=4,
    prompt=12,
    response=9,
    responses=4,
    pack_rows=120,
)


def alone(function, *args, **options):
    """Run in a forked process, which ``single_rank`` turns into a job of one."""

    def run():
        import torch.distributed as dist

        dist.destroy_process_group()  # run_ranks made one
        return function(*args, **options)

    return run_ranks(1, run)[0]


@pytest.mark.parametrize("name", ["step_ratio", "dead_groups"])
def test_ratios_are_reported_with_their_spread(name):
    result = alone(getattr(bench_step, name), TINY, pairs=3)
    contestant = result["gft" if name == "step_ratio" else "half_dead"]
    low, middle, high = (contestant[f"ratio_{q}"] for q in ("quartile_low", "median", "quartile_high"))
    assert 0 < low <= middle <= high and math.isfinite(high)
    assert result["shape"] == dataclasses.asdict(TINY)


def test_dead_groups_take_half_of_the_rows_and_change_no_gradient():
    result = alone(bench_step.dead_groups, TINY, pairs=1)
    assert result["rows_half_dead"] * 2 == result["rows_all_live"]
    assert result["gradient_error"] <= 1e-6


def test_shared_prefix_reports_speed_against_the_formula_and_the_same_gradient(monkeypatch):
    monkeypatch.setattr(bench_step, "PREFIX_SHAPES", ((20, 6, 4, 0.9), (6, 10, 3, 0.9)))
    rows = alone(bench_step.shared_prefix_step, TINY, pairs=1)["rows"]
    for row in rows:
        assert row["formula"] > 1 and row["attained"] == pytest.approx(row["speedup"] / row["formula"])
        assert row["gradient_error"] <= 2e-6
    assert rows[0]["formula"] > rows[1]["formula"]


def test_padded_batches_waste_rows_and_give_the_same_gradient():
    result = alone(bench_step.padded_batches, dataclasses.replace(TINY, groups=3, pack_rows=4096), pairs=1)
    assert result["rows_ratio"]["shared_prefix"] > result["rows_ratio"]["packed"] > 1
    assert max(result["gradient_error"].values()) <= 2e-6


def test_the_breakdown_adds_up_and_counts_the_rows_in_the_head():
    result = alone(bench_step.step_breakdown, TINY, repeats=2)
    parts = {name: value for name, value in result["seconds"].items() if name not in ("head", "total")}
    assert result["seconds"]["total"] == pytest.approx(sum(parts.values()))
    assert result["seconds"]["head"] <= result["seconds"]["forward"]
    assert result["rows_in_head"] == result["loss_tokens"] == 4 * 4 * 9 < result["rows"]
