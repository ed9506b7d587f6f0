"""Dense to sparse: the same function at first, and moments that add up."""

from pathlib import Path

import pytest
import torch

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.models.pretraining import PretrainingModel
from mmmoe_pretrain.surgery.upcycle import upcycle
from tests.surgery.support import (
    BLOCK,
    assert_same_function,
    batch_for,
    difference,
    gradients,
    model_of,
    moments,
    random_source,
)

DENSE = {"num_experts": 1, "experts_per_token": 1}


@pytest.mark.parametrize(
    ("top_k", "settings"),
    [
        (2, {}),
        (3, {"router": "sigmoid_top_k", "gate": "laplace"}),
        (4, {"bias_balancing": {"rate": 0.01}}),
        (2, {"expert_biases": True, "router_bias": True}),  # of zero
        (2, {"expert_attention_size": 4, "routing_memory_size": 3}),
        (2, {"activation": "gelu", "task_conditioned": True}),  # a dense layer is SwiGLU whatever this says
    ],
)
def test_a_layer_of_copies_begins_as_the_dense_model(tmp_path: Path, top_k: int, settings: dict) -> None:
    source = random_source(tmp_path, {**DENSE, **settings})
    result = upcycle(source, 4, top_k, noise=0.0, every=None)
    assert result.exact
    assert_same_function(source, result)
    moe = result.config.moe
    assert (moe.num_experts, moe.experts_per_token, moe.expert_hidden_size) == (4, top_k, 8)


def test_every_expert_is_the_dense_layer_transposed_and_the_router_is_a_fresh_one(tmp_path: Path) -> None:
    source = random_source(tmp_path, DENSE)
    result = upcycle(source, 4, 2, noise=0.0, every=None)
    before, now = source.state, result.state
    for expert in range(4):
        assert torch.equal(now[BLOCK + "experts.up"].value[expert], before[BLOCK + "gate_up.weight"].value)
        assert torch.equal(now[BLOCK + "experts.down"].value[expert], before[BLOCK + "down.weight"].value)
    fresh = dict(PretrainingModel(result.config).named_parameters())[BLOCK + "router.weight"]
    assert torch.equal(now[BLOCK + "router.weight"].value, fresh.detach())
    assert not moments(now, BLOCK + "router.weight")[0].any()
    assert now["mmmoe.trunk.norm.weight"] is before["mmmoe.trunk.norm.weight"]


def test_moments_add_up_as_the_gradients_of_the_copies_do(tmp_path: Path) -> None:
    source = random_source(tmp_path, DENSE)
    result = upcycle(source, 4, 2, noise=0.0, every=None)
    batch = batch_for(source.config)
    dense, sparse = gradients(source.model, batch), gradients(model_of(result.config, result.state), batch)
    for ours, theirs in (("experts.up", "gate_up.weight"), ("experts.down", "down.weight")):
        # sums of some hundred fp32 terms in another order
        torch.testing.assert_close(sparse[BLOCK + ours].sum(0), dense[BLOCK + theirs], rtol=1e-4, atol=1e-4)
        before, now = moments(source.state, BLOCK + theirs), moments(result.state, BLOCK + ours)
        torch.testing.assert_close(now[0].sum(0), before[0])
        torch.testing.assert_close(now[1][2], before[1] / 8)  # E K


def test_noise_breaks_the_ties_and_changes_the_function(tmp_path: Path) -> None:
    source = random_source(tmp_path, DENSE)
    result = upcycle(source, 4, 2, noise=0.1, every=None)
    assert not result.exact
    assert difference(source, result) > 1e-3
    up, dense = result.state[BLOCK + "experts.up"].value, source.state[BLOCK + "gate_up.weight"].value
    relative = (up - dense).square().mean().sqrt() / dense.square().mean().sqrt()
    assert float(relative) == pytest.approx(0.1, rel=0.1)  # of 1,024 draws
    assert not torch.equal(up[0], up[1])


def test_another_period_takes_the_widths_that_the_blocks_were_trained_with(tmp_path: Path) -> None:
    source = random_source(tmp_path, DENSE)
    result = upcycle(source, 4, 2, noise=0.0, every=1)  # blocks 0 and 2 had width 16, blocks 1 and 3 had 8
    assert_same_function(source, result)
    assert [result.config.moe.for_layer(i).expert_hidden_size for i in range(4)] == [16, 8, 16, 8]
    run_config.dump(result.config, tmp_path / "config.yaml")
    assert run_config.load(tmp_path / "config.yaml") == result.config
    with pytest.raises(ValueError, match=r"under --every 4 block 1 stays dense .* trained with 8; use --every 2"):
        upcycle(source, 4, 2, noise=0.0, every=4)


@pytest.mark.parametrize(
    ("top_k", "settings", "remedy"),
    [
        (1, {}, "use --experts-per-token 2"),
        (2, {"renormalize": False}, "moe.renormalize=true"),
        (2, {"capacity_factor": 1.0}, "moe.capacity_factor=null"),
        (2, {"shared_expert_hidden_size": 8}, "moe.shared_expert_hidden_size=0"),
        (2, {"routed_scaling_factor": 2.5}, "moe.routed_scaling_factor=1"),
        (2, {"router_weight_on_input": True}, "moe.router_weight_on_input=false"),
        (2, {"router": "hash"}, "moe.router=softmax_top_k"),
        (2, {"null_experts": 1}, "moe.null_experts=0"),
        (2, {"num_experts": 4, "experts_per_token": 2}, "mmmoe experts add"),  # sparse already
    ],
)
def test_what_would_not_begin_as_the_dense_model_is_refused(
    tmp_path: Path, top_k: int, settings: dict, remedy: str
) -> None:
    source = random_source(tmp_path, {**DENSE, **settings})
    with pytest.raises(ValueError, match=remedy):
        upcycle(source, 4, top_k, noise=0.0, every=None)
