"""The one place that touches Megatron's ``parallel_state``: sizes, ranks and process groups as one frozen value.

Everything else takes a :class:`Parallel`, or a single group, as an argument, so that tests can pass their own.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed


@dataclass(frozen=True)
class Parallel:
    """Sizes, this process's ranks, and the groups of one layout.

    ``dp`` is data parallel without context parallel, ``dp_cp`` both together (gradients are summed over it).
    ``vp_size`` is the number of virtual pipeline chunks per rank, None without interleaving.
    """

    world_size: int
    rank: int
    tp_size: int
    tp_rank: int
    tp_group: dist.ProcessGroup
    pp_size: int
    pp_rank: int
    pp_group: dist.ProcessGroup
    cp_size: int
    cp_rank: int
    dp_size: int
    dp_rank: int
    dp_cp_group: dist.ProcessGroup
    ep_size: int
    ep_rank: int
    etp_size: int
    etp_rank: int
    expert_dp_rank: int
    vp_size: int | None = None

    @property
    def is_last_stage(self) -> bool:
        """This rank holds the output layer (of its last chunk)."""
        return self.pp_rank == self.pp_size - 1

    def stage_bounds(self, vp_stage: int | None) -> tuple[bool, bool]:
        """(pre_process, post_process) of one model chunk: does it hold the embedding, the output layer?"""
        first = self.pp_rank == 0 and (vp_stage is None or vp_stage == 0)
        last = self.is_last_stage and (vp_stage is None or vp_stage == (self.vp_size or 1) - 1)
        return first, last

    @property
    def coordinates(self) -> str:
        """For messages: ``rank 3 (tp 1, pp 1, cp 0, dp 0, ep 0)``."""
        return (
            f"rank {self.rank} (tp {self.tp_rank}, pp {self.pp_rank}, cp {self.cp_rank}, "
            f"dp {self.dp_rank}, ep {self.ep_rank})"
        )


def initialize_parallel(
    *,
    tp: int = 1,
    pp: int = 1,
    vpp: int | None = None,
    cp: int = 1,
    ep: int = 1,
    etp: int | None = None,
    create_gloo_groups: bool = True,
    timeout_minutes: int = 30,
) -> Parallel:
    """Build Megatron's process groups over an initialised default group and return the layout.

    Args:
        create_gloo_groups: CPU twins of the data-parallel groups, needed by the distributed optimizer's
            checkpoints on GPUs; impossible under a fake process group.
        timeout_minutes: of every collective.
    """
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
        create_gloo_process_groups=create_gloo_groups,
        distributed_timeout_minutes=timeout_minutes,
    )
    return current_parallel()


def current_parallel() -> Parallel:
    """The layout that Megatron's ``parallel_state`` holds now."""
    ps = parallel_state
    return Parallel(
        world_size=dist.get_world_size(),
        rank=dist.get_rank(),
        tp_size=ps.get_tensor_model_parallel_world_size(),
        tp_rank=ps.get_tensor_model_parallel_rank(),
        tp_group=ps.get_tensor_model_parallel_group(),
        pp_size=ps.get_pipeline_model_parallel_world_size(),
        pp_rank=ps.get_pipeline_model_parallel_rank(),
        pp_group=ps.get_pipeline_model_parallel_group(),
        cp_size=ps.get_context_parallel_world_size(),
        cp_rank=ps.get_context_parallel_rank(),
        dp_size=ps.get_data_parallel_world_size(),
        dp_rank=ps.get_data_parallel_rank(),
        dp_cp_group=ps.get_data_parallel_group(with_context_parallel=True),
        ep_size=ps.get_expert_model_parallel_world_size(),
        ep_rank=ps.get_expert_model_parallel_rank(),
        etp_size=ps.get_expert_tensor_parallel_world_size(),
        etp_rank=ps.get_expert_tensor_parallel_rank(),
        expert_dp_rank=ps.get_expert_data_parallel_rank(),
        vp_size=ps.get_virtual_pipeline_model_parallel_world_size(),
    )


def destroy_parallel() -> None:
    """Forget Megatron's groups and leave the default process group."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def seed_everything(seed: int, parallel: Parallel) -> None:
    """Seed torch and Megatron's tensor-parallel RNG tracker; pipeline stages get different streams."""
    torch.manual_seed(seed + 100 * parallel.pp_rank)
    model_parallel_cuda_manual_seed(seed + 100 * parallel.pp_rank)
