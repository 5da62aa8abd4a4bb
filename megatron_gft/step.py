"""One optimizer step: forward and backward over packs, one division by one denominator, one update.

The contract with Megatron (``calculate_per_token_loss``): a loss function returns ``(loss sum, integer count,
metrics)``; counts are added over microbatches and over dp x cp, and gradients are divided once by the total. The
denominator D of a step is known before any forward, so exactly one loss call of the step (first microbatch, data
rank 0, context rank 0, last stage) returns D and all others return 0. Nothing is ever a mean of means.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_gft.gft import k3, log_ratio, published_losses, row_coefficient
from megatron_gft.head_rows import kernels
from megatron_gft.model import LossOutput, unwrap
from megatron_gft.objectives import READ_Q, SOURCES, HeadSettings, by_source
from megatron_gft.packing import Pack
from megatron_gft.parallel import Parallel
from megatron_gft.pipeline import schedule_arguments
from megatron_gft.timing import DeviceTimer, RankTimes

SIGNS = ("positive", "negative")
STATISTICS = ("tokens", "loss", "nll", "probability", "rectified", "abs_advantage", "entropy")
MORE_STATISTICS = ("published_loss", "unknown_q", "known_q", "sampling_gap", "clipped", "anchored", "kl")


@dataclass(frozen=True)
class LossReport:
    """Sums over all loss rows of a step, equal on every rank; ``sums`` may be on its way from the device until
    ``arrived``. ``denominator`` is D."""

    sums: torch.Tensor
    denominator: int
    arrived: torch.cuda.Event | None = None

    @property
    def token_sums(self) -> torch.Tensor:
        """float64 ``[source, sign of advantage, statistic]`` in the order of ``SOURCES``, ``SIGNS``, and ``STATISTICS``
        then ``MORE_STATISTICS``, on the host; every statistic is a sum over tokens."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.sums

    def __add__(self, other: "LossReport") -> "LossReport":
        """Both steps as one."""
        return LossReport(self.token_sums + other.token_sums, self.denominator + other.denominator)

    @property
    def loss(self) -> float:
        """The step's loss, ``sum(w * c * -log p) / D``, without the anchor; 0 where nothing was divided by."""
        total = float(self.token_sums[..., STATISTICS.index("loss")].sum())
        return total / self.denominator if self.denominator else 0.0


@dataclass
class StepOutcome:
    """What one step did. ``updated`` is false when the update was skipped; ``seconds`` are by part of the step.
    ``times`` is None where ranks were not compared: that is done every ``logging.every`` steps."""

    report: LossReport
    grad_norm: float
    lr: float
    updated: bool
    seconds: dict[str, float]
    times: RankTimes | None


def pack_token_sums(pack: Pack, output: LossOutput, head: HeadSettings) -> torch.Tensor:
    """Metrics of one pack as float64 ``[3, 2, 14]`` (see :class:`LossReport`); no communication, no host sync."""
    logprobs, entropy, facts = output.logprobs, output.entropy, pack.facts
    p, c = logprobs.double().exp(), row_coefficient(logprobs, head, facts).double()
    weight = pack.token_weights.double() * c
    rows = torch.stack(
        [
            torch.ones_like(p),
            weight * -logprobs.double(),
            -logprobs.double(),
            p,
            (p <= head.tau).double(),
            pack.advantages.double().abs(),
            torch.zeros_like(p) if entropy is None else entropy.double(),
        ],
        dim=-1,
    )
    place = pack.sources.long() * len(SIGNS) + (pack.advantages < 0).long()
    flat = rows.new_zeros(len(SOURCES) * len(SIGNS), len(STATISTICS) + len(MORE_STATISTICS))
    flat[:, : len(STATISTICS)].index_add_(0, place, rows)
    if facts.sampled_logprobs is not None or facts.anchor_weights is not None or "shaped" in head.coefficient:
        more = torch.zeros(len(p), len(MORE_STATISTICS), dtype=p.dtype, device=p.device)
        more[:, 0] = published_losses(logprobs, pack.token_weights, head, facts)
        if facts.sampled_logprobs is not None:
            gap, unknown = log_ratio(logprobs, facts.sampled_logprobs).double(), facts.sampled_logprobs.isnan()
            reads = _reads_q(head.coefficient, p.device)[pack.sources.long()]
            known = reads & ~unknown
            more[:, 1], more[:, 2], more[:, 3] = reads & unknown, known, known * gap.abs()
            more[:, 4] = known & ((c / gap.exp() - 1).abs() > 1e-5)
        if facts.anchor_weights is not None:
            more[:, 5] = facts.anchor_weights > 0
            more[:, 6] = more[:, 5] * k3(logprobs, facts)
        flat[:, len(STATISTICS) :].index_add_(0, place, more)
    return flat.view(len(SOURCES), len(SIGNS), -1)


@functools.lru_cache
def _reads_q(coefficient: str | tuple[str | None, ...], device: torch.device) -> torch.Tensor:
    """bool [3], which sources' coefficients read q; kept, since making it waits for the device."""
    names = [name or "none" for name in by_source(coefficient)]
    return torch.tensor([name in READ_Q or ":" in name for name in names], device=device)


class StepRunner:
    """Runs packs through the model chunks of this rank with Megatron's pipeline schedules."""

    def __init__(self, chunks: Sequence[torch.nn.Module], parallel: Parallel):
        self.chunks = list(chunks)
        self.parallel = parallel
        self.loss_sums: list[torch.Tensor] = []
        self.timer = DeviceTimer()

    def measure_entropy(self, due: bool) -> None:
        """Measure it in the next passes where it is ``due``, and always where the head's kernels have it for free."""
        for chunk in map(unwrap, self.chunks):
            free = chunk.head.fused and torch.cuda.is_available() and kernels() is not None
            chunk.head = replace(chunk.head, entropy=due or free)

    def forward_backward(self, packs: Sequence[Pack], denominator: int, *, forward_only: bool = False) -> LossReport:
        """Forward (and backward) of this rank's packs; gradients are left divided by ``denominator``.

        Args:
            packs: this data- and context-parallel rank's microbatches, on the host; every rank has as many.
            denominator: D of the whole step, the same on every rank.
            forward_only: evaluation; makes no gradient.
        """
        device = torch.device(torch.cuda.current_device())
        shape = (len(SOURCES), len(SIGNS), len(STATISTICS) + len(MORE_STATISTICS))
        total = torch.zeros(shape, dtype=torch.float64, device=device)
        packs = [pack.to(device) for pack in packs]
        self.loss_sums, self.timer = [], DeviceTimer()  # of these packs: those of a validation are no part of a step
        if packs:
            rows = [pack.tokens.numel() for pack in packs]
            config = unwrap(self.chunks[0]).config
            data = [enumerate(packs) for _ in self.chunks]
            # Megatron's schedules leave this to the caller, and the head makes its gradients in forward.
            with torch.set_grad_enabled(not forward_only):
                reports = get_forward_backward_func()(
                    forward_step_func=partial(self._forward_step, denominator=denominator),
                    data_iterator=data if len(data) > 1 else data[0],
                    model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
                    num_microbatches=len(packs),
                    seq_length=max(rows),
                    micro_batch_size=1,
                    forward_only=forward_only,
                    **schedule_arguments(self.parallel, config, rows),
                )
            for report in reports:
                total += report["token_sums"]
        self._reduce(total)
        # Into page-locked memory, and the host goes on: after the gradient's norm it is there without another wait.
        return LossReport(total.to("cpu", non_blocking=True), denominator, torch.cuda.current_stream().record_event())

    def nonfinite_packs(self) -> list[int]:
        """Indices of this rank's microbatches of the last step whose loss is not finite (last stage only)."""
        return [index for index, loss in enumerate(self.loss_sums) if not math.isfinite(float(loss))]

    def _forward_step(self, iterator: Iterator[tuple[int, Pack]], chunk: torch.nn.Module, *, denominator: int):
        index, pack = next(iterator)
        with self.timer.measure():
            output = chunk(pack)
        if not isinstance(output, LossOutput):
            return output, None
        first = index == 0 and self.parallel.dp_rank == 0 and self.parallel.cp_rank == 0
        return output.loss_sum, partial(self._loss, pack, output, denominator if first else 0)

    def _loss(self, pack: Pack, output: LossOutput, count: int, loss_sum: torch.Tensor):
        self.loss_sums.append(loss_sum.detach())
        tokens = torch.full((), count, dtype=torch.int, device=loss_sum.device)  # not torch.tensor, which waits
        head = unwrap(self.chunks[-1]).head  # a stage's last chunk is the one that ends in a loss
        return loss_sum, tokens, {"token_sums": pack_token_sums(pack, output, head)}

    def _reduce(self, total: torch.Tensor) -> None:
        """Sum over dp x cp on the last stage, then give it to all stages: every rank decides alike."""
        if self.parallel.is_last_stage:
            dist.all_reduce(total, group=self.parallel.dp_cp_group)
        if self.parallel.pp_size > 1:
            last = dist.get_global_rank(self.parallel.pp_group, self.parallel.pp_size - 1)
            dist.broadcast(total, src=last, group=self.parallel.pp_group)
