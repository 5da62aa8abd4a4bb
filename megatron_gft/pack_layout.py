"""Which rows of a pack see which, on every context-parallel rank, in the two forms that attention kernels take.

A pack is a row of *segments*; a segment may have a *prefix*: earlier rows of the same pack that it continues (the
prompt that several responses share). Its queries see ``[prefix; own rows]`` under a causal mask aligned to the
bottom right. Context parallelism cuts a segment's queries into chunks (zig-zag), each of which is again such a case
with fewer own rows, over keys gathered from all ranks. So one description serves packing, sharing and context
parallelism, alone and together.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


class Block(NamedTuple):
    """Queries ``[q_start, q_start + q_length)`` (local rows) that see keys ``[k_start, k_start + k_length)``
    (rows of the whole pack): all of them, or, for a square ``causal`` block, those up to their own index."""

    q_start: int
    q_length: int
    k_start: int
    k_length: int
    causal: bool


@dataclass(frozen=True)
class VarlenIndex:
    """One rank's pack as variable-length attention with J entries; entry j is causal, aligned to the bottom right.

    Attributes:
        cu_seqlens_q, cu_seqlens_kv: int32 [J + 1], prefix sums of the lengths.
        kv_index: int64 rows of the (gathered) keys in the order that ``cu_seqlens_kv`` counts; None = as they are.
        q_lengths, kv_lengths: the same lengths on the host.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_kv: Tensor
    kv_index: Tensor | None
    q_lengths: tuple[int, ...]
    kv_lengths: tuple[int, ...]


CPU = torch.device("cpu")


def page_locked(tensor: Tensor) -> Tensor:
    """The tensor where a GPU copies from by itself, without the host waiting; as it is where there is no GPU."""
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on ``device``; from page-locked memory the host does not wait for the copy to a GPU."""
    return tensor.to(device, non_blocking=torch.device(device).type == "cuda")


@dataclass(kw_only=True, eq=False)
class PackLayout(PackedSeqParams):
    """Which rows of a pack see which; travels through Megatron as ``packed_seq_params``.

    ``qkv_format`` is "sbhd" on purpose: our GPTModel hands RoPE frequencies indexed by position id, so Megatron's
    ``thd`` branches (RoPE that restarts at each segment) must not run. The other inherited fields stay None but
    for the maximal lengths.

    Attributes:
        segments: int32 [S, 4] on the CPU: start, length, prefix_start, prefix_length, in rows of the whole pack
            before any context-parallel slicing. Segments tile the pack in order. Row i of a segment sees all its
            prefix rows and its own rows <= i; a prefix lies before its segment.
        cp_size: ranks that share the pack; each segment length is a multiple of 2 * cp_size where cp_size > 1.
        tokens: rows of the whole pack, padding included.

    Raises:
        ValueError: the segments break these rules (a bug of the caller, not bad input).
    """

    segments: Tensor
    cp_size: int = 1
    qkv_format: str = "sbhd"
    tokens: int = field(init=False)
    _cache: dict = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.segments = self.segments.to("cpu", torch.int32)
        start, length, prefix_start, prefix_length = self.segments.long().unbind(1)
        if (length < 1).any() or not torch.equal(start, length.cumsum(0) - length):
            raise ValueError(f"segments do not tile the pack: {self.segments.tolist()}")
        inside = (prefix_start >= 0) & (prefix_start + prefix_length <= start)
        if (prefix_length < 0).any() or not (inside | (prefix_length == 0)).all():
            raise ValueError(f"a prefix must lie before its segment: {self.segments.tolist()}")
        if self.cp_size > 1 and (length % (2 * self.cp_size)).any():
            raise ValueError(f"segment lengths must be multiples of {2 * self.cp_size}: {length.tolist()}")
        self.max_seqlen_q = self.max_seqlen_kv = int((prefix_length + length).max())
        self.tokens = int(length.sum())

    def entries(self, cp_rank: int) -> list[tuple[int, int, int, int, int]]:
        """What a rank's queries need: (q_length, own_start, own_length, prefix_start, prefix_length), in row order.

        The queries are the last ``q_length`` of the own rows.
        """
        rows = [tuple(row) for row in self.segments.tolist()]
        if self.cp_size == 1:
            return [(length, start, length, *prefix) for start, length, *prefix in rows]
        entries = []
        for start, length, *prefix in rows:
            chunk = length // (2 * self.cp_size)
            for index in (cp_rank, 2 * self.cp_size - 1 - cp_rank):
                entries.append((chunk, start, (index + 1) * chunk, *prefix))
        return entries

    def rows(self, cp_rank: int) -> Tensor:
        """Rows of the pack that a context-parallel rank holds, int64 [T / cp_size].

        Transformer Engine's zig-zag: each segment falls into 2 * cp_size chunks, rank r holds chunks r and
        2 * cp_size - 1 - r, so that every rank has the same share of the causal triangle.
        """
        ends = ((own_start + own_length, q_length) for q_length, own_start, own_length, *_ in self.entries(cp_rank))
        return torch.cat([torch.arange(end - q_length, end) for end, q_length in ends])

    def blocks(self, cp_rank: int) -> tuple[Block, ...]:
        """Unmasked blocks that together are this rank's attention; the causal ones come first, each row in one.

        Neighbouring entries with the same prefix share one block over it.
        """
        key = ("blocks", cp_rank)
        if key not in self._cache:
            causal: list[Block] = []
            own: list[Block] = []
            prefixes: list[Block] = []
            row = 0
            for q_length, own_start, own_length, prefix_start, prefix_length in self.entries(cp_rank):
                before = own_length - q_length
                causal.append(Block(row, q_length, own_start + before, q_length, True))
                if before:
                    own.append(Block(row, q_length, own_start, before, False))
                if prefix_length:
                    last = prefixes[-1] if prefixes else None
                    if last and last[2:4] == (prefix_start, prefix_length) and last.q_start + last.q_length == row:
                        prefixes[-1] = last._replace(q_length=last.q_length + q_length)
                    else:
                        prefixes.append(Block(row, q_length, prefix_start, prefix_length, False))
                row += q_length
            self._cache[key] = (*causal, *own, *prefixes)
        return self._cache[key]

    def varlen(self, cp_rank: int, device: torch.device) -> VarlenIndex:
        """The rank's attention as one variable-length call on keys in gathered order, computed once a pack."""
        key = ("varlen", cp_rank, device)
        if key not in self._cache and device.type != "cpu":
            host = self.varlen(cp_rank, CPU)
            tensors: dict[str, Any] = {n: sent(x, device) for n, x in vars(host).items() if isinstance(x, Tensor)}
            self._cache[key] = replace(host, **tensors)
        if key not in self._cache:
            entries = self.entries(cp_rank)
            q_lengths = tuple(entry[0] for entry in entries)
            kv_lengths = tuple(entry[2] + entry[4] for entry in entries)
            kv_index = None
            if q_lengths != kv_lengths:
                pieces = []
                for _, own_start, own_length, prefix_start, prefix_length in entries:
                    pieces.append(torch.arange(prefix_start, prefix_start + prefix_length))
                    pieces.append(torch.arange(own_start, own_start + own_length))
                kv_index = torch.cat(pieces)
                if self.cp_size > 1:
                    kv_index = self.ungather_index(CPU)[kv_index]
                kv_index = page_locked(kv_index)
            self._cache[key] = VarlenIndex(
                _cumulative(q_lengths), _cumulative(kv_lengths), kv_index, q_lengths, kv_lengths
            )
        return self._cache[key]

    def prepare(self, cp_rank: int) -> None:
        """Compute on the host, ahead of the step, what the attention of this rank reads."""
        if torch.cuda.is_available():
            self.varlen(cp_rank, CPU)
            return
        self.blocks(cp_rank)
        if self.cp_size > 1:
            self.ungather_index(CPU)

    def ungather_index(self, device: torch.device) -> Tensor:
        """int64 [T * cp]: ``gathered[index]`` puts rows concatenated by rank back in pack order."""
        key = ("ungather", device)
        if key not in self._cache:
            gathered = torch.cat([self.rows(rank) for rank in range(self.cp_size)])
            self._cache[key] = torch.argsort(gathered).to(device)
        return self._cache[key]


def _cumulative(lengths: Sequence[int]) -> Tensor:
    """int32 [len + 1] prefix sums, the form in which kernels take lengths."""
    return page_locked(F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32))
