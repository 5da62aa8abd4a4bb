"""From planned items to the tensors of one microbatch, and its slice on a context-parallel rank.

A pack holds rows of tokens and, apart from them, its *loss rows*: which row's hidden state predicts which label,
with which weight. A prompt that several responses share is there once; its last row then predicts the first token of
each of them, so rows may repeat among the loss rows. The last token of a response is only ever a label.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from megatron_gft.gft import RowFacts
from megatron_gft.pack_layout import PackLayout, page_locked, sent
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

    def to(self, device: torch.device | str) -> Self:
        """The pack with its tensors on ``device``; the layout stays on the host and caches per device."""
        return self._with_each(lambda tensor: sent(tensor, device))

    def prepared(self, cp_rank: int) -> Self:
        """On the host, ready for a GPU to fetch while the host goes on; for a background thread."""
        self.layout.prepare(cp_rank)
        return self._with_each(page_locked)

    def _with_each(self, change: Callable[[Tensor], Tensor]) -> Self:
        changed: dict[str, Any] = {
            field.name: change(value)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **changed)


def _ramp(counts: np.ndarray) -> np.ndarray:
    """0 ... n - 1 for each n of ``counts``, one after the other."""
    return np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)


def _joined(arrays: Sequence[np.ndarray], dtype: type = np.int64) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *arrays]).astype(dtype, copy=False)


@dataclass(frozen=True)
class _Rows:
    """Where prompts and responses of a pack lie, from their lengths alone.

    ``segments`` are int [S, 4], as in :class:`PackLayout`, padding included; ``places`` the row of each token, prompts
    first, responses without their last; ``loss_rows`` the row that predicts each token of the responses.
    """

    segments: np.ndarray
    places: np.ndarray
    positions: np.ndarray
    loss_rows: np.ndarray

    @classmethod
    def of_items(cls, items: Sequence[tuple[Group, tuple[int, ...]]], multiple: int, unit: int) -> Self:
        """Those of (group, chosen responses); segments and pack are padded to ``multiple`` and ``unit``."""
        prompts = np.array([len(group.prompt) for group, _ in items], np.int64)
        counts = np.array([len(chosen) for _, chosen in items], np.int64)
        own = np.array([len(group.responses[k]) for group, chosen in items for k in chosen], np.int64)
        item = np.repeat(np.arange(len(counts)), counts)
        shared, prompt = counts > 1, prompts[item]
        together = shared[item]
        # Segments: each prompt that is shared, and each response's own rows, with its prompt where it is alone.
        rows = own - 1 + np.where(together, 0, prompt)
        has, first = rows > 0, counts.cumsum() - counts
        used = np.concatenate((prompts[shared], rows[has]))
        order = np.argsort(np.concatenate((2 * first[shared], 2 * np.flatnonzero(has) + 1)))
        length = -(-used // multiple) * multiple
        start = np.empty_like(length)
        start[order] = length[order].cumsum() - length[order]
        of_prompt, of_own = np.zeros_like(prompts), np.zeros_like(own)
        of_prompt[shared], of_own[has] = np.split(start, [int(shared.sum())])
        before = np.where(together, prompt, 0)  # rows of the prompt that the segment continues
        prefix = np.stack((np.where(together, of_prompt[item], 0), before), 1)[has]
        prefix = np.concatenate((np.zeros((int(shared.sum()), 2), np.int64), prefix))
        segments = np.column_stack((start, length, prefix))[order]
        total = int(length.sum())
        if padding := max(unit, -(-total // unit) * unit) - total:
            segments = np.vstack((segments, [[total, padding, 0, 0]]))
        # A response's tokens are predicted by the rows before them, the first one by the last row of the prompt.
        loss_rows = np.repeat(of_own - 1 + np.where(together, 0, prompt), own) + _ramp(own)
        loss_rows[(own.cumsum() - own)[together]] = (of_prompt[item] + prompt - 1)[together]
        used, ramp = used[order], _ramp(used[order])
        places = np.repeat(start[order], used) + ramp
        return cls(segments, places, np.repeat(prefix[order, 1], used) + ramp, loss_rows)


def _inputs(items: Sequence[tuple[Group, tuple[int, ...]]]) -> np.ndarray:
    """int64: tokens of prompts and responses, these without their last."""
    return _joined([piece for g, chosen in items for piece in (g.prompt, *[g.responses[k][:-1] for k in chosen])])


def _logprobs(items: Sequence[tuple[Group, tuple[int, ...]]], name: str) -> Tensor:
    """float32 of all tokens of the responses, NaN where the shard has none."""
    columns = [(getattr(group, name), k, group.responses[k]) for group, chosen in items for k in chosen]
    values = [column[k] if column else np.full(len(tokens), np.nan) for column, k, tokens in columns]
    return torch.from_numpy(_joined(values, np.float32))


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
        ValueError: the plan does not belong to these groups.
    """
    items = [(groups[place], chosen) for place, chosen in plan.items]
    rows = _Rows.of_items(items, segment_multiple, math.lcm(pad_multiple, segment_multiple))
    length = int(rows.segments[-1, :2].sum())
    if length != plan.tokens:
        raise ValueError(f"plan says {plan.tokens} rows, its items make {length}: other groups or multiples")
    labels = [group.responses[k] for group, chosen in items for k in chosen]
    tokens, positions = np.zeros((2, length), np.int64)
    tokens[rows.places], positions[rows.places] = _inputs(items), rows.positions
    index = torch.tensor([int(offsets[place]) + k for place, chosen in plan.items for k in chosen], dtype=torch.int64)
    lengths = torch.tensor(list(map(len, labels)), dtype=torch.int64)
    sources = _joined([group.sources[list(chosen)] for group, chosen in items], np.int8)

    def per_row(values: Any, dtype: torch.dtype = torch.float32) -> Tensor:  # from one of each response
        return torch.repeat_interleave(torch.as_tensor(values).to(dtype), lengths)

    return Pack(
        tokens=torch.from_numpy(tokens),
        position_ids=torch.from_numpy(positions),
        layout=PackLayout(segments=torch.from_numpy(rows.segments)),
        loss_rows=torch.from_numpy(rows.loss_rows),
        labels=torch.from_numpy(_joined(labels)),
        token_weights=per_row(torch.as_tensor(response_weights)[index]),
        sources=per_row(sources, torch.int8),
        advantages=per_row(torch.as_tensor(advantages)[index]),
        response_index=per_row(index, torch.int32),
        groups=tuple(sorted({group for group, _ in plan.items})),
        sampled_logprobs=_logprobs(items, "logprobs") if sampled else None,
        reference_logprobs=None if anchors is None else _logprobs(items, "reference"),
        anchor_weights=None if anchors is None else per_row(anchors[index]),
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
