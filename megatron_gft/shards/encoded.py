"""Groups as tokens: the batch form that goes from tokenizing to a shard. Numpy only, cheap to send to a process."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pydantic_core import to_json

from megatron_gft.objectives import SOURCE_CODES, SOURCES

PROMPT_MODE = -1  # mode of the prompt's sequence; a response has its source's code
UNKNOWN_OUTCOME = -1


@dataclass
class EncodedGroups:
    """G groups of S sequences (a prompt, then its responses), T tokens, M = S - G responses.

    Attributes:
        tokens: int32 [T].
        sequence_lengths: int32 [S]; sum T.
        sequence_modes: int8 [S]: source code of a response, ``PROMPT_MODE`` of a prompt.
        group_sizes: int32 [G]: sequences of each group.
        rewards: float32 [M], NaN without reward.
        outcomes: what the verifier said, M names or None.
        logprobs: float32 [response tokens], NaN where unknown; None when none is known.
        metas: UTF-8 JSON of each group: ``{"id", "answer", "models"}``.
    """

    tokens: np.ndarray
    sequence_lengths: np.ndarray
    sequence_modes: np.ndarray
    group_sizes: np.ndarray
    rewards: np.ndarray
    outcomes: list[str | None]
    logprobs: np.ndarray | None
    metas: list[bytes]

    def __len__(self) -> int:
        return len(self.group_sizes)

    def select(self, keep: np.ndarray) -> "EncodedGroups":
        """The groups where ``keep`` (bool [G]) is true."""
        of_sequence = np.repeat(keep, self.group_sizes)
        is_response = self.sequence_modes != PROMPT_MODE
        of_response = of_sequence[is_response]
        of_response_token = np.repeat(of_response, self.sequence_lengths[is_response])
        return EncodedGroups(
            self.tokens[np.repeat(of_sequence, self.sequence_lengths)],
            self.sequence_lengths[of_sequence],
            self.sequence_modes[of_sequence],
            self.group_sizes[keep],
            self.rewards[of_response],
            [name for name, kept in zip(self.outcomes, of_response, strict=True) if kept],
            None if self.logprobs is None else self.logprobs[of_response_token],
            [meta for meta, kept in zip(self.metas, keep, strict=True) if kept],
        )


@dataclass
class GroupEncoder:
    """Collects groups, then hands them over as :class:`EncodedGroups`."""

    _tokens: list[int] = field(default_factory=list)
    _lengths: list[int] = field(default_factory=list)
    _modes: list[int] = field(default_factory=list)
    _sizes: list[int] = field(default_factory=list)
    _rewards: list[float] = field(default_factory=list)
    _outcomes: list[str | None] = field(default_factory=list)
    _logprobs: list[Sequence[float] | None] = field(default_factory=list)  # of each response
    _metas: list[bytes] = field(default_factory=list)

    def add(
        self,
        prompt: Sequence[int],
        responses: Sequence[Sequence[int]],
        sources: Sequence[str],
        rewards: Sequence[float | None],
        *,
        group_id: str,
        answer: str | None = None,
        outcomes: Sequence[str | None] | None = None,
        models: Sequence[str | None] | None = None,
        logprobs: Sequence[Sequence[float] | None] | None = None,
    ) -> None:
        """Add one group of K responses; ``logprobs[k]`` has at most one float per token, the rest is unknown (EOS)."""
        self._tokens.extend(prompt)
        self._lengths.append(len(prompt))
        self._modes.append(PROMPT_MODE)
        for response in responses:
            self._tokens.extend(response)
            self._lengths.append(len(response))
        self._logprobs.extend(logprobs or [None] * len(responses))
        self._modes.extend(SOURCE_CODES[source] for source in sources)
        self._sizes.append(1 + len(responses))
        self._rewards.extend(np.nan if reward is None else reward for reward in rewards)
        self._outcomes.extend(outcomes or [None] * len(responses))
        meta: dict[str, Any] = {"id": group_id, "answer": answer}
        if models is not None and any(model is not None for model in models):
            meta["models"] = list(models)
        self._metas.append(to_json(meta))

    def take(self) -> EncodedGroups:
        """All groups that were added."""
        return EncodedGroups(
            np.array(self._tokens, dtype=np.int32),
            np.array(self._lengths, dtype=np.int32),
            np.array(self._modes, dtype=np.int8),
            np.array(self._sizes, dtype=np.int32),
            np.array(self._rewards, dtype=np.float32),
            self._outcomes,
            self._known_logprobs(),
            self._metas,
        )

    def _known_logprobs(self) -> np.ndarray | None:
        """float32 [response tokens], NaN where unknown; None when none is known."""
        if all(known is None for known in self._logprobs):
            return None
        lengths = [n for n, mode in zip(self._lengths, self._modes, strict=True) if mode != PROMPT_MODE]
        values = np.full(sum(lengths), np.nan, dtype=np.float32)
        start = 0
        for length, known in zip(lengths, self._logprobs, strict=True):
            if known is not None:
                values[start : start + len(known)] = known
            start += length
        return values


def sequence_counts(lengths: np.ndarray, modes: np.ndarray, starts: np.ndarray) -> dict[str, Any]:
    """What a manifest's counts say of sequences.

    Args:
        lengths, modes: int [S], int8 [S], of the sequences.
        starts: int [G]: first sequence of each group.
    """
    responses, prompts = lengths[modes != PROMPT_MODE], lengths[starts]
    sizes = np.diff(np.append(starts, len(lengths))) - 1
    return {
        "groups": len(starts),
        "responses": len(responses),
        "prompt_tokens": int(prompts.sum(dtype=np.int64)),
        "response_tokens": int(responses.sum(dtype=np.int64)),
        "by_source": {name: int((modes == code).sum()) for code, name in enumerate(SOURCES)},
        "max_prompt_tokens": int(prompts.max()),
        "max_response_tokens": int(responses.max()),
        "max_sequence_tokens": int((responses.astype(np.int64) + np.repeat(prompts, sizes)).max()),
        "max_responses": int(sizes.max()),
    }
