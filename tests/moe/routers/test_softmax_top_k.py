"""The most probable experts, with values derived by hand."""

import torch

from mmmoe_pretrain.moe.routers.softmax_top_k import softmax_top_k
from tests.moe.routing_inputs import inputs_of, logs

P = [[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.6, 0.25, 0.15]]


def test_the_most_probable_experts_serve_with_renormalised_weights() -> None:
    choice = softmax_top_k(inputs_of(logs(P)))
    assert choice.expert_ids_nK.tolist() == [[0, 1], [2, 1], [0, 1]]
    expected = torch.tensor([[0.5 / 0.8, 0.3 / 0.8], [0.7 / 0.9, 0.2 / 0.9], [0.6 / 0.85, 0.25 / 0.85]])
    torch.testing.assert_close(choice.weights_nK, expected)
    torch.testing.assert_close(choice.log_p_nE, logs(P))
    torch.testing.assert_close(choice.priority_n, torch.tensor([0.5, 0.7, 0.6]))
    assert choice.kept_nK is None


def test_a_single_choice_keeps_its_probability_so_that_the_router_learns() -> None:
    logits = logs(P).requires_grad_()
    weights = softmax_top_k(inputs_of(logits, experts_per_token=1)).weights_nK
    torch.testing.assert_close(weights, torch.tensor([[0.5], [0.7], [0.6]]))
    (gradient,) = torch.autograd.grad(weights[0, 0], logits)
    # d p_0 / d l_j = p_0 (1[j = 0] - p_j)
    torch.testing.assert_close(gradient[0], torch.tensor([0.5 * 0.5, -0.5 * 0.3, -0.5 * 0.2]))


def test_a_bias_moves_the_choice_and_neither_weights_nor_gradients() -> None:
    logits = logs([P[0]]).requires_grad_()
    biased = softmax_top_k(inputs_of(logits, bias=[-0.4, 0.0, 0.0], renormalize=False))  # 0.1, 0.3, 0.2
    assert biased.expert_ids_nK.tolist() == [[1, 2]]
    torch.testing.assert_close(biased.priority_n, torch.tensor([0.5]))  # max p, though expert 0 is not chosen
    torch.testing.assert_close(biased.weights_nK, torch.tensor([[0.3, 0.2]]))
    (gradient,) = torch.autograd.grad(biased.weights_nK[0, 0], logits)
    torch.testing.assert_close(gradient, torch.tensor([[-0.3 * 0.5, 0.3 * 0.7, -0.3 * 0.2]]))
