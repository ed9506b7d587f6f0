"""The only creator of process groups: turns degrees of parallelism into ``Groups``.

The groups are made by megatron-core's parallel_state, so that its engine finds the same ones. Ranks
are numbered with the tensor rank fastest, then expert, expert-data and pipeline rank: the ranks that
talk most are neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist

from mmmoe_pretrain.config import ParallelConfig
from mmmoe_pretrain.parallel.degrees import Layout, resolve_degrees
from mmmoe_pretrain.parallel.groups import Groups
from mmmoe_pretrain.parallel.quiet import quiet_calls, quiet_megatron


def build_groups(config: ParallelConfig, num_experts: int | Sequence[int]) -> Groups:
    """Create the groups of the running job; the default process group must exist.

    ``num_experts``: of the mixture, or of each group and layer where they differ. Raises ValueError for
    degrees that do not fit the ranks; ``layout.resolve_layout`` says the rest.
    """
    layout = resolve_degrees(config, num_experts, dist.get_world_size())
    with quiet_megatron():
        from megatron.core import parallel_state
    quiet_calls()

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.tensor,
        distributed_timeout_minutes=config.timeout_minutes,
    )
    return _groups(layout)


def _groups(layout: Layout) -> Groups:
    from megatron.core import parallel_state as state

    return Groups(
        data=state.get_data_parallel_group(),
        data_rank=state.get_data_parallel_rank(),
        data_size=layout.data,
        expert=state.get_expert_model_parallel_group(),
        expert_rank=state.get_expert_model_parallel_rank(),
        expert_size=layout.expert,
        expert_data=state.get_expert_data_parallel_group(),
        tensor=state.get_tensor_model_parallel_group(),
        tensor_rank=state.get_tensor_model_parallel_rank(),
        tensor_size=layout.tensor,
        sequence_parallel=layout.sequence_parallel,
        pipeline=state.get_pipeline_model_parallel_group(),
        pipeline_rank=state.get_pipeline_model_parallel_rank(),
        pipeline_size=layout.pipeline,
        virtual_size=layout.virtual_pipeline,
    )


def destroy_groups() -> None:
    """Forget the groups; the process may then build others."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
