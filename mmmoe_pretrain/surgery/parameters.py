"""Edits of parameters together with their optimizer moments.

If a weight is scaled by s and the function stays, its gradient is scaled by 1 / s: so ``exp_avg`` by
1 / s, ``exp_avg_sq`` by 1 / s^2. If n copies share what one weight did, their gradients sum to its
gradient: a copy's share of ``exp_avg`` is 1 / n, and that of ``exp_avg_sq`` lies between 1 / n^2 (the
copies' gradients are alike) and 1 / n (they are independent). The larger one is taken, so that the
first steps are rather too small than too large.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mmmoe_pretrain.checkpoint.state import ParameterState
from mmmoe_pretrain.config import MoEConfig

State = dict[str, ParameterState]
STACKED = ("up", "down", "up_bias", "down_bias")  # of each stack of experts; biases where there are any


def each(parameter: ParameterState, change: Callable[[Tensor], Tensor]) -> ParameterState:
    """The same change of the value and of both moments, e.g. a slice of all three."""
    first, second = (None if m is None else change(m) for m in (parameter.exp_avg, parameter.exp_avg_sq))
    return dataclasses.replace(parameter, value=change(parameter.value), exp_avg=first, exp_avg_sq=second)


def scaled(
    parameter: ParameterState, weight: float = 1.0, exp_avg: float = 1.0, exp_avg_sq: float = 1.0
) -> ParameterState:
    """Value and moments times factors of their own."""
    first = None if parameter.exp_avg is None else parameter.exp_avg * exp_avg
    second = None if parameter.exp_avg_sq is None else parameter.exp_avg_sq * exp_avg_sq
    return dataclasses.replace(parameter, value=parameter.value * weight, exp_avg=first, exp_avg_sq=second)


def without_moments(value: Tensor, moments: bool) -> ParameterState:
    """A parameter with moments of zero, or a buffer, which has none."""
    zeros = torch.zeros_like(value) if moments else None
    return ParameterState(value, zeros, None if zeros is None else zeros.clone())


def noise_like(value: Tensor, relative_std: float, key: str) -> Tensor:
    """Normal noise, ``relative_std`` times the root mean square of ``value``; a function of ``key``."""
    digest = hashlib.blake2b(key.encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    return torch.randn(value.shape, generator=generator) * (relative_std * value.square().mean().sqrt())


@dataclass(frozen=True)
class Layer:
    """Where block ``index`` keeps its mixture. ``moe`` holds the settings of that block."""

    index: int
    moe: MoEConfig

    @property
    def prefix(self) -> str:
        return f"mmmoe.trunk.blocks.{self.index}.ffn."

    @property
    def row_axis(self) -> dict[str, int]:
        """The router's tensors that have an entry for each expert -> the axis of the experts."""
        names = {"weight": 0, "noise_weight": 0, "logit_bias": 0, "bias": 1, "dormancy": 0}
        return {f"{self.prefix}router.{name}": axis for name, axis in names.items()}

    @property
    def stacks(self) -> list[tuple[str, range]]:
        """The prefix of each stack of experts, and the indices of its experts within the layer."""
        stacks, first = [], 0
        for g, group in enumerate(self.moe.groups):
            name = "experts." if len(self.moe.groups) == 1 else f"experts.stacks.{g}."
            stacks.append((self.prefix + name, range(first, first + group.num_experts)))
            first += group.num_experts
        return stacks

    @property
    def free(self) -> range:
        """The indices of the experts without computation, which stand behind the others."""
        return range(self.moe.num_experts, self.moe.router_outputs)


def change_rows(state: State, layer: Layer, change: Callable[..., Tensor]) -> State:
    """``change(tensor, axis=that of the experts)`` for all of the router's tensors and their moments."""
    rows = {name: axis for name, axis in layer.row_axis.items() if name in state}
    return {**state, **{name: each(state[name], partial(change, axis=axis)) for name, axis in rows.items()}}


def change_stacks(state: State, layer: Layer, change: Callable[..., Tensor]) -> State:
    """``change(tensor, stack=its experts)`` for the weights of all stacks and their moments."""
    names = ((prefix + name, experts) for prefix, experts in layer.stacks for name in STACKED)
    stacks = {name: experts for name, experts in names if name in state}
    return {**state, **{name: each(state[name], partial(change, stack=stack)) for name, stack in stacks.items()}}


def select_experts(state: State, layer: Layer, experts: Iterable[int]) -> State:
    """The layer with the experts of these indices alone, in this order; an index may come again. Those
    of one stack must stand together. Experts without computation stay."""
    wanted = list(experts)
    rows = torch.tensor([*wanted, *layer.free])
    state = change_rows(state, layer, lambda tensor, axis: tensor.index_select(axis, rows))
    return change_stacks(
        state,
        layer,
        lambda tensor, stack: tensor.index_select(0, torch.tensor([e - stack.start for e in wanted if e in stack])),
    )


def group_changes(layer: Layer, experts: Iterable[int]) -> dict[str, object]:
    """The settings that ``select_experts`` changes."""
    wanted = list(experts)
    changes: dict[str, object] = {"num_experts": len(wanted)}
    if layer.moe.expert_groups:
        sizes = [sum(e in stack for e in wanted) for _, stack in layer.stacks]
        changes["expert_groups"] = [
            {**group.model_dump(mode="json"), "num_experts": size}
            for group, size in zip(layer.moe.expert_groups, sizes, strict=True)
        ]
    return changes
