"""The benchmark of the head runs, and its memory goal holds (memory, unlike time, can be asserted in a test)."""

import json
import os
import subprocess
import sys

import pytest

from tools.bench.head import HeadShape, head_memory
from tools.bench.timing import summary


def test_peak_memory_is_one_chunk_of_logits():
    """512 MB of logits in all, chunks of 64 MB; 5 MB of it are the block buffer and the GEMM library's own."""
    result = head_memory(HeadShape(tokens=4096, vocab=32000, hidden=32, chunk_tokens=512), ("fused", "fused_main_grad"))
    assert set(result["ratios"]) == {"fused extra / chunk", "fused_main_grad extra / chunk"}
    for name, ratio in result["ratios"].items():
        assert 0.9 < ratio <= 1.1, (name, ratio)


def test_timing_runs_every_implementation():
    script = (
        "import json; from tools.bench.head import HeadShape, head_time, masked_rows\n"
        "shape = HeadShape(tokens=32, vocab=128, hidden=16, chunk_tokens=8)\n"
        "print(json.dumps([head_time(shape, repeats=2), masked_rows(shape, repeats=2)]))"
    )
    child = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert child.returncode == 0, child.stderr
    time, rows = json.loads(child.stdout.splitlines()[-1])
    assert set(time["runs"]) == {
        "three_gemms",
        "fused",
        "fused_sft",
        "fused_entropy",
        "fused_main_grad",
        "torch_cross_entropy",
        "megatron_unfused",
        "megatron_fused",
    }
    assert time["runs"]["three_gemms"]["ratio_median"] == 1
    assert all(value > 0 for value in time["ratios"].values())
    assert rows["ratios"]["fraction"] == 0.5


def test_summary_pairs_the_rounds():
    result = summary({"base": [1.0, 2.0, 4.0], "run": [2.0, 4.0, 4.0]}, "base")["run"]
    assert result["ratio_of_min"] == 2 and result["ratio_median"] == 2
    assert result["seconds_min"] == 2 and result["seconds_median"] == 4
    assert result["ratio_quartile_low"] == pytest.approx(1) and result["ratio_quartile_high"] == 2
