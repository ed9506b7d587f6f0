"""What a checkpoint holds of one parameter."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ParameterState:
    """One parameter by its logical name, as this rank holds it.

    ``value`` is the fp32 master weight; ``expert_axis`` is True where dimension 0 runs over the
    experts of this rank and the logical tensor over all of them.
    """

    value: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    expert_axis: bool

    def clone(self) -> ParameterState:
        """The same with tensors of its own."""
        return ParameterState(self.value.clone(), self.exp_avg.clone(), self.exp_avg_sq.clone(), self.expert_axis)
