"""Fine-grained experts: each becomes m experts of 1 / m of its hidden units (DeepSeekMoE, arXiv 2401.06066).

Why it is exact. An expert is a sum over its hidden units, so its parts sum to it. Their router rows are
copies, so their logits are equal, and above or below those of any other family as the old expert's was:
the m K largest logits are the families of the K largest. (Of two families with exactly equal logits
parts of both may be chosen; the old model's choice between them was arbitrary too.)
The weight of a part: with softmax p, m copies share what one had, p / m; with weights divided by
their sum, w / m; with bare sigmoid scores, s. What is missing goes into ``down``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmmoe_pretrain.config import MoEConfig, RunConfig
from mmmoe_pretrain.moe.activation import ACTIVATIONS
from mmmoe_pretrain.surgery.operation import Result, Source, stays_exact
from mmmoe_pretrain.surgery.parameters import Layer, State, change_rows, each, scaled
from mmmoe_pretrain.surgery.settings import moe_layers, with_layers

EXACT_ROUTERS = ("softmax_top_k", "sigmoid_top_k", "group_limited", "expert_choice")


def split(source: Source, factor: int, lossy: bool) -> Result:
    """Every expert of every MoE layer becomes ``factor`` experts, and a token chooses ``factor`` times as many."""
    if factor < 2:
        raise ValueError(f"--factor {factor} must be 2 or more")
    layers = moe_layers(source.config)
    if not layers:
        raise ValueError("this run is dense; convert it with mmmoe experts upcycle")
    state, changes, exact = dict(source.state), {}, True
    for layer in layers:
        exact &= stays_exact(layer, _reason(layer.moe, factor), lossy)
        changes[layer.index] = _changes(layer.moe, factor)
        state = _split_layer(state, layer, factor)
    config = with_layers(_more_thresholds(source.config, factor), changes)
    first = layers[0].moe
    did = (
        f"blocks {', '.join(str(layer.index) for layer in layers)}: every expert became {factor} with 1/{factor} of "
        f"its hidden units (block {layers[0].index}: {first.num_experts} experts, {first.experts_per_token} a token, "
        f"became {factor * first.num_experts}, {factor * first.experts_per_token} a token)",
        f"each old logit now appears {factor} times: z loss and local entropy rise by a constant, balance does not",
    )
    return Result(config, state, did, exact)


def part_weight(moe: MoEConfig, factor: int) -> float:
    """The factor by which the weight of a part is smaller than that of the whole."""
    divided = moe.router != "sigmoid_top_k" or (moe.renormalize and moe.experts_per_token > 1)
    return 1 / factor if divided else 1.0


def _reason(moe: MoEConfig, factor: int) -> str:
    """Why the function would change; empty where it would not."""
    top_k, limit = moe.experts_per_token, moe.groups_per_token
    if moe.router not in EXACT_ROUTERS:
        return (
            f"router {moe.router} separates the parts of an expert (its noise or hash differs between them); "
            f"this is exact for {', '.join(EXACT_ROUTERS)}"
        )
    if moe.expert_attention_size:
        return (
            f"attention among experts (moe.expert_attention_size {moe.expert_attention_size}) would see the parts of "
            f"an expert in place of its output"
        )
    if moe.capacity_factor is not None and moe.router != "expert_choice":
        return f"under capacity_factor {moe.capacity_factor:g} the parts of an expert may drop different tokens"
    if moe.router_outputs > moe.num_experts and part_weight(moe, factor) == 1:
        return "bare sigmoid scores weigh each copy of an identity or null expert as the one before"
    if moe.router_weight_on_input and part_weight(moe, factor) < 1:
        return (
            f"router_weight_on_input puts 1 / {factor} of the weight on the input of each part, and an activation is "
            f"not linear; only bare sigmoid scores are the same for parts"
        )
    judged_by_share = moe.scores_per_group is None
    if (
        moe.node_groups > 1
        and judged_by_share
        and top_k >= limit
        and (factor * top_k) // limit != factor * (top_k // limit)
    ):
        return (
            f"groups are judged by their best K / groups_per_token experts, and {top_k} / {limit} is not whole, so "
            f"that parts of an expert would be missed"
        )
    return ""


def _changes(moe: MoEConfig, factor: int) -> dict[str, Any]:
    for width in {group.expert_hidden_size for group in moe.groups}:
        assert width is not None
        if width % factor:
            raise ValueError(
                f"--factor {factor} does not divide the {width} hidden units of an expert; use a divisor"
            )
    changes: dict[str, Any] = {
        "num_experts": factor * moe.num_experts,
        "experts_per_token": factor * moe.experts_per_token,
        "expert_hidden_size": moe.expert_hidden_size // factor,
        "identity_experts": factor * moe.identity_experts,
        "null_experts": factor * moe.null_experts,
        "scores_per_group": moe.scores_per_group and factor * moe.scores_per_group,
        "renormalize": moe.renormalize and moe.experts_per_token > 1,  # K = 1 never was
    }
    if moe.expert_groups:
        changes["expert_groups"] = [
            {**g.model_dump(mode="json"), "num_experts": factor * g.num_experts,
             "expert_hidden_size": g.expert_hidden_size and g.expert_hidden_size // factor}
            for g in moe.expert_groups
        ]  # fmt: skip
    if moe.bias_balancing.rate and _scores_shrink(moe):
        changes["bias_balancing"] = {
            **moe.bias_balancing.model_dump(mode="json"), "rate": moe.bias_balancing.rate / factor,
        }  # fmt: skip
    return changes


def _scores_shrink(moe: MoEConfig) -> bool:
    """The scores that biases are added to are probabilities, which the parts share."""
    return moe.router != "sigmoid_top_k"


def _more_thresholds(config: RunConfig, factor: int) -> RunConfig:
    """H(p) rises by log m, and so must log(S): m S experts are the same demand."""
    losses = config.moe.losses
    scaled_up = losses.model_copy(update={"min_experts": {m: factor * n for m, n in losses.min_experts.items()}})
    return config.model_copy(update={"moe": config.moe.model_copy(update={"losses": scaled_up})})


def _split_layer(state: State, layer: Layer, factor: int) -> State:
    state = change_rows(state, layer, lambda tensor, axis: tensor.repeat_interleave(factor, axis))
    for name in layer.row_axis(state):  # copies: see parameters.py
        shrinks = name.startswith(layer.biases) and _scores_shrink(layer.moe)
        state[name] = scaled(state[name], 1 / factor if shrinks else 1.0, 1 / factor, 1 / factor)
    width = ACTIVATIONS[layer.moe.activation].width
    larger = 1 / part_weight(layer.moe, factor)
    for prefix, _ in layer.stacks:
        state[prefix + "up"] = each(state[prefix + "up"], lambda up: _parts_of_up(up, width, factor))
        down = each(state[prefix + "down"], lambda down: _parts_of_down(down, factor))
        state[prefix + "down"] = scaled(down, larger, 1 / larger, 1 / larger**2)
        if prefix + "up_bias" in state:
            state[prefix + "up_bias"] = each(state[prefix + "up_bias"], lambda up: _parts_of_up(up, width, factor))
            whole = each(state[prefix + "down_bias"], lambda down: down.repeat_interleave(factor, 0))
            # the m parts add m copies of it with 1 / larger of the weight: a token visits all or none of them
            state[prefix + "down_bias"] = scaled(whole, larger / factor, 1 / larger, 1 / larger**2)
    return state


def _parts_of_up(up_EFD: Tensor, width: int, factor: int) -> Tensor:
    """[E, width F, ...] -> [m E, width F / m, ...]: part j has hidden units j F / m onwards, gate and up."""
    pieces = up_EFD.unflatten(1, (width, factor, -1))  # [E, width, m, F / m, ...]
    return pieces.transpose(1, 2).flatten(2, 3).flatten(0, 1)


def _parts_of_down(down_EDF: Tensor, factor: int) -> Tensor:
    """[E, D, F] -> [m E, D, F / m]."""
    return down_EDF.unflatten(2, (factor, -1)).transpose(1, 2).flatten(0, 1)
