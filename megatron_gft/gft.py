"""The Group Fine-Tuning loss (arXiv 2604.14258) on plain tensors: advantages, coefficients, normalisers.

Nothing here knows of Megatron or of processes. With rewards r_k of the K responses y_k to one prompt::

    A_k  = (r_k - mean(r)) / (std(r) + eps)               group advantage
    c_t  = 1 if p_t > tau else p_t                        dynamic coefficient rectification, no gradient
    loss = (1/D) * sum_t u_k * A_k * c_t * (-log p_t)     over response tokens

so the gradient weight of SFT, 1/p, becomes 1/p where p > tau and 1 elsewhere: the gradient is that of
-A log p, respectively -A p. ``A_k * u_k`` and ``D`` depend on rewards and lengths alone: they are known before
any forward (:func:`response_weights`), and the model's part is a weighted cross entropy. Relatives of GFT
(``objectives.OBJECTIVES``) have another A, or another c, which may read q, the p of the model that sampled.

Shapes: N responses, T tokens.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Self, get_args

import torch

from megatron_gft.errors import InputError
from megatron_gft.objectives import (
    OBJECTIVES,
    READ_Q,
    Advantage,
    Coefficient,
    HeadSettings,
    Normalize,
    ZeroVariance,
    by_source,
    user_coefficient,
)


def group_advantages(
    rewards: torch.Tensor,
    group_ids: torch.Tensor,
    *,
    mode: Advantage = "std",
    eps: float = 1e-6,
    baseline_shift: float = 0.0,
) -> torch.Tensor:
    """Advantage of each response within its group.

    The rules apply in this order: mode ``none`` gives 1, mode ``reward`` r; a group of one response gives A = r; a
    group whose rewards are all equal gives exactly 0 (rounding of the mean must not become an advantage); else the
    mode; in both of these, less ``baseline_shift``:

    - ``std``: (r - mean) / (std + eps) with Bessel's correction, as in the paper's code; ``population``: without it;
    - ``mean_only``: r - mean; ``rloo``: r - mean of the group's other rewards.

    Args:
        rewards: [N], one per response; NaN means "not scored", which only mode ``none`` accepts.
        group_ids: [N] integers; equal ids form a group, in any order.

    Returns [N], in the dtype of ``rewards`` (float32 for integers and half precision); computed in float64.

    Raises:
        InputError: unknown mode, or a reward that the mode needs is missing or not finite.
    """
    _check_choice("advantage", mode, get_args(Advantage))
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    if mode == "none":
        return torch.ones(rewards.shape, dtype=dtype, device=rewards.device)
    _check_finite(rewards, group_ids, mode)
    if mode == "reward":
        return rewards.to(dtype)

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
    advantages = torch.where((highest == lowest)[groups], 0.0, advantages) - baseline_shift
    return torch.where((size == 1)[groups], r, advantages).to(dtype)


def response_weights(
    advantages: torch.Tensor,
    lengths: torch.Tensor,
    group_ids: torch.Tensor,
    *,
    normalize: Normalize = "tokens",
    zero_variance: ZeroVariance = "keep",
    strata: torch.Tensor | None = None,
) -> tuple[torch.Tensor, int]:
    """Weight of every token of each response, and the denominator of the whole optimizer step.

    The one place where normalisers live. The loss of a step is ``sum_t weight[k(t)] * c_t * (-log p_t) / D``:

    - ``tokens``: weight = A, D = number of response tokens;
    - ``sequences``: weight = A / |y|, D = number of responses;
    - ``groups``: weight = A / (K |y|), D = number of groups.

    A group is dead when all its advantages are exactly 0. It has weight 0 either way; ``zero_variance="keep"``
    counts it in D, ``"skip"`` does not, so D can be 0: then there is nothing to learn from and no update.

    Args:
        advantages: [N], from :func:`group_advantages`; or [2, N] with those of an anchor: dead is without either.
        lengths: [N] integers >= 1, tokens of each response (its end of sequence included).
        group_ids: [N] integers, as there.
        strata: [N]; each value is a loss with its own denominator D_s. Their sum is D; D / D_s is in the weights.

    Returns (A * u in the shape and dtype of ``advantages``, float32 or wider; D as int).

    Raises:
        InputError: unknown normaliser or policy, or a response without tokens.
    """
    _check_choice("normalize", normalize, get_args(Normalize))
    _check_choice("zero_variance", zero_variance, get_args(ZeroVariance))
    if lengths.numel() and int(lengths.min()) < 1:
        empty = group_ids[lengths < 1].unique().tolist()
        raise InputError(f"response without tokens in group(s) {_some(empty)} -> drop it before training")

    if strata is not None:
        divide = functools.partial(response_weights, normalize=normalize, zero_variance=zero_variance)
        parts = [strata == value for value in strata.unique()]
        found = [divide(advantages[..., part], lengths[part], group_ids[part]) for part in parts]
        total = sum(count for _, count in found)
        joined = torch.zeros_like(advantages, dtype=torch.promote_types(advantages.dtype, torch.float32))
        for part, (of_part, count) in zip(parts, found, strict=True):
            joined[..., part] = of_part * (total / max(count, 1))
        return joined, total
    groups, size = _groups(group_ids)
    live = (advantages != 0).long()
    dead = _group_sum(live.amax(0) if live.dim() > 1 else live, groups, size) == 0
    counted = torch.ones_like(dead) if zero_variance == "keep" else ~dead
    a = advantages.double()
    if normalize == "tokens":
        weights, denominator = a, lengths[counted[groups]].sum()
    elif normalize == "sequences":
        weights, denominator = a / lengths, counted[groups].sum()
    else:
        weights, denominator = a / (size[groups] * lengths), counted.sum()
    return weights.to(torch.promote_types(advantages.dtype, torch.float32)), int(denominator)


@dataclass(frozen=True)
class RowFacts:
    """What is known of rows before any forward, each [T]: A, codes of ``SOURCES``, log q and log p_ref (None or NaN:
    unknown, so c = 1 and no anchor there), and beta * u of the anchor (None: there is none)."""

    advantages: torch.Tensor
    sources: torch.Tensor
    sampled_logprobs: torch.Tensor | None = None
    reference_logprobs: torch.Tensor | None = None
    anchor_weights: torch.Tensor | None = None

    def at(self, rows: slice) -> Self:
        """Those of some rows."""
        return replace(self, **{name: value[rows] for name, value in vars(self).items() if value is not None})


def row_weights(
    logprobs: torch.Tensor, token_weights: torch.Tensor, settings: HeadSettings, facts: RowFacts | None = None
) -> torch.Tensor:
    """Gradient with respect to -log p of each row, ``A u c + beta u (p_ref / p - 1)``, [T], from log p [T],
    equal on all tensor-parallel ranks so that all branch alike, A * u [T], and what is read beside p."""
    weights = token_weights * row_coefficient(logprobs, settings, facts)
    if facts is None or facts.anchor_weights is None:
        return weights
    return weights + facts.anchor_weights * torch.expm1(-log_ratio(logprobs, facts.reference_logprobs))


def row_coefficient(logprobs: torch.Tensor, settings: HeadSettings, facts: RowFacts | None = None) -> torch.Tensor:
    """c of each row, [T] without gradient: that of its source where ``settings`` has several."""
    first, *others = names = by_source(settings.coefficient)
    c = _coefficient(first or "none", logprobs, settings, facts)
    for source, name in enumerate(others, 1) if len({*names}) > 1 else ():
        assert facts is not None
        c = torch.where(facts.sources == source, _coefficient(name or "none", logprobs, settings, facts), c)
    return c


def _coefficient(name: str, logprobs: torch.Tensor, settings: HeadSettings, facts: RowFacts | None) -> torch.Tensor:
    """One coefficient for all rows; the formulas of ``objectives.OBJECTIVES``."""
    log_p = _wide(logprobs)
    p = log_p.exp()
    if name == "rectified":
        return torch.where(p > settings.tau, 1.0, p)
    if name == "shaped":  # the slope of p / (p + g) by log p
        return settings.shaping * p / (p + settings.shaping).square()
    if name == "uncertainty":
        return p * -torch.expm1(log_p)
    if name in ("none", "probability"):
        return p if name == "probability" else torch.ones_like(p)
    assert facts is not None, name
    q = facts.sampled_logprobs
    if ":" in name:
        c = user_coefficient(name)(log_p, q, facts.advantages, facts.sources).to(p.dtype)
        return c if q is None else torch.where(q.isnan(), 1.0, c)
    r = log_ratio(logprobs, q).exp()
    if name == "truncated_ratio":
        return r.clamp(max=1 + settings.eps_high)
    if name == "clipped_ratio":  # where min(r A, clip(r) A), clipped again by dual clip, has no slope
        below = (facts.advantages < 0) & ((r < 1 - settings.eps_low) | (r > (settings.ratio_dual_clip or torch.inf)))
        return torch.where(below | (facts.advantages > 0) & (r > 1 + settings.eps_high), 0.0, r)
    return r


def log_ratio(logprobs: torch.Tensor, other: torch.Tensor | None) -> torch.Tensor:
    """log p less another log-prob of the same tokens, [T] without gradient, within +-20; 0 where that is unknown."""
    log_p = _wide(logprobs)
    if other is None:
        return torch.zeros_like(log_p)
    return torch.where(other.isnan(), 0.0, (log_p - other).clamp(-20, 20))


def published_losses(
    logprobs: torch.Tensor, token_weights: torch.Tensor, settings: HeadSettings, facts: RowFacts
) -> torch.Tensor:
    """Loss of each row as its paper writes it, [T]: ``-A p / q`` with PPO's clips, LUFFY's ``-A p / (p + g)``, plus
    ``beta k3`` of the anchor; else ``-A c log p``. It has the gradient of the surrogate -w log p, not its value."""
    log_p, r = _wide(logprobs), log_ratio(logprobs, facts.sampled_logprobs).exp()
    falling = r.clamp(1 - settings.eps_low, settings.ratio_dual_clip)
    clipped = torch.where(facts.advantages < 0, falling, r.clamp(max=1 + settings.eps_high))
    shaped = log_p.exp() / (log_p.exp() + settings.shaping)
    values, gains = (
        row_coefficient(logprobs, settings, facts) * log_p,
        dict(shaped=shaped, clipped_ratio=clipped, ratio=r),
    )
    for source, name in enumerate(by_source(settings.coefficient)):
        values = torch.where(facts.sources == source, gains.get(name or "", values), values)
    losses = -token_weights * values
    return losses if facts.anchor_weights is None else losses + facts.anchor_weights * k3(logprobs, facts)


def k3(logprobs: torch.Tensor, facts: RowFacts) -> torch.Tensor:
    """Estimate of KL(p || p_ref) from each sampled token, ``p_ref / p - log(p_ref / p) - 1``, [T] >= 0."""
    log_r = -log_ratio(logprobs, facts.reference_logprobs)
    return torch.expm1(log_r) - log_r


def check_user_coefficient(name: str, *, with_q: bool) -> None:
    """Raise InputError unless a user's coefficient gives 48 rows of all kinds one finite number each."""
    logprobs, facts = -torch.logspace(-4, 1.5, 48), torch.tensor([1.0, -1.0, 0.5, -2.0]).repeat(12)
    inputs = (logprobs, logprobs.roll(5) if with_q else None, facts, torch.arange(48, dtype=torch.int8) % 3)
    function, problem = user_coefficient(name), None
    try:
        with torch.no_grad():
            c, half = function(*inputs), function(*(value if value is None else value[:20] for value in inputs))
        if (shape := c.shape if isinstance(c, torch.Tensor) else type(c).__name__) != logprobs.shape:
            problem = f"returns {shape}"
        elif not c.isfinite().all():
            problem = "returns NaN or infinity"
        elif not torch.allclose(c[:20].double(), half.double(), rtol=1e-4):
            problem = "what it returns for a row depends on other rows"
    except Exception as error:  # of the user's code
        problem = f"fails with {type(error).__name__}: {error}"
    if problem is not None:
        signature = "f(logprobs [T], q [T] or None, advantages [T], sources [T]) -> [T], finite, row by row"
        raise InputError(f"objective.coefficient={name}: {problem}, tried on 48 rows -> {signature}")


def rectified_coefficient(logprobs: torch.Tensor, tau: float) -> torch.Tensor:
    """c = 1 where p > tau, else p; [T] without gradient, float32 or wider (GFT's rectification)."""
    return token_coefficient(logprobs, tau, "rectified")


def token_coefficient(logprobs: torch.Tensor, tau: float, coefficient: Coefficient) -> torch.Tensor:
    """c of each token where it is a function of p alone, [T]; see :func:`row_coefficient`."""
    _check_choice("coefficient", coefficient, tuple(name for name in get_args(Coefficient) if name not in READ_Q))
    return _coefficient(coefficient, logprobs, HeadSettings(tau=tau), None)


def token_losses(
    logprobs: torch.Tensor, advantages: torch.Tensor, *, objective: str = "gft", tau: float = 0.1
) -> torch.Tensor:
    """Loss of each token, A * c * (-log p) [T], differentiable in ``logprobs`` [T] with c held constant;
    ``advantages`` [T] are A or A * u, ``objective`` a preset whose coefficient needs no q (else InputError)."""
    of_p = {name: c for name, preset in OBJECTIVES.items() if isinstance(c := preset.coefficient, str)}
    _check_choice("objective", objective, tuple(name for name, c in of_p.items() if c not in READ_Q))
    return advantages * token_coefficient(logprobs, tau, of_p[objective]) * -logprobs


def _wide(logprobs: torch.Tensor) -> torch.Tensor:
    """log p, detached, float32 or wider."""
    return logprobs.detach().to(torch.promote_types(logprobs.dtype, torch.float32))


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
