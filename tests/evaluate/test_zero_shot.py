"""Class accuracy, plain and balanced, by hand."""

import numpy as np
import pytest

from mmmoe_pretrain.evaluate.zero_shot import class_texts, classify


def test_balanced_accuracy_is_the_mean_recall_of_the_classes() -> None:
    # Class 0: 3 of 4 right; class 1: 0 of 1 right; class 2: 1 of 1 right.
    predicted, labels = [0, 0, 0, 2, 0, 2], np.array([0, 0, 0, 0, 1, 2])
    result = classify(np.eye(3)[predicted], labels)
    assert result.accuracy == pytest.approx(4 / 6)
    assert result.balanced == pytest.approx((3 / 4 + 0 + 1) / 3)
    assert result.majority == pytest.approx(4 / 6)
    assert result.chance == pytest.approx(1 / 3)
    assert result.counts == (4, 1, 1)


def test_constant_answer_gets_majority_plain_and_chance_balanced() -> None:
    result = classify(np.tile([1.0, 0.0], (4, 1)), np.array([0, 0, 0, 1]))
    assert result.accuracy == result.majority == 0.75
    assert result.balanced == result.chance == 0.5


def test_tie_between_classes_is_shared() -> None:
    result = classify(np.zeros((2, 4)), np.array([0, 3]))
    assert result.accuracy == result.chance == 0.25


def test_absent_class_stays_a_candidate_but_has_no_recall() -> None:
    result = classify(np.eye(3)[[0, 1]], np.array([0, 1]))
    assert result.balanced == 1.0
    assert result.chance == pytest.approx(1 / 3)


def test_prompt_without_a_place_for_the_class_is_refused() -> None:
    assert class_texts("a picture of {}", ["cat"]) == ["a picture of cat"]
    with pytest.raises(ValueError, match=r"evaluate\.prompt"):
        class_texts("a picture", ["cat"])
