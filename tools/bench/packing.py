"""What the planner costs and reaches. CPU times are process times, so that other load counts less."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_gft.planning import FlopModel, GroupLengths, Packing, StepPlan, plan_step

# Llama 70B: trunk parameters, layers x hidden size, hidden size x vocabulary.
PLANNER_FLOP_MODEL = FlopModel(6 * 68.45e9, 12 * 80 * 8192, 6 * 8192 * 128256)

# Lognormal lengths as (median, sigma, least, most) of prompt and response, and the rows of a pack.
PLANNER_SHAPES: Mapping[str, tuple[tuple[int, float, int, int], tuple[int, float, int, int], int]] = {
    "gsm8k": ((115, 0.3, 70, 300), (180, 0.45, 20, 900), 8192),
    "math": ((180, 0.4, 60, 900), (1200, 0.7, 100, 12000), 16384),
    "long_prompt": ((7300, 0.5, 1000, 30000), (450, 0.5, 50, 2500), 65536),
}

PACKINGS: tuple[Packing, ...] = ("packed", "shared_prefix", "auto")


def lognormal_lengths(shape: str, groups: int = 64, responses: int = 8, seed: int = 0) -> list[GroupLengths]:
    """Synthetic lengths of a step in the manner of ``PLANNER_SHAPES[shape]``."""
    rng = np.random.default_rng(seed)

    def draw(median: int, sigma: float, least: int, most: int, size: int) -> list[int]:
        return np.clip(rng.lognormal(np.log(median), sigma, size), least, most).astype(int).tolist()

    prompt, response, _ = PLANNER_SHAPES[shape]
    return [GroupLengths(draw(*prompt, 1)[0], tuple(draw(*response, responses))) for _ in range(groups)]


def _worst_balance(plan: StepPlan) -> float:
    """The smallest mean / max cost of a microbatch over the ranks."""
    costs = [[pack.flops for pack in microbatch] for microbatch in zip(*plan.packs, strict=True)]
    return min(sum(cost) / len(cost) / max(cost) for cost in costs)


def bench_planner(
    dp_sizes: Sequence[int] = (4, 8, 16),
    *,
    seeds: int = 5,
    repeats: int = 3,
    large: Sequence[tuple[int, int]] = ((2048, 256), (4096, 8)),
) -> list[dict[str, Any]]:
    """Balance, fill and CPU time of plans for groups of 8 responses: 64, every shape, form and size; then ``large``.

    ``large`` steps, (groups, ranks), are of one seed and packed as ``auto``.
    """
    cases = [(shape, 64, dp, form, seeds) for shape in PLANNER_SHAPES for dp in dp_sizes for form in PACKINGS]
    cases += [(shape, groups, dp, "auto", 1) for groups, dp in large for shape in ("gsm8k", "math")]
    return [_planned(*case, repeats) for case in tqdm(cases, desc="plans", unit="case")]


def _planned(shape: str, groups: int, dp_size: int, packing: Packing, seeds: int, repeats: int) -> dict[str, Any]:
    capacity = PLANNER_SHAPES[shape][2]
    plans, seconds = [], []
    for seed in range(seeds):
        lengths = lognormal_lengths(shape, groups, seed=seed)
        tries = []
        for _ in range(repeats):
            start = time.process_time()
            plan = plan_step(lengths, dp_size, capacity, packing=packing, flop_model=PLANNER_FLOP_MODEL)
            tries.append(time.process_time() - start)
        plans.append(plan)
        seconds.append(min(tries))
    return {
        "shape": shape,
        "groups": groups,
        "dp_size": dp_size,
        "packing": packing,
        "max_tokens_per_pack": capacity,
        "balance_min": min(plan.balance for plan in plans),
        "balance_mean": float(np.mean([plan.balance for plan in plans])),
        "worst_balance_min": min(map(_worst_balance, plans)),
        "fill_mean": float(np.mean([plan.fill for plan in plans])),
        "cpu_ms_median": float(np.median(seconds)) * 1e3,
        "cpu_ms_max": max(seconds) * 1e3,
    }
