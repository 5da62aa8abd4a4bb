"""Which prompts a round asks: without those that teach nothing any more, and as many as it wants, drawn by its seed."""

import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from megatron_gft.errors import InputError
from megatron_gft.groups import iter_group_file
from megatron_gft.sampling.prompts import PromptSet
from megatron_gft.sampling.settings import sample_seed

ROUNDS_TO_SETTLE = 2
_Settled = dict[str, str]  # id -> why


def settled(files: Sequence[str]) -> _Settled:
    """Prompts whose self responses were all right, or all wrong, in two of the scored ``files``."""
    seen = Counter(found for file in files for found in _one_sided(file))
    return {group: f"all {how} {times} times" for (group, how), times in seen.items() if times >= ROUNDS_TO_SETTLE}


def _one_sided(file: str) -> Iterator[tuple[str, str]]:
    for group, place in iter_group_file(file):
        outcomes = {response.outcome for response in group.responses if response.source == "self"}
        if None in outcomes:
            raise InputError(f"{place}: self responses without an outcome -> name files of tools/score_groups.py")
        if len(right := {outcome == "correct" for outcome in outcomes}) == 1:
            yield group.id, "right" if right.pop() else "wrong"


def choose(prompts: PromptSet, draw: int | None, seed: int, scored: Sequence[str]) -> tuple[PromptSet, Counter[str]]:
    """``prompts`` without those that are settled in ``scored``, ``draw`` of the rest; counts of what was left out.

    Whether a prompt is drawn depends on the seed and the ids alone, not on the order of the rows.
    """
    if draw is None and not scored:
        return prompts, Counter()
    out = settled(scored)
    ids = [row.id for row in prompts]
    left_out = Counter(out[own] for own in ids if own in out)
    left = [own for own in ids if own not in out]
    if not left:
        raise InputError(f"every prompt is settled ({dict(left_out)}) -> give others, or keep these: no --settled")
    drawn = heapq.nsmallest(draw or len(left), left, key=lambda own: (sample_seed(seed, own, "draw", 0), own))
    left_out["not drawn"] += len(left) - len(drawn)
    return replace(prompts, only=frozenset(drawn)), +left_out
