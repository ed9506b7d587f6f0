"""The auxiliary losses against values worked out by hand."""

import dataclasses
import math

import pytest
import torch

from mmmoe_pretrain.config.moe import RoutingLossConfig
from mmmoe_pretrain.moe.balance import balance, importance, load
from mmmoe_pretrain.moe.losses import (
    BalanceWindow,
    global_entropy,
    layer_losses,
    local_entropy,
    loss_names,
    routing_losses,
)
from tests.moe.routing_inputs import NAMES, hand_stats

LN2 = math.log(2)
NONE = [0.0, 0.0]
# Two images split evenly over two experts, each token sure of its own; no audio; one undecided text.
MIXED = hand_stats([[1, 1], NONE, [0.5, 0.5]], [[1, 1], NONE, [1, 0]], [2, 0, 1],
                   entropy_M=[0, 0, LN2], z_M=[2, 0, 4])  # fmt: skip
# Images have experts 0 and 1, text 2 and 3; both spread evenly, and there is three times as much text.
APART = hand_stats([[1, 1, 0, 0], [0] * 4, [0, 0, 3, 3]], [[1, 1, 0, 0], [0] * 4, [0, 0, 3, 3]], [2, 0, 6],
                   load_ME=[[1.5, 1.5, 0, 0], [0] * 4, [0, 0, 4, 4]],
                   allowed_ME=[[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1]])  # fmt: skip


def test_entropies_of_single_tokens_and_of_their_mean() -> None:
    image, text = slice(0, 1), slice(2, 3)
    assert local_entropy(MIXED, image).item() == 0
    assert local_entropy(MIXED, text).item() == pytest.approx(LN2)
    assert global_entropy(MIXED, image, None).item() == pytest.approx(-LN2)
    assert global_entropy(MIXED, image, 2.0).item() == pytest.approx(0, abs=1e-6)  # two experts are in use
    collapsed = hand_stats([[2, 0], NONE, NONE], [[2, 0], NONE, NONE], [2, 0, 0])
    assert global_entropy(collapsed, image, 2.0).item() == pytest.approx(LN2)


def test_each_entropy_term_has_modalities_of_its_own() -> None:
    """LIMoE's ablation switches local and global terms by modality."""
    config = RoutingLossConfig(local_entropy=1.0, global_entropy=2.0, local_entropy_modalities=("text",),
                               global_entropy_modalities=("text", "image"))  # fmt: skip
    losses = layer_losses(MIXED, config)
    assert (
        tuple(losses)
        == loss_names(config, NAMES.modalities)
        == ("global_entropy/image", "local_entropy/text", "global_entropy/text")
    )
    # a mean over those that take part: text alone; images and text, each with an even mean routing
    assert [losses[name].item() for name in losses] == pytest.approx([-LN2, LN2, -LN2])
    neither = RoutingLossConfig(local_entropy=1.0, global_entropy=2.0, local_entropy_modalities=(),
                                global_entropy_modalities=("audio",), min_experts={"audio": 2})  # fmt: skip
    assert {name: loss.item() for name, loss in layer_losses(MIXED, neither).items()} == {"global_entropy/audio": 0}


def test_unevenness_of_probabilities_and_loads_is_their_squared_coefficient_of_variation() -> None:
    uneven = hand_stats([[2, 1], NONE, [1, 0]], [NONE] * 3, [3, 0, 1], load_ME=[[0.2, 0.1], NONE, [0.1, 0]])
    # Sums 3 and 1: mean 2, standard deviation 1. The loads are a tenth of them.
    assert importance(uneven).item() == pytest.approx(0.25) == load(uneven).item()
    assert importance(MIXED).item() == pytest.approx(0)
    collapsed = hand_stats([[4, 0, 0], [0] * 3, [0] * 3], [[0] * 3] * 3, [4, 0, 0])
    assert importance(collapsed).item() == pytest.approx(2), "E - 1"


def test_balance_is_one_when_even_and_the_number_of_experts_when_collapsed() -> None:
    for counts, expected in (([2, 2], 1), ([4, 0], 2)):
        stats = hand_stats([counts, NONE, NONE], [counts, NONE, NONE], [4, 0, 0])
        assert balance(stats).item() == pytest.approx(expected)


@pytest.mark.parametrize("term,even", [(importance, 0), (load, 0), (balance, 1)])
def test_an_expert_that_a_modality_may_not_choose_is_not_unused(term, even) -> None:  # type: ignore[no-untyped-def]
    """Spread as evenly as the groups allow, every term is at its least."""
    for rows in (slice(None), slice(0, 1), slice(2, 3)):
        assert term(APART, rows).item() == pytest.approx(even, abs=1e-6)
    assert term(dataclasses.replace(APART, allowed_ME=torch.ones(3, 4).bool())).item() > even + 0.2


def test_an_expert_whose_modality_is_absent_is_not_unused() -> None:
    no_text = hand_stats([[1, 1, 0, 0], [0] * 4, [0] * 4], [[1, 1, 0, 0], [0] * 4, [0] * 4], [2, 0, 0],
                         allowed_ME=[[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1]])  # fmt: skip
    assert importance(no_text).item() == pytest.approx(0, abs=1e-6)
    assert balance(no_text).item() == pytest.approx(1)


def test_a_term_by_modality_is_a_mean_over_the_modalities_that_are_there() -> None:
    config = RoutingLossConfig(balance=3.0, z=2.0, importance=1.0, local_entropy=1.0, per_modality=("balance", "z"))
    losses = layer_losses(MIXED, config)
    by_modality = [f"{term}/{m}" for term in ("balance", "z", "local_entropy") for m in NAMES.modalities]
    assert set(losses) == {"importance", *by_modality}
    assert losses["balance/image"].item() == pytest.approx(3 * 1 / 2)
    # The text chose expert 0 with p = 1/2: 2 * 1 * 1/2 = 1.
    assert losses["balance/text"].item() == pytest.approx(3 * 1 / 2)
    assert losses["balance/audio"].item() == losses["z/audio"].item() == losses["local_entropy/audio"].item() == 0
    assert losses["local_entropy/text"].item() == pytest.approx(LN2 / 2)  # two of three are present
    assert losses["z/image"].item() == pytest.approx(2 * (2 / 2) / 2)
    assert losses["z/text"].item() == pytest.approx(2 * 4 / 2)


def test_terms_are_weighted_and_averaged_over_layers_of_any_number_of_experts() -> None:
    config = RoutingLossConfig(z=0.5, orthogonality=2.0, balance=1.0)
    other = hand_stats([[1, 1, 1, 1], [0] * 4, [0] * 4], [[4, 0, 0, 0], [0] * 4, [0] * 4], [4, 0, 0],
                       z_M=[12, 0, 0], orthogonality=0.5)  # fmt: skip
    losses = routing_losses([MIXED, other], config)
    assert losses["z"].item() == pytest.approx(0.5 * (2 + 3) / 2)
    assert losses["orthogonality"].item() == pytest.approx(2 * (0 + 0.5) / 2)
    assert losses["balance"].item() == pytest.approx((2 * (2 / 3 * 1.5 + 1 / 3 * 1.5) / 3 + 1) / 2)


def test_the_threshold_of_experts_is_each_layers_own() -> None:
    """Two of two experts meet a threshold of 2, and so do two of four."""
    config = RoutingLossConfig(global_entropy=1.0, min_experts={"image": 2.0})
    wide = hand_stats([[1, 1, 0, 0], [0] * 4, [0] * 4], [[1, 1, 0, 0], [0] * 4, [0] * 4], [2, 0, 0])
    losses = routing_losses([MIXED, wide], config)
    assert losses["global_entropy/image"].item() == pytest.approx(0, abs=1e-6)


def test_the_window_counts_the_microbatches_of_one_step_of_training() -> None:
    window = BalanceWindow()
    with torch.no_grad():
        window.add([MIXED, APART])  # evaluation is not counted
    first = window.add([MIXED, APART])
    second = window.add([MIXED, APART])
    torch.testing.assert_close(first[0], torch.tensor([[1.0, 1], [0, 0], [1, 0]]))
    torch.testing.assert_close(second, tuple(2 * counts for counts in first))
    window.reset()
    torch.testing.assert_close(window.add([MIXED, APART])[0], first[0])


def test_global_batch_balance_takes_shares_from_the_window_and_probabilities_from_the_microbatch() -> None:
    config = RoutingLossConfig(balance=1.0, balance_scope="global_batch")
    left = hand_stats([[4, 0], NONE, NONE], [[4, 0], NONE, NONE], [4, 0, 0])
    right = hand_stats([[0, 4], NONE, NONE], [[0, 4], NONE, NONE], [4, 0, 0])
    window = BalanceWindow()
    values = [routing_losses([stats], config, window.add([stats]))["balance"].item() for stats in (left, right)]
    assert values == [2.0, 1.0], "collapsed as far as the first can know, even once both are counted"
    microbatch = config.model_copy(update={"balance_scope": "microbatch"})
    assert routing_losses([right], microbatch, window.add([right]))["balance"].item() == 2.0
