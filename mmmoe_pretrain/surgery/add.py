"""Add experts that are dormant at first, so that the function of the trained model does not change.

A new expert is a copy of a used one with noise, and so is its router row. The router's buffer
``dormancy`` lowers its logit by 32, below the resolution of fp32, and falls to 0 over
``moe.wake_steps`` optimizer steps; then the expert is chosen more and more, and diverges from its source.
"""

from __future__ import annotations

import torch

from mmmoe_pretrain.config import MoEConfig
from mmmoe_pretrain.moe.router import DORMANT
from mmmoe_pretrain.surgery.operation import Result, Source, capacity_reason, stays_exact
from mmmoe_pretrain.surgery.parameters import (
    STACKED,
    Layer,
    Parameter,
    State,
    clear_means,
    fresh,
    noise_like,
    select_experts,
)
from mmmoe_pretrain.surgery.settings import chosen_layers, with_layers


def add(
    source: Source,
    count: int,
    copy_from: int | None,
    layers: tuple[int, ...],
    noise: float,
    wake_steps: int,
    lossy: bool,
) -> Result:
    """``count`` experts behind the others in each of ``layers`` (all where none is named): copies of
    ``copy_from``, or of the most used ones in turn, with ``noise`` relative to their root mean square.

    Optimizer state: averages of the gradient of the new ones are zero; those of its square are copied from the source
    expert, so that their first steps have its size.
    """
    if count < 1 or wake_steps < 1:
        raise ValueError(f"--count {count} and --wake-steps {wake_steps} must be at least 1")
    state, changes, did, exact = dict(source.state), {}, [], True
    for layer in chosen_layers(source.config, layers):
        _check_router(layer)
        exact &= stays_exact(layer, capacity_reason(layer.moe), lossy)
        parents = _parents(source, layer, count, copy_from)
        state = _with_experts(state, layer, parents, noise)
        changes[layer.index] = {"num_experts": layer.moe.num_experts + count, "wake_steps": wake_steps}
        did.append(
            f"block {layer.index}: experts {_span(layer.moe, count)} are copies of {', '.join(map(str, parents))} "
            f"with noise {noise:g}, dormant; the dormancy falls to 0 over {wake_steps} optimizer steps"
        )
    return Result(with_layers(source.config, changes), state, tuple(did), exact)


def _span(moe: MoEConfig, count: int) -> str:
    return ", ".join(str(moe.num_experts + i) for i in range(count))


def _check_router(layer: Layer) -> None:
    moe = layer.moe
    if moe.node_groups > 1:
        raise ValueError(
            f"block {layer.index}: router {moe.router} has {moe.node_groups} groups of equally many experts, and new "
            f"ones behind the last would move their borders; divide the experts with mmmoe experts split instead"
        )
    if moe.expert_groups:
        raise ValueError(
            f"block {layer.index}: its experts belong to modalities (moe.expert_groups), and it is not said to which "
            f"a new one would; divide them with mmmoe experts split instead"
        )


def _parents(source: Source, layer: Layer, count: int, copy_from: int | None) -> list[int]:
    experts = layer.moe.num_experts
    if copy_from is not None:
        if not 0 <= copy_from < experts:
            raise ValueError(f"--copy-from {copy_from}: block {layer.index} has experts 0 to {experts - 1}")
        return [copy_from] * count
    by_use = (-source.usage.share[layer.index][:experts]).argsort(kind="stable").tolist()
    return [by_use[i % experts] for i in range(count)]


def _with_experts(state: State, layer: Layer, parents: list[int], noise: float) -> State:
    first = layer.moe.num_experts
    dormancy = f"{layer.prefix}router.dormancy"
    if dormancy not in state:
        state = {**state, dormancy: fresh(torch.zeros(layer.moe.router_outputs))}
    state = select_experts(state, layer, [*range(first), *parents])
    new = slice(first, first + len(parents))
    state[dormancy].value[new] = DORMANT
    stacked = [f"{prefix}{name}" for prefix, _ in layer.stacks for name in STACKED]
    for name in (*(name for name in stacked if name in state), f"{layer.prefix}router.weight"):
        _perturb(state[name], range(new.start, new.stop), noise, name)
    for name in ("noise_weight", "logit_bias", "memory.logits.weight"):
        rows = state.get(f"{layer.prefix}router.{name}")
        if rows is not None:
            clear_means(rows, new)
    return state


def _perturb(parameter: Parameter, new: range, noise: float, name: str) -> None:
    """Changes rows made by ``select_experts`` in place: they are copies."""
    for row in new:
        parameter.value[row] += noise_like(parameter.value[row], noise, f"{name}/added/{row}")
        clear_means(parameter, slice(row, row + 1))
