"""Which tokens an expert likes best: the most probable, of distinct content first, however batched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from mmmoe_pretrain.batch import MODALITIES, Sample, SampleMeta
from mmmoe_pretrain.evaluate.routing.favourites import FavouriteSearch
from mmmoe_pretrain.evaluate.routing.record import Decisions, Origins, origins, watch
from mmmoe_pretrain.models.pretraining import PretrainingModel
from tests.support import random_batch, tiny_config


def text_sample(key: str, text: str) -> Sample:
    return Sample(SampleMeta(key), text=np.array([4, 5]), raw_text=text)


def add(
    search: FavouriteSearch, samples: list[Sample], tokens: list[tuple[int, int, float]], served: str = ""
) -> None:
    """Text tokens (sample, place, probability of expert 0 of 2); ``served``: a letter n where it is not."""
    p = np.array([[token[2], 1 - token[2]] for token in tokens])
    served_nE = np.array([[flag != "n", True] for flag in served or "y" * len(tokens)])
    sample_n, place_n = (np.array([token[i] for token in tokens]) for i in (0, 1))
    found = Origins(sample_n, place_n, np.full(len(tokens), MODALITIES.index("text")))
    search.add([Decisions(1, np.log(p), served_nE)], found, np.zeros(len(tokens), dtype=int), samples)


def listed(search: FavouriteSearch, expert: int = 0) -> list[tuple[str, int]]:
    return [(token.sample.meta.key, token.place) for token in search.of(1, expert).get("text", [])]


A, B, TWIN = text_sample("a", "apple"), text_sample("b", "bear"), text_sample("a2", "Apple ")


def test_one_token_of_each_text_comes_before_a_second_of_the_best() -> None:
    search = FavouriteSearch(top=2)
    add(search, [A, B], [(0, 0, 0.9), (0, 1, 0.8), (1, 0, 0.1)])
    assert listed(search) == [("a", 0), ("b", 0)]


def test_with_too_few_texts_further_places_fill_up() -> None:
    search = FavouriteSearch(top=3)
    add(search, [A, B], [(1, 2, 0.1), (0, 0, 0.9), (0, 1, 0.8), (0, 2, 0.7), (0, 1, 0.85)])
    # Place 1 of a stands twice in the stream and is one token.
    assert listed(search) == [("a", 0), ("a", 1), ("b", 2)]


def test_equal_texts_count_as_one() -> None:
    search = FavouriteSearch(top=2)
    add(search, [A, TWIN, B], [(0, 1, 0.9), (1, 1, 0.8), (2, 1, 0.1)])
    assert listed(search) == [("a", 1), ("b", 1)]


def test_a_token_that_the_expert_did_not_serve_is_none_of_its_favourites() -> None:
    search = FavouriteSearch(top=2)
    add(search, [A, B], [(0, 0, 0.9), (1, 0, 0.2)], served="ny")
    assert listed(search) == [("b", 0)]
    search = FavouriteSearch(top=2)
    add(search, [A], [(0, 0, 0.9)], served="n")
    assert search.of(1, 0) == {}


def test_batches_change_nothing() -> None:
    """Random tokens of few texts, so that texts recur in other batches; distinct probabilities."""
    rng = np.random.default_rng(3)
    samples = [text_sample(f"s{i}", f"text {i % 5}") for i in range(12)]
    tokens = [(int(rng.integers(12)), int(rng.integers(3)), float(p)) for p in (1 + rng.permutation(60)) / 61]
    whole, parts = FavouriteSearch(top=8), FavouriteSearch(top=8)
    add(whole, samples, tokens)
    for start in range(0, 60, 7):
        add(parts, samples, tokens[start : start + 7])
    assert listed(whole) == listed(parts)
    assert listed(whole, expert=1) == listed(parts, expert=1)
    assert len({int(key[1:]) % 5 for key, _ in listed(whole)}) == 5


def test_tokens_are_traced_to_their_samples_whatever_these_lack(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, objectives={"captioning": {"weight": 1.0, "fraction": 1.0}})
    batch = random_batch(config, ["a", "t", "it", "iat", "at"])
    found = origins(batch, config.modalities)
    # Runs in the order of the stream, from the batch's own inputs: (modality, sample, length).
    frames, image = batch.audio_frames.tolist(), config.modalities.image.num_tokens
    sound = [-(-n // config.modalities.audio.patch) for n in frames]
    words = [
        int((batch.segment_ids == s).sum()) for s in range(len(batch.pool_sample)) if batch.pool_modality[s] == 2
    ]
    runs = [("audio", 0, sound[0]), ("text", 1, words[0]), ("image", 2, image), ("text", 2, words[1]),
            ("image", 3, image), ("audio", 3, sound[1]), ("text", 3, words[2]),
            ("audio", 4, sound[2]), ("text", 4, words[3])]  # fmt: skip
    prefix = MODALITIES[int(batch.modality_ids[(batch.segment_ids == 10)][0])]  # of sample 3, which has both
    runs += [("image", 2, image), ("text", 2, words[1] - 1)]  # a caption has no end mark
    runs += [(prefix, 3, image if prefix == "image" else sound[1]), ("text", 3, words[2] - 1)]
    runs += [("audio", 4, sound[2]), ("text", 4, words[3] - 1)]
    expected = [(m, sample, place) for m, sample, length in runs for place in range(length)]
    names = [MODALITIES[m] for m in found.modality_n]
    assert list(zip(names, found.sample_n.tolist(), found.place_n.tolist(), strict=True)) == expected


def test_watching_changes_no_output_and_leaves_no_hook(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, moe={"num_experts": 4, "expert_hidden_size": 8, "every": 1})
    model = PretrainingModel(config, 48).mmmoe.eval()
    batch = random_batch(config, ["iat", "it"])
    with torch.inference_mode():
        before = model(batch)
        with watch(model) as decisions:
            during = model(batch)
        model(batch)
    assert [layer.layer for layer in decisions] == [0, 1]  # and none of the pass after
    for modality in MODALITIES:
        assert torch.equal(before.features[modality], during.features[modality])
    for layer, stats in zip(decisions, during.routing, strict=True):
        assert layer.served_nE.sum(1).tolist() == [2] * len(layer.served_nE)  # dropless, two a token
        np.testing.assert_array_equal(layer.served_nE.sum(0), stats.counts_ME.sum(0).numpy())
        np.testing.assert_allclose(np.exp(layer.log_p_nE).sum(1), 1.0, rtol=1e-5)
