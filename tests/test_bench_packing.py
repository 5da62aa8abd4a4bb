"""The packing benchmarks on tiny sizes: their formula is the published one, and both forms train the same."""

import pytest

from tools.bench.packing import Trunk, bench_planner, bench_shared_prefix

SIZES = dict(layers=2, hidden=32, heads=4, kv_heads=2, ffn=48)


@pytest.mark.parametrize(("prompt", "response", "responses"), [(7, 5, 3), (20, 1, 2), (1, 9, 4)])
def test_shared_prefix_bench(prompt, response, responses):
    (row,) = bench_shared_prefix(shapes=[(prompt, response, responses)], repeats=1, **SIZES)
    assert row["gradient_error"] <= 1e-6
    # Per group: G (2 N n + 4 h L pairs) against 2 N (P + G r) + 4 h L (pairs of the tree), r = R - 1 input rows.
    parameters = Trunk(**SIZES).flop_model.linear_per_token / 6
    total, tail = prompt + response - 1, response - 1
    attention = 4 * SIZES["hidden"] * SIZES["layers"]

    def triangle(n):
        return n * (n + 1) / 2

    packed = responses * (2 * parameters * total + attention * triangle(total))
    pairs = triangle(prompt) + responses * (triangle(total) - triangle(prompt))
    shared = 2 * parameters * (prompt + responses * tail) + attention * pairs
    assert row["formula"] == pytest.approx(packed / shared)
    assert row["rows_packed"] == responses * total and row["rows_shared_prefix"] == prompt + responses * tail
    assert row["attained"] == pytest.approx(row["speedup"] / row["formula"])


def test_planner_bench_covers_shapes_and_forms():
    rows = bench_planner((2,), seeds=1, repeats=1)
    assert {(row["shape"], row["packing"]) for row in rows} == {
        (shape, packing)
        for shape in ("gsm8k", "math", "long_prompt")
        for packing in ("packed", "shared_prefix", "auto")
    }
    assert all(0 < row["balance_min"] <= row["balance_mean"] <= 1 and row["cpu_ms_max"] > 0 for row in rows)
