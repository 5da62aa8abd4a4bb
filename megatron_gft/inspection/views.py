"""Single groups, decoded token by token."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_gft.gft import group_advantages, rectified_coefficient, response_weights
from megatron_gft.groups import SOURCES
from megatron_gft.objectives import HeadSettings
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
    weight: float | None = None  # A*u*c, where the log-prob is known


@dataclass(frozen=True)
class ResponseView:
    """One response: what it is, and its tokens."""

    source: str
    reward: float | None
    outcome: str | None
    advantage: float | None
    weight: float | None  # A*u, of each of its tokens
    length: int
    unit: str
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
            parts.append(f"advantage {self.advantage:+.2f}" if self.advantage else "advantage 0")
        ending = "ends with EOS" if self.ends else "cut off, no EOS"
        return ", ".join([*parts, f"{self.length:,} {self.unit}", ending])


@dataclass(frozen=True)
class GroupView:
    """One group, decoded."""

    title: str
    answer: str | None
    prompt: list[TokenView]
    prompt_length: int
    unit: str
    responses: list[ResponseView]
    logprobs: str | None = None  # name of those that the weights are made with

    @property
    def largest_weight(self) -> float:
        """What is coloured most."""
        return max((abs(response.weight or 0.0) for response in self.responses), default=0.0) or 1.0


def view_tokens(tokenizer: Tokenizer, before: Sequence[int], ids: Sequence[int]) -> list[TokenView]:
    """Each token of ``ids`` as the text that it adds after ``before``.

    Of a character made of several tokens, the last one carries the text; so it is for U+FFFD and what follows it,
    because an unfinished character decodes to U+FFFD, too.
    """
    if not tokenizer.path:  # characters: the text in one piece
        return [TokenView(-1, tokenizer.decode(ids), False)]
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


def view_group(groups: EncodedGroups, tokenizer: Tokenizer, title: str, logprobs_name: str = "sampled") -> GroupView:
    """Decode the only group of ``groups`` and compute its advantages (mode ``std``; None when a reward is missing).

    Weights are those of the objective ``gft`` with its defaults.
    """
    lengths, rewards = groups.sequence_lengths, groups.rewards
    prompt, *responses = [ids.tolist() for ids in np.split(groups.tokens, np.cumsum(lengths)[:-1])]
    advantages, weights = [None] * len(responses), [None] * len(responses)
    if not np.isnan(rewards).any():
        of_one_group = torch.zeros(len(rewards), dtype=torch.long)
        found = group_advantages(torch.tensor(rewards, dtype=torch.float64), of_one_group)
        advantages = found.tolist()
        weights = response_weights(found, torch.tensor(lengths[1:].astype(np.int64)), of_one_group)[0].tolist()
    ends, unit = np.cumsum(lengths[1:])[:-1], "tokens" if tokenizer.path else "characters"
    views = []
    for k, ids in enumerate(responses):
        tokens = view_tokens(tokenizer, prompt, ids)
        if groups.logprobs is not None and tokenizer.path:
            tokens = _with_logprobs(tokens, np.split(groups.logprobs, ends)[k], weights[k])
        reward = None if np.isnan(rewards[k]) else float(rewards[k])
        source, is_ended = SOURCES[groups.sequence_modes[1 + k]], ids[-1] == tokenizer.eos_id
        judged = (source, reward, groups.outcomes[k], advantages[k], weights[k])
        views.append(ResponseView(*judged, len(ids), unit, is_ended, tokens))
    name = None if groups.logprobs is None else logprobs_name
    answer, shown = json.loads(groups.metas[0])["answer"], view_tokens(tokenizer, [], prompt)
    return GroupView(title, answer, shown, len(prompt), unit, views, name)


def _with_logprobs(tokens: list[TokenView], logprobs: np.ndarray, weight: float | None) -> list[TokenView]:
    """The tokens with their log-probs (float32 [tokens], NaN = unknown) and what these make of ``weight``."""
    coefficients = rectified_coefficient(torch.from_numpy(logprobs.copy()), HeadSettings().tau).tolist()
    return [
        token if np.isnan(p) else replace(token, logprob=float(p), weight=None if weight is None else weight * c)
        for token, p, c in zip(tokens, logprobs, coefficients, strict=True)
    ]
