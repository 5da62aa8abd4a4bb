"""What is in groups: counts, lengths, rewards, duplicates, problems, and how well they will pack.

Shards and files go through the same code: both are :class:`EncodedGroups`, a file by way of a tokenizer (without one,
lengths are in characters).
"""

import json
from collections import Counter
from collections.abc import Hashable, Iterable
from typing import Any

import numpy as np

from megatron_gft.groups import SOURCES
from megatron_gft.groups.records import id_digest
from megatron_gft.planning import GroupLengths, plan_step
from megatron_gft.shards.encoded import PROMPT_MODE, EncodedGroups

EXAMPLES_PER_KIND = 5
HISTOGRAM_BINS = 24
PACKED_SAMPLE = 2048  # groups whose packing is planned


class Statistics:
    """Columns over all groups and responses, and findings by kind (``problems``) with the first places of each.

    Args:
        eos_id: token that ends a response; one without it counts as truncated.
        bos_id: token that no response may hold, if there is one.
    """

    def __init__(self, eos_id: int, bos_id: int | None):
        self.eos_id, self.bos_id = eos_id, bos_id
        self.problems: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}
        self._outcomes: Counter[tuple[str, str]] = Counter()
        self._columns: list[tuple[np.ndarray, ...]] = []
        self._seen: set[bytes] = set()

    def add(self, groups: EncodedGroups, place: str) -> None:
        """Take in a slice of groups; ``place`` names it in examples."""
        if not len(groups):
            return
        modes, counts, rewards = groups.sequence_modes, groups.group_sizes.astype(np.int64) - 1, groups.rewards
        is_response = modes != PROMPT_MODE
        ends = np.cumsum(groups.sequence_lengths, dtype=np.int64)
        last, sources = ends[is_response] - 1, modes[is_response]
        truncated = groups.tokens[last] != self.eos_id
        starts, owner = np.cumsum(counts) - counts, np.repeat(np.arange(len(counts)), counts)
        equal = np.minimum.reduceat(rewards, starts) == np.maximum.reduceat(rewards, starts)
        judged = zip(groups.outcomes, rewards.tolist(), strict=True)
        wrong = np.array([o == "wrong" if o else reward <= 0 for o, reward in judged], dtype=bool)
        is_expert = sources == SOURCES.index("expert")
        special = groups.tokens == self.eos_id
        special[last] = False
        if self.bos_id is not None and self.bos_id != self.eos_id:
            special |= groups.tokens == self.bos_id
        inner = np.add.reduceat(special.astype(int), ends - groups.sequence_lengths)[is_response] > 0
        ids = [json.loads(meta)["id"] for meta in groups.metas]
        pieces = np.split(groups.tokens, ends[:-1])
        texts = [(g, pieces[i].tobytes()) for g, i in zip(owner.tolist(), np.flatnonzero(is_response), strict=True)]
        for kind, owners in (
            ("truncated", owner[truncated]),
            ("no_expert", np.flatnonzero(np.add.reduceat(is_expert.astype(int), starts) == 0)),
            ("equal_rewards", np.flatnonzero(equal & (counts > 1))),
            ("expert_wrong", owner[is_expert & wrong]),
            ("special_tokens", owner[inner]),
            ("duplicate_response", owner[_repeated(texts, set())]),
            ("duplicate_id", _repeated(map(id_digest, ids), self._seen)),
        ):
            if len(owners):
                self.problems[kind] += len(owners)
                shown = self.examples.setdefault(kind, [])
                shown += [f"{place} id {ids[g]!r}" for g in owners[: EXAMPLES_PER_KIND - len(shown)].tolist()]
        named = zip(sources.tolist(), groups.outcomes, strict=True)
        self._outcomes.update((SOURCES[source], outcome) for source, outcome in named if outcome is not None)
        prompts, lengths = groups.sequence_lengths[~is_response], groups.sequence_lengths[is_response]
        self._columns.append((prompts, counts, lengths, sources, rewards, truncated))

    def report(self, unit: str, max_tokens_per_pack: int | None, groups_per_step: int) -> dict[str, Any]:
        """The numbers as a JSON object; with a size of packs also how the groups fill them."""
        columns = map(np.concatenate, zip(*self._columns, strict=True)) if self._columns else [np.empty(0)] * 6
        prompts, counts, lengths, sources, rewards, truncated = columns
        by_source = {}
        for code, name in enumerate(SOURCES):
            mine = sources == code
            if mine.any():
                known = rewards[mine & ~np.isnan(rewards)]
                by_source[name] = {
                    "responses": int(mine.sum()),
                    "length": _summary(lengths[mine]),
                    "mean_reward": float(known.mean(dtype=np.float64)) if len(known) else None,
                    "rewarded": len(known),
                    "truncated": int(truncated[mine].sum()),
                    "outcomes": {outcome: n for (s, outcome), n in sorted(self._outcomes.items()) if s == name},
                }
        groups = len(prompts)
        report: dict[str, Any] = {
            "unit": unit,
            "groups": groups,
            "responses": len(lengths),
            "prompt_length": _summary(prompts),
            "response_length": _summary(lengths),
            "responses_per_group": _summary(counts),
            "total_prompt_length": int(prompts.sum()),
            "total_response_length": int(lengths.sum()),
            "by_source": by_source,
            "rewards": _summary(rewards[~np.isnan(rewards)]),
            "missing_rewards": int(np.isnan(rewards).sum()),
            "zero_variance_groups": self.problems["equal_rewards"],
            "zero_variance_share": self.problems["equal_rewards"] / groups if groups else 0.0,
        }
        if max_tokens_per_pack is not None and groups:
            report["packing"] = estimate_packing(prompts, counts, lengths, max_tokens_per_pack, groups_per_step)
        return report


def _repeated(keys: Iterable[Hashable], seen: set) -> np.ndarray:
    """int [N]: positions of the keys that are in ``seen`` or came before; ``seen`` takes all of them in."""
    found = []
    for position, key in enumerate(keys):
        if key in seen:
            found.append(position)
        seen.add(key)
    return np.array(found, dtype=int)


def _summary(values: np.ndarray) -> dict[str, Any] | None:
    """Mean, quantiles and a histogram; None without values."""
    if not len(values):
        return None
    values = values.astype(np.float64)
    low, high = float(values.min()), float(values.max())
    span, bins = (low, high if high > low else low + max(1.0, abs(low) * 1e-6)), HISTOGRAM_BINS  # of large values, too
    if high - low < bins - 1 and abs(high) < 1e9 and (values == np.round(values)).all():  # a bar for each value
        span, bins = (low - 0.5, high + 0.5), int(high - low) + 1
    counts, edges = np.histogram(values, bins=bins, range=span)
    median, p90, p99 = np.quantile(values, [0.5, 0.9, 0.99]).tolist()
    histogram = {"edges": edges.tolist(), "counts": counts.tolist()}
    of = {"mean": float(values.mean()), "min": low, "median": median, "p90": p90, "p99": p99, "max": high}
    return of | {"histogram": histogram}


def estimate_packing(
    prompts: np.ndarray, counts: np.ndarray, lengths: np.ndarray, max_tokens_per_pack: int, groups_per_step: int = 128
) -> dict[str, Any]:
    """Plan steps of a random sample of groups (the same every time) in both forms, for one data-parallel rank.

    Args:
        prompts, counts, lengths: tokens of each prompt and responses of each group, int [G]; tokens of each response,
            int [M].

    Returns:
        fill of the packs by form, and what sharing prompts saves: ``token_ratio`` = packed rows / shared rows,
        ``flop_ratio`` likewise (expected speed-up of compute-bound training); ``unfit_groups``, of all, do not fit.
    """
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    fits = prompts.astype(np.int64) + np.maximum.reduceat(lengths, offsets[:-1]) - 1 <= max_tokens_per_pack
    chosen = np.random.RandomState(0).permutation(np.flatnonzero(fits))[:PACKED_SAMPLE].tolist()
    sample = [GroupLengths(int(prompts[g]), tuple(lengths[offsets[g] : offsets[g + 1]].tolist())) for g in chosen]
    steps = [sample[first : first + groups_per_step] for first in range(0, len(sample), groups_per_step)]
    rows, flops, fill = {}, {}, {}
    for form in ("packed", "shared_prefix"):
        plans = [plan_step(step, 1, max_tokens_per_pack, packing=form) for step in steps]  # type: ignore[arg-type]
        rows[form], flops[form] = sum(plan.tokens for plan in plans), sum(plan.flops for plan in plans)
        room = max_tokens_per_pack * sum(plan.packs_per_rank for plan in plans)
        fill[form] = rows[form] / room if room else 0.0
    return {
        "max_tokens_per_pack": max_tokens_per_pack,
        "groups_per_step": groups_per_step,
        "sampled_groups": len(sample),
        "unfit_groups": int((~fits).sum()),
        "fill": fill,
        "token_ratio": rows["packed"] / rows["shared_prefix"] if steps else None,
        "flop_ratio": flops["packed"] / flops["shared_prefix"] if steps else None,
    }
