"""Top-activating tokens of an expert: the most probable, of distinct content first, however batched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from mmmoe_pretrain.batch import Item, Sample, SampleMeta
from mmmoe_pretrain.config.base import StreamNames
from mmmoe_pretrain.data.pack import Origins, origins, pack
from mmmoe_pretrain.evaluate.routing.top_tokens import Decisions, TopTokens, watch
from mmmoe_pretrain.models.pretraining import PretrainingModel
from mmmoe_pretrain.moe.tokens import TokenInfo
from tests.support import objectives, pack_settings, random_batch, random_sample, tiny_config

NAMES = StreamNames(("image", "text"), ("pairs",))


def text_sample(key: str, text: str) -> Sample:
    return Sample(SampleMeta(key), (Item("text", np.array([1, 4, 5, 2]), text),))


def add(search: TopTokens, samples: list[Sample], tokens: list[tuple[int, int, float]], served: str = "") -> None:
    """Text tokens (sample, place, probability of expert 0 of 2); ``served``: a letter n where it is not."""
    p = np.array([[token[2], 1 - token[2]] for token in tokens])
    served_nE = np.array([[flag != "n", True] for flag in served or "y" * len(tokens)])
    sample_n, place_n = (np.array([token[i] for token in tokens]) for i in (0, 1))
    of_text = TokenInfo.of_modalities(torch.full((len(tokens),), NAMES.modalities.index("text")), NAMES)
    found = Origins(sample_n, np.zeros_like(sample_n), place_n)
    search.add([Decisions(1, np.log(p), served_nE)], of_text, found, samples)


def listed(search: TopTokens, expert: int = 0) -> list[tuple[str, int]]:
    return [(token.sample.meta.key, token.token) for token in search.of(1, expert).get("text", [])]


A, B, TWIN = text_sample("a", "apple"), text_sample("b", "bear"), text_sample("a2", "Apple ")


def test_one_token_of_each_text_comes_before_a_second_of_the_best() -> None:
    search = TopTokens(top=2)
    add(search, [A, B], [(0, 0, 0.9), (0, 1, 0.8), (1, 0, 0.1)])
    assert listed(search) == [("a", 0), ("b", 0)]


def test_with_too_few_texts_further_places_fill_up() -> None:
    search = TopTokens(top=3)
    add(search, [A, B], [(1, 2, 0.1), (0, 0, 0.9), (0, 1, 0.8), (0, 2, 0.7), (0, 1, 0.85)])
    # Place 1 of a stands twice in the stream and is one token.
    assert listed(search) == [("a", 0), ("a", 1), ("b", 2)]


def test_equal_texts_count_as_one() -> None:
    search = TopTokens(top=2)
    add(search, [A, TWIN, B], [(0, 1, 0.9), (1, 1, 0.8), (2, 1, 0.1)])
    assert listed(search) == [("a", 1), ("b", 1)]


def test_a_token_that_the_expert_did_not_serve_is_not_listed() -> None:
    search = TopTokens(top=2)
    add(search, [A, B], [(0, 0, 0.9), (1, 0, 0.2)], served="ny")
    assert listed(search) == [("b", 0)]
    search = TopTokens(top=2)
    add(search, [A], [(0, 0, 0.9)], served="n")
    assert search.of(1, 0) == {}


def test_a_token_of_a_view_is_of_no_place_and_not_listed(tmp_path: Path) -> None:
    """A report would show what the item has there."""
    views = {"short": {"kind": "view", "parts": ["audio"], "transforms": ["crop"]}}
    tasks = {"pairs": {"kind": "contrastive", "pairs": {"short-audio": 1.0}},
             "masked": {"kind": "masked", "hidden": {"audio": 0.5}}}  # fmt: skip
    config = tiny_config(tmp_path, objectives=tasks, representations=views)
    settings, samples = pack_settings(config), [random_sample(0, "a", config)]
    count = settings.modalities["audio"].num_tokens(samples[0].items[0].value)
    batch, found = pack(samples, settings), origins(samples, settings)
    lengths = batch.attention.lengths
    assert len(lengths) == 3 and lengths.count(count) >= 2
    assert found.token_n.tolist() == [*range(count), *[-1] * lengths[1], *range(count)]
    search = TopTokens(top=2)
    add(search, [A], [(0, -1, 0.9), (0, 1, 0.1)])
    assert listed(search) == [("a", 1)]


def test_batches_change_nothing() -> None:
    """Random tokens of few texts, so that texts recur in other batches; distinct probabilities."""
    rng = np.random.default_rng(3)
    samples = [text_sample(f"s{i}", f"text {i % 5}") for i in range(12)]
    tokens = [(int(rng.integers(12)), int(rng.integers(3)), float(p)) for p in (1 + rng.permutation(60)) / 61]
    whole, parts = TopTokens(top=8), TopTokens(top=8)
    add(whole, samples, tokens)
    for start in range(0, 60, 7):
        add(parts, samples, tokens[start : start + 7])
    assert listed(whole) == listed(parts)
    assert listed(whole, expert=1) == listed(parts, expert=1)
    assert len({int(key[1:]) % 5 for key, _ in listed(whole)}) == 5


def test_tokens_are_traced_to_their_items_whatever_the_samples_lack(tmp_path: Path) -> None:
    """Of pooled segments, and of captions behind an image or audio, which one is drawn by position."""
    config = tiny_config(tmp_path, objectives=objectives(captioning={"fraction": 1.0}))
    settings, positions = pack_settings(config), range(7, 12)
    samples = [random_sample(i, has, config) for i, has in enumerate(["a", "t", "it", "iat", "at"])]
    batch = pack(samples, settings, positions)
    found = origins(samples, settings, positions)
    sizes = [[settings.modalities[i.modality].num_tokens(i.value) for i in sample.items] for sample in samples]
    runs = [(b, i, size) for b, of_sample in enumerate(sizes) for i, size in enumerate(of_sample)]
    captioned = batch.segment_ids == int(batch.segment_ids.max()) - 1  # of sample 3, which has both
    behind = list(config.modalities).index("image") != int(batch.modality_ids[captioned][0])
    for b, prefix in ((2, 0), (3, int(behind)), (4, 0)):
        runs += [(b, prefix, sizes[b][prefix]), (b, len(sizes[b]) - 1, sizes[b][-1] - 1)]  # without the end mark
    expected = [(b, i, token) for b, i, size in runs for token in range(size)]
    of_tokens = (its.tolist() for its in (found.sample_n, found.item_n, found.token_n))
    assert list(zip(*of_tokens, strict=True)) == expected
    assert batch.num_valid == len(expected)


def test_tokens_of_a_document_are_traced_to_its_parts(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, objectives={"text": {"kind": "next_token"}})
    parts = [item for seed in (1, 2) for item in random_sample(seed, "it", config).items]
    document = Sample(SampleMeta("d"), tuple(parts), document=True)
    found = origins([document], pack_settings(config))
    lengths = [4, len(parts[1].value) - 1, 4, len(parts[3].value) - 1]  # end marks are targets alone
    assert found.item_n.tolist() == [i for i, length in enumerate(lengths) for _ in range(length)]
    assert found.token_n.tolist() == [token for length in lengths for token in range(length)]


def test_watching_changes_no_output_and_leaves_no_hook(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, moe={"num_experts": 4, "expert_hidden_size": 8, "every": 1})
    model = PretrainingModel(config).mmmoe.eval()
    batch = random_batch(config, ["iat", "it"])
    with torch.inference_mode():
        before, _ = model(batch)
        with watch(model) as decisions:
            during, routing = model(batch)
        model(batch)
    assert [layer.layer for layer in decisions] == [0, 1]  # and none of the pass after
    assert before.features.keys() == {"image", "audio", "text"}
    for modality, features in before.features.items():
        assert torch.equal(features, during.features[modality])
    for layer, stats in zip(decisions, routing, strict=True):
        assert layer.served_nE.sum(1).tolist() == [2] * len(layer.served_nE)  # dropless, two a token
        np.testing.assert_array_equal(layer.served_nE.sum(0), stats.counts_ME.sum(0).numpy())
        np.testing.assert_allclose(np.exp(layer.log_p_nE).sum(1), 1.0, rtol=1e-5)
