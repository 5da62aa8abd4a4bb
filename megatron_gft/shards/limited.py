"""Shards read as one sequence of groups, with limits on lengths.

A :class:`GroupSource` is what the dataset reads from: its shards one after another. Over-long prompts and responses
are found from the index alone; the policy says what becomes of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np

from megatron_gft.errors import InputErrors
from megatron_gft.shards import Group, GroupShard

_SHOWN_PROBLEMS = 5


@dataclass(frozen=True)
class LengthLimits:
    """Longest prompt, response (EOS included) and both together, in tokens; None = no limit.

    ``policy`` for what exceeds: ``error``; ``drop`` the response, and the group when its prompt is too long or no
    response remains; ``truncate`` the response, without EOS (a prompt is never cut: that stays an error).
    """

    max_prompt_tokens: int | None = None
    max_response_tokens: int | None = None
    max_sequence_tokens: int | None = None
    policy: Literal["error", "drop", "truncate"] = "error"


@dataclass
class LimitedCounts:
    """What the limits changed."""

    dropped_groups: int = 0
    dropped_responses: int = 0  # of the groups that stay
    truncated_responses: int = 0

    def __add__(self, other: LimitedCounts) -> LimitedCounts:
        return LimitedCounts(**{name: value + getattr(other, name) for name, value in asdict(self).items()})


@dataclass(frozen=True)
class GroupTable:
    """Lengths, sources and rewards of N groups with M responses in all; no token.

    Attributes:
        prompt_lengths: int32 [N].
        offsets: int64 [N + 1]: first response of each group among the M.
        response_lengths: int32 [M].
        sources: int8 [M].
        rewards: float32 [M], NaN = none.
    """

    prompt_lengths: np.ndarray
    offsets: np.ndarray
    response_lengths: np.ndarray
    sources: np.ndarray
    rewards: np.ndarray

    @classmethod
    def of_groups(cls, groups: Sequence[tuple[int, np.ndarray, np.ndarray, np.ndarray]]) -> GroupTable:
        """Of groups given one by one: (prompt length, response lengths, sources, rewards)."""
        prompts, lengths, sources, rewards = zip(*groups, strict=True)
        return cls(
            np.array(prompts, np.int32),
            np.concatenate([[0], np.cumsum([len(of_group) for of_group in lengths])]),
            np.concatenate(lengths).astype(np.int32),
            np.concatenate(sources).astype(np.int8),
            np.concatenate(rewards).astype(np.float32),
        )


class _Part:
    """One shard in which nothing exceeds the limits; columns come straight from its index."""

    def __init__(self, shard: GroupShard):
        self.shard = shard
        self.counts = LimitedCounts()

    def __len__(self) -> int:
        return len(self.shard)

    def shard_index(self, i: int) -> int:
        """Position in the shard of group ``i`` of this part."""
        return i

    def group(self, i: int) -> Group:
        return self.shard[i]

    def spans(self, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of groups int64 [N]: prompt lengths, position of the first response, number of responses."""
        return self.shard.spans(groups)

    def columns(self, responses: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Lengths, sources and rewards of responses at these positions, of these groups (int64 [M] both)."""
        return self.shard.columns(responses, groups)


class _LimitedPart(_Part):
    """One shard in which limits change something: its bulk arrays, and its groups by new index."""

    def __init__(self, shard: GroupShard, limits: LengthLimits):
        super().__init__(shard)
        self.groups: np.ndarray | None = None  # shard index of each group that stays; None = all
        self.keep: np.ndarray | None = None  # responses that stay, of the shard's; None = all
        self.prompt_lengths, self.response_lengths = shard.prompt_lengths, shard.response_lengths
        self.offsets, self.sources, self.rewards = shard.response_offsets, shard.sources, shard.rewards
        self._apply(limits)

    def spans(self, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        firsts = self.offsets[groups]
        return self.prompt_lengths[groups], firsts, self.offsets[groups + 1] - firsts

    def columns(self, responses: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.response_lengths[responses], self.sources[responses], self.rewards[responses]

    def _apply(self, limits: LengthLimits) -> None:
        counts = self.shard.response_counts
        allowed = np.full(len(self.shard), np.iinfo(np.int32).max, dtype=np.int64)
        if limits.max_response_tokens is not None:
            allowed[:] = limits.max_response_tokens
        if limits.max_sequence_tokens is not None:
            allowed = np.minimum(allowed, limits.max_sequence_tokens - self.prompt_lengths)
        bad_prompt = allowed < 1
        if limits.max_prompt_tokens is not None:
            bad_prompt |= self.prompt_lengths > limits.max_prompt_tokens
        limit_of_response = np.repeat(allowed, counts)
        over = self.response_lengths > limit_of_response
        over_group = np.repeat(np.arange(len(self.shard)), counts)[over]
        if limits.policy == "error":
            self._raise(limits, np.union1d(np.flatnonzero(bad_prompt), over_group))
        if limits.policy == "truncate":
            self._raise(limits, np.flatnonzero(bad_prompt))
            self.response_lengths = np.minimum(self.response_lengths, limit_of_response).astype(np.int32)
            self.counts.truncated_responses = int(over.sum())
            return
        self._drop(bad_prompt, over, counts)

    def _drop(self, bad_prompt: np.ndarray, over: np.ndarray, counts: np.ndarray) -> None:
        stays = ~over & ~np.repeat(bad_prompt, counts)
        remaining = np.add.reduceat(stays.astype(np.int64), self.offsets[:-1])
        self.groups = np.flatnonzero(remaining)
        self.keep = stays
        self.counts.dropped_groups = len(self.shard) - len(self.groups)
        self.counts.dropped_responses = int(counts[self.groups].sum() - remaining.sum())
        self.prompt_lengths = self.prompt_lengths[self.groups]
        self.offsets = np.concatenate([[0], np.cumsum(remaining[self.groups])])
        self.response_lengths = self.response_lengths[stays]
        self.sources, self.rewards = self.sources[stays], self.rewards[stays]

    def _raise(self, limits: LengthLimits, groups: np.ndarray) -> None:
        if not len(groups):
            return
        shown = []
        for i in groups[:_SHOWN_PROBLEMS].tolist():
            prompt, responses = self.shard.lengths(i)
            shown.append(
                f"{self.shard.prefix}: group {i} (id {self.shard.meta(i)['id']!r}) has a prompt of {prompt} and "
                f"responses of {responses} tokens"
            )
        if len(groups) > len(shown):
            shown.append(f"... and {len(groups) - len(shown)} more groups of this shard")
        limit = {k: v for k, v in asdict(limits).items() if v is not None and k != "policy"}
        hint = "raise the limit, or drop or truncate" if limits.policy == "error" else "raise the limit, or drop"
        raise InputErrors(f"over-long groups, limits {limit} -> {hint}", shown)

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    def shard_index(self, i: int) -> int:
        return i if self.groups is None else int(self.groups[i])

    def group(self, i: int) -> Group:
        original = self.shard_index(i)
        group = self.shard[original]
        if self.keep is not None:
            first = int(self.shard.spans(np.array([original]))[1][0])  # response_offsets would be made of all groups
            stays = np.flatnonzero(self.keep[first : first + len(group.responses)])
            return replace(
                group,
                responses=[group.responses[k] for k in stays],
                sources=group.sources[stays],
                rewards=group.rewards[stays],
                logprobs=None if group.logprobs is None else [group.logprobs[k] for k in stays],
            )
        if self.counts.truncated_responses:
            lengths = self.response_lengths[self.offsets[i] : self.offsets[i + 1]].tolist()
            cut = [group.responses, group.logprobs or group.responses]
            responses, logprobs = ([a[:n] for a, n in zip(arrays, lengths, strict=True)] for arrays in cut)
            return replace(group, responses=responses, logprobs=None if group.logprobs is None else logprobs)
        return group


def _exceeds(shard: GroupShard, limits: LengthLimits) -> bool:
    counts = shard.manifest.counts
    pairs = (
        (counts.max_prompt_tokens, limits.max_prompt_tokens),
        (counts.max_response_tokens, limits.max_response_tokens),
        (counts.max_sequence_tokens, limits.max_sequence_tokens),
    )
    return any(limit is not None and longest > limit for longest, limit in pairs)


class GroupSource:
    """Groups of several shards as one sequence.

    Raises:
        InputErrors: a prompt or response exceeds the limits and the policy is ``error``.
    """

    def __init__(self, shards: Sequence[GroupShard], limits: LengthLimits | None = None):
        limits = limits or LengthLimits()
        self._parts = [_LimitedPart(s, limits) if _exceeds(s, limits) else _Part(s) for s in shards]
        self._starts = np.cumsum([0, *map(len, self._parts)])
        self.limited = sum((part.counts for part in self._parts), LimitedCounts())

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _locate(self, i: int) -> tuple[_Part, int]:
        if len(self._parts) == 1:
            return self._parts[0], i
        number = int(np.searchsorted(self._starts, i, side="right")) - 1
        return self._parts[number], i - int(self._starts[number])

    def __getitem__(self, i: int) -> Group:
        part, local = self._locate(i)
        return part.group(local)

    def describe(self, i: int) -> str:
        """Shard, position and id of group ``i``, for messages."""
        part, local = self._locate(i)
        index = part.shard_index(local)
        return f"{part.shard.prefix} group {index} (id {part.shard.meta(index)['id']!r})"

    def table(self, groups: np.ndarray) -> GroupTable:
        """Lengths, sources and rewards of groups (int [N], any order, repeats allowed)."""
        groups = np.asarray(groups, dtype=np.int64)
        owner = np.searchsorted(self._starts, groups, side="right") - 1
        members = [(self._parts[n], np.flatnonzero(owner == n)) for n in np.unique(owner)]
        groups = groups - self._starts[owner]
        prompts, counts = np.empty(len(groups), np.int32), np.empty(len(groups), np.int64)
        firsts = np.empty(len(groups), np.int64)
        for part, places in members:
            prompts[places], firsts[places], counts[places] = part.spans(groups[places])
        offsets = np.concatenate([[0], np.cumsum(counts)])
        table = GroupTable(
            prompts,
            offsets,
            np.empty(offsets[-1], np.int32),
            np.empty(offsets[-1], np.int8),
            np.empty(offsets[-1], np.float32),
        )
        for part, places in members:
            source = _ragged(firsts[places], counts[places])
            target = _ragged(offsets[places], counts[places])
            owners = np.repeat(groups[places], counts[places])
            columns = part.columns(source, owners)
            table.response_lengths[target], table.sources[target], table.rewards[target] = columns
        return table


def _ragged(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """``[starts[0], starts[0] + 1, ... (counts[0] of them), starts[1], ...]``."""
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(int(counts.sum()))
