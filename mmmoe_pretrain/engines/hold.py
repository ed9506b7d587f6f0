"""Weights that are held: pulled to an anchor before each update, or frozen (``optimizer.hold``).

The pull is a proximal step of strength * importance * (w - anchor)^2 / 2 by the learning rate, at the fp32 master
weights and apart from the gradient, as AdamW's decay is: it is stable for any strength, the gradient that is clipped
and averaged is that of the losses alone, and ZeRO's shards need nothing of each other. It comes before the update of
the optimizer, so working weights are published once.

What is frozen has a gradient of zero from the backward pass on, so it counts in no norm; with moments of zero and
without decay an optimizer then leaves it as it is, bit for bit. Every parameter keeps its gradient and its place, as
export and ZeRO need. A parameter of which some rows are frozen does not decay.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmmoe_pretrain.checkpoint.state import ShardedTensor
from mmmoe_pretrain.config.optimizer import ANCHOR, FROZEN, IMPORTANCE
from mmmoe_pretrain.parallel.collectives import group_size
from mmmoe_pretrain.parallel.cuts import is_vector
from mmmoe_pretrain.parallel.groups import Groups
from mmmoe_pretrain.parallel.placement import Placement, boxes, logical_shape, placements

PULLED = 1 << 24  # numbers that are pulled at once
Rows = tuple[range, ...]  # of the first dimension of a logical parameter; of a single number range(1)


def freeze(models: Iterable[nn.Module], frozen: Sequence[str], groups: Groups, device: torch.device) -> None:
    """Give what is frozen of the stages of this rank gradients of zero, and mark it for the optimizer. Raises
    ValueError on every rank where a name is that of no parameter of the model, or one has fewer rows. Collective."""
    found = torch.zeros(len(frozen), device=device)
    for model in models:
        placed = placements(model)
        for name, parameter in model.named_parameters():
            shape = logical_shape(tuple(parameter.shape), placed[name])
            chosen = [i for i, pattern in enumerate(frozen) if fnmatchcase(name, _parsed(pattern)[0])]
            if chosen:
                found[chosen] += 1
                rows = tuple(rows_of(frozen[i], name, shape) for i in chosen)
                parameter.frozen = rows  # type: ignore[attr-defined]
                here = _local(tuple(parameter.shape), placed[name], rows) if shape else None
                parameter.register_hook(functools.partial(_without, here))
    if group_size(groups.pipeline) > 1 and len(frozen):
        dist.all_reduce(found, group=groups.pipeline)
    if missing := [pattern for pattern, count in zip(frozen, found.tolist(), strict=True) if not count]:
        raise ValueError(
            f"optimizer.hold.frozen {missing[0]}: no parameter has such a name; they begin with mmmoe. and tasks., "
            f"e.g. mmmoe.trunk.blocks.0.*; the index of an export (mmmoe export RUN) lists all"
        )


def rows_of(pattern: str, name: str, shape: tuple[int, ...]) -> range:
    """The rows of ``name`` that ``pattern`` freezes."""
    _, begin, stop = _parsed(pattern)
    count = shape[0] if shape else 1
    first, end = int(begin or 0), int(stop or count)
    if not first < end <= count:
        raise ValueError(f"optimizer.hold.frozen {pattern}: {name} has rows 0 to {count - 1}; choose some of these")
    return range(first, end)


def _parsed(pattern: str) -> tuple[str, str | None, str | None]:
    """The names, and the first row and the end where they are given."""
    parsed = FROZEN.fullmatch(pattern)
    assert parsed is not None, "HoldConfig has checked it"
    return parsed[1], parsed[2], parsed[3]


def _local(shape: tuple[int, ...], placement: Placement, rows: Rows) -> list[slice]:
    """The part of ``rows`` in this rank's part of ``shape``."""
    found = []
    for part, whole in boxes(shape, placement):
        shift, stop = part.offset[0] - whole.offset[0], whole.offset[0] + whole.size[0]
        for each in rows:
            first, end = max(each.start, whole.offset[0]), min(each.stop, stop)
            if first < end:
                found.append(slice(first + shift, end + shift))
    return found


def _without(rows: Sequence[slice] | None, grad: Tensor) -> Tensor:
    """``grad`` with zeros in these rows; None: everywhere."""
    if rows is None:
        return torch.zeros_like(grad)
    kept = grad.clone()
    for each in rows:
        kept[each] = 0
    return kept


def decays(parameter: Tensor) -> bool:
    """Matrices do, unless something of them is frozen."""
    return not is_vector(parameter) and not hasattr(parameter, "frozen")


@torch.no_grad()
def clear_rows(held: ShardedTensor, rows: Rows) -> None:
    """Zeros in these rows."""
    for at, piece in held.pieces.items():
        if not held.shape:
            piece.zero_()
            continue
        for each in rows:  # a slice that ends before it begins is empty
            piece[max(each.start - at[0], 0) : max(each.stop - at[0], 0)] = 0


def pull_before_updates(optimizer: torch.optim.Optimizer, strength: float) -> None:
    """Have ``optimizer`` pull the flat master weights that it is about to update, and no others: ZeRO updates one
    after the other, and none in a step that is skipped."""

    @torch.no_grad()
    def pull(stepped: torch.optim.Optimizer, *_: object) -> None:
        for group in stepped.param_groups:
            for flat in group["params"]:
                held: Mapping[str, Tensor] = stepped.state.get(flat, {})
                if ANCHOR in held and flat.grad is not None:
                    pull_(flat.data, held[ANCHOR], held[IMPORTANCE], strength * group["lr"])

    optimizer.register_step_pre_hook(pull)


def pull_(weights: Tensor, anchor: Tensor, importance: Tensor, factor: float) -> None:
    """In place w = (w + c anchor) / (1 + c) with c = factor * importance."""
    flat = (tensor.view(-1).split(PULLED) for tensor in (weights, anchor, importance))
    for mine, to, weight in zip(*flat, strict=True):
        c = factor * weight
        mine.lerp_(to, c / (1 + c))
