"""Intervals of shares, means and ratios, and pass@k."""

import math
from collections.abc import Sequence
from typing import Any

Z_95 = 1.959963984540054


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927); sane at 0, at 1 and for few trials, unlike the normal one."""
    share, z2 = successes / trials, Z_95**2
    center = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z_95 / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    return max(0.0, center - half), min(1.0, center + half)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right: 1 - C(n-c, k) / C(n, k) (arXiv 2107.03374)."""
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def pass_at_k_summary(samples: int, correct: Sequence[int], k: int) -> dict[str, Any]:
    """Mean of pass@k over problems with its 95 % interval; ``correct[i]`` of ``samples`` were right for problem i."""
    value, interval = mean_interval([pass_at_k(samples, c, k) for c in correct])
    clipped = None if interval is None else (max(0.0, interval[0]), min(1.0, interval[1]))
    return {"value": value, "interval": clipped, "num_problems": len(correct), "samples": samples}


def mean_interval(values: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """Mean and its normal 95 % interval (``None`` for a single value)."""
    return ratio_interval(values, [1.0] * len(values))


def ratio_interval(tops: Sequence[float], bottoms: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """sum(tops) / sum(bottoms) and its 95 % interval over independent pairs (linearised ratio estimator)."""
    count, total = len(tops), math.fsum(bottoms)
    ratio = math.fsum(tops) / total
    if count < 2:
        return ratio, None
    squares = math.fsum((top - ratio * bottom) ** 2 for top, bottom in zip(tops, bottoms, strict=True))
    half = Z_95 * math.sqrt(squares * count / (count - 1)) / total
    return ratio, (ratio - half, ratio + half)
