"""megatron-core's tensor-parallel layers as ours: they return the tensor alone, say how their weight is
cut, and leave its initial values to the caller.

Imports megatron-core (seconds): ``parallel/tensor.py`` imports this module where there are several
tensor ranks, and nothing else does.
"""

from __future__ import annotations

import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from torch import Tensor, nn

from mmmoe_pretrain.parallel.cuts import divides_tokens, mark_cut, tensor_cut
from mmmoe_pretrain.parallel.groups import Groups
from mmmoe_pretrain.parallel.placement import Placement


class _Cut:
    """A layer whose ``weight`` is cut over the tensor ranks."""

    weight: nn.Parameter

    def _cut(self, dim: int, groups: Groups, blocks: tuple[int, ...] = (1,)) -> None:
        mark_cut(self.weight, groups)
        self._placement = tensor_cut(dim, groups, blocks)

    def placements(self) -> dict[str, Placement]:
        return {"weight": self._placement}


class ColumnLinear(_Cut, ColumnParallelLinear):
    """``weight``: [out / ranks, in]. With ``sequence_parallel`` the input is this rank's rows, else all."""

    def __init__(
        self, in_size: int, out_size: int, groups: Groups, blocks: tuple[int, ...], sequence_parallel: bool
    ) -> None:
        assert out_size % (sum(blocks) * groups.tensor_size) == 0, f"{out_size} / {blocks} / {groups.tensor_size}"
        super().__init__(
            in_size,
            out_size,
            config=_config(groups, sequence_parallel),
            init_method=_no_values,
            bias=False,
            tp_group=groups.tensor,
        )
        self._cut(0, groups, blocks)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


class RowLinear(_Cut, RowParallelLinear):
    """``weight``: [out, in / ranks]."""

    def __init__(self, in_size: int, out_size: int, groups: Groups) -> None:
        super().__init__(
            in_size,
            out_size,
            config=_config(groups, divides_tokens(groups)),
            init_method=_no_values,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=groups.tensor,
        )
        self._cut(1, groups)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


class VocabEmbedding(_Cut, VocabParallelEmbedding):
    """``weight``: [V / ranks, D]."""

    def __init__(self, vocab_size: int, hidden_size: int, groups: Groups) -> None:
        super().__init__(
            vocab_size,
            hidden_size,
            init_method=_no_values,
            config=_config(groups, sequence_parallel=False),
            tp_group=groups.tensor,
        )
        self._cut(0, groups)


def _config(groups: Groups, sequence_parallel: bool) -> ModelParallelConfig:
    return ModelParallelConfig(
        tensor_model_parallel_size=groups.tensor_size,
        sequence_parallel=sequence_parallel,
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=torch.float32,
    )


def _no_values(weight: Tensor) -> None:
    """``models/init.py`` draws them."""
