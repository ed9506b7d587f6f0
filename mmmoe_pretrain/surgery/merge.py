"""Two experts become one: the mean of their weights and router rows, weighted by how much each is used. Exact if no
token chooses one of them, such as a dormant one. Two equal experts with sigmoid scores at K = 1 are exact too.
Otherwise the two were two of the top K or shared a probability, which one cannot reproduce; and the mean of different
experts is neither of them, since their hidden units need not correspond.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmmoe_pretrain.config.optimizer import GRADIENT_POWER
from mmmoe_pretrain.surgery.operation import Result, Source, capacity_reason, stays_exact
from mmmoe_pretrain.surgery.parameters import STACKED, Layer, Parameter, State, group_changes, select_experts
from mmmoe_pretrain.surgery.settings import chosen_layers, with_layers

WHY_NOT = "Pass --lossy to do it all the same"


def merge(source: Source, layer_index: int, experts: tuple[int, int], lossy: bool) -> Result:
    """The second of ``experts`` goes into the place of the first.

    Optimizer state: the merged expert gets the tokens of both, so its gradient is the sum of theirs; averages of the
    gradient and of its square are summed over those of the two that are used (independent tokens: variances add).
    """
    layer = chosen_layers(source.config, (layer_index,))[0]
    first, second = experts
    _check(layer, first, second)
    stays_exact(layer, capacity_reason(layer.moe), lossy)
    used = _shares(source, layer, first, second)
    kept = [e for e in range(layer.moe.num_experts) if e != second]
    state = select_experts(_merged(source.state, layer, first, second, used), layer, kept)
    config = with_layers(source.config, {layer.index: group_changes(layer, kept)})
    did = (
        f"block {layer.index}: experts {first} and {second} were merged, weighted {used[0]:.3f} and {used[1]:.3f} by "
        f"their use ({source.usage.origin}); {len(kept)} experts are left",
    )
    return Result(config, state, did, exact=not lossy, on_data=True, why_not=WHY_NOT)


def _check(layer: Layer, first: int, second: int) -> None:
    moe = layer.moe
    if first == second or not all(0 <= e < moe.num_experts for e in (first, second)):
        raise ValueError(
            f"--experts {first},{second}: name two different experts of block {layer.index}, which has 0 to "
            f"{moe.num_experts - 1}"
        )
    if moe.num_experts == 2 or moe.router_outputs == moe.experts_per_token:
        raise ValueError(
            f"block {layer.index} has {moe.num_experts} experts, of which a token chooses {moe.experts_per_token}: "
            f"with one less there would be no choice"
        )
    if moe.node_groups > 1:
        raise ValueError(
            f"block {layer.index}: router {moe.router} needs {moe.node_groups} runs of equally many experts; remove "
            f"one from each run with mmmoe experts prune"
        )
    if not any(first in stack and second in stack for _, stack in layer.stacks):
        raise ValueError(
            f"block {layer.index}: experts {first} and {second} serve different modalities (moe.expert_groups); name "
            f"two of one group"
        )


def _shares(source: Source, layer: Layer, first: int, second: int) -> tuple[float, float]:
    """How much each is used, of the two together; 0 for a dormant one."""
    dormancy = source.state.get(f"{layer.prefix}router.dormancy")
    active = [float(dormancy is None or dormancy.value[e] == 0) for e in (first, second)]
    used = [source.usage.share[layer.index][e] * a for e, a in zip((first, second), active, strict=True)]
    for weights in (used, active):
        if sum(weights) > 0:
            return weights[0] / sum(weights), weights[1] / sum(weights)
    return 0.5, 0.5


def _merged(state: State, layer: Layer, first: int, second: int, used: tuple[float, float]) -> State:
    changed = dict(state)
    for name, axis in layer.row_axis(state).items():
        changed[name] = _combined(state[name], axis, (first, second), used)
    for prefix, stack in layer.stacks:
        if first in stack:
            for name in (prefix + name for name in STACKED if prefix + name in state):
                changed[name] = _combined(state[name], 0, (first - stack.start, second - stack.start), used)
    return changed


def _combined(parameter: Parameter, axis: int, rows: tuple[int, int], used: tuple[float, float]) -> Parameter:
    """Row ``rows[0]`` holds both: the weighted means of weights and of their averages, and the sums of what the
    optimizer averages of the gradients of those in use."""

    def write(tensor: Tensor, factors: tuple[float, ...]) -> Tensor:
        both = sum(tensor.select(axis, row) * factor for row, factor in zip(rows, factors, strict=True) if factor)
        copy = tensor.clone()
        copy.select(axis, rows[0]).copy_(torch.as_tensor(both))
        return copy

    summed = tuple(float(u > 0) for u in used)
    kept = {
        name: write(tensor, summed if GRADIENT_POWER[name] else used) for name, tensor in parameter.optimizer.items()
    }
    return Parameter(write(parameter.value, used), kept)
