"""New experts are dormant at first; until they are active the model is unchanged."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mmmoe_pretrain.moe.layer import MoELayer
from mmmoe_pretrain.moe.router import DORMANT, Router
from mmmoe_pretrain.moe.tokens import TokenInfo
from mmmoe_pretrain.surgery.add import add
from mmmoe_pretrain.surgery.operation import Result, Source
from tests.surgery.support import (
    BLOCK,
    after,
    assert_same_function,
    batch_for,
    model_of,
    moments,
    random_source,
)


def run_add(source: Source, count: int = 2, **changed: Any) -> Result:
    settings = {"copy_from": None, "layers": (), "noise": 0.1, "wake_steps": 4, "lossy": False, **changed}
    return add(source, count, **settings)


CASES: dict[str, dict[str, Any]] = {
    "softmax": {},
    "top 1": {"experts_per_token": 1},
    "sigmoid": {"router": "sigmoid_top_k"},
    "biases": {"router": "sigmoid_top_k", "bias_balancing": {"rate": 0.01, "per_modality": True}},
    "no computation": {"identity_experts": 1, "null_experts": 1},
    "noisy": {"router": "noisy_top_k"},
    "laplace": {"gate": "laplace"},
    "attention and memory": {"expert_attention_size": 4, "routing_memory_size": 3},
    "biases of experts and router": {"expert_biases": True, "router_bias": True, "router_weight_on_input": True},
}


@pytest.mark.parametrize("case", CASES)
def test_dormant_experts_change_nothing_and_get_no_token(tmp_path: Path, case: str) -> None:
    source = random_source(tmp_path, CASES[case])
    result = run_add(source)
    assert result.exact
    assert_same_function(source, result)
    model = model_of(result.config, result.state)
    for stats in model(batch_for(source.config))[1]:
        counts = stats.counts_ME.sum(0)
        assert counts[:4].sum() > 0
        assert counts[4:6].tolist() == [0, 0]


def test_a_negative_bias_of_the_old_ones_does_not_activate_the_new(tmp_path: Path) -> None:
    source = random_source(tmp_path, CASES["biases"])
    for block in (1, 3):
        for m in source.config.modalities:
            bias = source.state[f"mmmoe.trunk.blocks.{block}.ffn.router.bias.{m}"].value
            bias.copy_(torch.tensor([[0.0, -1, -1, -1]]))
    source = after(source, Result(source.config, source.state, ()))
    assert_same_function(source, run_add(source, copy_from=0))


def test_new_experts_stand_behind_the_real_ones_and_before_those_without_computation(tmp_path: Path) -> None:
    source = random_source(tmp_path, {"identity_experts": 1})
    result = run_add(source, noise=0.0, copy_from=2)
    before, now = (s[BLOCK + "router.weight"].value for s in (source.state, result.state))
    assert torch.equal(now, before[[0, 1, 2, 3, 2, 2, 4]])
    up = result.state[BLOCK + "experts.up"].value
    assert torch.equal(up, source.state[BLOCK + "experts.up"].value[[0, 1, 2, 3, 2, 2]])
    assert result.state[BLOCK + "router.dormancy"].value.tolist() == [0, 0, 0, 0, DORMANT, DORMANT, 0]


def test_copies_are_perturbed_and_begin_without_momentum(tmp_path: Path) -> None:
    source = random_source(tmp_path, {})
    result = run_add(source, copy_from=1, noise=0.1)
    for name in ("experts.up", "experts.down", "router.weight"):
        old, new = source.state[BLOCK + name].value, result.state[BLOCK + name].value
        assert torch.equal(new[:4], old)
        assert not torch.equal(new[4], new[5])
        relative = (new[4:] - old[1]).square().mean().sqrt() / old[1].square().mean().sqrt()
        assert float(relative) == pytest.approx(0.1, rel=0.5)  # of 32 draws and more
        first, second = moments(result.state, BLOCK + name)
        assert not first[4:].any()
        assert torch.equal(second[5], moments(source.state, BLOCK + name)[1][1])


def test_the_most_used_experts_are_copied_by_default(tmp_path: Path) -> None:
    source = random_source(tmp_path, {})
    share = source.usage.share[1]
    result = run_add(source, noise=0.0)
    rows = source.state[BLOCK + "router.weight"].value
    expected = rows[torch.as_tensor(share.argsort()[::-1].copy())[:2]]
    assert torch.equal(result.state[BLOCK + "router.weight"].value[4:], expected)


def test_one_layer_can_grow_alone_and_again(tmp_path: Path) -> None:
    source = random_source(tmp_path, {})
    once = run_add(source, layers=(3,))
    assert once.config.moe.layers == {3: {"num_experts": 6, "wake_steps": 4}}
    assert once.config.moe.num_experts == 4
    twice = run_add(after(source, once), count=1)
    assert_same_function(source, twice)
    assert [twice.config.moe.for_layer(i).num_experts for i in (1, 3)] == [5, 7]
    assert twice.state["mmmoe.trunk.blocks.3.ffn.router.dormancy"].value.tolist() == [0] * 4 + [DORMANT] * 3


def biases(router: Router) -> torch.Tensor:
    assert router.bias is not None
    return torch.cat(list(router.bias.buffers()))


def test_dormancy_falls_over_wake_steps_and_then_experts_get_tokens(tmp_path: Path) -> None:
    source = random_source(tmp_path, CASES["biases"])
    result = run_add(source, copy_from=0, noise=0.0)
    model = model_of(result.config, result.state)
    layer = model.trunk.blocks["1"].ffn
    assert isinstance(layer, MoELayer)
    router = layer.router
    assert router.bias is not None
    x_nD = torch.randn(32, 16)
    tokens = TokenInfo.of_modalities(torch.zeros(32, dtype=torch.int64), source.config.stream_names)
    seen = []
    for _ in range(4):
        router.end_step(router(x_nD, tokens).stats)
        seen.append(float(router.dormancy[4]))
        if seen[-1] > 0:
            assert not biases(router)[:, 4:].any()  # held, though their load is below the mean
    assert seen == [24, 16, 8, 0]
    assert biases(router)[:, :4].any()
    for buffer in router.bias.buffers():
        buffer.zero_()
    assert router(x_nD, tokens).stats.counts_ME.sum(0)[4] > 0  # as good as expert 0


@pytest.mark.parametrize(
    ("moe", "error"),
    [
        ({"router": "group_limited", "node_groups": 2}, "mmmoe experts split"),
        ({"expert_groups": [{"num_experts": 4}]}, "mmmoe experts split"),
        ({"router": "hash"}, "modulo the number of experts, which changes; pass --lossy"),
        ({"capacity_factor": 1.5}, "capacity_factor 1.5 leaves each expert room .*; pass --lossy"),
    ],
)
def test_a_layer_that_cannot_grow_is_refused_with_the_reason(tmp_path: Path, moe: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        run_add(random_source(tmp_path, moe))


def test_experts_and_layers_that_are_not_there_are_refused(tmp_path: Path) -> None:
    source = random_source(tmp_path, {})
    with pytest.raises(ValueError, match="--copy-from 4: block 1 has experts 0 to 3"):
        run_add(source, copy_from=4)
    with pytest.raises(ValueError, match="--layer 2: no MoE layer there; the MoE layers of this run are blocks 1, 3"):
        run_add(source, layers=(1, 2))
