"""The head's Triton kernels in Triton's interpreter on the CPU, against float64 of the formulas and the eager passes.

The interpreter truncates where a GPU rounds to half precision, so a stored half-precision gradient may be off by one
unit in the last place, and not by half of one.
"""

import pytest
import torch
from ranks import run_ranks

pytest.importorskip("triton")
from megatron_gft import cpu, head_rows, row_kernels, vocab_parallel
from megatron_gft.gft import RowFacts

LAST_PLACE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
DTYPES = list(LAST_PLACE)


def formulas(logits, labels, start, valid):
    """Maximum, sum, target, sum of e log e of one rank's columns [T, valid] in float64."""
    x = logits[:, :valid].double()
    top = x.amax(1)
    e = (x - top[:, None]).exp()
    columns = labels - start
    owned = (columns >= 0) & (columns < valid)
    target = torch.where(owned, x.gather(1, columns.clamp(0, valid - 1)[:, None])[:, 0], -torch.inf)
    return torch.stack([top, e.sum(1), target, torch.xlogy(e, e).sum(1)])


def random_rows(columns, dtype, *, spread=3.0, rows=5):
    generator = torch.Generator().manual_seed(columns)
    return (torch.randn(rows, columns, generator=generator) * spread).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 7, 2047, 2048, 4099])
@pytest.mark.parametrize("padding", [0, 3])
def test_statistics_equal_the_formulas(columns, padding, dtype):
    logits = random_rows(columns + padding, dtype)
    logits[:, columns:] = 1e4  # padding is never read
    start = 100
    labels = torch.tensor([start, start + columns - 1, start + columns // 2, start - 1, start + columns])
    before = logits.clone()
    found = row_kernels.row_statistics(logits, labels, start, columns, entropy=True).double()
    torch.testing.assert_close(found, formulas(logits, labels, start, columns), rtol=1e-5, atol=1e-5)
    assert torch.equal(logits, before)
    without = row_kernels.row_statistics(logits, labels, start, columns)
    assert torch.equal(without.double(), found[:3])


@pytest.mark.parametrize("value", [1e4, -1e4])
def test_extreme_logits_stay_finite(value):
    logits = random_rows(3000, torch.float32)
    logits[0] = value
    logits[1, 2500] = value
    logits[2, :2048], logits[2, 2048:] = -value, value  # a lane that rises, or falls, after its first block
    labels = torch.tensor([0, 2500, 2100, 5, 6])
    found = row_kernels.row_statistics(logits, labels, 0, 3000, entropy=True).double()
    torch.testing.assert_close(found, formulas(logits, labels, 0, 3000), rtol=1e-5, atol=1e-5)


def test_what_is_not_finite_shows():
    logits = random_rows(2100, torch.float32)
    logits[0, 2099], logits[1, 3], logits[2, 7] = torch.nan, torch.inf, -torch.inf
    sums = row_kernels.row_statistics(logits, torch.zeros(5, dtype=torch.long), 0, 2100)[1]
    assert sums.isnan().tolist() == [True, True, False, False, False]


def test_a_shard_of_padding_adds_nothing():
    statistics = row_kernels.row_statistics(torch.ones(2, 64), torch.tensor([3, 70]), 128, 0, entropy=True)
    assert statistics[0].tolist() == [torch.finfo(torch.float32).min] * 2
    assert statistics[1:].tolist() == [[0.0, 0.0], [-torch.inf] * 2, [0.0, 0.0]]
    assert row_kernels.row_statistics(torch.ones(0, 64), torch.tensor([], dtype=torch.long), 0, 64).shape == (3, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("columns", "padding"), [(1, 0), (7, 0), (4096, 0), (4099, 5)])
def test_gradient_equals_the_formula(columns, padding, dtype):
    logits, start = random_rows(columns + padding, dtype), 10
    labels = torch.tensor([start, start + columns - 1, start - 1, start + columns, start + columns // 2])
    weights = torch.tensor([1.0, -2.5, 0.3, 1e-3, 0.0])  # the last row is masked
    x = logits[:, :columns].double()
    top, sums, *_ = formulas(logits, labels, start, columns)
    partition = sums * 1.25  # other ranks hold the rest of it
    softmax = (x - top[:, None]).exp() / partition[:, None]
    owned = (labels >= start) & (labels < start + columns)
    logprobs = torch.where(owned, x.gather(1, (labels - start).clamp(0, columns - 1)[:, None])[:, 0] - top, 0.0)
    label_gradient = weights.double() * torch.expm1(logprobs - partition.log())
    expected = weights.double()[:, None] * softmax
    expected[owned, (labels - start)[owned]] = label_gradient[owned]
    arguments = (top.float(), (weights.double() / partition).float(), label_gradient.float())
    found = row_kernels.row_gradient_(logits, labels, start, columns, *arguments)
    assert found is logits and not found[:, columns:].any() and not found[4].any()
    torch.testing.assert_close(found[:, :columns].double(), expected, rtol=LAST_PLACE[dtype], atol=1e-6)


def test_where_triton_cannot_build_them_the_eager_passes_run_and_a_line_says_why(monkeypatch, caplog):
    """Images without a C compiler, or without Python's headers, have Triton all the same."""
    cpu.install()  # "cuda" is the CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert isinstance(head_rows.kernels.__wrapped__(), head_rows.RowPasses)

    def no_compiler(*_, **__):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(row_kernels, "row_statistics", no_compiler)
    with cpu.CudaToDevice("meta"):  # a plan on a machine with a GPU
        assert isinstance(head_rows.kernels.__wrapped__(), head_rows.RowPasses) and not caplog.text
    assert head_rows.kernels.__wrapped__() is None
    assert "Failed to find C compiler" in caplog.text and "-> install gcc" in caplog.text


# --- within the head --------------------------------------------------------------------------------------------------

ROWS, CHANNELS, VOCABULARY, PADDED = 11, 8, 297, 304
WEIGHTS = [[1.0, -0.5, 0.0, 2.0, 1e-3, 0.0, 0.7, -1.0, 0.3, 0.0, 1.5], [0.0] * ROWS]  # and rows that are all masked


def head(passes, dtype, objective, weights, tp_group=None):
    """Loss, log p, entropy, and both gradients of this rank, computed with ``passes``."""
    vocab_parallel.choose_passes = lambda _: passes
    rank, size = (0, 1) if tp_group is None else (tp_group.rank(), tp_group.size())
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, CHANNELS, generator=generator).to(dtype)
    matrix = torch.randn(PADDED, CHANNELS, generator=generator).to(dtype)
    labels = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    hidden, matrix = hidden.double(), matrix.double().chunk(size)[rank].clone()  # the twin has the same values
    dtype = torch.float64 if passes is head_rows.EAGER else dtype
    hidden, matrix = hidden.to(dtype).requires_grad_(), matrix.to(dtype).requires_grad_()
    sampled = -6.0 + torch.rand(ROWS, generator=generator)
    sampled[::4] = torch.nan
    facts = RowFacts(torch.tensor(weights).sign(), torch.arange(ROWS) % 3, sampled)
    settings = {"vocab_size": VOCABULARY, "entropy": True, "chunk_tokens": 4, "objective": objective}
    outputs = vocab_parallel.linear_gft_loss(
        hidden, matrix, labels, torch.tensor(weights), facts=facts, tp_group=tp_group, **settings
    )
    outputs[0].backward()
    return [tensor.detach().double() for tensor in (*outputs, hidden.grad, matrix.grad)]


def both_heads(dtype, objective, weights, size=1):
    group = torch.distributed.group.WORLD if size > 1 else None
    return [head(passes, dtype, objective, weights, group) for passes in (head_rows.EAGER, head_rows.kernels())]


@pytest.mark.parametrize("weights", WEIGHTS, ids=["mixed", "masked"])
@pytest.mark.parametrize("objective", ["gft", "sft", "dft", "grpo", "cispo", "luffy", "chord_phi"])  # every coefficient
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_the_head_is_that_of_float64(monkeypatch, dtype, error, objective, weights):
    monkeypatch.setattr(vocab_parallel, "choose_passes", None)  # put back what the cases set
    for expected, found in zip(*both_heads(dtype, objective, weights), strict=True):
        torch.testing.assert_close(found, expected, rtol=error, atol=error)


def test_the_head_is_that_of_float64_over_two_ranks():
    for eager, kernel in run_ranks(2, both_heads, torch.float32, "gft", WEIGHTS[0], 2):
        for expected, found in zip(eager, kernel, strict=True):
            torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)
