"""A dense checkpoint becomes a sparse one (sparse upcycling, arXiv 2212.05055).

Every expert is a copy of the block's dense layer and the router is new. Where the chosen weights sum
to 1, K equal experts give the output of one, for any routing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.checkpoint.state import persistent_buffers
from mmmoe_pretrain.config import MoEConfig, RunConfig
from mmmoe_pretrain.models.block import dense_width
from mmmoe_pretrain.models.pretraining import PretrainingModel
from mmmoe_pretrain.surgery.operation import Result, Source
from mmmoe_pretrain.surgery.parameters import Layer, Parameter, State, each, fresh, noise_like, scaled
from mmmoe_pretrain.surgery.settings import moe_layers, with_layers

BIASES = ("up_bias", "down_bias")
WEIGHTS_SUM_TO_ONE = ("softmax_top_k", "sigmoid_top_k", "group_limited", "noisy_top_k")


def upcycle(source: Source, num_experts: int, experts_per_token: int, noise: float, every: int | None) -> Result:
    """Experts are copies; ``noise``, a standard deviation relative to each weight matrix's root mean
    square, makes them differ and the function with them.

    Optimizer state: the copies' gradients sum to the dense layer's, and an expert sees K / E of the tokens at
    weights of 1 / K. So averages of the gradient are divided by E, those of its square by E K (``parameters.py``).
    """
    config = _sparse_config(source.config, num_experts, experts_per_token, every or source.config.moe.every)
    state = dict(source.state)
    layers = moe_layers(config)
    for layer in layers:
        state = _with_experts(state, layer, noise)
    state |= _new_parameters(config, layers)
    blocks = ", ".join(str(layer.index) for layer in layers)
    did = [f"blocks {blocks}: {num_experts} copies of the dense layer, {experts_per_token} a token, and a new router"]
    if noise:
        did.append(f"noise of {noise:g} times their root mean square on the experts' weights")
    return Result(config, state, tuple(did), exact=not noise)


def _sparse_config(config: RunConfig, num_experts: int, experts_per_token: int, every: int) -> RunConfig:
    if not config.moe.dense:
        raise ValueError(
            f"this run has MoE layers already (moe.num_experts {config.moe.num_experts}); add experts to them with "
            f"mmmoe experts add, or divide them with mmmoe experts split"
        )
    if num_experts < 2:
        raise ValueError(f"--num-experts {num_experts}: an MoE layer has 2 or more")
    _check_equality(config.moe, experts_per_token)
    old = {i: dense_width(config.model, config.moe, i) for i in range(config.model.num_layers)}
    changes: dict[str, Any] = {
        "every": every, "num_experts": num_experts, "experts_per_token": experts_per_token, "activation": "swiglu",
    }  # fmt: skip
    sparse = [i for i in old if (i + 1) % every == 0]
    for i, width in old.items():
        if i not in sparse and width != config.model.ffn_hidden_size:
            raise ValueError(
                f"under --every {every} block {i} stays dense with width model.ffn_hidden_size "
                f"{config.model.ffn_hidden_size}, and it was trained with {width}; use --every {config.moe.every}"
            )
    if sparse:  # else the config says that no block is an MoE layer
        changes["expert_hidden_size"] = old[sparse[0]]
    values = config.model_dump(mode="json")
    values["moe"] |= changes
    return with_layers(
        run_config.parse(values, where="the new run"), {i: {"expert_hidden_size": old[i]} for i in sparse}
    )


def _check_equality(moe: MoEConfig, experts_per_token: int) -> None:
    sums = moe.router in WEIGHTS_SUM_TO_ONE
    remedies = {
        "the weight of a single expert is its probability, below 1: use --experts-per-token 2": experts_per_token < 2,
        "weights that are not renormalised sum to less than 1: add moe.renormalize=true": not moe.renormalize,
        f"router {moe.router} does not weigh to 1: add moe.router=softmax_top_k": not sums,
        "a limited capacity drops tokens: add moe.capacity_factor=null": moe.capacity_factor is not None,
        "experts without computation take weight from the copies: add moe.identity_experts=0 moe.null_experts=0": (
            moe.router_outputs > moe.num_experts
        ),
        "a shared expert adds to the copies: add moe.shared_expert_hidden_size=0 moe.shared_expert_gate=false": (
            moe.shared_expert_hidden_size > 0
        ),
        "weights are scaled: add moe.routed_scaling_factor=1": moe.routed_scaling_factor != 1,
        "weights of less than 1 on the input of an activation: add moe.router_weight_on_input=false": (
            moe.router_weight_on_input
        ),
    }
    wrong = [remedy for remedy, applies in remedies.items() if applies]
    if wrong:
        raise ValueError(f"the MoE model would not equal the dense one: {'; '.join(wrong)}")


def _with_experts(state: State, layer: Layer, noise: float) -> State:
    copies, top_k = layer.moe.num_experts, layer.moe.experts_per_token
    changed = dict(state)
    dense = {"up": changed.pop(f"{layer.prefix}gate_up.weight"), "down": changed.pop(f"{layer.prefix}down.weight")}
    for prefix, experts in layer.stacks:
        for name, parameter in dense.items():
            shared = scaled(parameter, mean=1 / copies, square=1 / (copies * top_k))
            changed[prefix + name] = _stacked(shared, experts, noise, prefix + name)
    return changed


def _stacked(parameter: Parameter, experts: range, noise: float, name: str) -> Parameter:
    """[out, in], as nn.Linear keeps it -> [E, out, in]."""

    def copy(tensor: Tensor) -> Tensor:
        return tensor.expand(len(experts), -1, -1).contiguous()

    stacked = each(parameter, copy)
    for row, expert in enumerate(experts):
        stacked.value[row] += noise_like(stacked.value[row], noise, f"{name}/{expert}")
    return stacked


def _new_parameters(config: RunConfig, layers: list[Layer]) -> State:
    """Routers, attention among experts and the experts' biases of zero if there are any, as a fresh run of this
    config would begin."""
    model = PretrainingModel(config)
    prefixes = tuple(f"{layer.prefix}{part}." for layer in layers for part in ("router", "expert_attention"))
    biases = tuple(f"{prefix}{name}" for layer in layers for prefix, _ in layer.stacks for name in BIASES)
    found: State = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(prefixes) or name in biases:
                found[name] = fresh(parameter.detach().clone(), config.optimizer.state)
        for name, buffer in persistent_buffers(model).items():
            if name.startswith(prefixes):
                found[name] = fresh(buffer.clone())
    return found
