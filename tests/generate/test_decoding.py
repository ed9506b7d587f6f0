"""Decoding on distributions that are known: by enumeration of all texts, and by frequencies."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mmmoe_pretrain.config.evaluate import GenerateConfig
from mmmoe_pretrain.generate.decoding import draw, generate, uniform
from mmmoe_pretrain.generate.growing import Ahead, Generated

VOCAB, END, LONGEST = 4, 0, 4


class Table:
    """A model of tokens whose log probabilities are noise, drawn anew for every sequence of ids."""

    def __init__(self, seeds: list[int], scale: float = 2.0) -> None:
        self.so_far: list[tuple[int, ...]] = [(seed,) for seed in seeds]
        self.scale = scale
        self.logits_SV = self._logits()

    def _logits(self) -> Tensor:
        return torch.stack([self.after(ids) for ids in self.so_far])

    def after(self, ids: tuple[int, ...]) -> Tensor:
        return torch.from_numpy(self.scale * np.random.default_rng(ids).standard_normal(VOCAB))

    def append(self, ids_S: Tensor) -> None:
        self.so_far = [(*ids, token) for ids, token in zip(self.so_far, ids_S.tolist(), strict=True)]
        self.logits_SV = self._logits()

    def select(self, rows_R: Tensor) -> None:
        self.so_far = [self.so_far[row] for row in rows_R.tolist()]
        self.logits_SV = self._logits()


def ahead(seeds: list[int], longest: int = LONGEST) -> Ahead:
    limits = tuple(longest for _ in seeds)
    return Ahead(tuple(f"s{seed}" for seed in seeds), limits, END, torch.ones(VOCAB, dtype=torch.bool))


def decode(seeds: list[int], **settings: object) -> list[Generated]:
    return generate(Table(seeds), ahead(seeds), GenerateConfig.model_validate(settings))


def every_text(seed: int) -> dict[tuple[int, ...], float]:
    """The log probability of every text: tokens that end with the mark, or as many as there may be without it."""
    table, found = Table([seed]), {}
    pieces = [token for token in range(VOCAB) if token != END]
    for length in range(LONGEST + 1):
        for text in itertools.product(pieces, repeat=length):
            ids = text if length == LONGEST else (*text, END)
            terms = [float(table.after((seed, *ids[:i])).log_softmax(-1)[token]) for i, token in enumerate(ids)]
            found[ids] = math.fsum(terms)
    return found


def test_the_texts_have_all_of_the_probability() -> None:
    assert math.isclose(sum(map(math.exp, every_text(5).values())), 1.0, rel_tol=1e-12)


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.5])
def test_a_beam_that_keeps_everything_finds_the_best_of_all_texts(penalty: float) -> None:
    seeds = list(range(6))
    # At most 27 beginnings of three pieces go on, and 1 + 3 + 9 + 27 texts have ended.
    found = decode(seeds, method="beam", beams=64, length_penalty=penalty)
    lengths = set()
    for seed, best in zip(seeds, found, strict=True):
        texts = every_text(seed)
        ids = max(texts, key=lambda its: texts[its] / len(its) ** penalty)
        lengths.add(len(ids))
        assert (*best.ids, *[END] * best.ended) == ids
        assert math.isclose(best.log_probability, texts[ids], rel_tol=1e-9)
    assert len(lengths) > 1


def test_a_wider_beam_finds_texts_that_greedy_decoding_misses() -> None:
    seeds = list(range(16))
    beams = [{"method": "beam", "beams": beams, "length_penalty": 0} for beams in (2, 64)]
    sums = [
        sum(its.log_probability for its in found)
        for found in (decode(seeds), *(decode(seeds, **its) for its in beams))
    ]
    assert sums[0] < sums[1] < sums[2]


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_one_beam_is_greedy(penalty: float) -> None:
    seeds = list(range(20))
    greedy = decode(seeds)
    assert decode(seeds, method="beam", beams=1, length_penalty=penalty) == greedy
    assert {its.ended for its in greedy} == {True, False}
    for seed, its in zip(seeds, greedy, strict=True):  # the most probable token each time
        table, ids = Table([seed]), (*its.ids, *[END] * its.ended)
        rows = [table.after((seed, *ids[:i])).log_softmax(-1) for i in range(len(ids))]
        assert [int(row.argmax()) for row in rows] == list(ids)
        assert math.isclose(its.log_probability, sum(float(row.max()) for row in rows), rel_tol=1e-9)


def test_samples_have_the_frequencies_of_the_texts() -> None:
    seeds, texts, number = [5] * 1000, every_text(5), 1000
    keys = tuple(f"sample {i}" for i in range(number))
    limits, allowed = (LONGEST,) * number, torch.ones(VOCAB, dtype=torch.bool)
    settings = GenerateConfig(method="sample", seed=1)
    found = [
        its.ids + (END,) * its.ended for its in generate(Table(seeds), Ahead(keys, limits, END, allowed), settings)
    ]
    for ids, log_probability in texts.items():
        p = math.exp(log_probability)
        # Five standard deviations of a count over independent draws, and one more for rare texts: of 121 texts one is
        # outside in less than 1 of 10,000 seeds.
        assert abs(found.count(ids) - number * p) <= 5 * math.sqrt(number * p * (1 - p)) + 1, ids


def test_temperature_and_limits_shape_the_distribution() -> None:
    log_p = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64).log()[None]

    def masses(**settings: object) -> list[float]:
        """The share of [0, 1) that gives each token, by 1000 numbers spread evenly."""
        how = GenerateConfig.model_validate({"method": "sample", **settings})
        numbers = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
        drawn = draw(log_p.expand(1000, -1), numbers, how)
        return [float((drawn == token).double().mean()) for token in range(4)]

    assert masses() == pytest.approx([0.1, 0.4, 0.3, 0.2], abs=1e-3)
    assert masses(top_k=2) == pytest.approx([0, 4 / 7, 3 / 7, 0], abs=1e-3)
    assert masses(top_p=0.71) == pytest.approx([0, 4 / 9, 3 / 9, 2 / 9], abs=1e-3)  # 0.7 is less than 0.71
    assert masses(top_p=0.69) == pytest.approx([0, 4 / 7, 3 / 7, 0], abs=1e-3)
    assert masses(top_p=1e-9) == masses(top_k=1) == [0, 1, 0, 0]
    squares = np.array([0.1, 0.4, 0.3, 0.2]) ** 2  # p ** (1 / temperature)
    assert masses(temperature=0.5) == pytest.approx((squares / squares.sum()).tolist(), abs=1e-3)


def test_draws_depend_on_seed_sample_and_token() -> None:
    numbers = {uniform(seed, key, step) for seed in (0, 1) for key in ("a", "b") for step in (0, 1)}
    assert len(numbers) == 8 and all(0 <= number < 1 for number in numbers)
    together = decode([3, 4, 5], method="sample", seed=9)
    assert together == [decode([seed], method="sample", seed=9)[0] for seed in (3, 4, 5)]
    assert together != decode([3, 4, 5], method="sample", seed=10)


def test_tokens_that_are_not_allowed_have_no_probability() -> None:
    only_one = Ahead(("a",), (LONGEST,), END, torch.tensor([True, False, True, False]))
    for settings in (GenerateConfig(), GenerateConfig(method="sample"), GenerateConfig(method="beam")):
        found = [generate(Table([seed]), only_one, settings)[0] for seed in range(20)]
        assert {token for its in found for token in its.ids} == {2}


def test_a_setting_of_another_method_is_refused() -> None:
    with pytest.raises(ValueError, match="temperature is of method sample, and this is greedy"):
        GenerateConfig(temperature=0.5)
