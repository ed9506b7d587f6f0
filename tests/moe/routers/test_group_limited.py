"""Groups first, experts inside them: values derived by hand."""

import torch

from mmmoe_pretrain.moe.routers.group_limited import group_limited
from tests.moe.routing_inputs import inputs_of, logs

P = [[0.34, 0.01, 0.20, 0.19, 0.16, 0.10]]  # groups of two: sums 0.35, 0.39, 0.26; bests 0.34, 0.20, 0.16


def route(**settings: object):
    return group_limited(inputs_of(logs(P), router="group_limited", node_groups=3, **settings))


def test_a_group_is_worth_what_its_best_experts_are_worth_together() -> None:
    choice = route(groups_per_token=1)  # two experts from one group: the sum of the best two decides
    assert choice.expert_ids_nK.tolist() == [[2, 3]]  # though expert 0 is the most probable of all
    torch.testing.assert_close(choice.weights_nK, torch.tensor([[0.20 / 0.39, 0.19 / 0.39]]))
    torch.testing.assert_close(choice.log_p_nE, logs(P))  # losses see the whole distribution
    torch.testing.assert_close(choice.priority_n, torch.tensor([0.34]))  # max p, as in V-MoE


def test_one_expert_a_group_is_ranked_by_its_best() -> None:
    choice = route(groups_per_token=2)  # one expert from each of two groups: the best one decides
    assert choice.expert_ids_nK.tolist() == [[0, 2]]
    torch.testing.assert_close(choice.weights_nK, torch.tensor([[0.34 / 0.54, 0.20 / 0.54]]))
    assert route(groups_per_token=2, experts_per_token=1).expert_ids_nK.tolist() == [[0]]  # fewer experts than groups


def test_the_bias_moves_groups_and_experts_and_not_the_weights() -> None:
    choice = route(groups_per_token=1, bias=[0.0, 0.0, 0.0, 0.0, 0.2, 0.3])  # 0.36 and 0.40: worth 0.76
    assert choice.expert_ids_nK.tolist() == [[5, 4]]
    torch.testing.assert_close(choice.weights_nK, torch.tensor([[0.10 / 0.26, 0.16 / 0.26]]))


def test_a_token_stays_within_its_groups() -> None:
    logits = torch.randn(50, 16, generator=torch.Generator().manual_seed(1))
    settings = {"router": "group_limited", "node_groups": 4, "groups_per_token": 2, "experts_per_token": 6}
    groups_nK = group_limited(inputs_of(logits, **settings)).expert_ids_nK // 4
    assert max(len(set(row)) for row in groups_nK.tolist()) == 2
