"""Sigmoid scores, with values derived by hand."""

import math

import torch

from mmmoe_pretrain.moe.routers.sigmoid_top_k import sigmoid_top_k
from mmmoe_pretrain.moe.routing import MASKED
from tests.moe.routing_inputs import inputs_of

LOGITS = [[math.log(4.0), 0.0, -math.log(4.0)]]  # s = 0.8, 0.5, 0.2


def test_weights_are_scores_over_the_sum_of_the_chosen() -> None:
    choice = sigmoid_top_k(inputs_of(torch.tensor(LOGITS)))
    assert choice.expert_ids_nK.tolist() == [[0, 1]]
    torch.testing.assert_close(choice.weights_nK, torch.tensor([[0.8 / 1.3, 0.5 / 1.3]]))
    torch.testing.assert_close(choice.priority_n, torch.tensor([0.8]))
    p = choice.log_p_nE.exp()  # the routing distribution: scores over the sum of all
    torch.testing.assert_close(p, torch.tensor([[0.8 / 1.5, 0.5 / 1.5, 0.2 / 1.5]]))


def test_the_bias_moves_the_choice_and_not_the_weights() -> None:
    choice = sigmoid_top_k(inputs_of(torch.tensor(LOGITS), bias=[0.0, -0.4, 0.1]))  # s + b = 0.8, 0.1, 0.3
    assert choice.expert_ids_nK.tolist() == [[0, 2]]
    torch.testing.assert_close(choice.weights_nK, torch.tensor([[0.8, 0.2]]))  # 0.8 + 0.2 is 1
    choice = sigmoid_top_k(inputs_of(torch.tensor(LOGITS), bias=[-0.9, 0.0, 0.0]))  # s + b = -0.1, 0.5, 0.2
    assert choice.expert_ids_nK.tolist() == [[1, 2]]
    torch.testing.assert_close(choice.priority_n, torch.tensor([0.8]))  # the largest score before the bias


def test_a_single_choice_keeps_its_score_and_trains_its_expert_alone() -> None:
    logits = torch.tensor(LOGITS, requires_grad=True)
    weights = sigmoid_top_k(inputs_of(logits, experts_per_token=1)).weights_nK
    torch.testing.assert_close(weights, torch.tensor([[0.8]]))
    (gradient,) = torch.autograd.grad(weights.sum(), logits)
    torch.testing.assert_close(gradient, torch.tensor([[0.8 * 0.2, 0.0, 0.0]]))  # s (1 - s)


def test_scores_too_small_for_fp32_still_weigh_one_together() -> None:
    choice = sigmoid_top_k(inputs_of(torch.tensor([[-200.0, -200.0, -300.0]])))
    torch.testing.assert_close(choice.weights_nK, torch.tensor([[0.5, 0.5]]))
    torch.testing.assert_close(choice.log_p_nE[0, :2], torch.full((2,), -math.log(2.0)))


def test_a_masked_expert_has_no_probability_and_breaks_no_gradient() -> None:
    logits = torch.tensor([[math.log(4.0), MASKED, 0.0]], requires_grad=True)  # s = 0.8, 0, 0.5
    groups = ({"num_experts": 1}, {"num_experts": 1, "modalities": ("text",)}, {"num_experts": 1})
    choice = sigmoid_top_k(inputs_of(logits, bias=[0.0, 9.0, 0.0], expert_groups=groups))
    assert choice.expert_ids_nK.tolist() == [[0, 2]]
    torch.testing.assert_close(choice.weights_nK, torch.tensor([[0.8 / 1.3, 0.5 / 1.3]]))
    p = choice.log_p_nE.exp()
    torch.testing.assert_close(p, torch.tensor([[0.8 / 1.3, 0.0, 0.5 / 1.3]]))
    entropy = -(p * choice.log_p_nE).sum()
    expected = -sum(q * math.log(q) for q in (0.8 / 1.3, 0.5 / 1.3))
    torch.testing.assert_close(entropy, torch.tensor(expected))
    (gradient,) = torch.autograd.grad(entropy + choice.weights_nK[0, 0], logits)
    assert gradient.isfinite().all() and gradient[0, 1] == 0 and gradient[0, 0] != 0


def test_node_groups_limit_the_choice_to_the_groups_worth_most() -> None:
    s = torch.tensor([[0.9, 0.1, 0.6, 0.5, 0.4, 0.45]])  # groups of two are worth 1.0, 1.1 and 0.85
    choice = sigmoid_top_k(inputs_of(s.logit(), router="sigmoid_top_k", node_groups=3))
    assert choice.expert_ids_nK.tolist() == [[2, 3]]  # not expert 0, the best of all
    torch.testing.assert_close(choice.weights_nK, torch.tensor([[0.6 / 1.1, 0.5 / 1.1]]))
