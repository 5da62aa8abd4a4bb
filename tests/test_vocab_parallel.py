"""Vocab-parallel log-probabilities and the fused head against a dense softmax in float64, in one to four ranks."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from megatron_gft.gft import token_coefficient
from megatron_gft.objectives import HeadSettings
from megatron_gft.vocab_parallel import linear_gft_loss, vocab_parallel_logprobs

TAU = 0.2


@dataclass
class Problem:
    """Whole tensors; ranks take their rows of ``weight``. ``vocab`` real rows, the rest is padding."""

    hidden: torch.Tensor
    weight: torch.Tensor
    labels: torch.Tensor
    token_weights: torch.Tensor
    vocab: int

    def to(self, dtype: torch.dtype) -> "Problem":
        wide = torch.promote_types(dtype, torch.float32)
        return replace(
            self,
            hidden=self.hidden.to(dtype),
            weight=self.weight.to(dtype),
            token_weights=self.token_weights.to(wide),
        )

    def rows(self, kept: torch.Tensor) -> "Problem":
        """The rows where ``kept`` [T] is true."""
        return replace(self, hidden=self.hidden[kept], labels=self.labels[kept], token_weights=self.token_weights[kept])

    def on(self, device: str) -> "Problem":
        tensors = {name: value.to(device) for name, value in vars(self).items() if name != "vocab"}
        return replace(self, **tensors)


def make_problem(rows: int = 37, hidden: int = 16, vocab: int = 101, padded: int = 104, seed: int = 0) -> Problem:
    """Rows lean towards their labels, so that p falls on both sides of tau; weights span signs and decades."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(padded, hidden, dtype=torch.float64, generator=g)
    labels = torch.randint(0, vocab, (rows,), generator=g)
    labels[:2] = torch.tensor([0, vocab - 1])[:rows]
    lean = torch.rand(rows, 1, dtype=torch.float64, generator=g)
    states = torch.randn(rows, hidden, dtype=torch.float64, generator=g) * 0.5 + 0.6 * lean * weight[labels]
    token_weights = torch.randn(rows, dtype=torch.float64, generator=g) * 10 ** torch.randint(
        -2, 2, (rows,), generator=g
    )
    return Problem(states, weight, labels, token_weights, vocab)


def dense(problem: Problem, coefficient: str = "rectified") -> dict[str, torch.Tensor]:
    """The loss by a full softmax in float64, differentiated by autograd."""
    hidden = problem.hidden.detach().double().requires_grad_()
    weight = problem.weight.detach().double().requires_grad_()
    table = torch.log_softmax(hidden @ weight[: problem.vocab].t(), dim=1)
    logprobs = table.gather(1, problem.labels[:, None])[:, 0]
    c = token_coefficient(logprobs, TAU, coefficient)
    loss = -(problem.token_weights.double() * c * logprobs).sum()
    loss.backward()
    scale = (problem.token_weights * c * logprobs).abs().sum().item()
    return {
        "loss": loss.detach(),
        "logprobs": logprobs.detach(),
        "entropy": -(table.exp() * table).sum(1).detach(),
        "hidden": hidden.grad,
        "weight": weight.grad,
        "scale": scale,
    }


def assert_both_branches(logprobs: torch.Tensor) -> None:
    p = logprobs.exp()
    assert (p > TAU).any() and (p < TAU).any() and ((p - TAU).abs() > 1e-4).all()


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want).norm() / want.norm().clamp(min=1e-300)).item()


def tp_group():
    return dist.group.WORLD if dist.is_initialized() else None


def local_rows(problem: Problem) -> slice:
    group = tp_group()
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    shard = len(problem.weight) // size
    return slice(rank * shard, (rank + 1) * shard)


def fused_loss(problem: Problem, hidden: torch.Tensor, weight: torch.Tensor, **options):
    """The fused head on the problem's labels and token weights."""
    options = {"tau": TAU, "tp_group": tp_group(), "vocab_size": problem.vocab} | options
    return linear_gft_loss(hidden, weight, problem.labels, problem.token_weights, **options)


def leaves(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and this rank's rows of the matrix, with gradients to come."""
    return problem.hidden.clone().requires_grad_(), problem.weight[local_rows(problem)].clone().requires_grad_()


def fused_on_rank(problem: Problem, options: dict) -> dict[str, torch.Tensor]:
    """Loss, gradients and metrics of the fused head on this rank's rows of the matrix."""
    hidden, weight = leaves(problem)
    loss, logprobs, entropy = fused_loss(problem, hidden, weight, **options)
    loss.backward()
    assert not logprobs.requires_grad
    result = {"loss": loss.detach(), "logprobs": logprobs, "hidden": hidden.grad, "weight": weight.grad}
    return result if entropy is None else result | {"entropy": entropy}


def logprobs_on_rank(problem: Problem, coefficient: str) -> dict[str, torch.Tensor]:
    """The same through logits and ``vocab_parallel_logprobs``; the hidden gradient is summed by hand."""
    hidden, weight = leaves(problem)
    logits = hidden @ weight.t()
    kept = logits.detach().clone()
    logprobs = vocab_parallel_logprobs(logits, problem.labels, tp_group(), vocab_size=problem.vocab)
    loss = -(problem.token_weights * token_coefficient(logprobs, TAU, coefficient) * logprobs).sum()
    loss.backward()
    assert torch.equal(logits, kept)
    if dist.is_initialized():
        dist.all_reduce(hidden.grad)
    return {"loss": loss.detach(), "logprobs": logprobs.detach(), "hidden": hidden.grad, "weight": weight.grad}


def check(results: list[dict], want: dict, loss_tolerance: float, gradient_tolerance: float) -> None:
    """Every rank agrees bit for bit on what is replicated; the shards together equal the dense gradient."""
    for result in results[1:]:
        for name in result.keys() - {"weight"}:
            assert torch.equal(result[name], results[0][name]), f"{name} differs between ranks"
    first = results[0]
    assert abs(first["loss"].item() - want["loss"].item()) <= loss_tolerance * want["scale"]
    assert error(first["hidden"], want["hidden"]) <= gradient_tolerance
    assert error(torch.cat([r["weight"] for r in results]), want["weight"]) <= gradient_tolerance
    if "entropy" in first:
        assert error(first["entropy"], want["entropy"]) <= gradient_tolerance


PRECISIONS = [
    pytest.param(torch.float64, 1e-12, 1e-12, id="fp64"),
    pytest.param(torch.float32, 1e-6, 5e-6, id="fp32"),
]


@pytest.mark.parametrize(("dtype", "loss_tolerance", "gradient_tolerance"), PRECISIONS)
@pytest.mark.parametrize("coefficient", ["rectified", "none", "probability"])
@pytest.mark.parametrize("chunk_tokens", [1, 8, 64])
def test_fused_head_equals_dense_softmax(dtype, loss_tolerance, gradient_tolerance, coefficient, chunk_tokens):
    problem = make_problem().to(dtype)
    want = dense(problem, coefficient)
    assert_both_branches(want["logprobs"])
    options = {"coefficient": coefficient, "chunk_tokens": chunk_tokens, "entropy": True}
    got = fused_on_rank(problem, options)
    assert got["logprobs"].dtype == got["entropy"].dtype == dtype
    check([got], want, loss_tolerance, gradient_tolerance)


@pytest.mark.parametrize(("dtype", "loss_tolerance", "gradient_tolerance"), PRECISIONS)
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(("vocab", "padded"), [(101, 104), (104, 104), (33, 104), (26, 52)])
def test_fused_head_over_tensor_parallel_ranks(dtype, loss_tolerance, gradient_tolerance, world_size, vocab, padded):
    """Odd vocabularies; at 33 of 104 rows, two of four ranks hold nothing but padding."""
    problem = make_problem(vocab=vocab, padded=padded, seed=1).to(dtype)
    want = dense(problem)
    assert_both_branches(want["logprobs"])
    results = run_ranks(world_size, fused_on_rank, problem, {"chunk_tokens": 10, "entropy": True})
    check(results, want, loss_tolerance, gradient_tolerance)


@pytest.mark.parametrize(("dtype", "loss_tolerance", "gradient_tolerance"), PRECISIONS)
@pytest.mark.parametrize("coefficient", ["rectified", "none", "probability"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_logprobs_over_tensor_parallel_ranks(dtype, loss_tolerance, gradient_tolerance, coefficient, world_size):
    problem = make_problem(seed=2).to(dtype)
    if world_size == 1:
        results = [logprobs_on_rank(problem, coefficient)]
    else:
        results = run_ranks(world_size, logprobs_on_rank, problem, coefficient)
    want = dense(problem, coefficient)
    assert_both_branches(want["logprobs"])
    # float32 log-probs of wide logits: rounding of logits of magnitude ~10 dominates
    atol = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(results[0]["logprobs"].double(), want["logprobs"], rtol=0, atol=atol)
    check(results, want, loss_tolerance, gradient_tolerance)


def test_logprobs_pass_gradcheck():
    problem = make_problem(rows=5, vocab=6, padded=8)
    logits = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: vocab_parallel_logprobs(z, problem.labels, vocab_size=6), (logits,))


def test_padding_has_no_probability_and_no_gradient():
    """Padding rows are zeros in a converted checkpoint; their logit 0 is not small beside real logits here."""
    problem = make_problem(vocab=33, padded=104)
    problem.weight[33:] = 0
    masked = fused_on_rank(problem, {})
    unmasked = fused_on_rank(replace(problem, vocab=104), {})
    assert (masked["weight"][33:] == 0).all() and (unmasked["weight"][33:] != 0).any()
    assert (masked["logprobs"] > unmasked["logprobs"]).all()


def test_label_in_the_padding_is_not_a_silent_number():
    logprobs = vocab_parallel_logprobs(torch.zeros(1, 8), torch.tensor([7]), vocab_size=6)
    assert logprobs.item() == -torch.inf


@pytest.mark.parametrize("world_size", [1, 2])
def test_no_rows(world_size):
    """A pack without loss rows still takes part in forward and backward, with zero gradients."""
    problem = make_problem(rows=0)
    options = {"entropy": True}
    ranks = [fused_on_rank(problem, options)] if world_size == 1 else run_ranks(2, fused_on_rank, problem, options)
    for result in ranks:
        assert result["loss"] == 0 and result["logprobs"].shape == result["entropy"].shape == (0,)
        assert result["hidden"].shape == (0, 16) and (result["weight"] == 0).all()


def test_rows_of_weight_zero_change_nothing():
    problem = make_problem()
    problem.token_weights[::3] = 0
    kept = problem.token_weights != 0
    smaller = problem.rows(kept)
    got, want = fused_on_rank(problem, {}), fused_on_rank(smaller, {})
    assert (got["hidden"][~kept] == 0).all()
    torch.testing.assert_close(got["hidden"][kept], want["hidden"], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(got["weight"], want["weight"], rtol=1e-11, atol=1e-13)
    problem.token_weights[:] = 0
    masked = fused_on_rank(problem, {})
    assert masked["loss"] == 0 and (masked["hidden"] == 0).all() and (masked["weight"] == 0).all()


@pytest.mark.parametrize("size", [1e3, 1e30])
def test_large_logits_do_not_overflow(size):
    """The label at the top: p = 1. The label far below: ce = size, p = 0, so weight, loss and gradient are 0."""
    hidden = torch.tensor([[size, 1.0], [size, 1.0]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    loss, logprobs, entropy = linear_gft_loss(
        hidden, weight, torch.tensor([0, 1]), torch.ones(2), tau=TAU, entropy=True
    )
    loss.backward()
    assert loss == 0 and logprobs[0] == 0 and logprobs[1].item() == pytest.approx(1 - size)
    assert (entropy == 0).all() and (hidden.grad == 0).all() and (weight.grad == 0).all()


@pytest.mark.parametrize("world_size", [1, 2])
def test_bf16_stays_near_float64(world_size):
    """Tolerance: logits are rounded to bf16 (2^-9 of |logit| <= 8, so 1.6 % of p), p itself is float32.

    The decision at tau is taken from the same p on all ranks; rows whose p is within that noise of tau are left
    out, since either branch is right there.
    """
    problem = make_problem(rows=64, hidden=32, seed=3).to(torch.bfloat16)
    problem.hidden /= 4
    problem = problem.rows((dense(problem)["logprobs"].exp() / TAU - 1).abs() > 0.05)
    want = dense(problem)
    assert_both_branches(want["logprobs"])
    options = {"chunk_tokens": 16, "entropy": True}
    results = [fused_on_rank(problem, options)] if world_size == 1 else run_ranks(2, fused_on_rank, problem, options)
    assert results[0]["logprobs"].dtype == torch.float32 and results[0]["hidden"].dtype == torch.bfloat16
    check(results, want, 5e-3, 1.5e-2)


class CountMatmuls(torch.utils._python_dispatch.TorchDispatchMode):
    """Rows of every matrix product under it."""

    def __init__(self):
        super().__init__()
        self.products = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.products.append(tuple(a.shape for a in args if isinstance(a, torch.Tensor)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("needing", "enabled", "products"),
    [(("hidden",), False, 3), ((), True, 3), (("hidden",), True, 6), (("weight",), True, 6)],
)
def test_only_what_is_needed_is_computed(needing, enabled, products):
    """Three chunks: a GEMM each for the logits, and one more for each gradient that somebody wants."""
    problem = make_problem()
    want = fused_on_rank(problem, {"chunk_tokens": 16, "entropy": True})
    inputs = {name: getattr(problem, name).clone().requires_grad_(name in needing) for name in ("hidden", "weight")}
    with CountMatmuls() as count, torch.set_grad_enabled(enabled):
        loss, logprobs, entropy = fused_loss(problem, **inputs, chunk_tokens=16, entropy=True)
    assert len(count.products) == products and loss.requires_grad == (enabled and bool(needing))
    assert torch.equal(loss, want["loss"])
    assert torch.equal(logprobs, want["logprobs"]) and torch.equal(entropy, want["entropy"])
    if loss.requires_grad:
        loss.backward()
        assert error(inputs[needing[0]].grad, dense(problem)[needing[0]]) <= 1e-12


def test_upstream_gradient_scales_both_gradients_once():
    problem = make_problem()
    hidden, weight = leaves(problem)
    loss, _, _ = fused_loss(problem, hidden, weight, loss_scale=64.0)
    (-2.5 * loss).backward(retain_graph=True)
    want = dense(problem)
    assert error(hidden.grad, -2.5 * want["hidden"]) <= 1e-12
    assert error(weight.grad, -2.5 * want["weight"]) <= 1e-12
    with pytest.raises(RuntimeError, match="backward ran twice"):
        loss.backward()


def into_main_grad(problem: Problem, dtype: torch.dtype, upstream: float, loss_scale: float, tied: bool):
    hidden, weight = leaves(problem)
    weight.main_grad = torch.ones(weight.shape, dtype=dtype, device=weight.device)
    weight.grad_added_to_main_grad, weight.zero_out_wgrad = False, tied
    options = {"chunk_tokens": 10, "accumulate_into_main_grad": True, "loss_scale": loss_scale}
    (upstream * fused_loss(problem, hidden, weight, **options)[0]).backward()
    return hidden, weight


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("loss_scale", [1.0, 1024.0])
def test_weight_gradient_goes_into_main_grad(tied, loss_scale):
    """Added to what is there; autograd gets a placeholder, zeros where the hook will add it (tied weights)."""
    problem = make_problem()
    want = dense(problem)
    hidden, weight = into_main_grad(problem, torch.float64, loss_scale, loss_scale, tied)
    assert error(weight.main_grad - 1, loss_scale * want["weight"]) <= 1e-12
    assert error(hidden.grad, loss_scale * want["hidden"]) <= 1e-12
    assert weight.grad_added_to_main_grad and weight.grad.shape == weight.shape
    assert not tied or (weight.grad == 0).all()


@pytest.mark.parametrize("padded", [104, 9000])
def test_half_precision_weight_gradient_accumulates_in_float32(padded):
    """9000 rows take more than one slice of the vocabulary."""
    problem = make_problem(padded=padded).to(torch.bfloat16)
    _, weight = into_main_grad(problem, torch.float32, 1.0, 1.0, tied=False)
    separate = fused_on_rank(problem, {"chunk_tokens": 10})
    assert error(weight.main_grad - 1, separate["weight"].double()) <= 4e-3  # one rounding to bf16
    assert error(weight.main_grad - 1, dense(problem)["weight"]) <= 2.5e-2


def test_wrong_upstream_gradient_with_main_grad_is_refused():
    with pytest.raises(RuntimeError, match="upstream gradient is not loss_scale"):
        into_main_grad(make_problem(), torch.float64, 2.0, 1.0, tied=False)


@pytest.mark.parametrize(
    ("asked", "columns", "itemsize", "rows"),
    [(None, 128256, 2, 2092), (None, 16032, 2, 16743), (None, 2**30, 4, 1), (2048, 16032, 2, 2048)],
)
def test_chunks_are_as_large_in_bytes_whatever_the_vocabulary(asked, columns, itemsize, rows):
    assert HeadSettings(chunk_tokens=asked).chunk_rows(columns, itemsize) == rows


def largest_storage(problem: Problem, chunk_tokens: int) -> int:
    """Elements of the largest tensor made in forward and backward."""
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                sizes.append(out.untyped_storage().nbytes() // out.element_size())
            return out

    with Watch():
        fused_on_rank(problem, {"chunk_tokens": chunk_tokens})
    return max(sizes)


def test_logits_of_all_rows_never_exist():
    problem = make_problem(rows=200, hidden=4, vocab=500, padded=500)
    assert largest_storage(problem, chunk_tokens=20) == 20 * 500


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "loss_tolerance", "gradient_tolerance"),
    [*PRECISIONS, pytest.param(torch.bfloat16, 5e-3, 1.5e-2, id="bf16")],
)
@pytest.mark.parametrize("main_grad", [False, True])
def test_fused_head_on_the_gpu(dtype, loss_tolerance, gradient_tolerance, main_grad):
    """Covers what a CPU cannot: the GEMM that adds half-precision products to a float32 gradient."""
    problem = make_problem(rows=300, hidden=64, vocab=1003, padded=1024, seed=7).to(dtype).on("cuda")
    problem.hidden /= 4
    noise = 0.05 if dtype == torch.bfloat16 else 1e-3
    problem = problem.rows((dense(problem)["logprobs"].exp() / TAU - 1).abs() > noise)
    want = dense(problem)
    assert_both_branches(want["logprobs"])
    if not main_grad:
        check([fused_on_rank(problem, {"chunk_tokens": 64})], want, loss_tolerance, gradient_tolerance)
        return
    wide = torch.promote_types(dtype, torch.float32)
    hidden, weight = into_main_grad(problem, wide, 1.0, 1.0, tied=True)
    assert error(weight.main_grad - 1, want["weight"]) <= gradient_tolerance
    assert error(hidden.grad, want["hidden"]) <= gradient_tolerance
