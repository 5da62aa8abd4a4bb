"""The Group Fine-Tuning loss (arXiv 2604.14258) on plain tensors: advantages, coefficients, normalisers.

Nothing here knows of Megatron or of processes. With rewards r_k of the K responses y_k to one prompt::

    A_k  = (r_k - mean(r)) / (std(r) + eps)               group advantage
    c_t  = 1 if p_t > tau else p_t                        dynamic coefficient rectification, no gradient
    loss = (1/D) * sum_t u_k * A_k * c_t * (-log p_t)     over response tokens

so the gradient weight of SFT, 1/p, becomes 1/p where p > tau and 1 elsewhere: the gradient is that of
-A log p, respectively -A p. ``A_k * u_k`` and ``D`` depend on rewards and lengths alone: they are known before
any forward (:func:`response_weights`), and the model's part is a weighted cross entropy.

Shapes: N responses, T tokens.
"""

from __future__ import annotations

from typing import get_args

import torch

from megatron_gft.errors import InputError
from megatron_gft.objectives import OBJECTIVES, Advantage, Coefficient, Normalize, ZeroVariance


def group_advantages(
    rewards: torch.Tensor, group_ids: torch.Tensor, *, mode: Advantage = "std", eps: float = 1e-6
) -> torch.Tensor:
    """Advantage of each response within its group.

    The rules apply in this order: mode ``none`` gives 1; a group of one response gives A = r; a group whose
    rewards are all equal gives exactly 0 (rounding of the mean must not become an advantage); else the mode:

    - ``std``: (r - mean) / (std + eps) with Bessel's correction, as in the paper's code;
    - ``population``: the same with the population's standard deviation;
    - ``mean_only``: r - mean;
    - ``rloo``: r - mean of the group's other rewards.

    Args:
        rewards: [N], one per response; NaN means "not scored", which only mode ``none`` accepts.
        group_ids: [N] integers; equal ids form a group, in any order.

    Returns:
        [N], in the dtype of ``rewards`` (float32 for integers and half precision); computed in float64.

    Raises:
        InputError: unknown mode, or a reward that the mode needs is missing or not finite.
    """
    _check_choice("advantage", mode, get_args(Advantage))
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    if mode == "none":
        return torch.ones(rewards.shape, dtype=dtype, device=rewards.device)
    _check_finite(rewards, group_ids, mode)

    r = rewards.double()
    groups, size = _groups(group_ids)
    mean = _group_sum(r, groups, size) / size
    deviation = r - mean[groups]
    if mode == "mean_only":
        advantages = deviation
    elif mode == "rloo":
        advantages = deviation * (size.double() / (size - 1).clamp(min=1))[groups]
    else:
        freedom = size - 1 if mode == "std" else size
        std = (_group_sum(deviation.square(), groups, size) / freedom.clamp(min=1)).sqrt()
        advantages = deviation / (std + eps)[groups]

    lowest = torch.full_like(mean, torch.inf).scatter_reduce(0, groups, r, "amin")
    highest = torch.full_like(mean, -torch.inf).scatter_reduce(0, groups, r, "amax")
    advantages = torch.where((highest == lowest)[groups], 0.0, advantages)
    return torch.where((size == 1)[groups], r, advantages).to(dtype)


def response_weights(
    advantages: torch.Tensor,
    lengths: torch.Tensor,
    group_ids: torch.Tensor,
    *,
    normalize: Normalize = "tokens",
    zero_variance: ZeroVariance = "keep",
) -> tuple[torch.Tensor, int]:
    """Weight of every token of each response, and the denominator of the whole optimizer step.

    The one place where normalisers live. The loss of a step is ``sum_t weight[k(t)] * c_t * (-log p_t) / D``:

    - ``tokens``: weight = A, D = number of response tokens;
    - ``sequences``: weight = A / |y|, D = number of responses;
    - ``groups``: weight = A / (K |y|), D = number of groups.

    A group is dead when all its advantages are exactly 0. It has weight 0 either way; ``zero_variance="keep"``
    counts it in D, ``"skip"`` does not, so D can be 0: then there is nothing to learn from and no update.

    Args:
        advantages: [N], from :func:`group_advantages`.
        lengths: [N] integers >= 1, tokens of each response (its end of sequence included).
        group_ids: [N] integers; K of a group is the number of its rows here.

    Returns:
        (A * u as [N] in the dtype of ``advantages``, float32 or wider; D as int)

    Raises:
        InputError: unknown normaliser or policy, or a response without tokens.
    """
    _check_choice("normalize", normalize, get_args(Normalize))
    _check_choice("zero_variance", zero_variance, get_args(ZeroVariance))
    if lengths.numel() and int(lengths.min()) < 1:
        empty = group_ids[lengths < 1].unique().tolist()
        raise InputError(f"response without tokens in group(s) {_some(empty)} -> drop it before training")

    groups, size = _groups(group_ids)
    dead = _group_sum((advantages != 0).long(), groups, size) == 0
    counted = torch.ones_like(dead) if zero_variance == "keep" else ~dead
    a = advantages.double()
    if normalize == "tokens":
        weights, denominator = a, lengths[counted[groups]].sum()
    elif normalize == "sequences":
        weights, denominator = a / lengths, counted[groups].sum()
    else:
        weights, denominator = a / (size[groups] * lengths), counted.sum()
    return weights.to(torch.promote_types(advantages.dtype, torch.float32)), int(denominator)


def rectified_coefficient(logprobs: torch.Tensor, tau: float) -> torch.Tensor:
    """c = 1 where p > tau, else p; [T] without gradient, float32 or wider (GFT's rectification)."""
    p = _probabilities(logprobs)
    return torch.where(p > tau, 1.0, p)


def token_coefficient(logprobs: torch.Tensor, tau: float, coefficient: Coefficient) -> torch.Tensor:
    """c of each token: ``rectified`` (GFT), ``none`` (1: SFT) or ``probability`` (p: DFT).

    Args:
        logprobs: [T] log p of the labels, reduced over all tensor-parallel ranks: each must see the same p,
            or they would take different branches at ``tau``.

    Returns:
        [T] without gradient, float32 or wider.

    Raises:
        InputError: unknown coefficient.
    """
    _check_choice("coefficient", coefficient, get_args(Coefficient))
    if coefficient == "rectified":
        return rectified_coefficient(logprobs, tau)
    p = _probabilities(logprobs)
    return p if coefficient == "probability" else torch.ones_like(p)


def token_losses(
    logprobs: torch.Tensor, advantages: torch.Tensor, *, objective: str = "gft", tau: float = 0.1
) -> torch.Tensor:
    """Loss of each token, A * c * (-log p), differentiable in ``logprobs`` with c held constant.

    Args:
        logprobs: [T] log p of the labels.
        advantages: [T] A (or A * u) of each token's response; 0 for tokens that carry no loss.
        objective: picks the coefficient: ``gft``, ``sft`` or ``dft``. Advantages always multiply.

    Returns:
        [T], float32 or wider.

    Raises:
        InputError: unknown objective.
    """
    _check_choice("objective", objective, tuple(OBJECTIVES))
    return advantages * token_coefficient(logprobs, tau, OBJECTIVES[objective].coefficient) * -logprobs


def _probabilities(logprobs: torch.Tensor) -> torch.Tensor:
    """exp(log p), detached, float32 or wider."""
    logprobs = logprobs.detach()
    return logprobs.to(torch.promote_types(logprobs.dtype, torch.float32)).exp()


def _groups(group_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense group index of each row [N], and the number of rows of each group [G]."""
    _, dense, size = torch.unique(group_ids, return_inverse=True, return_counts=True)
    return dense, size


def _group_sum(values: torch.Tensor, groups: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    return torch.zeros(size.shape, dtype=values.dtype, device=values.device).index_add(0, groups, values)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{name}: unknown value {value!r} -> one of {', '.join(choices)}")


def _check_finite(rewards: torch.Tensor, group_ids: torch.Tensor, mode: str) -> None:
    bad = ~torch.isfinite(rewards)
    if bad.any():
        groups = group_ids[bad].unique().tolist()
        raise InputError(
            f"reward missing or not finite in group(s) {_some(groups)}: advantage {mode!r} needs one for every "
            "response -> score the groups with tools/score_groups.py, or set advantage to none"
        )


def _some(ids: list[int], limit: int = 5) -> str:
    more = f" and {len(ids) - limit} more" if len(ids) > limit else ""
    return ", ".join(map(str, ids[:limit])) + more
