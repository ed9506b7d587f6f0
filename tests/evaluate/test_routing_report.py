"""Specialisation, experts used and dead experts by hand; the figure."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmmoe_pretrain.config.base import StreamNames
from mmmoe_pretrain.evaluate.figures import expert_order, shares
from mmmoe_pretrain.evaluate.routing_report import (
    dead_experts,
    strongest_pairs,
    summarise_layer,
    summarise_tasks,
)
from mmmoe_pretrain.moe.stats import RoutingStats

NAMES = StreamNames(("image", "audio", "text"), ("pairs", "captions"))


def summary(counts: list[list[float]]) -> dict[str, Any]:
    return summarise_layer(totals(counts), totals([[1] * len(counts[0])] * 3))


def totals(counts: list[list[float]]) -> RoutingStats:
    """Of one task; two experts a token."""
    counts_MXE = torch.tensor(counts)[:, None].double()
    tokens_MX = counts_MXE.sum(-1) / 2
    nothing = torch.zeros(())
    return RoutingStats(
        probability_MXE=counts_MXE / 2, entropy_MX=tokens_MX * math.log(2), z_MX=nothing, counts_MXE=counts_MXE,
        tokens_MX=tokens_MX, dropped_MX=tokens_MX / 5, load_ME=nothing, sequence_balance=nothing,
        combination_C3=nothing, coactivation_MEE=nothing, orthogonality=nothing, names=NAMES, layer=1,
        allowed_ME=torch.ones(3, counts_MXE.shape[-1]).bool(),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("counts", "score", "used"),
    [
        # Counts differ a hundredfold between modalities: the score does not see it.
        ([[1000, 1000, 0, 0], [0, 0, 10, 0], [0, 0, 0, 30]], 1.0, {"image": 2.0, "audio": 1.0, "text": 1.0}),
        ([[6, 6, 6], [60, 60, 60], [1, 1, 1]], 0.0, {"image": 3.0, "audio": 3.0, "text": 3.0}),
        ([[4, 0], [0, 0], [0, 4]], 1.0, {"image": 1.0, "text": 1.0}),  # an absent modality is left out
        # p(e|image) = (1/2, 1/2, 0), p(e|text) = (0, 1/2, 1/2): H(E) = 1.5 bits, H(E|M) = 1 bit, H(M) = 1 bit.
        ([[2, 2, 0], [0, 0, 0], [0, 2, 2]], 0.5, {"image": 2.0, "text": 2.0}),
        ([[2, 2], [0, 0], [0, 0]], 0.0, {"image": 2.0}),  # one modality alone
    ],
)
def test_specialisation_and_experts_used_by_hand(
    counts: list[list[float]], score: float, used: dict[str, float]
) -> None:
    layer = summary(counts)
    bits = math.log2(len(used))
    assert layer["specialisation"] == pytest.approx(score, abs=1e-12)
    assert (layer["specialisation_bits"], layer["modality_bits"]) == pytest.approx((score * bits, bits), abs=1e-12)
    assert layer["experts_used"] == pytest.approx(used)
    assert layer["share"].keys() == used.keys()


def test_expert_that_one_modality_needs_is_not_dead() -> None:
    share = np.array([[0.5, 0.5, 0.0, 0.0], [0.499, 0.0, 0.5, 0.001]])
    assert dead_experts(share) == [3]  # 0.001 < 0.01 / 4


def test_rates_are_of_tokens_and_of_assignments() -> None:
    layer = summarise_layer(totals([[10, 10], [0, 0], [5, 5]]), totals([[7, 0], [0, 0], [0, 7]]))
    assert (layer["specialisation"], layer["specialisation_untrained"]) == pytest.approx((0.0, 1.0), abs=1e-12)
    assert layer["entropy_bits"] == pytest.approx({"image": 1.0, "text": 1.0})
    assert layer["dropped"] == pytest.approx({"image": 0.1, "text": 0.1})
    assert layer["tokens"] == {"image": 10.0, "text": 5.0}


def test_tasks_are_scored_one_by_one_and_against_each_other() -> None:
    counts = np.zeros((3, 2, 2))
    counts[0] = [[8, 0], [0, 2]]  # image: pairs to expert 0, captions to expert 1
    counts[2] = [[0, 4], [0, 9]]  # text: expert 1 whatever the task
    found = summarise_tasks(counts, NAMES)
    assert found["share_by_task"] == {"pairs": pytest.approx([8 / 12, 4 / 12]), "captions": pytest.approx([0, 1])}
    # Tokens of pairs: the expert tells image from text. Those of captions: all go to expert 1.
    assert found["specialisation_by_task"] == pytest.approx({"pairs": 1.0, "captions": 0.0})
    assert found["task_specialisation"] == pytest.approx({"image": 1.0, "text": 0.0})


def test_a_single_task_has_nothing_to_tell_tasks_apart() -> None:
    counts = np.zeros((3, 2, 2))
    counts[:, 0] = [[1, 1], [0, 2], [2, 0]]
    found = summarise_tasks(counts, NAMES)
    assert found["task_specialisation"] == {}
    assert set(found["specialisation_by_task"]) == {"pairs"}


def test_pairs_are_sorted_by_the_tokens_that_both_served() -> None:
    together = np.array([[9.0, 2, 0], [2, 9, 5], [0, 5, 9]])  # the diagonal is not a pair
    assert strongest_pairs(together, tokens=10, limit=8) == [(1, 2, 0.5), (0, 1, 0.2)]
    assert strongest_pairs(together, tokens=10, limit=1) == [(1, 2, 0.5)]


def test_experts_are_sorted_by_the_modality_that_uses_them_most() -> None:
    share = np.array([[0.1, 0.6, 0.3], [0.8, 0.1, 0.1]])
    assert expert_order(share) == [1, 2, 0]


def test_no_figure_of_one_expert(tmp_path: Path) -> None:
    assert not shares([summary([[6], [1], [2]])], NAMES.modalities, tmp_path / "dense.png")
    assert not (tmp_path / "dense.png").exists()
