"""The only creator of process groups: turns degrees of parallelism into ``Groups``.

The groups are made by megatron-core's parallel_state, so that its engine finds the same ones. Ranks are numbered with
the tensor rank fastest, then expert, expert-data and pipeline rank: the ranks that communicate most are adjacent.
"""

from __future__ import annotations

import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from mmmoe_pretrain.parallel.degrees import Layout
from mmmoe_pretrain.parallel.groups import Group, Groups, HostGroups
from mmmoe_pretrain.parallel.runtime import silence_calls, silence_megatron, unbound_device

STORAGE_TIMEOUT = timedelta(hours=6)  # a rank may write a large share to a slow target while the others wait


def build_host_groups(timeout_minutes: float) -> HostGroups:
    """Create two groups of all ranks on the host, or none in one process. A rank that keeps the others
    waiting on ``control`` for ``timeout_minutes`` ends the job."""
    if dist.get_world_size() == 1:
        return HostGroups()
    return HostGroups(
        control=dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes), group_desc="control"),
        storage=dist.new_group(backend="gloo", timeout=STORAGE_TIMEOUT, group_desc="storage"),
    )


def host_pipeline(groups: Groups, control: Group, timeout_minutes: float) -> Group:
    """A group on the host of the ranks of ``groups.pipeline``, for objects that stages exchange; None where that is
    one rank. Collective over all ranks, which ``control`` has."""
    if groups.pipeline_size == 1:
        return None
    own = torch.tensor(dist.get_process_group_ranks(groups.pipeline))
    found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(found, own, group=control)
    pipelines = [list(ranks) for ranks in sorted({tuple(ranks.tolist()) for ranks in found})]
    with unbound_device():
        return dist.new_subgroups_by_enumeration(
            pipelines, timedelta(minutes=timeout_minutes), backend="gloo", group_desc="host pipeline"
        )[0]


def build_groups(layout: Layout, timeout_minutes: float = 5.0) -> Groups:
    """Create the groups of the running job; the default process group must exist. A rank that keeps the others
    waiting in a collective for ``timeout_minutes`` ends the job."""
    with silence_megatron():
        from megatron.core import parallel_state
    silence_calls()

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.tensor,
        distributed_timeout_minutes=timeout_minutes,
        create_gloo_process_groups=False,  # for its own checkpoints; each is a connection to every other rank
    )
    return Groups(
        data=parallel_state.get_data_parallel_group(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=layout.data,
        expert=parallel_state.get_expert_model_parallel_group(),
        expert_rank=parallel_state.get_expert_model_parallel_rank(),
        expert_size=layout.expert,
        expert_data=parallel_state.get_expert_data_parallel_group(),
        tensor=parallel_state.get_tensor_model_parallel_group(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=layout.tensor,
        sequence_parallel=layout.sequence_parallel,
        pipeline=parallel_state.get_pipeline_model_parallel_group(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=layout.pipeline,
        virtual_size=layout.virtual_pipeline,
    )


def forget_buffers() -> None:
    """Free megatron-core's buffers, in which it gathers rows (sequence parallelism); it makes new ones."""
    parallel_state = sys.modules.get("megatron.core.parallel_state")
    if parallel_state is not None and parallel_state.model_parallel_is_initialized():
        parallel_state.get_global_memory_buffer().buffer.clear()


def destroy_groups(after_error: bool = False) -> None:
    """End every group but the default one; the process may then build others.

    Each holds threads and connections. ``after_error`` NCCL's are only forgotten: tearing them down while
    peers wait in a collective can hang (``runtime.process_group``).
    """
    parallel_state = sys.modules.get("megatron.core.parallel_state")
    if parallel_state is not None:  # else nothing was built, and an import warns of much beside the first error
        parallel_state.destroy_model_parallel()
    world = distributed_c10d._get_default_group()
    # torch has no public list of the groups; megatron-core makes some that it hands out nowhere.
    for group in [group for group in distributed_c10d._world.pg_map if group is not world]:
        if not (after_error and dist.get_backend(group) == "nccl"):
            dist.destroy_process_group(group)
