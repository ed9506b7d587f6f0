"""What the ``moe`` section refuses, and with which words; every message names the value and the remedy."""

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.config.moe import MoEConfig, RoutingLossConfig, RoutingTerm
from mmmoe_pretrain.moe.activation import ACTIVATIONS
from mmmoe_pretrain.moe.cpu.activation import GRADIENTS
from mmmoe_pretrain.moe.experts import EXPERT_BACKENDS
from mmmoe_pretrain.moe.losses import TERMS
from mmmoe_pretrain.moe.router import GATES
from tests.support import objectives, tiny_values

IMAGE_ALONE = {"num_experts": 2, "modalities": ["image"]}
OTHERS = {"num_experts": 2, "modalities": ["audio", "text"]}


def refusal(moe: dict[str, Any], **sections: Any) -> str:
    with pytest.raises(ValueError) as caught:
        run_config.parse(tiny_values(Path("unused"), moe={"num_experts": 4, **moe}, **sections))
    return str(caught.value)


@pytest.mark.parametrize("moe,value,remedy", [
    ({"experts_per_token": 5}, "experts_per_token 5 exceeds moe.num_experts 4;", "lower the first"),
    ({"experts_per_token": 7, "null_experts": 2}, "moe.num_experts 4 and the 2 without computation",
     "raise the second"),
    ({"batch_priority": True}, "moe.capacity_factor null", "capacity_factor: 1.25"),
    ({"losses": {"min_experts": {"image": 5}}}, "min_experts of image is 5", "use 1 to 4"),
    ({"losses": {"min_experts": {"image": 0.5}}}, "min_experts of image is 0.5", "use 1 to 4"),
    ({"losses": {"balance_scope": "sequence", "per_modality": ["balance"]}}, "balance_scope sequence",
     "remove balance"),
    ({"expert_groups": [IMAGE_ALONE]}, "hold 2 experts together, and moe.num_experts is 4", "set num_experts: 2"),
    ({"expert_groups": [IMAGE_ALONE, {"num_experts": 2, "modalities": ["text"]}]}, "let audio reach 0 experts",
     "add audio to a group"),
    ({"expert_groups": [IMAGE_ALONE, OTHERS], "losses": {"min_experts": {"text": 3}}}, "min_experts of text is 3",
     "use 1 to 2"),
    ({"expert_groups": [IMAGE_ALONE, {"num_experts": "auto"}], "group_multiple": 3}, "leave 2 of moe.num_experts 4",
     "a multiple of moe.group_multiple 3, 3 at least; change num_experts"),
    ({"expert_groups": [IMAGE_ALONE, {"num_experts": 0}]}, "num_experts 0: a group has at least 1 expert",
     "write auto"),
    ({"expert_groups": [{**IMAGE_ALONE, "num_experts": 4}, {"num_experts": "auto"}]}, "leave 0 of moe.num_experts 4",
     "change num_experts"),
    ({"expert_groups": [IMAGE_ALONE, OTHERS], "router": "hash"}, "moe.router hash", "use softmax_top_k"),
    ({"expert_groups": [IMAGE_ALONE, OTHERS], "router": "group_limited", "node_groups": 2}, "moe.node_groups 2",
     "drop expert_groups"),
    ({"router": "expert_choice", "batch_priority": True, "capacity_factor": 1.0}, "moe.router expert_choice",
     "remove both"),
    ({"router": "expert_choice", "bias_balancing": {"rate": 0.001}}, "moe.bias_balancing", "remove both"),
    ({"router": "hash", "losses": {"load": 0.1}}, "moe.router hash does not;", "losses.load: 0"),
    ({"router": "expert_choice", "losses": {"load": 0.1}}, "moe.router expert_choice does not", "losses.load: 0"),
    ({"router": "hash", "jitter": 0.1}, "moe.router hash", "remove them"),
    ({"task_input": "alone"}, "moe.task_input alone", "set task_conditioned: true"),
    ({"task_conditioned": ["captoning"]}, "no objective captoning", "did you mean captioning"),
    ({"router": "hash", "task_conditioned": True}, "moe.task_conditioned", "remove them"),
    ({"router": "hash", "bias_balancing": {"rate": 0.1}}, "moe.bias_balancing", "remove them"),
    ({"router": "group_limited", "node_groups": 3}, "moe.node_groups 3", "use a divisor of 4"),
    ({"router": "group_limited", "node_groups": 2, "groups_per_token": 3}, "moe.groups_per_token 3",
     "at most that many groups"),
    ({"router": "group_limited", "node_groups": 4}, "1 of 4 leaves a token 1 experts", "raise groups_per_token"),
    ({"router": "group_limited", "node_groups": 2, "null_experts": 1}, "moe.null_experts", "or moe.node_groups"),
    ({"node_groups": 2}, "moe.node_groups 2", "remove them"),
    ({"scores_per_group": 2}, "moe.scores_per_group 2", "raise node_groups"),
    ({"router": "group_limited", "node_groups": 2, "scores_per_group": 3}, "moe.scores_per_group 3", "use 1 to 2"),
    ({"shared_expert_gate": True}, "moe.shared_expert_hidden_size is 0", "shared_expert_gate: false"),
    ({"expert_attention_size": 8, "experts_per_token": 1}, "moe.experts_per_token 1 it chooses one",
     "expert_attention_size: 0"),
    ({"expert_attention_size": 8, "router": "expert_choice"}, "moe.router expert_choice", "expert_attention_size: 0"),
    ({"expert_attention_size": 8, "router_weight_on_input": True}, "moe.router_weight_on_input",
     "router_weight_on_input: false"),
    ({"router": "hash", "routing_memory_size": 4}, "moe.routing_memory_size", "remove them"),
    ({"layers": {1: {"routing_memory_size": 4}}}, "moe.layers.1.routing_memory_size holds for all layers",
     "set moe.routing_memory_size instead"),
    ({"router": "hash", "router_bias": True}, "moe.router_bias", "remove them"),
    ({"routed_scaling_factor": 0}, "got 0", "greater than 0"),
    ({"layers": {1: {"losses": {"z": 1}}}}, "moe.layers.1.losses holds for all layers", "set moe.losses instead"),
    ({"layers": {0: {"router": "hash"}}}, "block 0 has no experts under moe.every 2", "name one of 1, 3, 5, 7"),
    ({"layers": {-1: {"router": "hash"}}}, "block -1 has no experts", "name one of 1, 3, 5, 7"),
    ({"layers": {1: {"ruter": "hash"}}}, "unknown key 'moe.layers.1.ruter'", "did you mean router?"),
    ({"layers": {1: {"num_experts": 1, "experts_per_token": 1}}}, "moe.layers.1", "use num_experts: 2 or more"),
    ({"layers": {1: {"experts_per_token": 9}}}, "moe.layers.1: moe.experts_per_token 9 exceeds", "lower the first"),
    ({"losses": {"min_experts": {"text": 3}}, "layers": {1: {"num_experts": 2}}}, "min_experts of text is 3",
     "use 1 to 2"),
    ({"layers": {1: {"router": "hashing"}}},
     "moe.layers.1.router: there is no router 'hashing'", "did you mean hash?"),
    ({"layers": {3: {"router": "hash"}}}, "moe.layers.3: there is no such block", "model.num_layers is 2"),
    ({"losses": {"combination": 0.1}}, "each of the 6 combinations that lack some of image, audio, text, and "
     "moe.num_experts is 4", "raise it to 6 or more, or name fewer modalities"),
    ({"losses": {"combination": 0.1}, "num_experts": 6, "layers": {1: {"num_experts": 5}}}, "moe.num_experts is 5",
     "raise it to 6"),
    ({"losses": {"combination": 0.1, "combination_modalities": ["image"]}}, "combination_modalities are image",
     "name two or more"),
    ({"losses": {"combination": 0.1, "combination_modalities": ["image", "image"]}}, "are image, image", "each once"),
    ({"losses": {"combination_modalities": ["image", "adio"]}}, "there is no modality adio", "did you mean audio?"),
    ({"losses": {"combination": 0.1, "combination_modalities": ["image", "text"]},
      "expert_groups": [IMAGE_ALONE, OTHERS]}, "keep experts apart by modality", "remove expert_groups"),
    ({"router": "hash", "losses": {"combination": 0.1}}, "moe.router hash does not", "moe.losses.combination: 0"),
    ({"router": "softmax"}, "there is no router 'softmax'", "did you mean softmax_top_k?"),
    ({"jitter": 1.0}, "got 1.0", "less than 1"),
    ({"lending": {}, "dispatch_chunks": 2}, "moe.dispatch_chunks 2", "set dispatch_chunks: 1, or lending: null"),
    ({"lending": {}, "expert_groups": [IMAGE_ALONE, OTHERS]}, "moe.expert_groups has 2", "remove expert_groups"),
    ({"lending": {"threshold": 0.5}}, "got 0.5", "greater than or equal to 1"),
    ({"layers": {1: {"lending": {}}}}, "moe.layers.1.lending holds for all layers", "set moe.lending instead"),
])  # fmt: skip
def test_impossible_moe_settings_are_refused_with_the_value_and_the_remedy(
    moe: dict[str, Any], value: str, remedy: str
) -> None:
    message = refusal(moe)
    assert value in message and remedy in message


@pytest.mark.parametrize("moe", [{"router": "expert_choice"}, {"layers": {1: {"router": "expert_choice"}}}],
                         ids=["everywhere", "in one layer"])  # fmt: skip
def test_expert_choice_is_refused_where_segments_are_causal(moe: dict[str, Any]) -> None:
    message = refusal(moe, objectives=objectives())
    assert "moe.router expert_choice" in message and "set objectives.captioning.weight: 0" in message


def test_expert_choice_serves_contrastive_objectives() -> None:
    values = tiny_values(Path("unused"), moe={"router": "expert_choice"}, objectives=objectives({}, None))
    assert run_config.parse(values).moe.router == "expert_choice"


def test_layers_differ_in_what_they_name_alone() -> None:
    config = MoEConfig(num_experts=8, jitter=0.1, layers={3: {"router": "group_limited", "node_groups": 4,
                                                               "groups_per_token": 2}})  # fmt: skip
    usual, odd = config.for_layer(1), config.for_layer(3)
    assert (usual.router, odd.router, odd.node_groups) == ("softmax_top_k", "group_limited", 4)
    assert usual.jitter == odd.jitter == 0.1 and odd.num_experts == 8


def test_groups_without_a_size_take_that_of_the_mixture() -> None:
    sized = {**OTHERS, "expert_hidden_size": 64}
    config = MoEConfig(num_experts=4, expert_hidden_size=256, expert_groups=(IMAGE_ALONE, sized))
    assert [group.expert_hidden_size for group in config.groups] == [256, 64]
    assert [group.num_experts for group in MoEConfig(num_experts=4).groups] == [4]


def test_combinations_are_those_that_lack_a_modality_in_an_order_of_their_own() -> None:
    config = MoEConfig(losses={"combination": 0.1, "combination_modalities": ["text", "image", "audio"]})
    assert config.combinations(("image", "depth", "audio", "text")) == (
        ("image",), ("audio",), ("text",), ("image", "audio"), ("image", "text"), ("audio", "text"),
    )  # fmt: skip
    assert MoEConfig().combinations(("image", "text")) == ()
    values = tiny_values(Path("unused"), moe={"losses": {"combination": 0.1}, "num_experts": 8})
    assert run_config.parse(values).stream_names.combinations[-1] == ("audio", "text")


@pytest.mark.parametrize(
    ("tokens", "multiple", "sizes"),
    [
        (None, 1, [3, 3, 2]),  # until the tokens are known
        ({"image": 1.0, "audio": 1.0, "text": 2.0}, 1, [2, 4, 2]),  # 3 tokens to 1
        ({"image": 3.0, "audio": 1.0, "text": 0.0}, 1, [5, 1, 2]),  # 4.5 to 1.5: at a tie the first goes first
        ({"image": 1.0, "audio": 1.0, "text": 2.0}, 2, [2, 4, 2]),
        ({"image": 0.0, "audio": 5.0, "text": 5.0}, 1, [1, 5, 2]),  # a token must reach an expert
    ],
)
def test_groups_of_auto_size_follow_the_tokens(tokens: dict | None, multiple: int, sizes: list[int]) -> None:
    groups = [{"modalities": ["image"], "num_experts": "auto"},
              {"modalities": ["audio", "text"], "num_experts": "auto"}, {"num_experts": 2}]  # fmt: skip
    config = MoEConfig(num_experts=8, expert_groups=groups, group_multiple=multiple)
    known = config if tokens is None else config.with_budgets(tokens)
    assert [group.num_experts for group in known.groups] == sizes
    assert known.auto_layers == ((None,) if tokens is None else ())


def test_the_names_that_a_config_may_use_are_those_of_the_tables() -> None:
    fields = MoEConfig.model_fields
    weights = {name for name, field in RoutingLossConfig.model_fields.items() if field.annotation is float}
    assert weights == TERMS.keys() > set(get_args(RoutingTerm))
    assert set(get_args(fields["gate"].annotation)) == GATES.keys()
    assert set(get_args(fields["activation"].annotation)) == ACTIVATIONS.keys() == GRADIENTS.keys()
    assert set(get_args(fields["expert_backend"].annotation)) == EXPERT_BACKENDS.keys() | {"auto"}


def test_an_override_reaches_into_a_layer_that_yaml_names_by_a_number(tmp_path: Path) -> None:
    values = tiny_values(tmp_path, moe={"layers": {1: {"num_experts": 16}}})
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    layers = run_config.load(path, ["moe.layers.1.jitter=0.5"]).moe.layers
    assert layers == {1: {"num_experts": 16, "jitter": 0.5}}


@pytest.mark.parametrize(
    ("moe", "balance"),
    [
        ({}, 0.02),
        ({"router": "sigmoid_top_k"}, 0.02),
        ({"losses": {}}, 0.0),
        ({"losses": {"importance": 0.1}}, 0.0),
        ({"router": "hash"}, 0.0),
        ({"router": "expert_choice"}, 0.0),
        ({"bias_balancing": {"rate": 0.001}}, 0.0),
        ({"num_experts": 1, "experts_per_token": 1}, 0.0),
    ],
)
def test_the_balance_loss_is_on_where_nothing_else_balances(moe: dict[str, Any], balance: float) -> None:
    config = MoEConfig(**moe)
    assert config.losses.balance == balance
    assert MoEConfig(**config.model_dump(mode="json")) == config
