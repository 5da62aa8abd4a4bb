"""The loss on plain tensors against formulas written out group by group in Python floats."""

import inspect
import math
import re

import naive_twin
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gft import gft
from megatron_gft.errors import InputError

MODES = ["std", "population", "mean_only", "rloo"]
EPS = 1e-6


def naive_advantages(groups: list[list[float]], mode: str) -> list[float]:
    """The twin's advantages, one group after the other."""
    return [value for rewards in groups for value in naive_twin.advantages(rewards, mode, EPS)]


def flatten(groups: list[list[float]], dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    rewards = torch.tensor([x for r in groups for x in r], dtype=dtype)
    ids = torch.tensor([g for g, r in enumerate(groups) for _ in r])
    return rewards, ids


GROUPS = [[1.0, 0.0, 0.0, 1.0, 0.0], [0.7], [0.0, 0.0, 0.0], [0.1, 0.1, 0.1], [-3.0, 250.0], [0.0]]


@pytest.mark.parametrize("mode", [*MODES, "none"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_advantages_equal_the_formulas(mode, dtype, tolerance):
    rewards, ids = flatten(GROUPS, dtype)
    got = gft.group_advantages(rewards, ids, mode=mode, eps=EPS)
    assert got.dtype == dtype
    want = torch.tensor(naive_advantages(GROUPS, mode), dtype=torch.float64)
    assert ((got.double() - want).abs() <= tolerance * want.abs().clamp(min=1)).all()


@settings(max_examples=60, deadline=None)
@given(
    groups=st.lists(
        st.lists(st.floats(-100, 100, allow_subnormal=False).map(lambda x: round(x, 3)), min_size=1, max_size=9),
        min_size=1,
        max_size=8,
    ),
    mode=st.sampled_from(MODES),
    seed=st.integers(0, 99),
)
def test_advantages_do_not_depend_on_row_order_or_id_values(groups, mode, seed):
    rewards, ids = flatten(groups)
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(seed))
    shuffled = gft.group_advantages(rewards[order], (ids * -17 + 5)[order], mode=mode)
    want = torch.tensor(naive_advantages(groups, mode), dtype=torch.float64)
    torch.testing.assert_close(shuffled, want[order], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e-30, 16777217.0])
def test_equal_rewards_give_exactly_zero(mode, dtype, value):
    """The mean of equal numbers is often not that number; divided by eps this would be a large advantage."""
    advantages = gft.group_advantages(torch.full((7,), value, dtype=dtype), torch.zeros(7).long(), mode=mode)
    assert (advantages == 0).all()


def test_integer_rewards_are_accepted():
    assert gft.group_advantages(torch.tensor([1, 0]), torch.tensor([3, 3]), mode="mean_only").tolist() == [0.5, -0.5]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_missing_reward_names_the_group_and_the_tool(bad):
    rewards, ids = torch.tensor([1.0, 0.0, bad, 1.0]), torch.tensor([4, 4, 9, 9])
    with pytest.raises(InputError, match=r"group\(s\) 9: .*tools/score_groups.py"):
        gft.group_advantages(rewards, ids)
    assert gft.group_advantages(rewards, ids, mode="none").tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(
    "call",
    [
        lambda: gft.group_advantages(torch.ones(1), torch.zeros(1), mode="grpo"),
        lambda: gft.response_weights(torch.ones(1), torch.ones(1), torch.zeros(1), normalize="batch"),
        lambda: gft.response_weights(torch.ones(1), torch.ones(1), torch.zeros(1), zero_variance="drop"),
        lambda: gft.token_coefficient(torch.zeros(1), 0.1, "clip"),
        lambda: gft.token_losses(torch.zeros(1), torch.ones(1), objective="ppo"),
    ],
)
def test_unknown_choices_are_refused_with_the_list(call):
    with pytest.raises(InputError, match="unknown value .* -> one of "):
        call()


@pytest.mark.parametrize("zero_variance", ["keep", "skip"])
@pytest.mark.parametrize("normalize", ["tokens", "sequences", "groups"])
def test_response_weights_equal_the_formulas(normalize, zero_variance):
    advantages, ids = flatten(GROUPS)
    advantages = torch.tensor(naive_advantages(GROUPS, "std"), dtype=torch.float64)
    lengths = torch.arange(1, len(ids) + 1) * 3 % 11 + 1
    weights, denominator = gft.response_weights(
        advantages, lengths, ids, normalize=normalize, zero_variance=zero_variance
    )
    dead = {2, 3, 5}  # equal rewards, and a lone response with reward 0
    live = [i for i, g in enumerate(ids.tolist()) if zero_variance == "keep" or g not in dead]
    responses = list(zip(ids.tolist(), lengths.tolist(), strict=True))
    u = {
        "tokens": [1.0 for _ in responses],
        "sequences": [1 / n for _, n in responses],
        "groups": [1 / (len(GROUPS[g]) * n) for g, n in responses],
    }[normalize]
    d = {
        "tokens": sum(lengths.tolist()[i] for i in live),
        "sequences": len(live),
        "groups": len({ids.tolist()[i] for i in live}),
    }[normalize]
    assert type(denominator) is int and denominator == d
    torch.testing.assert_close(weights, advantages * torch.tensor(u, dtype=torch.float64), rtol=1e-14, atol=0)


def test_only_dead_groups_leave_nothing_to_divide_by():
    zero, ones, ids = torch.zeros(4), torch.ones(4).long(), torch.tensor([0, 0, 1, 1])
    assert gft.response_weights(zero, ones, ids, zero_variance="skip")[1] == 0
    assert gft.response_weights(zero, ones, ids, zero_variance="keep")[1] == 4


def test_response_without_tokens_is_refused():
    with pytest.raises(InputError, match=r"without tokens in group\(s\) 8"):
        gft.response_weights(torch.ones(2), torch.tensor([3, 0]), torch.tensor([7, 8]))


def test_rectification_is_strict_at_tau():
    """p == tau keeps the coefficient p; the next larger p gets 1."""
    tau = 0.25
    logprobs = torch.tensor([0.25, 0.25 * (1 + 1e-15), 0.2, 0.9], dtype=torch.float64).log()
    p = logprobs.exp()
    assert p[0] == tau  # log and exp round-trip here, so equality is really tested
    assert gft.rectified_coefficient(logprobs, tau).tolist() == [0.25, 1.0, p[2].item(), 1.0]
    assert gft.token_coefficient(logprobs, tau, "none").tolist() == [1, 1, 1, 1]
    assert gft.token_coefficient(logprobs, tau, "probability").tolist() == p.tolist()


def test_improbable_token_has_weight_zero_and_finite_loss():
    """From ce = 104 on, exp(-ce) is 0 in float32."""
    logprobs = torch.tensor([-110.0], requires_grad=True)
    loss = gft.token_losses(logprobs, torch.tensor([1.0]))
    loss.sum().backward()
    assert loss.item() == 0 and logprobs.grad.item() == 0


def naive_token_loss(logit_row: torch.Tensor, label: int, advantage: float, objective: str, tau: float):
    """A * c * -log p for one token by a dense softmax."""
    p = logit_row.exp()[label] / logit_row.exp().sum()
    frozen = p.detach()
    c = {"gft": 1.0 if frozen > tau else frozen, "sft": 1.0, "dft": frozen}[objective]
    return advantage * c * -p.log()


@pytest.mark.parametrize("objective", ["gft", "sft", "dft"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("normalize", ["tokens", "sequences", "groups"])
@pytest.mark.parametrize("mode", [*MODES, "none"])
def test_whole_loss_and_gradient_equal_the_paper(objective, dtype, tolerance, normalize, mode):
    """Rewards and logits in, loss and logit gradient out, against one token after the other in float64."""
    torch.manual_seed(0)
    groups, tau, vocab = [[1.0, 0.0, 0.0], [0.5], [1.0, 1.0], [0.0, 2.0]], 0.2, 7
    rewards, ids = flatten(groups, dtype)
    lengths = torch.tensor([3, 1, 4, 2, 1, 5, 2, 2])  # one-token responses included
    response = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    logits = (2 * torch.randn(len(response), vocab, dtype=torch.float64)).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, (len(response),))

    weights, d = gft.response_weights(gft.group_advantages(rewards, ids, mode=mode), lengths, ids, normalize=normalize)
    logprobs = torch.log_softmax(logits, dim=1)[torch.arange(len(labels)), labels]
    loss = gft.token_losses(logprobs, weights[response], objective=objective, tau=tau).sum() / d
    loss.backward()

    twin = logits.detach().double().requires_grad_()
    advantages, want = naive_advantages(groups, mode), torch.zeros((), dtype=torch.float64)
    scale = {
        "tokens": lambda k: 1 / sum(lengths.tolist()),
        "sequences": lambda k: 1 / (lengths[k].item() * len(lengths)),
        "groups": lambda k: 1 / (lengths[k].item() * len(groups[ids[k]]) * len(groups)),
    }[normalize]
    for t, k in enumerate(response.tolist()):
        want = want + scale(k) * naive_token_loss(twin[t], labels[t].item(), advantages[k], objective, tau)
    want.backward()
    probabilities = logprobs.detach().exp()
    assert (probabilities > tau).any() and (probabilities < tau).any()
    assert abs(loss.item() - want.item()) <= tolerance * max(1, abs(want.item()))
    assert (logits.grad.double() - twin.grad).norm() <= tolerance * twin.grad.norm()


def test_gradient_is_that_of_log_p_above_tau_and_of_p_below():
    """p * grad(log p) = grad(p): an oracle without stop-gradient, itself checked by finite differences."""
    torch.manual_seed(1)
    tau, labels = 0.2, torch.randint(0, 5, (12,))
    advantages = torch.randn(12, dtype=torch.float64)
    logits = (1.5 * torch.randn(12, 5, dtype=torch.float64)).requires_grad_()

    def log_probability(logits):
        return torch.log_softmax(logits, dim=1)[torch.arange(12), labels]

    def oracle(logits):
        lp = log_probability(logits)
        return -(advantages * torch.where(lp.exp() > tau, lp, lp.exp())).sum()

    p = log_probability(logits).exp()
    assert (p > tau).any() and (p < tau).any() and ((p - tau).abs() > 1e-3).all()
    assert torch.autograd.gradcheck(oracle, (logits,))
    (got,) = torch.autograd.grad(gft.token_losses(log_probability(logits), advantages, tau=tau).sum(), logits)
    (want,) = torch.autograd.grad(oracle(logits), logits)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_half_precision_logprobs_are_raised_to_float32():
    coefficient = gft.rectified_coefficient(torch.tensor([-3.0], dtype=torch.bfloat16), tau=0.9)
    assert coefficient.dtype == torch.float32
    assert coefficient.item() == pytest.approx(math.exp(-3), rel=1e-6)


def test_module_needs_no_megatron_and_no_processes():
    """One file for the algorithm: it must stay readable and usable without any of the machinery."""
    modules = set(re.findall(r"(?m)^(?:from|import) (\S+)", inspect.getsource(gft)))
    standard = {"__future__", "dataclasses", "functools", "typing"}
    assert modules == {*standard, "torch", "megatron_gft.errors", "megatron_gft.objectives"}
