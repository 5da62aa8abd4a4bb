"""How well groups will pack, and what shared prefixes would save."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_gft.planning import GroupLengths, plan_step

PACKED_SAMPLE = 2048  # groups whose packing is planned


@dataclass(frozen=True)
class PackingQuestion:
    """What to plan: steps of ``groups_per_step`` groups into packs, one data-parallel rank."""

    max_tokens_per_pack: int
    groups_per_step: int = 128


def estimate_packing(
    prompts: np.ndarray, counts: np.ndarray, lengths: np.ndarray, question: PackingQuestion
) -> dict[str, Any]:
    """Plan steps of a random sample of groups (the same every time) in both forms.

    Args:
        prompts: int [G], tokens of each prompt.
        counts: int [G], responses of each group.
        lengths: int [M], tokens of each response.
        question: what to plan.

    Returns:
        fill of the packs by form, and what sharing prompts saves: ``token_ratio`` = packed rows / shared rows,
        ``flop_ratio`` likewise (expected speed-up of compute-bound training); ``unfit_groups``, of all, do not fit a
        pack.
    """
    limit = question.max_tokens_per_pack
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    longest = np.maximum.reduceat(lengths, offsets[:-1])
    fits = prompts.astype(np.int64) + longest - 1 <= limit
    chosen = np.random.RandomState(0).permutation(np.flatnonzero(fits))[:PACKED_SAMPLE].tolist()
    sample = [GroupLengths(int(prompts[g]), tuple(lengths[offsets[g] : offsets[g + 1]].tolist())) for g in chosen]
    totals: dict[str, dict[str, float]] = {}
    for form in ("packed", "shared_prefix"):
        rows = flops = packs = 0.0
        for first in range(0, len(sample), question.groups_per_step):
            step = sample[first : first + question.groups_per_step]
            plan = plan_step(step, 1, limit, packing=form)  # type: ignore[arg-type]
            rows += plan.tokens
            flops += plan.flops
            packs += plan.packs_per_rank
        totals[form] = {"rows": rows, "flops": flops, "packs": packs, "fill": rows / (packs * limit) if packs else 0.0}
    packed, shared = totals["packed"], totals["shared_prefix"]
    return {
        "max_tokens_per_pack": limit,
        "groups_per_step": question.groups_per_step,
        "sampled_groups": len(sample),
        "unfit_groups": int((~fits).sum()),
        "fill": {form: values["fill"] for form, values in totals.items()},
        "token_ratio": packed["rows"] / shared["rows"] if shared["rows"] else None,
        "flop_ratio": packed["flops"] / shared["flops"] if shared["flops"] else None,
    }
