"""Pipeline transfers whose shapes are known, so that none is sent ahead.

Packs differ in length. Megatron then (``variable_seq_lengths``) lets the ranks tell each other the shape before each
transfer, which synchronises the device every time: no rank runs ahead of its GPU, and interleaving hides nothing.
But all ranks of a pipeline hold the same packs, so each knows every shape before the step starts.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig

from megatron_gft.parallel import Parallel

Shape = tuple[int, int, int]
# What Megatron's schedules take from ``parallel_state`` where they make their own communicator.
GROUPS = ["tp", "cp", "pp", "embd", "pos_embd", "dp_cp"]


class KnownShapes(P2PCommunicator):
    """Megatron's transfers between stages, with the shape of each one from the microbatches of the step.

    The n-th tensor that a rank receives belongs to the n-th slot of Megatron's schedule that has a sender, forward
    and backward alike. Outer slots are the pipeline's two ends: nothing comes before the first stage's first chunk,
    nor back to the last stage's last one.
    """

    def __init__(self, parallel: Parallel, config: TransformerConfig, rows: Sequence[int]):
        """``rows`` of tokens of each microbatch on this context-parallel rank, the same on all stages."""
        super().__init__(pp_group=parallel.pp_group, config=config)
        sharded = parallel.tp_size if config.sequence_parallel else 1
        shapes = [(count // sharded, 1, config.hidden_size) for count in rows]
        every = [(microbatch, 0) for microbatch in range(len(rows))]
        if parallel.vp_size:
            every = get_schedule_table(len(rows), parallel.vp_size, config.microbatch_group_size_per_vp_stage)
        inner = [(microbatch, chunk) for microbatch, chunk in every if chunk]
        first, last = parallel.pp_rank == 0, parallel.is_last_stage
        self.forward: Iterator[Shape] = iter([shapes[microbatch] for microbatch, _ in (inner if first else every)])
        self.backward: Iterator[Shape] = iter([shapes[microbatch] for microbatch, _ in (inner if last else every)])

    def _communicate_shapes(
        self,
        tensor_send_next: torch.Tensor | None,
        tensor_send_prev: torch.Tensor | None,
        recv_prev: bool,
        recv_next: bool,
    ) -> tuple[Shape | None, Shape | None]:
        """(shape from the previous stage, shape from the next one); Megatron asks before each transfer."""
        return (next(self.forward) if recv_prev else None), (next(self.backward) if recv_next else None)


def schedule_arguments(parallel: Parallel, config: TransformerConfig, rows: Sequence[int]) -> dict[str, Any]:
    """What Megatron's forward-backward function takes beyond model and data; nothing without a pipeline."""
    if parallel.pp_size == 1:
        return {}
    return {
        "p2p_communicator": KnownShapes(parallel, config, rows),
        "pg_collection": ProcessGroupCollection.use_mpu_process_groups(GROUPS),
    }
