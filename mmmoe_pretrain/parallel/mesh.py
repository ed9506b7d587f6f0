"""The only creator of process groups: turns degrees of parallelism into ``Groups``.

The groups are made by megatron-core's parallel_state, so that its engine finds the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist

from mmmoe_pretrain.config import ParallelConfig
from mmmoe_pretrain.parallel.groups import Groups
from mmmoe_pretrain.parallel.quiet import quiet_megatron


def resolve_expert_parallel_size(requested: int | str, num_experts: int | Sequence[int], world_size: int) -> int:
    """The number of ranks that share one set of experts.

    ``num_experts``: of the mixture, or of each group and layer where they differ. ``auto`` takes the
    largest number that divides both the experts and the ranks. Raises
    ValueError for a layout that cannot be, with the nearest that can.
    """
    counts = [num_experts] if isinstance(num_experts, int) else list(num_experts)
    legal = [n for n in range(1, world_size + 1) if world_size % n == 0 and all(c % n == 0 for c in counts)]
    if requested == "auto":
        return legal[-1]
    size = int(requested)
    if size not in legal:
        raise ValueError(
            f"parallel.expert_parallel_size {size} does not fit moe.num_experts {', '.join(map(str, counts))} on "
            f"{world_size} ranks: it must divide both; use one of {legal} or auto"
        )
    return size


def build_groups(config: ParallelConfig, num_experts: int | Sequence[int]) -> Groups:
    """Create the groups of the running job; the default process group must exist."""
    with quiet_megatron():
        from megatron.core import parallel_state

    world_size = dist.get_world_size()
    expert_size = resolve_expert_parallel_size(config.expert_parallel_size, num_experts, world_size)
    parallel_state.initialize_model_parallel(
        expert_model_parallel_size=expert_size,
        distributed_timeout_minutes=config.timeout_minutes,
    )
    return Groups(
        data=parallel_state.get_data_parallel_group(),
        expert=parallel_state.get_expert_model_parallel_group(),
        expert_data=parallel_state.get_expert_data_parallel_group(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        expert_rank=parallel_state.get_expert_model_parallel_rank(),
        expert_size=expert_size,
    )


def destroy_groups() -> None:
    """Forget the groups; the process may then build others."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
