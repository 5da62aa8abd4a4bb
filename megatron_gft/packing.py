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
from megatron_gft.gft import RowFacts
from megatron_gft.pack_layout import PackLayout
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
        sampled_logprobs, reference_logprobs, anchor_weights: float32 [N], as in ``gft.RowFacts``; None: not read.
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
    sampled_logprobs: Tensor | None = None
    reference_logprobs: Tensor | None = None
    anchor_weights: Tensor | None = None

    @property
    def facts(self) -> RowFacts:
        """What the objective reads of the loss rows."""
        return RowFacts(**{field.name: getattr(self, field.name) for field in fields(RowFacts)})

    def to(self, device: torch.device | str) -> Pack:
        """The pack with its tensors on ``device``; the layout stays on the host and caches per device."""
        moved: dict[str, Any] = {
            field.name: value.to(device)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)


class _PackBuilder:
    """Rows, segments and loss rows, appended segment by segment (numpy; :meth:`pack` makes the tensors)."""

    def __init__(self, segment_multiple: int):
        self.segment_multiple, self.length = segment_multiple, 0
        self.tokens: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.segments: list[tuple[int, int, int, int]] = []
        # One entry per response:
        self.loss_rows: list[np.ndarray] = []
        self.labels: list[np.ndarray] = []
        self.indices: list[int] = []  # flat, among all responses of the step
        self.sources: list[int] = []
        self.sampled: list[np.ndarray] = []
        self.reference: list[np.ndarray] = []

    def segment(self, tokens: np.ndarray, position: int, prefix: tuple[int, int] = (0, 0), rows: int = 0) -> int:
        """Append a segment of ``tokens``, padded to the multiple and to ``rows``; returns its first row."""
        start = self.length
        length = max(rows, -(-len(tokens) // self.segment_multiple) * self.segment_multiple)
        padding = (0, length - len(tokens))
        self.tokens.append(np.pad(tokens.astype(np.int64), padding))
        self.positions.append(np.pad(np.arange(position, position + len(tokens)), padding))
        self.segments.append((start, length, *prefix))
        self.length += length
        return start

    def alone(self, prompt: np.ndarray, response: np.ndarray) -> None:
        """A response that carries its prompt: rows P - 1 ... P + R - 2 of the segment predict it."""
        first = self.segment(np.concatenate((prompt, response[:-1])), 0) + len(prompt) - 1
        self.loss_rows.append(np.arange(first, first + len(response)))

    def together(self, prompt: np.ndarray, responses: Sequence[np.ndarray]) -> None:
        """Responses on one prompt, whose last row predicts each one's first token."""
        start = self.segment(prompt, 0)
        for response in responses:
            rows = np.full(len(response), start + len(prompt) - 1)
            if len(response) > 1:
                own = self.segment(response[:-1], len(prompt), (start, len(prompt)))
                rows[1:] = np.arange(own, own + len(response) - 1)
            self.loss_rows.append(rows)

    def logprobs(self, group: Group, chosen: Sequence[int]) -> None:
        """Those of a group's responses, NaN where the shard has none."""
        for into, known in ((self.sampled, group.logprobs), (self.reference, group.reference)):
            values = known or [np.full(len(response), np.nan, np.float32) for response in group.responses]
            into += (values[k] for k in chosen)


def build_pack(
    plan: PackPlan,
    groups: Mapping[int, Group],
    offsets: np.ndarray,
    response_weights: Sequence[float] | np.ndarray | Tensor,
    advantages: Sequence[float] | np.ndarray | Tensor,
    anchors: Tensor | None = None,
    *,
    sampled: bool = False,
    pad_multiple: int = 1,
    segment_multiple: int = 1,
) -> Pack:
    """The tensors of a planned pack, on the host.

    Args:
        plan: one pack of :func:`megatron_gft.planning.plan_step`.
        groups: those that the pack needs, by their place in the step.
        offsets: int [groups of the step + 1]: first response of each group among all responses of the step.
        response_weights: A * u of every response of the step, flat, groups in order, dead responses included.
        advantages: A, likewise.
        anchors: beta * u, likewise; None: no KL anchor. ``sampled``: the pack brings log q.
        pad_multiple, segment_multiple: as ``pad_multiple`` and ``alignment`` of the plan. Padding is a segment of
            its own, of token 0, without loss.

    Raises:
        InputError: a prompt without tokens.
        ValueError: the plan does not belong to these groups.
    """
    builder = _PackBuilder(segment_multiple)
    for place, chosen in plan.items:
        group = groups[place]
        if not len(group.prompt):
            raise InputError(f"group {place} of the step: prompt has no token -> give it one")
        responses = [group.responses[k] for k in chosen]
        if len(responses) > 1:
            builder.together(group.prompt, responses)
        else:
            builder.alone(group.prompt, responses[0])
        builder.labels += responses
        builder.indices += (int(offsets[place]) + k for k in chosen)
        builder.sources += (int(group.sources[k]) for k in chosen)
        builder.logprobs(group, chosen)
    unit = math.lcm(pad_multiple, segment_multiple)
    padding = max(unit, -(-builder.length // unit) * unit) - builder.length
    if padding:
        builder.segment(np.empty(0, dtype=np.int64), 0, rows=padding)
    if builder.length != plan.tokens:
        raise ValueError(f"plan says {plan.tokens} rows, its items make {builder.length}: other groups or multiples")
    lengths = torch.tensor([len(labels) for labels in builder.labels], dtype=torch.int64)
    index = torch.tensor(builder.indices, dtype=torch.int64)

    def per_row(values: Tensor) -> Tensor:  # from one of each response
        return torch.repeat_interleave(values, lengths)

    def joined(arrays: Sequence[np.ndarray], dtype: type = np.int64) -> Tensor:
        return torch.from_numpy(np.concatenate([np.empty(0, dtype), *arrays]))

    return Pack(
        tokens=joined(builder.tokens),
        position_ids=joined(builder.positions),
        layout=PackLayout(segments=torch.tensor(builder.segments, dtype=torch.int32)),
        loss_rows=joined(builder.loss_rows),
        labels=joined(builder.labels),
        token_weights=per_row(torch.as_tensor(response_weights, dtype=torch.float32)[index]),
        sources=per_row(torch.tensor(builder.sources, dtype=torch.int8)),
        advantages=per_row(torch.as_tensor(advantages, dtype=torch.float32)[index]),
        response_index=per_row(index.to(torch.int32)),
        groups=tuple(sorted({group for group, _ in plan.items})),
        sampled_logprobs=joined(builder.sampled, np.float32) if sampled else None,
        reference_logprobs=None if anchors is None else joined(builder.reference, np.float32),
        anchor_weights=None if anchors is None else per_row(anchors.to(torch.float32)[index]),
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
    layout = PackLayout(segments=pack.layout.segments, cp_size=cp_size)
    rows = layout.rows(cp_rank)
    local = torch.full((pack.layout.tokens,), -1, dtype=torch.int64)
    local[rows] = torch.arange(len(rows))
    loss_rows = local[pack.loss_rows]
    mine = loss_rows >= 0
    of_loss_rows: dict[str, Any] = {
        name: value[mine]
        for name in ("labels", "token_weights", "response_index", *vars(pack.facts))
        if (value := getattr(pack, name)) is not None
    }
    return replace(
        pack,
        tokens=pack.tokens[rows],
        position_ids=pack.position_ids[rows],
        layout=layout,
        loss_rows=loss_rows[mine],
        **of_loss_rows,
    )
