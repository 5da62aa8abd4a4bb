"""From planned items to the tensors of one microbatch, and its slice on a context-parallel rank.

A pack holds rows of tokens and, apart from them, its *loss rows*: which row's hidden state predicts which label,
with which weight. A prompt that several responses share is there once; its last row then predicts the first token of
each of them, so rows may repeat among the loss rows. The last token of a response is only ever a label.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_gft.errors import InputError
from megatron_gft.pack_layout import PackLayout, zigzag_indices
from megatron_gft.planning import PackPlan
from megatron_gft.shards import Group


@dataclass(frozen=True)
class Pack:
    """One microbatch: T rows, N loss rows.

    Attributes:
        tokens: int64 [T].
        position_ids: int64 [T], from 0 at each prompt; responses go on at the prompt's length; 0 in padding.
        layout: which rows see which, always of the whole pack.
        loss_rows: int64 [N], rows of ``tokens`` whose hidden state predicts the label; may repeat.
        labels: int64 [N].
        token_weights: float [N], A * u of the response; 1/D is never in it.
        sources: int8 [N], where the response comes from.
        advantages: float32 [N].
        response_index: int32 [N], the response's place among all responses of the step, dead ones included.
        groups: places in the step of the groups in this pack, for messages.
    """

    tokens: Tensor
    position_ids: Tensor
    layout: PackLayout
    loss_rows: Tensor
    labels: Tensor
    token_weights: Tensor
    sources: Tensor
    advantages: Tensor
    response_index: Tensor
    groups: tuple[int, ...]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Pack:
        """The pack with its tensors on ``device``; the layout stays on the host and caches per device."""
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=non_blocking)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)


class _PackBuilder:
    """Rows, segments and loss rows, appended segment by segment (numpy; ``pack`` makes the tensors)."""

    def __init__(self, segment_multiple: int, pad_token: int):
        self.segment_multiple, self.pad_token = segment_multiple, pad_token
        self.length = 0
        self.tokens: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.segments: list[tuple[int, int, int, int]] = []
        # One entry per response:
        self.loss_rows: list[np.ndarray] = []
        self.labels: list[np.ndarray] = []
        self.indices: list[int] = []
        self.sources: list[int] = []

    def segment(self, tokens: np.ndarray, position: int, prefix: tuple[int, int] = (0, 0), rows: int = 0) -> int:
        """Append a segment of ``tokens``, padded to the multiple and to ``rows``; returns its first row."""
        start = self.length
        length = max(rows, -(-len(tokens) // self.segment_multiple) * self.segment_multiple)
        padded = np.full(length, self.pad_token, dtype=np.int64)
        padded[: len(tokens)] = tokens
        positions = np.zeros(length, dtype=np.int64)
        positions[: len(tokens)] = np.arange(position, position + len(tokens))
        self.tokens.append(padded)
        self.positions.append(positions)
        self.segments.append((start, length, *prefix))
        self.length += length
        return start

    def targets(self, rows: np.ndarray, labels: np.ndarray, index: int, source: int) -> None:
        """Append loss rows of the response with flat index ``index``."""
        self.loss_rows.append(rows)
        self.labels.append(labels)
        self.indices.append(index)
        self.sources.append(source)

    def alone(self, prompt: np.ndarray, response: np.ndarray, index: int, source: int) -> None:
        """A response that carries its prompt: rows P - 1 ... P + R - 2 of the segment predict it."""
        start = self.segment(np.concatenate((prompt, response[:-1])), 0)
        first = start + len(prompt) - 1
        self.targets(np.arange(first, first + len(response)), response, index, source)

    def together(self, prompt: np.ndarray, responses: Sequence[tuple[np.ndarray, int, int]]) -> None:
        """Responses (tokens, flat index, source) on one prompt, whose last row predicts each one's first token."""
        start = self.segment(prompt, 0)
        last = start + len(prompt) - 1
        for response, index, source in responses:
            rows = np.full(len(response), last, dtype=np.int64)
            if len(response) > 1:
                own = self.segment(response[:-1], len(prompt), (start, len(prompt)))
                rows[1:] = np.arange(own, own + len(response) - 1)
            self.targets(rows, response, index, source)


def build_pack(
    plan: PackPlan,
    groups: Mapping[int, Group],
    offsets: np.ndarray,
    response_weights: Sequence[float] | np.ndarray | Tensor,
    advantages: Sequence[float] | np.ndarray | Tensor,
    *,
    pad_multiple: int = 1,
    segment_multiple: int = 1,
    pad_token: int = 0,
    weight_dtype: torch.dtype = torch.float32,
) -> Pack:
    """The tensors of a planned pack, on the host.

    Args:
        plan: one pack of :func:`megatron_gft.planning.plan_step`.
        groups: those that the pack needs, by their place in the step.
        offsets: int [groups of the step + 1]: first response of each group among all responses of the step.
        response_weights: A * u of every response of the step, flat, groups in order, dead responses included.
        advantages: A, likewise.
        pad_multiple, segment_multiple: as ``pad_multiple`` and ``alignment`` of the plan. Padding is a segment of
            its own, without loss.
        pad_token: any valid token.

    Raises:
        InputError: a prompt without tokens.
        ValueError: the plan does not belong to these groups.
    """
    builder = _PackBuilder(segment_multiple, pad_token)
    for place, responses in plan.items:
        group = groups[place]
        if not len(group.prompt):
            raise InputError(f"group {place} of the step: prompt has no token -> give it one")
        members = [(group.responses[k], int(offsets[place]) + k, int(group.sources[k])) for k in responses]
        if plan.form == "shared_prefix" and len(members) > 1:
            builder.together(group.prompt, members)
        else:
            for member in members:
                builder.alone(group.prompt, *member)
    unit = math.lcm(pad_multiple, segment_multiple)
    padding = max(unit, -(-builder.length // unit) * unit) - builder.length
    if padding:
        builder.segment(np.empty(0, dtype=np.int64), 0, rows=padding)
    if builder.length != plan.tokens:
        raise ValueError(f"plan says {plan.tokens} rows, its items make {builder.length}: other groups or multiples")
    return _finish(builder, plan, response_weights, advantages, weight_dtype)


def _finish(
    builder: _PackBuilder,
    plan: PackPlan,
    response_weights: Sequence[float] | np.ndarray | Tensor,
    advantages: Sequence[float] | np.ndarray | Tensor,
    weight_dtype: torch.dtype,
) -> Pack:
    """Tensors of what was appended; values of a response are repeated over its loss rows."""
    lengths = torch.tensor([len(labels) for labels in builder.labels], dtype=torch.int64)
    index = torch.tensor(builder.indices, dtype=torch.int64)

    def per_row(values: Tensor) -> Tensor:
        return torch.repeat_interleave(values, lengths)

    def joined(arrays: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *arrays]))

    return Pack(
        tokens=joined(builder.tokens),
        position_ids=joined(builder.positions),
        layout=PackLayout(segments=torch.tensor(builder.segments, dtype=torch.int32)),
        loss_rows=joined(builder.loss_rows),
        labels=joined(builder.labels),
        token_weights=per_row(torch.as_tensor(response_weights, dtype=weight_dtype)[index]),
        sources=per_row(torch.tensor(builder.sources, dtype=torch.int8)),
        advantages=per_row(torch.as_tensor(advantages, dtype=torch.float32)[index]),
        response_index=per_row(index.to(torch.int32)),
        groups=tuple(sorted({group for group, _ in plan.items})),
    )


def slice_for_context_parallel(pack: Pack, cp_size: int, cp_rank: int) -> Pack:
    """What one context-parallel rank works on: its zig-zag rows, and the loss rows among them.

    Loss rows are renumbered to local rows; the layout stays that of the whole pack (with ``cp_size`` set). Over the
    ranks, rows and loss rows of the slices are those of the pack.

    Raises:
        ValueError: a segment length is no multiple of 2 * cp_size.
    """
    if cp_size == 1:
        return pack
    rows = zigzag_indices(pack.layout.segments, cp_size, cp_rank)
    local = torch.full((pack.layout.tokens,), -1, dtype=torch.int64)
    local[rows] = torch.arange(len(rows))
    loss_rows = local[pack.loss_rows]
    mine = loss_rows >= 0
    return replace(
        pack,
        tokens=pack.tokens[rows],
        position_ids=pack.position_ids[rows],
        layout=PackLayout(segments=pack.layout.segments, cp_size=cp_size),
        loss_rows=loss_rows[mine],
        labels=pack.labels[mine],
        token_weights=pack.token_weights[mine],
        sources=pack.sources[mine],
        advantages=pack.advantages[mine],
        response_index=pack.response_index[mine],
    )
