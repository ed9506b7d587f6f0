"""The process groups of a model as a frozen value, so that model code uses groups, not ranks. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import torch.distributed as dist

Group: TypeAlias = "dist.ProcessGroup | None"


@dataclass(frozen=True)
class Groups:
    """The groups of this rank. A group of None is a group of this process alone.

    ``data``: the ranks that read different samples and are otherwise equal (same pipeline stage, same
    tensor rank); it splits into ``expert`` (the ranks that together hold all experts) times
    ``expert_data`` (the replicas of one expert). ``tensor``: the ranks that share each matrix, experts'
    included; all see the same samples. ``pipeline``: the ranks that hold the stages of one model.
    """

    data: Group = None
    expert: Group = None
    expert_data: Group = None
    data_rank: int = 0
    data_size: int = 1
    expert_rank: int = 0
    expert_size: int = 1
    tensor: Group = None
    tensor_rank: int = 0
    tensor_size: int = 1
    sequence_parallel: bool = False  # between matrices each tensor rank holds a share of the tokens
    pipeline: Group = None
    pipeline_rank: int = 0
    pipeline_size: int = 1
    virtual_size: int = 1  # stages that a pipeline rank holds

    @property
    def num_stages(self) -> int:
        return self.pipeline_size * self.virtual_size

    def local_experts(self, num_experts: int) -> range:
        """Global indices of the experts on this rank."""
        share = num_experts // self.expert_size
        return range(self.expert_rank * share, (self.expert_rank + 1) * share)


@dataclass(frozen=True)
class HostGroups:
    """Groups that communicate through host memory (gloo), independent of the model's; of all ranks but the last.

    ``control``: small messages of the main thread. ``storage``: saving, loading and deleting checkpoints; a
    thread of a save in flight may own it. Collectives of two threads on one group would mix. ``pipeline``: the ranks
    of ``Groups.pipeline`` (``mesh.host_pipeline``).
    """

    control: Group = None
    storage: Group = None
    pipeline: Group = None


SINGLE = Groups()
