"""Experts are taken out. That is exact where no token chose them and their probability was not a part of
a weight; anything else is a loss, which the user must ask for."""

from __future__ import annotations

import numpy as np

from mmmoe_pretrain.surgery.operation import Result, Source, capacity_reason, stays_exact
from mmmoe_pretrain.surgery.parameters import Layer, group_changes, select_experts
from mmmoe_pretrain.surgery.settings import chosen_layers, with_layers

LEFT_OUT_OF_THE_SUM = (
    "Where weights are softmax probabilities that are not renormalised, even an unused expert is part of "
    "their sum. Pass --lossy to do it all the same"
)


def prune(
    source: Source, experts: tuple[int, ...], unused_below: float | None, layers: tuple[int, ...], lossy: bool
) -> Result:
    """Remove ``experts``, or those with at most ``unused_below`` of a layer's assignments, from ``layers``
    (all where none is named)."""
    state, changes, did, exact = dict(source.state), {}, [], not lossy
    for layer in chosen_layers(source.config, layers):
        removed = _chosen(source, layer, experts, unused_below)
        if not removed:
            did.append(f"block {layer.index}: every expert is used; nothing was removed")
            continue
        kept = [e for e in range(layer.moe.num_experts) if e not in removed]
        _check_kept(layer, kept)
        share = source.usage.share[layer.index]
        lost = float(share[removed].sum())
        numbers = f"experts {', '.join(map(str, removed))}, {lost:.2%} of the assignments ({source.usage.origin})"
        stays_exact(layer, f"removing {numbers} changes the function" if lost > 0 else "", lossy)
        stays_exact(layer, capacity_reason(layer.moe), lossy)
        state = select_experts(state, layer, kept)
        changes[layer.index] = group_changes(layer, kept)
        did.append(f"block {layer.index}: removed {numbers}; {len(kept)} experts are left")
    if not changes:
        raise ValueError("every expert is used, so there is nothing to remove; raise --below, or name --experts")
    config = with_layers(source.config, changes)
    did += _lowered(source, config.moe.losses.min_experts)
    return Result(config, state, tuple(did), exact, on_data=True, why_not=LEFT_OUT_OF_THE_SUM)


def _chosen(source: Source, layer: Layer, experts: tuple[int, ...], unused_below: float | None) -> list[int]:
    total = layer.moe.num_experts
    wrong = [e for e in experts if not 0 <= e < total]
    if wrong:
        raise ValueError(f"--experts {wrong[0]}: block {layer.index} has experts 0 to {total - 1}")
    if unused_below is None:
        return sorted(set(experts))
    share = source.usage.share[layer.index][:total]
    return np.flatnonzero(share <= unused_below).tolist()


def _check_kept(layer: Layer, kept: list[int]) -> None:
    moe = layer.moe
    if len(kept) < 2:
        raise ValueError(f"block {layer.index} would keep {len(kept)} experts, and an MoE layer has 2 or more")
    if len(kept) + len(layer.free) < moe.experts_per_token:
        raise ValueError(
            f"block {layer.index} would keep {len(kept)} experts, fewer than the {moe.experts_per_token} that a "
            f"token chooses; remove fewer"
        )
    for _, stack in layer.stacks:
        if not any(e in stack for e in kept):
            raise ValueError(
                f"block {layer.index}: experts {stack.start} to {stack.stop - 1} are a group of moe.expert_groups "
                f"and would all be removed; keep one of them"
            )
    if moe.node_groups > 1:
        size = moe.num_experts // moe.node_groups
        left = {sum(e // size == g for e in kept) for g in range(moe.node_groups)}
        if len(left) > 1:
            raise ValueError(
                f"block {layer.index}: router {moe.router} needs {moe.node_groups} runs of equally many experts, "
                f"and {sorted(left)} would be left in them; remove as many from each run of {size}"
            )


def _lowered(source: Source, now: dict) -> list[str]:
    before = source.config.moe.losses.min_experts
    return [
        f"moe.losses.min_experts of {modality} was {count:g} and is {now[modality]:g}"
        for modality, count in before.items()
        if now[modality] != count
    ]
