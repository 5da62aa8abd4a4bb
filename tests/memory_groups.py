"""Groups of tokens in memory, as training reads them."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from megatron_gft.packing import Pack, build_pack
from megatron_gft.planning import PackPlan
from megatron_gft.shards import Group, GroupTable


def table_of(groups: Sequence[Group]) -> GroupTable:
    """What planning sees of these groups."""
    return GroupTable.of_groups([(len(g.prompt), [*map(len, g.responses)], g.sources, g.rewards) for g in groups])


def pack_of(plan: PackPlan, groups: Sequence[Group], weights, advantages, **options) -> Pack:
    """The pack of a plan, where ``groups`` are all groups of the step."""
    offsets = np.cumsum([0, *(len(group.responses) for group in groups)])
    return build_pack(plan, dict(enumerate(groups)), offsets, weights, advantages, **options)


class MemoryGroups:
    """A data set (``batch.Groups``) in memory."""

    def __init__(self, items: list[Group], fingerprint: str):
        self.items, self.fingerprint = items, fingerprint

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Group:
        return self.items[index]

    def table(self, indices, *, ends: bool = False) -> GroupTable:
        groups = [self.items[index] for index in indices]
        known = [np.ones(len(g.responses), bool) if g.ended is None else g.ended for g in groups]
        return dataclasses.replace(table_of(groups), ended=np.concatenate(known) if ends else np.empty(0, bool))

    def describe(self, index: int) -> str:
        return f"g{index}"
