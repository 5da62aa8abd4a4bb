"""Single groups, decoded token by token."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_gft.gft import group_advantages
from megatron_gft.groups import SOURCES
from megatron_gft.shards.encoded import EncodedGroups
from megatron_gft.tokenizer import Tokenizer

_CONTEXT_TOKENS = 16  # a token is decoded after so many others: enough for any multi-token character


@dataclass(frozen=True)
class TokenView:
    """One token as text; ``special`` for tokens that are not ordinary text."""

    id: int
    text: str
    special: bool
    logprob: float | None = None


@dataclass(frozen=True)
class ResponseView:
    """One response: what it is, and its tokens."""

    source: str
    reward: float | None
    outcome: str | None
    advantage: float | None
    ends: bool  # with EOS
    tokens: list[TokenView]

    @property
    def role(self) -> str:
        """``plus``, ``minus`` or ``zero``: sign of the advantage."""
        if not self.advantage:
            return "zero"
        return "plus" if self.advantage > 0 else "minus"

    @property
    def headline(self) -> str:
        """``self, reward 0 (wrong), advantage -0.87, 31 tokens, cut off, no EOS``."""
        parts = [self.source]
        if self.reward is not None:
            parts.append(f"reward {self.reward:g}" + (f" ({self.outcome})" if self.outcome else ""))
        if self.advantage is not None:
            parts.append(f"advantage {self.advantage:+.2f}")
        ending = "ends with EOS" if self.ends else "cut off, no EOS"
        return ", ".join([*parts, f"{len(self.tokens)} tokens", ending])


@dataclass(frozen=True)
class GroupView:
    """One group, decoded."""

    title: str
    answer: str | None
    prompt: list[TokenView]
    responses: list[ResponseView]


def view_tokens(tokenizer: Tokenizer, before: Sequence[int], ids: Sequence[int]) -> list[TokenView]:
    """Each token of ``ids`` as the text that it adds after ``before``.

    Of a character made of several tokens, the last one carries the text; so it is for U+FFFD and what follows it,
    because an unfinished character decodes to U+FFFD, too.
    """
    every = [*before, *ids]
    views: list[TokenView] = []
    shown = len(before)  # tokens whose text has been shown
    for position in range(len(before), len(every)):
        start = max(0, shown - _CONTEXT_TOKENS)
        text = tokenizer.decode(every[start : position + 1])
        final = position + 1 == len(every) or every[position + 1] in tokenizer.special_ids
        if text.endswith("\ufffd") and not final:
            added = ""  # perhaps a character that the next token goes on with
        else:
            added = text[len(tokenizer.decode(every[start:shown])) :]
            shown = position + 1
        views.append(TokenView(every[position], added, every[position] in tokenizer.special_ids))
    return views


def view_group(groups: EncodedGroups, tokenizer: Tokenizer, title: str) -> GroupView:
    """Decode the only group of ``groups`` and compute its advantages (mode ``std``; None when a reward is missing)."""
    lengths, rewards = groups.sequence_lengths, groups.rewards
    prompt, *responses = [ids.tolist() for ids in np.split(groups.tokens, np.cumsum(lengths)[:-1])]
    advantages: list[float | None] = [None] * len(responses)
    if not np.isnan(rewards).any():
        of_one_group = torch.zeros(len(rewards), dtype=torch.long)
        advantages = list(group_advantages(torch.tensor(rewards, dtype=torch.float64), of_one_group).tolist())
    known = groups.logprobs if groups.logprobs is not None else np.full(lengths[1:].sum(), np.nan)
    logprobs = np.split(known, np.cumsum(lengths[1:])[:-1])
    views = []
    for k, ids in enumerate(responses):
        tokens = [
            replace(token, logprob=None if np.isnan(value) else float(value))
            for token, value in zip(view_tokens(tokenizer, prompt, ids), logprobs[k], strict=True)
        ]
        reward = None if np.isnan(rewards[k]) else float(rewards[k])
        source, ends = SOURCES[groups.sequence_modes[1 + k]], ids[-1] == tokenizer.eos_id
        views.append(ResponseView(source, reward, groups.outcomes[k], advantages[k], ends, tokens))
    return GroupView(title, json.loads(groups.metas[0])["answer"], view_tokens(tokenizer, [], prompt), views)
