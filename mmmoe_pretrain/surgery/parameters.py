"""Edits of parameters together with the state that the optimizer keeps for them.

If a weight is scaled by s and the function stays, its gradient is scaled by 1 / s: so averages of the gradient
(``exp_avg``, ``momentum_buffer``) by 1 / s, and those of its square (``exp_avg_sq``) by 1 / s^2. If n copies share
what one weight did, their gradients sum to its gradient: a copy's share of the former is 1 / n, and that of the
latter is between 1 / n^2 (equal gradients of the copies) and 1 / n (independent ones). The larger one is
taken, so that the first steps are rather too small than too large.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from mmmoe_pretrain.checkpoint.state import WholeState, model_key, optimizer_key, split_key
from mmmoe_pretrain.config import MoEConfig
from mmmoe_pretrain.config.optimizer import ANCHOR, AVERAGE, GRADIENT_POWER, IMPORTANCE

STACKED = ("up", "down", "up_bias", "down_bias")  # of each stack of experts; biases where there are any


@dataclass(frozen=True)
class Parameter:
    """The fp32 master weight, and what the optimizer keeps for it, by name. A buffer has none of that."""

    value: Tensor
    optimizer: dict[str, Tensor] = field(default_factory=dict)


State = dict[str, Parameter]


def by_parameter(state: WholeState) -> State:
    """What a checkpoint holds, by the names of parameters and buffers."""
    found = {split_key(key)[0]: Parameter(value) for key, value in state.items() if split_key(key)[1] is None}
    for key, value in state.items():
        name, tensor = split_key(key)
        if tensor is not None:
            found[name].optimizer[tensor] = value
    return found


def by_key(state: State) -> WholeState:
    """For a checkpoint."""
    found = {}
    for name, parameter in state.items():
        found[model_key(name)] = parameter.value
        found |= {optimizer_key(name, tensor): value for tensor, value in parameter.optimizer.items()}
    return found


def each(parameter: Parameter, change: Callable[[Tensor], Tensor]) -> Parameter:
    """The same change of the value and of the optimizer's tensors, e.g. a slice of all."""
    return Parameter(change(parameter.value), {name: change(kept) for name, kept in parameter.optimizer.items()})


def scaled(parameter: Parameter, weight: float = 1.0, mean: float = 1.0, square: float = 1.0) -> Parameter:
    """Value with its average and anchor, averages of the gradient, and those of its square with the importance, times
    factors of their own."""
    factors = {0: weight, 1: mean, 2: square}
    kept = {name: value * factors[GRADIENT_POWER[name]] for name, value in parameter.optimizer.items()}
    return Parameter(parameter.value * weight, kept)


def fresh(value: Tensor, optimizer: Iterable[str] = ()) -> Parameter:
    """A parameter for which the optimizer has just begun to keep these tensors; without names, a buffer."""
    begun = {name: value.clone() if name in (AVERAGE, ANCHOR) else torch.zeros_like(value) for name in optimizer}
    return Parameter(value, begun)


def clear_means(parameter: Parameter, rows: slice) -> None:
    """Averages of the gradient of these rows become zero, in place, and nothing holds them: the rows are new."""
    for name, kept in parameter.optimizer.items():
        if name == ANCHOR:
            kept[rows] = parameter.value[rows]
        elif name == IMPORTANCE or GRADIENT_POWER[name] == 1:
            kept[rows] = 0


def noise_like(value: Tensor, relative_std: float, key: str) -> Tensor:
    """Normal noise, ``relative_std`` times the root mean square of ``value``; a function of ``key``."""
    digest = hashlib.blake2b(key.encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    return torch.randn(value.shape, generator=generator) * (relative_std * value.square().mean().sqrt())


@dataclass(frozen=True)
class Layer:
    """Where block ``index`` keeps its MoE layer. ``moe`` holds the settings of that block."""

    index: int
    moe: MoEConfig

    @property
    def prefix(self) -> str:
        return f"mmmoe.trunk.blocks.{self.index}.ffn."

    def row_axis(self, state: State) -> dict[str, int]:
        """The router's tensors of ``state`` that have an entry for each expert -> the axis of the experts."""
        router = f"{self.prefix}router."
        of_rows = ("weight", "noise_weight", "logit_bias", "dormancy", "memory.logits.weight")
        axes = {f"{router}{name}": 0 for name in of_rows}
        return {name: axes.get(name, 1) for name in state if name in axes or name.startswith(self.biases)}

    @property
    def biases(self) -> str:
        """What the names of the buffers of bias balancing begin with."""
        return f"{self.prefix}router.bias."

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
        """The indices of the experts without computation, which follow the others."""
        return range(self.moe.num_experts, self.moe.router_outputs)


def change_rows(state: State, layer: Layer, change: Callable[..., Tensor]) -> State:
    """``change(tensor, axis=that of the experts)`` for all of the router's tensors and their optimizer state."""
    rows = layer.row_axis(state).items()
    return {**state, **{name: each(state[name], partial(change, axis=axis)) for name, axis in rows}}


def change_stacks(state: State, layer: Layer, change: Callable[..., Tensor]) -> State:
    """``change(tensor, stack=its experts)`` for the weights of all stacks and their optimizer state."""
    names = ((prefix + name, experts) for prefix, experts in layer.stacks for name in STACKED)
    stacks = {name: experts for name, experts in names if name in state}
    return {**state, **{name: each(state[name], partial(change, stack=stack)) for name, stack in stacks.items()}}


def select_experts(state: State, layer: Layer, experts: Iterable[int]) -> State:
    """The layer with the experts of these indices alone, in this order; an index may come again. Those
    of one stack must be adjacent. Experts without computation stay."""
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
