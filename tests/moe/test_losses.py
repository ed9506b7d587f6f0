"""The auxiliary losses against values worked out by hand."""

import math

import pytest
import torch

from mmmoe_pretrain.config import RoutingLossConfig
from mmmoe_pretrain.moe.losses import balance, global_entropy, layer_losses, local_entropy, routing_losses, z_loss
from mmmoe_pretrain.moe.routing import RoutingStats

LN2 = math.log(2)


def stats(probability: list[list[float]], counts: list[list[float]], entropy: list[float],
          tokens: list[float], z_sum: float = 0.0) -> RoutingStats:  # fmt: skip
    return RoutingStats(torch.tensor(probability), torch.tensor(entropy), torch.tensor(z_sum),
                        torch.tensor(counts), torch.tensor(tokens), torch.zeros(3))  # fmt: skip


# Two images split evenly over two experts, each token sure of its own; no audio; one undecided text.
MIXED = stats([[1.0, 1.0], [0.0, 0.0], [0.5, 0.5]], [[1, 1], [0, 0], [1, 0]], [0.0, 0.0, LN2], [2, 0, 1], 6.0)


def test_local_entropy_is_the_mean_uncertainty_of_single_tokens() -> None:
    assert local_entropy(MIXED, 0).item() == 0
    assert local_entropy(MIXED, 2).item() == pytest.approx(LN2)


def test_global_entropy_rewards_a_modality_that_uses_many_experts() -> None:
    assert global_entropy(MIXED, 0, None).item() == pytest.approx(-LN2)


def test_the_threshold_is_met_once_enough_experts_are_in_use() -> None:
    assert global_entropy(MIXED, 0, 2.0).item() == pytest.approx(0, abs=1e-6)
    collapsed = stats([[2.0, 0.0], [0, 0], [0, 0]], [[2, 0], [0, 0], [0, 0]], [0, 0, 0], [2, 0, 0])
    assert global_entropy(collapsed, 0, 2.0).item() == pytest.approx(LN2)


def test_balance_is_one_when_even_and_the_number_of_experts_when_collapsed() -> None:
    even = stats([[2.0, 2.0], [0, 0], [0, 0]], [[2, 2], [0, 0], [0, 0]], [0, 0, 0], [4, 0, 0])
    collapsed = stats([[4.0, 0.0], [0, 0], [0, 0]], [[4, 0], [0, 0], [0, 0]], [0, 0, 0], [4, 0, 0])
    assert balance(even).item() == pytest.approx(1)
    assert balance(collapsed).item() == pytest.approx(2)


def test_z_loss_is_a_mean_over_tokens() -> None:
    assert z_loss(MIXED).item() == pytest.approx(2.0)


def test_entropies_are_means_over_the_modalities_that_are_there() -> None:
    losses = layer_losses(MIXED, RoutingLossConfig(local_entropy=1.0))
    assert losses["local_entropy/audio"].item() == 0
    assert losses["local_entropy/text"].item() == pytest.approx(LN2 / 2)  # two of three are present


def test_terms_are_weighted_and_averaged_over_layers() -> None:
    config = RoutingLossConfig(z=0.5)
    assert routing_losses([MIXED, MIXED], config)["z"].item() == pytest.approx(1.0)


def test_no_tokens_at_all_give_finite_losses_and_gradients() -> None:
    probability = torch.zeros(3, 2, requires_grad=True)
    empty = RoutingStats(probability, torch.zeros(3), torch.tensor(0.0), torch.zeros(3, 2), torch.zeros(3),
                         torch.zeros(3))  # fmt: skip
    losses = layer_losses(empty, RoutingLossConfig(local_entropy=1, global_entropy=1, balance=1, z=1))
    sum(losses.values()).backward()
    assert all(math.isfinite(loss.item()) for loss in losses.values())
    assert torch.isfinite(probability.grad).all()
