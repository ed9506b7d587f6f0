"""The auxiliary losses against values worked out by hand."""

import dataclasses
import math

import pytest
import torch

from mmmoe_pretrain.config.moe import MoEConfig, RoutingLossConfig
from mmmoe_pretrain.moe.balance import balance, importance, load, sequence_balance
from mmmoe_pretrain.moe.losses import (
    BalanceWindow,
    global_entropy,
    layer_losses,
    local_entropy,
    loss_names,
    routing_losses,
    z_loss,
)
from tests.moe.hand_stats import hand_stats
from tests.moe.routing_inputs import NAMES

LN2 = math.log(2)
NONE = [0.0, 0.0]
# Two images split evenly over two experts, each token sure of its own; no audio; one undecided text.
MIXED = hand_stats([[1, 1], NONE, [0.5, 0.5]], [[1, 1], NONE, [1, 0]], [2, 0, 1],
                   entropy_M=[0, 0, LN2], z_M=[2, 0, 4])  # fmt: skip
# Images have experts 0 and 1, text 2 and 3; both spread evenly, and there is three times as much text.
APART = hand_stats([[1, 1, 0, 0], [0] * 4, [0, 0, 3, 3]], [[1, 1, 0, 0], [0] * 4, [0, 0, 3, 3]], [2, 0, 6],
                   load_ME=[[1.5, 1.5, 0, 0], [0] * 4, [0, 0, 4, 4]],
                   allowed_ME=[[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1]])  # fmt: skip


def test_local_entropy_is_the_mean_uncertainty_of_single_tokens() -> None:
    assert local_entropy(MIXED, 0).item() == 0
    assert local_entropy(MIXED, 2).item() == pytest.approx(LN2)


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
                                global_entropy_modalities=("audio",))  # fmt: skip
    assert {name: loss.item() for name, loss in layer_losses(MIXED, neither).items()} == {"global_entropy/audio": 0}


def test_global_entropy_rewards_a_modality_that_uses_many_experts() -> None:
    assert global_entropy(MIXED, 0, None).item() == pytest.approx(-LN2)


def test_the_threshold_is_met_once_enough_experts_are_in_use() -> None:
    assert global_entropy(MIXED, 0, 2.0).item() == pytest.approx(0, abs=1e-6)
    collapsed = hand_stats([[2, 0], NONE, NONE], [[2, 0], NONE, NONE], [2, 0, 0])
    assert global_entropy(collapsed, 0, 2.0).item() == pytest.approx(LN2)


def test_importance_is_the_squared_coefficient_of_variation_of_the_summed_probabilities() -> None:
    uneven = hand_stats([[2, 1], NONE, [1, 0]], [NONE] * 3, [3, 0, 1])
    assert importance(uneven).item() == pytest.approx(0.25)  # sums 3 and 1: mean 2, standard deviation 1
    assert importance(MIXED).item() == pytest.approx(0)
    collapsed = hand_stats([[4, 0, 0], [0] * 3, [0] * 3], [[0] * 3] * 3, [4, 0, 0])
    assert importance(collapsed).item() == pytest.approx(2), "E - 1"


def test_load_is_the_same_of_the_smooth_load_whatever_its_sum() -> None:
    stats = hand_stats([NONE] * 3, [NONE] * 3, [3, 0, 1], load_ME=[[0.2, 0.1], NONE, [0.1, 0]])
    assert load(stats).item() == pytest.approx(0.25)


def test_balance_is_one_when_even_and_the_number_of_experts_when_collapsed() -> None:
    even = hand_stats([[2, 2], NONE, NONE], [[2, 2], NONE, NONE], [4, 0, 0])
    collapsed = hand_stats([[4, 0], NONE, NONE], [[4, 0], NONE, NONE], [4, 0, 0])
    assert balance(even).item() == pytest.approx(1)
    assert balance(collapsed).item() == pytest.approx(2)


def test_balance_at_sequence_scope_is_a_mean_over_segments() -> None:
    assert sequence_balance(hand_stats([NONE] * 3, [NONE] * 3, [1, 0, 0], sequence=[5, 4])).item() == 1.25


def test_z_loss_is_a_mean_over_tokens() -> None:
    assert z_loss(MIXED).item() == pytest.approx(2.0)


@pytest.mark.parametrize("term,even", [(importance, 0), (load, 0), (balance, 1)])
def test_an_expert_that_a_modality_may_not_choose_is_not_unused(term, even) -> None:  # type: ignore[no-untyped-def]
    """Spread as evenly as the groups allow, every term is at its least."""
    assert term(APART).item() == pytest.approx(even, abs=1e-6)
    for m in (0, 2):
        assert term(APART, slice(m, m + 1)).item() == pytest.approx(even, abs=1e-6)
    free = dataclasses.replace(APART, allowed_ME=None)
    # Without groups the same sums 1, 1, 3, 3 (of 8) are uneven: CV^2 1/4, and 4 (1 + 1 + 9 + 9) / 64 = 1.25.
    expected = {importance: 0.25, load: (1.25 / 2.75) ** 2, balance: 1.25}[term]
    assert term(free).item() == pytest.approx(expected)


def test_within_its_group_an_expert_counts_by_the_tokens_that_may_reach_it() -> None:
    sums = [[1, 1, 0, 0], [0] * 4, [0, 0, 6, 0]]
    text_collapsed = hand_stats(sums, sums, [2, 0, 6],
                                allowed_ME=[[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1]])  # fmt: skip
    # Shares 1/8, 1/8, 6/8, 0 against 1/8, 1/8, 3/8, 3/8: 2 (3/8)^2 / (3/8), and 2/8 + (6/8)^2 / (3/8).
    assert importance(text_collapsed).item() == pytest.approx(0.75)
    assert balance(text_collapsed).item() == pytest.approx(1.75)


def test_an_expert_whose_modality_is_absent_is_not_unused() -> None:
    no_text = hand_stats([[1, 1, 0, 0], [0] * 4, [0] * 4], [[1, 1, 0, 0], [0] * 4, [0] * 4], [2, 0, 0],
                         allowed_ME=[[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1]])  # fmt: skip
    assert importance(no_text).item() == pytest.approx(0, abs=1e-6)
    assert balance(no_text).item() == pytest.approx(1)


def test_entropies_are_means_over_the_modalities_that_are_there() -> None:
    losses = layer_losses(MIXED, RoutingLossConfig(local_entropy=1.0))
    assert losses["local_entropy/audio"].item() == 0
    assert losses["local_entropy/text"].item() == pytest.approx(LN2 / 2)  # two of three are present


def test_a_term_by_modality_is_a_mean_over_the_modalities_that_are_there() -> None:
    config = RoutingLossConfig(balance=3.0, z=2.0, importance=1.0, per_modality=("balance", "z"))
    losses = layer_losses(MIXED, config)
    assert set(losses) == {
        "importance",
        *(f"{term}/{m}" for term in ("balance", "z") for m in ("image", "audio", "text")),
    }
    assert losses["balance/image"].item() == pytest.approx(3 * 1 / 2)
    # The text chose expert 0 with p = 1/2: 2 * 1 * 1/2 = 1.
    assert losses["balance/text"].item() == pytest.approx(3 * 1 / 2)
    assert losses["balance/audio"].item() == losses["z/audio"].item() == 0
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


def test_the_window_counts_the_microbatches_of_one_step() -> None:
    window = BalanceWindow()
    first = window.add([MIXED, APART])
    second = window.add([MIXED, APART])
    torch.testing.assert_close(first[0], torch.tensor([[1.0, 1], [0, 0], [1, 0]]))
    torch.testing.assert_close(second[0], 2 * first[0])
    torch.testing.assert_close(second[1], 2 * first[1])
    window.reset()
    torch.testing.assert_close(window.add([MIXED, APART])[0], first[0])


def test_without_gradients_the_window_remembers_nothing() -> None:
    window = BalanceWindow()
    with torch.no_grad():
        window.add([MIXED])
    torch.testing.assert_close(window.add([MIXED])[0], MIXED.counts_ME)


def test_global_batch_balance_takes_shares_from_the_window_and_probabilities_from_the_microbatch() -> None:
    config = RoutingLossConfig(balance=1.0, balance_scope="global_batch")
    left = hand_stats([[4, 0], NONE, NONE], [[4, 0], NONE, NONE], [4, 0, 0])
    right = hand_stats([[0, 4], NONE, NONE], [[0, 4], NONE, NONE], [4, 0, 0])
    window = BalanceWindow()
    values = [routing_losses([stats], config, window.add([stats]))["balance"].item() for stats in (left, right)]
    assert values == [2.0, 1.0], "collapsed as far as the first can know, even once both are counted"
    microbatch = config.model_copy(update={"balance_scope": "microbatch"})
    assert routing_losses([right], microbatch, window.add([right]))["balance"].item() == 2.0


def test_balance_by_modality_within_segments_is_refused() -> None:
    with pytest.raises(ValueError, match="remove balance from"):
        RoutingLossConfig(balance=1, balance_scope="sequence", per_modality=("balance",))


@pytest.mark.parametrize("router", ["hash", "expert_choice"])
def test_smooth_load_is_refused_where_tokens_do_not_choose(router: str) -> None:
    with pytest.raises(ValueError, match=f"moe.router {router} does not"):
        MoEConfig.model_validate({"router": router, "losses": {"load": 1}})


def test_a_threshold_above_the_experts_that_a_modality_may_choose_is_refused() -> None:
    groups = [{"modalities": ["image"], "num_experts": 6}, {"modalities": ["audio", "text"], "num_experts": 2}]
    with pytest.raises(ValueError, match=r"min_experts of text is 3, .* let it reach 2"):
        MoEConfig.model_validate(
            {"num_experts": 8, "expert_groups": groups, "losses": {"min_experts": {"text": 3}}}
        ).check_modalities(NAMES.modalities)


def test_a_threshold_above_the_experts_of_one_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="min_experts of text is 6, and there are 4 experts"):
        MoEConfig.model_validate({"num_experts": 8, "losses": {"min_experts": {"text": 6}},
                                  "layers": {3: {"num_experts": 4}}})  # fmt: skip
