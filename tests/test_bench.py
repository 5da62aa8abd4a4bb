"""The benchmarks on tiny sizes: they compare like with like, and what they report about exactness holds."""

import dataclasses
import math

import pytest
from ranks import run_ranks

from tools.bench import data, head, packing, start_up, step
from tools.bench.timing import summary
from tools.bench.workbench import StepShape

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


# --- steps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "contestant"),
    [
        ("step_ratio", "gft"),
        ("logprob_throughput", "step"),
    ],
)
def test_ratios_are_reported_with_their_spread(name, contestant):
    result = alone(getattr(step, name), TINY, pairs=3)
    low, middle, high = (result[contestant][f"ratio_{q}"] for q in ("quartile_low", "median", "quartile_high"))
    assert 0 < low <= middle <= high and math.isfinite(high)
    assert result["shape"] == dataclasses.asdict(TINY)
    if name == "logprob_throughput":
        rates = result["tokens_per_second"]
        assert rates["forward"] > rates["step"] > 0 and result["speedup"] > 1


def test_shared_prefix_reports_speed_against_the_formula_and_the_same_gradient():
    rows = alone(step.shared_prefix_step, TINY, pairs=1, shapes=((20, 6, 4, 0.9), (6, 10, 3, 0.9)))["rows"]
    for row in rows:
        assert row["formula"] > 1 and row["attained"] == pytest.approx(row["speedup"] / row["formula"])
        assert row["gradient_error"] <= 2e-6
    assert rows[0]["formula"] > rows[1]["formula"]


def test_padded_batches_waste_rows_and_give_the_same_gradient():
    result = alone(step.padded_batches, dataclasses.replace(TINY, groups=3, pack_rows=4096), pairs=1)
    assert result["rows_ratio"]["shared_prefix"] > result["rows_ratio"]["packed"] > 1
    assert max(result["gradient_error"].values()) <= 2e-6


# --- the head -------------------------------------------------------------------------------------------------------


@pytest.mark.slow  # a measurement of a process of its own
def test_peak_memory_of_the_head_is_one_chunk_of_logits():
    """512 MB of logits in all, chunks of 64 MB; 5 MB of it are the block buffer and the GEMM library's own."""
    shape = head.HeadShape(tokens=4096, vocab=32000, hidden=32, chunk_tokens=512)
    result = head.head_memory(shape, ("fused", "fused_main_grad"))
    assert set(result["ratios"]) == {"fused extra / chunk", "fused_main_grad extra / chunk"}
    for name, ratio in result["ratios"].items():
        assert 0.9 < ratio <= 1.1, (name, ratio)


def test_timing_runs_every_implementation_of_the_head():
    result = alone(head.head_time, head.HeadShape(tokens=32, vocab=128, hidden=16, chunk_tokens=8), repeats=2)
    ours = {"three_gemms", "fused", "fused_sft", "fused_entropy", "fused_main_grad"}
    assert set(result["runs"]) == ours | {"torch_cross_entropy", "megatron_unfused", "megatron_fused"}
    assert result["runs"]["three_gemms"]["ratio_median"] == 1
    assert all(value > 0 for value in result["ratios"].values())


def test_another_implementation_that_fails_hides_nothing(monkeypatch):
    def broken(self):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(head.Workload, "megatron_fused", broken)
    result = alone(head.head_time, head.HeadShape(tokens=32, vocab=128, hidden=16, chunk_tokens=8), repeats=2)
    assert result["failed"] == {"megatron_fused": "RuntimeError: no compiler"}
    assert "megatron_fused" not in result["runs"] and result["ratios"]["fused / megatron_unfused"] > 0


# --- plans and data -------------------------------------------------------------------------------------------------


def test_planner_bench_covers_shapes_and_forms():
    rows = packing.bench_planner((2,), seeds=1, repeats=1, large=((96, 2),))
    assert [(row["shape"], row["groups"]) for row in rows if row["groups"] > 64] == [("gsm8k", 96), ("math", 96)]
    assert {(row["shape"], row["packing"]) for row in rows} == {
        (shape, form) for shape in ("gsm8k", "math", "long_prompt") for form in ("packed", "shared_prefix", "auto")
    }
    assert all(0 < row["balance_min"] <= row["balance_mean"] <= 1 and row["cpu_ms_max"] > 0 for row in rows)


def test_both_ways_write_the_same_tokens_of_flat_text(tmp_path):
    records = data.synthetic_records(20, 1)
    folder = data.synthetic_tokenizer(tmp_path / "tokenizer", records, vocab_size=500)
    flat = data.compare_preprocessing(records, folder, "none", repeats=1)
    assert flat["responses"] == 20 and flat["speed_up"] > 0
    assert 0.98 < flat["token_ratio"] < 1.02  # a prompt ends in a token of its own
    grouped = data.compare_preprocessing(data.synthetic_records(5, 8), folder, "none", repeats=1)
    assert grouped["token_ratio"] < 0.8


# --- starting, and timing itself ------------------------------------------------------------------------------------


@pytest.mark.slow  # starts every tool; the benchmarks are no product
def test_help_of_every_tool_is_quick_and_a_first_row_is_timed():
    result = start_up.start_up(repeats=1)
    slow = {tool: run for tool, run in result["help"].items() if run["cpu_seconds"] > 0.6}  # the goal is 0.3
    assert len(result["help"]) >= 11 and not slow
    assert 0 < result["preprocess_first_row"]["cpu_seconds"]


def test_a_tool_that_fails_is_not_timed():
    with pytest.raises(RuntimeError, match=r"plot_run\.py --unknown: failed with status"):
        start_up._measure(["plot_run.py", "--unknown"])


def test_summary_pairs_the_rounds():
    result = summary({"base": [1.0, 2.0, 4.0], "run": [2.0, 4.0, 4.0]}, "base")["run"]
    assert result["ratio_of_min"] == 2 and result["ratio_median"] == 2
    assert result["seconds_min"] == 2 and result["seconds_median"] == 4
    assert result["ratio_quartile_low"] == pytest.approx(1) and result["ratio_quartile_high"] == 2
