"""The row passes of the head: statistics of each row of logits, what they mean over all ranks, and the gradient.

Two pairs of passes give the same: the eager one, which is the reference, and the Triton kernels of ``row_kernels``.

Shapes: T rows, V vocabulary rows of all ranks (padding included), v = V/tp columns here.
"""

import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
import torch.distributed as dist

# Rows are handled in blocks so that several passes over them hit the cache (CPU), or so that float32
# temporaries of half-precision logits stay small beside the chunk (elsewhere).
_CPU_BLOCK_ELEMENTS = 2**18
_BLOCKS_PER_CHUNK = 32


@dataclass(frozen=True)
class VocabShard:
    """The vocabulary columns of this rank: ``size`` of them from ``start``, of which the first ``valid`` are real.

    The rest is padding that makes the vocabulary divisible; its weights are zeros in converted checkpoints, so
    its logits (0) must stay out of the softmax for the loss to equal the original model's. The ranks of ``tp_group``
    hold the other columns; None is one rank.
    """

    start: int
    size: int
    valid: int
    tp_group: dist.ProcessGroup | None

    @classmethod
    def of_rank(cls, size: int, tp_group: dist.ProcessGroup | None, vocab_size: int | None) -> Self:
        """Shard of this rank in ``tp_group``; ``vocab_size`` is the true size, None means no padding."""
        rank, world_size = (0, 1) if tp_group is None else (tp_group.rank(), tp_group.size())
        start = rank * size
        total = world_size * size if vocab_size is None else vocab_size
        assert 0 < total <= world_size * size, f"vocab_size {total} exceeds {world_size} shards of {size} columns"
        return cls(start, size, min(max(total - start, 0), size), tp_group if world_size > 1 else None)

    def targets(self, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Column of each label here (0 where it is another rank's), and whether it is ours; both [T]."""
        columns = labels - self.start
        owned = (columns >= 0) & (columns < self.valid)
        return torch.where(owned, columns, 0), owned


def exponentiate_rows_(
    logits: torch.Tensor, labels: torch.Tensor, shard: VocabShard, *, entropy: bool = False
) -> torch.Tensor:
    """Replace each row of ``logits`` [T, v] by exp(logit - row maximum) and return the row statistics.

    Padding columns are neither read nor written. Half-precision rows are computed in float32.

    Returns:
        [3 or 4, T], float32 or wider: maximum, sum of exponentials, logit of the label (-inf where another
        rank owns it), and with ``entropy`` the sum of e * log(e) over the exponentials e.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    columns, owned = shard.targets(labels)
    statistics = torch.empty((4 if entropy else 3, len(logits)), dtype=dtype, device=logits.device)
    statistics[2] = torch.where(owned, logits.gather(1, columns[:, None])[:, 0].to(dtype), -torch.inf)
    if shard.valid == 0:  # this shard is all padding: it adds nothing to any sum
        statistics[0] = torch.finfo(dtype).min
        statistics[1] = 0
        statistics[3:] = 0
        return statistics
    for rows in _row_blocks(logits):
        block = logits[rows, : shard.valid]
        values = block.to(dtype)  # the block itself where it is float32 or wider
        torch.amax(values, dim=1, out=statistics[0, rows])
        shifted = values.sub_(statistics[0, rows, None])
        if entropy:
            shifted = shifted.clone()
        torch.exp(shifted, out=values)
        torch.sum(values, dim=1, out=statistics[1, rows])
        if entropy:
            torch.sum(shifted.mul_(values), dim=1, out=statistics[3, rows])
        if values.dtype != block.dtype:
            block.copy_(values)
    return statistics


class RowResult(NamedTuple):
    """Per row, each [T]: log p of the label, entropy (or None), and exp(local maximum) / partition function."""

    logprobs: torch.Tensor
    entropy: torch.Tensor | None
    scale: torch.Tensor


def softmax_gradient(
    exponentials: torch.Tensor,
    labels: torch.Tensor,
    shard: VocabShard,
    rows: RowResult,
    row_weights: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    """``out[t] = row_weights[t] * (softmax[t] - onehot[t])`` [T, v], where softmax = ``exponentials * rows.scale``.

    Args:
        exponentials: [T, v] exp(logit - row maximum).
        row_weights: [T] gradient with respect to -log p of each row.
        out: [T, v], may be ``exponentials`` itself; padding columns are set to 0.
    """
    valid = slice(shard.valid)
    torch.mul(exponentials[:, valid], (rows.scale * row_weights)[:, None], out=out[:, valid])
    out[:, shard.valid :].zero_()
    columns, owned = shard.targets(labels)
    # w (p - 1) by expm1: no cancellation where p is close to 1, and no rounding of p to half precision
    label_gradient = (row_weights * torch.expm1(rows.logprobs)).to(out.dtype)
    current = out.gather(1, columns[:, None])[:, 0]
    out.scatter_(1, columns[:, None], torch.where(owned, label_gradient, current)[:, None])
    return out


def combine(statistics: torch.Tensor, tp_group: dist.ProcessGroup | None) -> RowResult:
    """Statistics [3 or 4, T] of every rank -> the same row results on every rank; one all-gather."""
    rank, gathered = 0, statistics[None]
    if tp_group is not None:
        rank = tp_group.rank()
        gathered = statistics.new_empty((tp_group.size() * len(statistics), statistics.shape[1]))
        dist.all_gather_into_tensor(gathered, statistics, group=tp_group)
        gathered = gathered.view(-1, *statistics.shape)
    maximum, sums, target = gathered[:, 0], gathered[:, 1], gathered[:, 2]
    top = maximum.amax(0)
    rescale = (maximum - top).exp()
    total = (sums * rescale).sum(0)
    logprobs = target.amax(0) - top - total.log()
    entropy = None
    if len(statistics) == 4:
        expected = ((gathered[:, 3] + (maximum - top) * sums) * rescale).sum(0) / total  # E[logit - top]
        entropy = total.log() - expected
    return RowResult(logprobs, entropy, rescale[rank] / total)


def _row_blocks(logits: torch.Tensor) -> Iterator[slice]:
    rows, columns = logits.shape
    on_cpu = logits.device.type == "cpu"
    step = max(1, _CPU_BLOCK_ELEMENTS // columns if on_cpu else -(-rows // _BLOCKS_PER_CHUNK))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


class RowPasses(NamedTuple):
    """``statistics(logits, labels, shard, entropy)`` [3 or 4, T], which may change the logits, and
    ``gradient_(logits, labels, shard, statistics, rows, row_weights)``, which puts the gradient in their place."""

    statistics: Callable[[torch.Tensor, torch.Tensor, VocabShard, bool], torch.Tensor]
    gradient_: Callable[[torch.Tensor, torch.Tensor, VocabShard, torch.Tensor, RowResult, torch.Tensor], torch.Tensor]


EAGER = RowPasses(
    lambda logits, labels, shard, entropy: exponentiate_rows_(logits, labels, shard, entropy=entropy),
    lambda logits, labels, shard, _, rows, weights: softmax_gradient(logits, labels, shard, rows, weights, out=logits),
)


@functools.cache
def kernels() -> RowPasses | None:
    """The passes as Triton kernels; None where Triton is not installed, or cannot build what starts them."""
    try:
        from megatron_gft.row_kernels import row_gradient_, row_statistics

        if torch.cuda.is_available() and not (probe := torch.zeros(1, 8, device="cuda")).is_meta:  # as a plan's is
            row_statistics(probe, torch.zeros(1, dtype=torch.int64, device="cuda"), 0, 8)
    except ImportError:
        return None
    except Exception as error:  # of compilers and drivers anything
        logging.getLogger(__name__).warning(f"no kernels of Triton, slower: {error!r} -> install gcc, Python's headers")
        return None

    def gradient_(logits, labels, shard, statistics, rows, weights):
        factor, of_label = rows.scale * weights, weights * torch.expm1(rows.logprobs)  # see softmax_gradient
        return row_gradient_(logits, labels, shard.start, shard.valid, statistics[0], factor.float(), of_label.float())

    return RowPasses(lambda x, y, at, entropy: row_statistics(x, y, at.start, at.valid, entropy=entropy), gradient_)


def choose_passes(logits: torch.Tensor) -> RowPasses:
    """Kernels for logits of at most 32 bits on a GPU, the eager passes for all else."""
    return (kernels() if logits.is_cuda and logits.dtype != torch.float64 else None) or EAGER
