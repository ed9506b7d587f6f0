"""Pruned and merged experts: exact only where one of them is not used."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mmmoe_pretrain.surgery.add import add
from mmmoe_pretrain.surgery.merge import merge
from mmmoe_pretrain.surgery.operation import Result, Source
from mmmoe_pretrain.surgery.parameters import State, by_key
from mmmoe_pretrain.surgery.probe import TOLERANCE
from mmmoe_pretrain.surgery.prune import prune
from tests.surgery.support import BLOCK, after, assert_same_function, difference, model_of, moments, random_source

NEVER = -10.0  # of a sigmoid's bias: its expert is not chosen


def grown(source: Source, noise: float = 0.1) -> Source:
    return after(source, add(source, 1, 1, (), noise, 10, lossy=False))


def with_idle_expert(root: Path, expert: int, **moe: Any) -> Source:
    source = random_source(root, {"router": "sigmoid_top_k", "bias_balancing": {"rate": 0.01}, **moe})
    for block in (1, 3):
        source.state[f"mmmoe.trunk.blocks.{block}.ffn.router.bias.all"].value[0, expert] = NEVER
    return after(source, Result(source.config, source.state, ()))


def write_log(source: Source, load: list[float]) -> None:
    """A metrics.jsonl of two records; the second is from after the checkpoint."""
    source.run_dir.mkdir(parents=True, exist_ok=True)
    even = [0.25] * 4
    records = [
        {"step": step, "routing": [
            {"layer": layer, "tokens": {"image": 15, "audio": 5, "text": 0},
             "assignments": {"image": 30, "audio": 10, "text": 0},
             "load": {"image": row, "audio": even, "text": [0.0] * 4}} for layer in (1, 3)]}
        for step, row in ((5, load), (6, even))
    ]  # fmt: skip
    (source.run_dir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def assert_equal_states(a: State, b: State) -> None:
    ours, theirs = by_key(a), by_key(b)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_pruning_an_unused_expert_changes_nothing(tmp_path: Path) -> None:
    source = with_idle_expert(tmp_path, 2, expert_biases=True, router_bias=True)
    result = prune(source, (), 0.0, (), lossy=False)
    assert result.exact
    assert_same_function(source, result)
    assert result.config.moe.num_experts == 3
    kept = [0, 1, 3]
    biases = ("router.logit_bias", "experts.up_bias", "experts.down_bias")
    for name in ("router.weight", "experts.up", "experts.down", *biases):
        assert torch.equal(result.state[BLOCK + name].value, source.state[BLOCK + name].value[kept])
        for now, before in zip(moments(result.state, BLOCK + name), moments(source.state, BLOCK + name), strict=True):
            assert torch.equal(now, before[kept])
    before, now = (s.state[BLOCK + "router.bias.all"].value for s in (source, result))
    assert torch.equal(now, before[:, kept])


def test_the_comparison_sees_an_unused_probability_that_was_part_of_the_sum(tmp_path: Path) -> None:
    source = with_idle_expert(tmp_path, 2, router="softmax_top_k", experts_per_token=1)
    result = prune(source, (), 0.0, (), lossy=False)
    assert result.exact and "part of their sum" in result.why_not
    assert difference(source, result) > TOLERANCE  # so that it is refused


def test_pruning_added_experts_restores_the_state(tmp_path: Path) -> None:
    source = random_source(tmp_path, {"identity_experts": 1})
    result = prune(grown(source), (4,), None, (), lossy=False)
    kept = {name: p for name, p in result.state.items() if not name.endswith("dormancy")}
    assert_equal_states(kept, source.state)


def test_usage_is_read_from_the_log_up_to_the_checkpoint(tmp_path: Path) -> None:
    source = random_source(tmp_path, {})
    write_log(source, [0.5, 0.5, 0.0, 0.0])
    # image: 30 tokens of which expert 2 has none; audio: 10 tokens of which it has a quarter
    with pytest.raises(ValueError, match=r"experts 2, 6\.25% of the assignments .*steps 5 to 5\).*pass --lossy"):
        prune(source, (2,), None, (), lossy=False)
    result = prune(source, (), 0.07, (3,), lossy=True)
    assert not result.exact
    assert result.config.moe.layers == {3: {"num_experts": 2}}
    assert difference(source, result) > 1e-3


def test_a_log_of_another_number_of_experts_is_not_used(tmp_path: Path) -> None:
    source = random_source(tmp_path, {})
    write_log(source, [0.5, 0.5, 0.0, 0.0])
    assert "noise" in grown(source).usage.origin
    assert "metrics.jsonl" in source.usage.origin


@pytest.mark.parametrize(
    ("moe", "experts", "error"),
    [
        ({}, (4,), "--experts 4: block 1 has experts 0 to 3"),
        ({}, (0, 1, 2), "would keep 1 experts"),
        ({"experts_per_token": 3}, (0, 1), "fewer than the 3 that a token chooses"),
        ({"expert_groups": [{"num_experts": 1}, {"num_experts": 3}]}, (0,), "experts 0 to 0 are a group"),
        ({"router": "group_limited", "node_groups": 2}, (0,), r"\[1, 2\] would be left"),
    ],
)
def test_pruning_that_leaves_no_valid_layer_is_refused(
    tmp_path: Path, moe: dict[str, Any], experts: tuple[int, ...], error: str
) -> None:
    with pytest.raises(ValueError, match=error):
        prune(random_source(tmp_path, moe), experts, None, (), lossy=True)


def test_groups_of_modalities_and_thresholds_follow(tmp_path: Path) -> None:
    groups = [{"num_experts": 3}, {"modalities": ["text"], "num_experts": 3, "expert_hidden_size": 4}]
    losses = {"global_entropy": 0.1, "min_experts": {"text": 6}}
    source = random_source(tmp_path, {"num_experts": 6, "expert_groups": groups, "losses": losses})
    result = prune(source, (1, 5), None, (), lossy=True)
    assert [group.num_experts for group in result.config.moe.expert_groups] == [2, 2]
    assert any("min_experts of text was 6 and is 4" in line for line in result.did)
    model_of(result.config, result.state)
    rows = source.state[BLOCK + "router.weight"].value[[0, 2, 3, 4]]
    assert torch.equal(result.state[BLOCK + "router.weight"].value, rows)


def test_merging_with_a_dormant_copy_gives_back_the_model(tmp_path: Path) -> None:
    source = random_source(tmp_path, {})
    result = merge(grown(source), 1, (1, 4), lossy=False)
    assert result.exact
    assert_same_function(source, result)
    kept = {n: p for n, p in result.state.items() if n.startswith(BLOCK) and not n.endswith("dormancy")}
    assert_equal_states(kept, {n: p for n, p in source.state.items() if n.startswith(BLOCK)})
    assert [result.config.moe.for_layer(i).num_experts for i in (1, 3)] == [4, 5]


def test_equal_experts_of_a_top_1_sigmoid_are_one(tmp_path: Path) -> None:
    source = random_source(tmp_path, {"router": "sigmoid_top_k", "experts_per_token": 1})
    for name in ("router.weight", "experts.up", "experts.down"):
        source.state[BLOCK + name].value[3] = source.state[BLOCK + name].value[0]
    source = after(source, Result(source.config, source.state, ()))
    result = merge(source, 1, (0, 3), lossy=False)
    assert_same_function(source, result)


def test_unlike_experts_become_their_mean_by_use_with_the_moments_of_both(tmp_path: Path) -> None:
    source = random_source(tmp_path, {"expert_biases": True, "router_bias": True}, optimizer={"average": 0.9})
    write_log(source, [0.25, 0.45, 0.05, 0.25])  # of all: experts 1 and 2 have 0.4 and 0.1
    result = merge(source, 1, (2, 1), lossy=True)
    assert not result.exact
    assert difference(source, result) > 1e-3
    for name in ("router.weight", "router.logit_bias", "experts.up", "experts.up_bias", "experts.down_bias"):
        before, merged = source.state[BLOCK + name], result.state[BLOCK + name]
        averages = before.optimizer["average"], merged.optimizer["average"]
        for old, new in ((before.value, merged.value), averages):
            torch.testing.assert_close(new, torch.stack([old[0], 0.8 * old[1] + 0.2 * old[2], old[3]]))
        first, second = moments(source.state, BLOCK + name)
        torch.testing.assert_close(moments(result.state, BLOCK + name)[0][1], first[1] + first[2])
        torch.testing.assert_close(moments(result.state, BLOCK + name)[1][1], second[1] + second[2])


@pytest.mark.parametrize(
    ("moe", "experts", "error"),
    [
        ({}, (2, 2), "name two different experts"),
        ({}, (0, 4), "which has 0 to 3"),
        ({"num_experts": 2}, (0, 1), "there would be no choice"),
        ({"experts_per_token": 4}, (0, 1), "there would be no choice"),
        ({"expert_groups": [{"num_experts": 2}, {"num_experts": 2}]}, (1, 2), "name two of one group"),
        ({"router": "group_limited", "node_groups": 2}, (0, 1), "mmmoe experts prune"),
        ({"router": "hash"}, (0, 1), "pass --lossy"),
    ],
)
def test_a_pair_that_cannot_merge_is_refused(
    tmp_path: Path, moe: dict[str, Any], experts: tuple[int, int], error: str
) -> None:
    with pytest.raises(ValueError, match=error):
        merge(random_source(tmp_path, moe), 1, experts, lossy=False)
