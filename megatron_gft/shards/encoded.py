"""Groups as tokens: the batch form that goes from tokenizing to a shard. Numpy only, cheap to send to a process."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic_core import to_json

from megatron_gft.groups import GroupRecord, ResponseRecord
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

    @classmethod
    def of_groups(cls, groups: Sequence[tuple[Sequence[int], GroupRecord]]) -> "EncodedGroups":
        """Of prompts as tokens, and groups whose responses have their ``token_ids``; where these have fewer log-probs
        (EOS has none) or none, they are unknown."""
        responses = [response for _, record in groups for response in record.responses]
        sequences, modes = list[Sequence[int]](), list[int]()
        for prompt, record in groups:
            sequences += [prompt, *(response.token_ids or () for response in record.responses)]
            modes += [PROMPT_MODE, *(SOURCE_CODES[response.source] for response in record.responses)]
        return cls(
            np.array([*itertools.chain.from_iterable(sequences)], dtype=np.int32),
            np.array([*map(len, sequences)], dtype=np.int32),
            np.array(modes, dtype=np.int8),
            np.array([1 + len(record.responses) for _, record in groups], dtype=np.int32),
            np.array([np.nan if response.reward is None else response.reward for response in responses], np.float32),
            [response.outcome for response in responses],
            _known_logprobs(responses),
            [_meta(record) for _, record in groups],
        )

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


def _known_logprobs(responses: Sequence[ResponseRecord]) -> np.ndarray | None:
    """float32 [response tokens], NaN where unknown; None when none is known."""
    if all(response.logprobs is None for response in responses):
        return None
    ends = np.cumsum([len(response.token_ids or ()) for response in responses]).tolist()
    values = np.full(ends[-1], np.nan, dtype=np.float32)
    for start, response in zip([0, *ends], responses, strict=False):
        known = response.logprobs or []
        values[start : start + len(known)] = known
    return values


def _meta(record: GroupRecord) -> bytes:
    models = [response.model for response in record.responses]
    meta: dict[str, Any] = {"id": record.id, "answer": record.answer}
    return to_json(meta if all(model is None for model in models) else meta | {"models": models})


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
