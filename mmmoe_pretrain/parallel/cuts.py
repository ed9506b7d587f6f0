"""How matrices are shared by the tensor ranks: sizes, placements, and the marks that engines read.

No communication; ``parallel/tensor.py`` has that.
"""

from __future__ import annotations

from torch import Tensor, nn

from mmmoe_pretrain.parallel.groups import Groups
from mmmoe_pretrain.parallel.placement import Cut, Placement


def divides_tokens(groups: Groups) -> bool:
    """Whether a tensor rank holds a share of the tokens between matrices (sequence parallelism)."""
    return groups.sequence_parallel and groups.tensor_size > 1


def tensor_share(size: int, groups: Groups) -> int:
    """How many of ``size`` equal things one tensor rank has; ``layout.py`` refuses what does not divide."""
    assert size % groups.tensor_size == 0, f"{size} over {groups.tensor_size} tensor ranks"
    return size // groups.tensor_size


def tensor_cut(dim: int, groups: Groups, blocks: tuple[int, ...] = (1,)) -> Placement:
    """Dimension ``dim`` is cut over the tensor ranks; see ``Cut`` for ``blocks``."""
    return (Cut(dim, groups.tensor_rank, groups.tensor_size, blocks),) if groups.tensor_size > 1 else ()


def expert_cut(groups: Groups) -> Placement:
    """Dimension 0, the experts, is cut over the expert ranks."""
    return (Cut(0, groups.expert_rank, groups.expert_size),) if groups.expert_size > 1 else ()


def mark_cut(parameter: nn.Parameter, groups: Groups) -> None:
    """megatron-core then counts the parameter on every tensor rank in the gradient's norm."""
    if groups.tensor_size > 1:
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]


def mark_stacked(parameter: nn.Parameter) -> None:
    """Dimension 0 counts experts, so that a stack of biases is one of vectors: see ``is_vector``."""
    parameter.stacked = True  # type: ignore[attr-defined]


def is_vector(parameter: Tensor) -> bool:
    """A bias, a scale or a single number, or a stack of them: it does not decay, and stays fp32."""
    return parameter.ndim - int(getattr(parameter, "stacked", False)) < 2


def computed_alike(parameter: nn.Parameter) -> bool:
    """Under tensor parallelism: every tensor rank holds the whole parameter and computes its whole gradient,
    from the same numbers. Engines average it all the same: sums that are not deterministic on a GPU would let the
    copies drift apart, and then a token near the edge between two experts would be sent to both."""
    return not (getattr(parameter, "tensor_model_parallel", False) or getattr(parameter, "sequence_parallel", False))


def mark_partial_gradient(parameter: nn.Parameter, groups: Groups) -> None:
    """For a whole parameter that meets a share of the tokens alone: an engine then sums its gradient
    over the tensor ranks. The mark is megatron-core's."""
    if divides_tokens(groups):
        parameter.sequence_parallel = True  # type: ignore[attr-defined]
