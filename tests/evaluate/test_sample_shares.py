"""Concepts, consistency and stability of experts, with values by hand and from another library."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_mutual_info_score

from mmmoe_pretrain.batch import Item, Sample, SampleMeta
from mmmoe_pretrain.checkpoint.model import SavedRun
from mmmoe_pretrain.checkpoint.store import Checkpoint
from mmmoe_pretrain.config.base import StreamNames
from mmmoe_pretrain.data.pack import Origins
from mmmoe_pretrain.evaluate.routing import stability
from mmmoe_pretrain.evaluate.routing.sample_shares import (
    PRIOR,
    SampleShares,
    concepts,
    consistency,
    divergence,
    log_odds,
    most_samples,
    summarise,
    view_of,
)
from mmmoe_pretrain.evaluate.routing.top_tokens import Decisions
from mmmoe_pretrain.modalities import build_modalities
from mmmoe_pretrain.moe.tokens import TokenInfo
from tests.support import random_sample, tiny_config

DRAWN = {"objectives": {"drawn": {"kind": "next_token", "parts": ["image"]}}}
NAMES = StreamNames(("image", "text"), ("pairs",))


def test_log_odds_by_the_formulas_of_the_paper() -> None:
    """Of 10 words with expert 0, 6 are a; of 10 with expert 1, 2. The prior has a in 8 of 20."""
    z_WE = log_odds(np.array([[6.0, 2.0], [4.0, 8.0]]))
    of_a, of_b = PRIOR * 8 / 20, PRIOR * 12 / 20
    odds = math.log((6 + of_a) / (10 + PRIOR - 6 - of_a)) - math.log((2 + of_a) / (10 + PRIOR - 2 - of_a))
    spread = math.sqrt(1 / (6 + of_a) + 1 / (2 + of_a))
    assert z_WE[0, 0] == pytest.approx(odds / spread)
    assert z_WE[0, 1] == pytest.approx(-odds / spread)
    other = math.log((8 + of_b) / (2 + of_a)) - math.log((4 + of_b) / (6 + of_a))
    assert z_WE[1, 1] == pytest.approx(other / math.sqrt(1 / (8 + of_b) + 1 / (4 + of_b)))


def test_an_expert_of_dogs_says_dog_and_rare_words_say_nothing() -> None:
    words = [{"a", "dog"}] * 40 + [{"a", "cat"}] * 40 + [{"a", "yak"}]
    share_SE = np.array([[0.9, 0.1]] * 40 + [[0.1, 0.9]] * 40 + [[1.0, 0.0]])
    found = concepts(share_SE, words)
    assert [[word for word, _ in of] for of in found] == [["dog"], ["cat"]]
    assert concepts(np.zeros((1, 2)), [set()]) == [[], []]


def test_divergence_is_0_of_equal_shares_and_1_bit_of_experts_apart() -> None:
    a_PE = np.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    b_PE = np.array([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0], [0.5, 0.5, 0.0]])
    # The last: H(3/4, 1/4) - H(1/2, 1/2) / 2 = 0.8113 - 0.5.
    np.testing.assert_allclose(divergence(a_PE, b_PE), [0, 1, 0.31127812], atol=1e-8)
    found = consistency(a_PE, b_PE, a_PE[[1, 2, 0]])
    assert found is not None and found["pairs"] == 3
    assert found["divergence"] == pytest.approx((0 + 1 + 0.31127812) / 3)
    assert found["same_expert"] == pytest.approx(2 / 3) and found["same_expert_unlike"] == 1
    assert consistency(a_PE[:1], b_PE[:1], a_PE[:1]) is None


def named(key: str, pixel: int, text: str, label: str = "") -> Sample:
    image, ids = np.full((1, 2, 2), pixel, np.uint8), np.array([1, 4, 2])
    return Sample(SampleMeta(key, label=label), (Item("image", image), Item("text", ids, text)))


def collected(samples: list[Sample], text_experts: list[int]) -> SampleShares:
    """Two tokens a sample: of its image, always of expert 0, and of its text, of the given one."""
    shares, count = SampleShares(), len(samples)
    served = np.eye(3, dtype=bool)[[e for expert in text_experts for e in (0, expert)]]
    tokens = TokenInfo.of_modalities(torch.tensor([0, 1] * count), NAMES)
    where = Origins(np.arange(count).repeat(2), np.tile([0, 1], count), np.zeros(2 * count, dtype=np.int64))
    shares.add([Decisions(1, np.zeros((2 * count, 3)), served)], tokens, where, samples)
    return shares


def test_names_of_one_image_are_paraphrases_and_are_compared_with_names_of_others() -> None:
    """Three images with two names each: both names of the first two go to one expert, those of the third do not."""
    samples = [named(f"{n}", n // 2, f"name {n}") for n in range(6)]
    own, views = collected(samples, [1, 1, 2, 2, 1, 2]), collected(samples[:4], [1, 1, 2, 0])
    found = summarise(own, views, 1, ["image", "text"])["consistency"]
    assert set(found["paraphrases"]) == {"text"}
    text = found["paraphrases"]["text"]
    # Pairs: experts (1, 1), (2, 2), (1, 2). Half of three is one: beside them are (1, 2), (2, 1), (1, 2).
    assert (text["pairs"], text["same_expert"], text["same_expert_unlike"]) == (3, pytest.approx(2 / 3), 0)
    assert text["divergence"] == pytest.approx(1 / 3) and text["divergence_unlike"] == 1
    # Of the first four samples, the view of the last goes elsewhere.
    assert found["views"]["text"]["same_expert"] == 0.75 and found["views"]["image"]["divergence"] == 0


def test_fewer_samples_are_looked_at_where_there_are_very_many_experts() -> None:
    assert most_samples(4 * 16 * 3) == 4096
    assert most_samples(64 * 256 * 3) == (1 << 26) // (64 * 256 * 3)


def test_a_view_changes_every_item_in_the_same_way_each_time(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    sample, modalities = random_sample(3, "iat", config), build_modalities(config.modalities, decoding=False)
    one, same = (view_of(sample, modalities, 7) for _ in range(2))
    for item, again, whole in zip(one.items, same.items, sample.items, strict=True):
        assert np.array_equal(item.value, again.value) and item.raw == whole.raw
    image, whole = one.items[0].value, sample.items[0].value
    assert image.shape == whole.shape and not np.array_equal(image, whole)
    assert one.items[1].value.shape[1] <= sample.items[1].value.shape[1]


@pytest.mark.parametrize("parts", [(2, 3), (4, 4), (5, 1)])
def test_agreement_of_partitions_is_scikit_learns(parts: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    own = rng.integers(0, parts[0], 60)
    other = np.where(rng.random(60) < 0.5, own % parts[1], rng.integers(0, parts[1], 60))
    table = np.zeros((parts[0] + 1, parts[1]), dtype=np.int64)  # the last expert of the first run has no token
    np.add.at(table, (own, other), 1)
    expected = adjusted_mutual_info_score(own, other)
    assert stability.adjusted_mutual_information(table) == pytest.approx(expected, abs=1e-9)


def test_renumbered_experts_agree_and_independent_ones_do_not() -> None:
    assert stability.adjusted_mutual_information(np.array([[0, 30, 0], [20, 0, 0], [0, 0, 10]])) == pytest.approx(1)
    assert stability.adjusted_mutual_information(np.full((3, 3), 100)) == pytest.approx(0, abs=0.01)
    assert stability.adjusted_mutual_information(np.array([[7]])) == 1


def test_only_runs_of_the_same_tokens_are_compared(tmp_path: Path) -> None:
    """Each run has its own copy of a tokenizer of codes, under its own path."""

    def saved(meta: str = "a", codes: str = "own/codes.npz", fingerprint: str = "c", **changed: object) -> SavedRun:
        settings = {"kind": "image_codes", "tokenizer": codes, "codes": 12, "max_tokens": 4,
                    "fingerprint": fingerprint}  # fmt: skip
        config = tiny_config(
            tmp_path, modalities={"image": settings, "text": {"kind": "text"}}, **{**DRAWN, **changed}
        )
        return SavedRun(config, Checkpoint("", "", 0), {"tokenizer_fingerprint": meta})

    def refused(message: str, other: SavedRun) -> None:
        with pytest.raises(ValueError, match=message):
            stability.check_same_tokens(saved(), other, "other")

    stability.check_same_tokens(saved(), saved(codes="other/codes.npz", seed=5), "other")
    refused("its modalities are not", saved(fingerprint="d"))
    refused("its tokenizer is not", saved(meta="b"))
    refused(
        "its objectives are not",
        saved(objectives={**DRAWN["objectives"], "read": {"kind": "next_token", "parts": ["text"]}}),
    )
    refused("dense model", saved(moe={"num_experts": 1, "experts_per_token": 1}))
