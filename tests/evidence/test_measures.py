"""Measures of routing, by hand."""

from __future__ import annotations

import pytest

from evidence.measures import Routing, measure

EVEN, ONE, PAIR = [0.25] * 4, [1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]


def routing(*layers: dict[str, list[float]], dropped: tuple[dict[str, float | None], ...] = ()) -> Routing:
    return Routing([0.2, 0.4], [1.0, 4.0], layers, dropped)


def test_experts_used_is_of_the_modality_that_uses_fewest() -> None:
    # image: 1 and 2 experts in the two layers; text: 4 and 4
    found = measure("routing/experts_used", routing({"image": ONE, "text": EVEN}, {"image": PAIR, "text": EVEN}))
    assert found == pytest.approx(1.5)


def test_an_expert_is_dead_that_no_modality_uses() -> None:
    # layer 1: experts 2 and 3; layer 2: none
    assert measure("routing/dead", routing({"image": ONE, "text": PAIR}, {"image": ONE, "text": EVEN})) == 0.25
    # 1% of an even share of 4 experts is 0.0025
    rarely = [0.5, 0.497, 0.003, 0.0]
    assert measure("routing/dead", routing({"image": rarely})) == 0.25


def test_modalities_without_tokens_do_not_count() -> None:
    for absent in (0.0, None):
        found = Routing([0.0], [1.0], [{"image": EVEN, "audio": [absent] * 4}], [{"image": 0.5, "audio": None}])
        assert measure("routing/experts_used", found) == pytest.approx(4)
        assert measure("routing/dead", found) == 0
        assert measure("routing/dropped/image", found) == 0.5
        assert measure("routing/dropped/audio", found) is None


def test_means_and_maxima_are_over_layers() -> None:
    of = routing({"image": EVEN}, {"image": EVEN}, dropped=({"image": 0.25}, {"image": 0.75}))
    assert measure("routing/specialisation", of) == pytest.approx(0.3)
    assert measure("routing/largest_load", of) == 4
    assert measure("routing/dropped/image", of) == 0.5


def test_a_dense_model_has_no_measures_and_unknown_names_are_refused() -> None:
    assert measure("routing/specialisation", Routing([], [], [], [])) is None
    with pytest.raises(ValueError, match=r"no measure 'routing/balance'.*routing/dead"):
        measure("routing/balance", routing({"image": EVEN}))
