"""Error rates of generated texts: by hand, and by the definition of the edit distance."""

from __future__ import annotations

import functools
import random

import pytest

from mmmoe_pretrain.config import EvaluateConfig
from mmmoe_pretrain.evaluate.generation import Errors, edit_distance, errors_of, scores


def by_definition(a: str, b: str) -> int:
    """The least number of edits, by recursion over the beginnings of both."""

    @functools.cache
    def of(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        return min(of(i - 1, j) + 1, of(i, j - 1) + 1, of(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    return of(len(a), len(b))


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("abc", "", 3), ("", "abc", 3), ("kitten", "sitting", 3), ("abc", "abc", 0), ("ab", "ba", 2)],
)
def test_the_edit_distance_of_known_pairs(a: str, b: str, distance: int) -> None:
    assert edit_distance(a, b) == distance


def test_the_edit_distance_is_that_of_its_definition() -> None:
    rng = random.Random(0)
    for _ in range(200):
        a, b = ("".join(rng.choices("abc", k=rng.randrange(9))) for _ in range(2))
        assert edit_distance(a, b) == by_definition(a, b)


def test_words_and_characters_are_counted_without_case_and_spacing() -> None:
    # "the" for "a", "cat" missing, "now" too much; of 4 words. The ligature is two letters in NFKC.
    its = errors_of("The  sat down now", "a cat sat down")
    assert its.words == (3, 4) and not its.exact
    assert errors_of("A  \ufb01sh", "a Fish") == Errors((0, 2), (0, 6), "a fish", True, "unknown")
    assert errors_of("", "a cat").words == (2, 2) and errors_of("", "a cat").characters == (5, 5)


def test_rates_are_of_sums_so_a_long_text_counts_more() -> None:
    errors = [errors_of("x", "a b c d e f g h", "de"), errors_of("a b", "a b", "de"), errors_of("a b", "a b", "fr"),
              errors_of("c", "d", "fr"), errors_of("c", "c", "nl")]  # fmt: skip
    settings = EvaluateConfig(within="language", min_items=2)
    found = {score.metric: score for score in scores("speech", errors, settings)}
    assert found["speech_wer"].value == pytest.approx(9 / 14) and found["speech_wer"].n == 14
    assert found["speech_wer/de"].value == pytest.approx(8 / 10)
    assert found["speech_wer/fr"].value == pytest.approx(1 / 3)
    # 15 characters of which 15 are wrong (an x, and 14 are missing), 3 and 3 right, 1 wrong, 1 right.
    assert found["speech_cer"].value == pytest.approx(16 / 23)
    assert found["speech_exact"].value == 3 / 5 and found["speech_exact"].majority == 2 / 5
    assert "speech_wer/nl" not in found  # one sample
    low, high = found["speech_wer"].interval
    assert 0 <= low < 9 / 14 < high
