"""The balancing bias against steps worked out by hand, and at work."""

import pytest
import torch

from mmmoe_pretrain.config.moe import MoEConfig
from mmmoe_pretrain.moe.balance import updated_bias
from mmmoe_pretrain.moe.router import Router
from mmmoe_pretrain.moe.tokens import TokenInfo
from tests.moe.routing_inputs import NAMES, Rows, hand_stats

ZERO3 = [0.0, 0.0, 0.0]


def after(counts: Rows, bias: Rows, rate: float, allowed: Rows | None = None) -> list[list[float]]:
    stats = hand_stats(counts, counts, [sum(row) for row in counts])
    allowed_ME = stats.allowed_ME if allowed is None else torch.tensor(allowed).bool()
    return updated_bias(torch.tensor(bias), stats, rate, allowed_ME).tolist()


def test_busy_experts_sink_and_idle_ones_rise_by_the_rate() -> None:
    """Loads 4, 1, 1 over all modalities, mean 2: -0.3, +0.3, +0.3, less their mean of 0.1."""
    counts = [[3, 0, 1], ZERO3, [1, 1, 0]]
    assert after(counts, [ZERO3], 0.3)[0] == pytest.approx([-0.4, 0.2, 0.2])
    assert after([[2, 2, 2], ZERO3, ZERO3], [[0.5, -0.25, -0.25]], 0.1)[0] == pytest.approx([0.5, -0.25, -0.25])


def test_a_modality_follows_its_own_load_and_one_without_tokens_keeps_its_bias() -> None:
    """Pooled, the loads are even; by modality they are not."""
    counts = [[4, 0, 0], ZERO3, [0, 4, 4]]
    biases = after(counts, [ZERO3, [0.7, -0.3, 0.1], ZERO3], 0.3)
    assert biases[0] == pytest.approx([-0.4, 0.2, 0.2])
    assert biases[1] == torch.tensor([0.7, -0.3, 0.1]).tolist(), "untouched, not even recentred"
    assert biases[2] == pytest.approx([0.4, -0.2, -0.2])
    assert after(counts, [ZERO3], 0.3)[0] == pytest.approx([0, 0, 0])


def test_the_mean_is_over_the_experts_that_a_modality_may_choose() -> None:
    """Two experts of images with loads 3 and 1, two of text with 8 and 8. Over all four the mean is 5, and
    text would be pushed away from its own experts for being more than the images."""
    allowed = [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1]]
    counts = [[3, 1, 0, 0], [0] * 4, [0, 0, 8, 8]]
    assert after(counts, [[0.0] * 4], 0.2, allowed)[0] == pytest.approx([-0.2, 0.2, 0, 0])
    by_modality = after(counts, [[0.0] * 4] * 3, 0.2, allowed)
    assert by_modality[0] == pytest.approx([-0.2, 0.2, 0, 0])
    assert by_modality[2] == pytest.approx([0, 0, 0, 0])
    # Recentring is over the experts in reach, and one out of reach stays at 0: 4, 1, 1 give what they give alone.
    three = after([[4, 1, 1, 0], [0] * 4, [0] * 4], [[0.0] * 4] * 3, 0.3, [[1, 1, 1, 0]] * 3)
    assert three[0] == pytest.approx([-0.4, 0.2, 0.2, 0])


def test_an_expert_that_nobody_could_choose_keeps_its_place() -> None:
    """Without text its experts have no load to follow: they move with the mean alone, as all do."""
    allowed = [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 1]]
    biases = after([[4, 1, 1, 0, 0], [0] * 5, [0] * 5], [[0.0] * 5], 0.5, allowed)[0]
    assert biases == pytest.approx([-0.6, 0.4, 0.4, -0.1, -0.1])


def test_a_router_becomes_even_on_tokens_that_all_prefer_one_expert() -> None:
    config = MoEConfig.model_validate({"router": "sigmoid_top_k", "num_experts": 4, "experts_per_token": 1,
                                       "bias_balancing": {"rate": 0.02}})  # fmt: skip
    router = Router(config, 4, 0, NAMES)
    torch.nn.init.eye_(router.weight)
    x = torch.randn(256, 4, generator=torch.Generator().manual_seed(0)) + torch.tensor([2.0, 0, 0, 0])
    tokens = TokenInfo.of_modalities(torch.arange(256) % 3, NAMES)
    with torch.no_grad():
        before = router(x, tokens).stats.counts_ME.sum(0)
        for _ in range(100):
            router.end_step(router(x, tokens).stats)
        counts = router(x, tokens).stats.counts_ME.sum(0)
    assert before.max() > 0.75 * 256
    # A step of 0.02 in a score moves a few of 256 tokens; 64 each is even.
    assert counts.max() < 1.2 * 64 and counts.min() > 0.8 * 64
