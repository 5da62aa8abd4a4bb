"""Shards read as one sequence of groups, with limits on lengths.

Over-long prompts and responses are found from the index alone; the policy says what becomes of them.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np

from megatron_gft.errors import InputErrors
from megatron_gft.shards import Group, GroupShard, GroupTable

_SHOWN_PROBLEMS = 5
_SLICE = 1 << 20  # groups looked at together when limits are applied: bounds the memory that it takes


@dataclass(frozen=True)
class LengthLimits:
    """Longest response (EOS included), and prompt with response, in tokens; None = no limit.

    ``policy`` for what exceeds: ``error``; ``drop`` the response, and the group when its prompt is too long or no
    response remains; ``truncate`` the response, without EOS (a prompt is never cut: that stays an error).
    """

    max_response_tokens: int | None = None
    max_sequence_tokens: int | None = None
    policy: Literal["error", "drop", "truncate"] = "error"

    def given(self) -> dict[str, int]:
        """The limits that are set, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None and name != "policy"}

    def room(self, prompt_lengths: np.ndarray) -> np.ndarray:
        """int64 [N]: tokens that a response to each prompt may have; below 1 the prompt itself is too long."""
        longest = np.iinfo(np.int32).max if self.max_response_tokens is None else self.max_response_tokens
        room = np.full(len(prompt_lengths), longest, dtype=np.int64)
        return room if self.max_sequence_tokens is None else np.minimum(room, self.max_sequence_tokens - prompt_lengths)

    def of_table(self, table: GroupTable) -> GroupTable:
        """The table of the same groups as they are after dropping or truncating responses."""
        room = np.repeat(self.room(table.prompt_lengths), table.response_counts)
        if self.policy == "truncate":
            ended = table.ended & (table.response_lengths <= room) if len(table.ended) else table.ended
            lengths = np.minimum(table.response_lengths, room).astype(np.int32)
            return replace(table, response_lengths=lengths, ended=ended)
        return table.select(table.response_lengths <= room)

    def of_group(self, group: Group) -> Group:
        """The group without what is dropped or truncated."""
        room = int(self.room(np.array([len(group.prompt)]))[0])
        kept = [k for k, tokens in enumerate(group.responses) if self.policy == "truncate" or len(tokens) <= room]
        return replace(
            group,
            responses=[group.responses[k][:room] for k in kept],
            sources=group.sources[kept],
            rewards=group.rewards[kept],
            logprobs=None if group.logprobs is None else [group.logprobs[k][:room] for k in kept],
            reference=None if group.reference is None else [group.reference[k][:room] for k in kept],
            ended=None if group.ended is None else group.ended[kept] & [len(group.responses[k]) <= room for k in kept],
        )


@dataclass(frozen=True)
class LimitedCounts:
    """What the limits changed."""

    dropped_groups: int = 0
    dropped_responses: int = 0  # of the groups that stay
    truncated_responses: int = 0

    def __add__(self, other: "LimitedCounts") -> "LimitedCounts":
        return LimitedCounts(**{name: value + getattr(other, name) for name, value in asdict(self).items()})


class LimitedGroups:
    """Groups of several shards as one sequence, without what limits take away; ``limited`` counts it.

    Raises:
        InputErrors: a prompt or response exceeds the limits and the policy is ``error``.
    """

    def __init__(self, shards: Sequence[GroupShard], limits: LengthLimits):
        self.shards, self.limited = [*shards], LimitedCounts()
        given, counts = limits.given().items(), [shard.manifest.counts for shard in shards]
        exceeding = [any(getattr(of, name) > limit for name, limit in given) for of in counts]
        self._limits = limits if any(exceeding) else None  # None: nothing is over-long
        self._kept = [self._survey(s, limits) if bad else None for s, bad in zip(shards, exceeding, strict=True)]
        sizes = [len(s) if kept is None else len(kept) for s, kept in zip(shards, self._kept, strict=True)]
        self._starts = np.cumsum([0, *sizes])

    def _survey(self, shard: GroupShard, limits: LengthLimits) -> np.ndarray | None:
        """Positions in the shard of the groups that stay, None = all; counts what changes."""
        refused, kept = [], []
        for start in range(0, len(shard), _SLICE):
            groups = np.arange(start, min(start + _SLICE, len(shard)))
            table = shard.table(groups)
            room = limits.room(table.prompt_lengths)
            over = (table.response_lengths > np.repeat(room, table.response_counts)).astype(np.int64)
            over = np.add.reduceat(over, table.offsets[:-1])  # of each group
            if limits.policy == "drop":
                stays = over < table.response_counts
                counts = LimitedCounts(int((~stays).sum()), int(over[stays].sum()))
                kept.append(groups[stays])
            else:
                counts = LimitedCounts(truncated_responses=int(over.sum()))
                refused.append(groups[(over > 0) if limits.policy == "error" else (room < 1)])
            self.limited += counts
        if limits.policy == "drop":
            return np.concatenate(kept)
        if len(too_long := np.concatenate(refused)):
            _refuse(shard, limits, too_long)
        return None

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def fingerprint(self) -> str:
        """Of what the shards hold, whatever the limits."""
        return " ".join(shard.manifest.fingerprint for shard in self.shards)

    def locate(self, i: int) -> tuple[GroupShard, int]:
        """Shard of group ``i``, and its position there."""
        number = int(np.searchsorted(self._starts, i, side="right")) - 1
        kept, i = self._kept[number], i - int(self._starts[number])
        return self.shards[number], i if kept is None else int(kept[i])

    def __getitem__(self, i: int) -> Group:
        shard, position = self.locate(i)
        group = shard[position]
        return group if self._limits is None else self._limits.of_group(group)

    def describe(self, i: int) -> str:
        """Shard, position and id of group ``i``, for messages."""
        shard, position = self.locate(i)
        return f"{shard.prefix} group {position} (id {shard.meta(position)['id']!r})"

    def table(self, groups: np.ndarray, *, ends: bool = False) -> GroupTable:
        """Lengths, sources and rewards of groups (int64 [N], any order, repeats allowed); ``ends`` as in a shard."""
        owner = np.searchsorted(self._starts, groups, side="right") - 1
        tables = []
        for number in np.unique(owner):
            kept, positions = self._kept[number], groups[owner == number] - self._starts[number]
            tables.append(self.shards[number].table(positions if kept is None else kept[positions], ends=ends))
        table = GroupTable.merge(owner, tables)
        return table if self._limits is None else self._limits.of_table(table)


def _refuse(shard: GroupShard, limits: LengthLimits, groups: np.ndarray) -> None:
    """Raise with some of the over-long groups of a shard."""
    shown = []
    for i in groups[:_SHOWN_PROBLEMS].tolist():
        lengths = shard.table(np.array([i]))
        shown.append(
            f"{shard.prefix}: group {i} (id {shard.meta(i)['id']!r}) has a prompt of {lengths.prompt_lengths[0]} and "
            f"responses of {lengths.response_lengths.tolist()} tokens"
        )
    if len(groups) > len(shown):
        shown.append(f"... and {len(groups) - len(shown)} more groups of this shard")
    named = {
        "max_response_tokens": "a response {} tokens (data.max_response_tokens)",
        "max_sequence_tokens": "prompt and response {} (data.max_tokens_per_pack, the model's max_position_embeddings)",
    }
    most = ", ".join(named[name].format(limit) for name, limit in limits.given().items())
    others = "drop or truncate" if limits.policy == "error" else "drop"
    raise InputErrors(f"over-long groups: at most {most} -> raise the limit, or data.overlong={others}", shown)
