"""Finer experts compute the same, and their moments are those of the gradients they get."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mmmoe_pretrain.surgery.operation import Result
from mmmoe_pretrain.surgery.split import split
from tests.support import objectives
from tests.surgery.support import (
    BLOCK,
    after,
    assert_same_function,
    batch_for,
    gradients,
    model_of,
    random_source,
)

NO_CAPTIONS = objectives(captioning=None)
BIASES = {"expert_biases": True, "router_bias": True, "activation": "clamped_swiglu"}
CASES: dict[str, dict[str, Any]] = {
    "softmax": {},
    "softmax, not renormalised": {"renormalize": False},
    "top 1": {"experts_per_token": 1},
    "sigmoid": {"router": "sigmoid_top_k"},
    "sigmoid top 1": {"router": "sigmoid_top_k", "experts_per_token": 1},
    "sigmoid, not renormalised": {"router": "sigmoid_top_k", "renormalize": False},
    "groups of nodes": {"router": "group_limited", "node_groups": 2, "groups_per_token": 1},
    "two groups of nodes": {"router": "group_limited", "num_experts": 8, "node_groups": 4, "groups_per_token": 2},
    "expert choice": {"router": "expert_choice"},
    "modalities": {"expert_groups": [{"num_experts": 2, "expert_hidden_size": 12},
                                     {"modalities": ["text", "image"], "num_experts": 2}]},
    "no computation": {"identity_experts": 1, "null_experts": 2},
    "gelu": {"activation": "gelu"},
    "laplace": {"gate": "laplace"},
    "groups worth two scores": {"router": "group_limited", "num_experts": 8, "experts_per_token": 3,
                                "node_groups": 4, "groups_per_token": 2, "scores_per_group": 2},
    "biases": {**BIASES, "routed_scaling_factor": 2.5},
    "biases, sigmoid, not renormalised": {**BIASES, "router": "sigmoid_top_k", "renormalize": False},
    "weights on the input": {"router": "sigmoid_top_k", "renormalize": False, "router_weight_on_input": True},
    "gated": {"shared_expert_hidden_size": 8, "shared_expert_gate": True},
    "shared": {"shared_expert_hidden_size": 8, "task_conditioned": True},
    "memory": {"routing_memory_size": 3},
}  # fmt: skip


@pytest.mark.parametrize(("case", "factor"), [*((case, 2) for case in CASES), ("softmax", 4), ("modalities", 4)])
def test_finer_experts_compute_the_same(tmp_path: Path, case: str, factor: int) -> None:
    sections = {"objectives": NO_CAPTIONS} if case == "expert choice" else {}
    source = random_source(tmp_path, CASES[case], **sections)
    result = split(source, factor, lossy=False)
    assert result.exact
    assert_same_function(source, result)
    before, now = source.config.moe, result.config.moe
    assert now.num_experts == factor * before.num_experts
    assert now.experts_per_token == factor * before.experts_per_token
    assert now.expert_hidden_size == before.expert_hidden_size // factor


@pytest.mark.parametrize("per_modality", [False, True])
@pytest.mark.parametrize("router", ["softmax_top_k", "sigmoid_top_k"])
def test_biases_of_the_choice_keep_choosing_the_same(tmp_path: Path, router: str, per_modality: bool) -> None:
    balancing = {"rate": 0.02, "per_modality": per_modality}
    source = random_source(tmp_path, {"router": router, "bias_balancing": balancing})
    for block in (1, 3):
        for number, name in enumerate(source.config.modalities if per_modality else ["all"]):
            bias = source.state[f"mmmoe.trunk.blocks.{block}.ffn.router.bias.{name}"].value
            of_a_gap = torch.tensor([0.1, -0.05, 0.05, -0.1])  # between two probabilities
            bias[0] = of_a_gap.roll(number)
    source = after(source, Result(source.config, source.state, ()))  # the model takes the biases over
    result = split(source, 2, lossy=False)
    assert_same_function(source, result)
    # probabilities halve, sigmoid scores do not
    assert result.config.moe.bias_balancing.rate == (0.01 if router == "softmax_top_k" else 0.02)


@pytest.mark.parametrize(
    "case", ["softmax", "top 1", "sigmoid top 1", "gelu", "biases", "biases, sigmoid, not renormalised", "sgd"]
)
def test_optimizer_state_is_transformed_as_gradients_are(tmp_path: Path, case: str) -> None:
    """With the gradient in place of averages of it and its square in place of ``exp_avg_sq``, splitting gives
    the gradients of the split model. The two copies of a router row together get the row's."""
    source = random_source(tmp_path, CASES.get(case, {}), optimizer={"kind": "sgd" if case == "sgd" else "adamw"})
    batch = batch_for(source.config)
    for name, gradient in gradients(source.model, batch).items():
        for kept, tensor in source.state[name].optimizer.items():
            tensor.copy_(gradient.square() if kept == "exp_avg_sq" else gradient)
    result = split(source, 2, lossy=False)
    wanted = gradients(model_of(result.config, result.state), batch)
    for name in [name for name in result.state if name.startswith(BLOCK + "experts.")]:
        for kept, tensor in result.state[name].optimizer.items():
            expected = wanted[name].square() if kept == "exp_avg_sq" else wanted[name]
            torch.testing.assert_close(tensor, expected, rtol=2e-4, atol=2e-4)  # fp32 sums over tokens
    mean = result.state[BLOCK + "router.weight"].optimizer["momentum_buffer" if case == "sgd" else "exp_avg"]
    row = wanted[BLOCK + "router.weight"].view(4, 2, -1).sum(1)
    torch.testing.assert_close(mean.view(4, 2, -1).sum(1), row, rtol=1e-4, atol=1e-4)


def test_layers_of_unlike_sizes_stay_so(tmp_path: Path) -> None:
    layers = {3: {"num_experts": 6, "experts_per_token": 3, "expert_hidden_size": 4, "router": "sigmoid_top_k"}}
    source = random_source(tmp_path, {"layers": layers})
    result = split(source, 2, lossy=False)
    assert_same_function(source, result)
    sizes = [result.config.moe.for_layer(i) for i in (1, 3)]
    assert [(moe.num_experts, moe.experts_per_token) for moe in sizes] == [(8, 4), (12, 6)]
    assert [moe.router for moe in sizes] == ["softmax_top_k", "sigmoid_top_k"]


def test_the_demand_for_several_experts_grows_with_their_number(tmp_path: Path) -> None:
    """H of m equal parts is H + log m, so the threshold log S becomes log(m S)."""
    source = random_source(tmp_path, {"losses": {"global_entropy": 0.1, "min_experts": {"text": 3}}})
    assert split(source, 2, lossy=False).config.moe.losses.min_experts == {"text": 6}


@pytest.mark.parametrize(
    ("moe", "reason"),
    [
        ({"router": "noisy_top_k"}, "router noisy_top_k separates the parts"),
        ({"router": "hash"}, "this is exact for softmax_top_k, sigmoid_top_k"),
        ({"router_weight_on_input": True}, "an activation is not linear"),
        ({"capacity_factor": 1.25}, "may drop different tokens"),
        ({"expert_attention_size": 4}, "attention among experts .moe.expert_attention_size 4. would see the parts"),
        ({"router": "sigmoid_top_k", "renormalize": False, "identity_experts": 1}, "bare sigmoid scores"),
        ({"router": "group_limited", "num_experts": 8, "experts_per_token": 3, "node_groups": 4,
          "groups_per_token": 2}, "3 / 2 is not whole"),
    ],
)  # fmt: skip
def test_what_would_change_the_function_needs_lossy(tmp_path: Path, moe: dict[str, Any], reason: str) -> None:
    source = random_source(tmp_path, moe)
    with pytest.raises(ValueError, match=f"{reason}.*pass --lossy"):
        split(source, 2, lossy=False)
    result = split(source, 2, lossy=True)
    assert not result.exact
    model_of(result.config, result.state)


def test_a_factor_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    source = random_source(tmp_path, {})
    with pytest.raises(ValueError, match="--factor 3 does not divide the 8 hidden units"):
        split(source, 3, lossy=False)
    with pytest.raises(ValueError, match="--factor 1 must be 2 or more"):
        split(source, 1, lossy=False)
    dense = random_source(tmp_path, {"num_experts": 1, "experts_per_token": 1})
    with pytest.raises(ValueError, match="mmmoe experts upcycle"):
        split(dense, 2, lossy=False)
