"""Where the time of a step goes on each rank: forward compute per rank, the slowest one, idle share, traces."""

import contextlib
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_gft.config import ProfileConfig
from megatron_gft.parallel import Parallel

# Forward is a third of forward and backward (backward computes two products for each of forward's).
FORWARD_SHARE = 1 / 3
# A rank this much slower than the median of its pipeline stage is worth a word.
STRAGGLER_FACTOR = 1.1


def _now() -> torch.cuda.Event | float:
    """This point of the device's stream, read later and without synchronisation; on a CPU the clock."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


@dataclass
class DeviceTimer:
    """Sums the time that the device spends on parts of a step; of a forward pass, waits for other stages left out."""

    spans: list[tuple[Any, Any]] = field(default_factory=list)

    @contextlib.contextmanager
    def measure(self) -> Iterator[None]:
        """Add the time of the block."""
        begin = _now()
        yield
        self.spans.append((begin, _now()))

    def take(self) -> float:
        """Seconds since the last call; waits for the device."""
        spans, self.spans = self.spans, []
        if not spans or isinstance(spans[-1][1], float):
            return sum(end - begin for begin, end in spans)
        spans[-1][1].synchronize()
        return sum(begin.elapsed_time(end) for begin, end in spans) / 1000


@dataclass(frozen=True)
class RankTimes:
    """What follows from the forward seconds of every rank; see :func:`gather_times`."""

    slowest_rank: int
    slowest_factor: float
    idle_share_by_stage: tuple[float, ...]

    @property
    def hint(self) -> str | None:
        """A sentence when one rank holds up the others."""
        if self.slowest_factor < STRAGGLER_FACTOR:
            return None
        return (
            f"straggler: rank {self.slowest_rank} takes {self.slowest_factor:.2f} times the median forward time of its "
            "pipeline stage"
        )


def gather_times(forward_seconds: float, step_seconds: float, parallel: Parallel) -> RankTimes:
    """Compare forward times of all ranks; collective.

    A rank is compared with the ranks of its own pipeline stage, which run the same layers. The idle share of a
    stage is an estimate, ``1 - 3 * forward / (forward and backward)`` of its median rank: the pipeline bubble, and
    waiting for others.
    """
    mine = torch.tensor([parallel.pp_rank, forward_seconds, step_seconds])  # on the host: no device waits
    rows = [torch.empty_like(mine) for _ in range(parallel.world_size)]
    dist.all_gather(rows, mine)
    table = torch.stack(rows).tolist()
    median = {
        stage: statistics.median(row[1] for row in table if int(row[0]) == stage) for stage in range(parallel.pp_size)
    }
    factors = [row[1] / median[int(row[0])] if median[int(row[0])] else 1.0 for row in table]
    slowest = max(range(len(factors)), key=factors.__getitem__)
    wall = max(max(row[2] for row in table), 1e-9)
    idle = tuple(max(0.0, 1 - median[stage] / FORWARD_SHARE / wall) for stage in range(parallel.pp_size))
    return RankTimes(slowest, factors[slowest], idle)


@contextlib.contextmanager
def traced(config: ProfileConfig, step: int, rank: int, folder: Path) -> Iterator[None]:
    """Write a torch profiler trace of this step on this rank when the configuration asks for it, for Perfetto."""
    if step not in config.steps or rank not in config.ranks:
        yield
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, record_shapes=True, profile_memory=True) as profiler:
        yield
    folder.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(folder / f"step-{step:08d}-rank-{rank}.json"))
