"""What a checkpoint holds of one parameter, whole in one process."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class ParameterState:
    """One parameter: ``value`` is the fp32 master weight, the others Adam's moments. A buffer has no moments."""

    value: Tensor
    exp_avg: Tensor | None
    exp_avg_sq: Tensor | None

    def tensors(self, name: str) -> dict[str, Tensor]:
        """By their names in a checkpoint."""
        named = {
            f"model/{name}": self.value,
            f"optimizer/{name}/exp_avg": self.exp_avg,
            f"optimizer/{name}/exp_avg_sq": self.exp_avg_sq,
        }
        return {key: tensor for key, tensor in named.items() if tensor is not None}

    def clone(self) -> ParameterState:
        """The same with tensors of its own."""
        first, second = (None if m is None else m.clone() for m in (self.exp_avg, self.exp_avg_sq))
        return ParameterState(self.value.clone(), first, second)


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that are trained state (router biases), by name; the others are made anew."""
    kept = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}
