"""The process groups a model is handed: a frozen value, so that model code knows groups, not ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

Group = dist.ProcessGroup | None


@dataclass(frozen=True)
class Groups:
    """Where this rank stands. A group of None is a group of this process alone.

    ``data`` holds the ranks that see different samples; it splits into ``expert`` (the ranks
    that together hold all experts) times ``expert_data`` (the replicas of one expert).
    """

    data: Group = None
    expert: Group = None
    expert_data: Group = None
    data_rank: int = 0
    data_size: int = 1
    expert_rank: int = 0
    expert_size: int = 1

    @property
    def expert_data_size(self) -> int:
        return self.data_size // self.expert_size

    def local_experts(self, num_experts: int) -> range:
        """Global indices of the experts that live on this rank."""
        share = num_experts // self.expert_size
        return range(self.expert_rank * share, (self.expert_rank + 1) * share)


SINGLE = Groups()
