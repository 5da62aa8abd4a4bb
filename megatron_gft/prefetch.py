"""The next step is weighed, planned and read while the current one trains.

At 256 data-parallel ranks and 2048 groups a step, planning takes 2 s of one core (LOG.md), and reading waits for
disks: a GPU should wait for neither.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import torch

from megatron_gft.batch import StepBatch, StepSource
from megatron_gft.packing import Pack


class StepPrefetcher:
    """Hands out the steps of ``source`` in order, one prepared ahead in a thread.

    Args:
        source: where steps come from.
        end: steps from this one on are never prepared.
    """

    def __init__(self, source: StepSource, end: int):
        self.source, self.end = source, end
        # The current device belongs to a thread.
        self._thread = ThreadPoolExecutor(1, "next-step", torch.cuda.set_device, (torch.cuda.current_device(),))
        self._ahead: dict[int, Future[tuple[StepBatch, list[Pack]]]] = {}

    def take(self, step: int) -> tuple[StepBatch, list[Pack]]:
        """Batch and this rank's packs of the 0-based ``step``, and start on the one after it.

        Raises:
            InputError: as :meth:`StepSource.batch`, when the step that is wrong is taken, not before.
        """
        future = self._ahead.pop(step, None) or self._thread.submit(self._prepare, step)
        prepared = future.result()
        if step + 1 < self.end:
            self._ahead = {step + 1: self._thread.submit(self._prepare, step + 1)}
        return prepared

    def close(self) -> None:
        """Wait for the step in preparation and end the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _prepare(self, step: int) -> tuple[StepBatch, list[Pack]]:
        batch = self.source.batch(step)
        return batch, self.source.packs(batch)
