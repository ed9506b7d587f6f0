"""Recall at k and class accuracy: expected values by hand, chance against a simulation."""

import numpy as np
import pytest

from mmmoe_pretrain.evaluate.retrieval import (
    effective_count,
    hit_probability,
    nearest_class,
    pose,
    recall_at,
    wilson_interval,
)


def test_recall_counts_queries_whose_match_is_among_the_first_k() -> None:
    similarity = np.array([[0.9, 0.1, 0.2], [0.8, 0.5, 0.6], [0.1, 0.2, 0.3]])
    relevance = np.eye(3, dtype=bool)  # ranks of the matches: 1, 3, 1
    assert recall_at(1, similarity, relevance).value == pytest.approx(2 / 3)
    assert recall_at(2, similarity, relevance).value == pytest.approx(2 / 3)
    assert recall_at(3, similarity, relevance).value == 1.0


def test_any_relevant_candidate_counts() -> None:
    relevance = np.array([[True, False, True, False]])
    assert recall_at(1, np.array([[0.1, 0.8, 0.9, 0.2]]), relevance).value == 1.0
    result = recall_at(2, np.array([[0.1, 0.8, 0.7, 0.9]]), relevance)
    assert result.value == 0.0
    assert result.chance == pytest.approx(1 - (2 / 4) * (1 / 3))  # both picks among the 2 others


def test_tie_earns_the_probability_of_a_random_order() -> None:
    # One candidate above; the match ties with two others: places 2, 3, 4 are equally likely.
    similarity, relevance = np.array([[0.9, 0.5, 0.5, 0.5, 0.1]]), np.array([[0, 1, 0, 0, 0]], dtype=bool)
    values = [recall_at(k, similarity, relevance).value for k in (1, 2, 3, 4)]
    assert values == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_equal_scores_everywhere_give_exactly_chance() -> None:
    relevance = np.zeros((3, 7), dtype=bool)
    relevance[0, :1] = relevance[1, 2:4] = relevance[2, 1:6] = True
    for k in (1, 5, 10):
        result = recall_at(k, np.zeros((3, 7)), relevance)
        assert result.value == pytest.approx(result.chance)


def test_hit_probability_by_hand() -> None:
    assert hit_probability(172, 1, 1) == pytest.approx(1 / 173)
    assert hit_probability(172, 1, 10) == pytest.approx(10 / 173)
    assert hit_probability(2, 2, 2) == pytest.approx(5 / 6)  # 1 - 1 / C(4, 2)
    assert hit_probability(3, 1, 9) == 1.0
    assert hit_probability(3, 1, -1) == 0.0


def test_majority_is_the_best_fixed_answer() -> None:
    # Candidate 0 answers three of five queries, candidate 1 one more.
    relevance = np.array([[1, 0, 0], [1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=bool)
    similarity = np.zeros((5, 3))
    assert recall_at(1, similarity, relevance).majority == pytest.approx(3 / 5)
    assert recall_at(2, similarity, relevance).majority == pytest.approx(4 / 5)


def test_equal_content_is_one_item_and_equal_texts_match() -> None:
    # Three rows, two images; rows 1 and 2 read alike, so both images match that text.
    task = pose(["cat", "cat", "dog"], ["a cat", "pet", "pet"], ["a cat", "pet", "pet"])
    assert task.query_rows.tolist() == [0, 2]
    assert task.candidate_rows.tolist() == [0, 1]
    assert task.relevance_QC.tolist() == [[True, True], [False, True]]


def test_wilson_interval_is_open_where_nothing_was_hit() -> None:
    low, high = wilson_interval(0.0, 10)
    assert low == 0.0
    assert high == pytest.approx(0.2775, abs=1e-4)  # z^2 / (n + z^2), by hand
    low, high = wilson_interval(0.5, 100)
    assert (low, high) == pytest.approx((0.4038, 0.5962), abs=1e-4)  # Newcombe 1998, method 3


def test_effective_count_of_strata() -> None:
    assert effective_count([50]) == 50
    assert effective_count([50, 50]) == 100
    assert effective_count([10, 90]) == pytest.approx(4 / (1 / 10 + 1 / 90))


def test_balanced_accuracy_is_the_mean_recall_of_the_classes() -> None:
    # Class 0: 3 of 4 right; class 1: 0 of 1 right; class 2: 1 of 1 right.
    predicted, labels = [0, 0, 0, 2, 0, 2], np.array([0, 0, 0, 0, 1, 2])
    result = nearest_class(np.eye(3)[predicted], labels)
    assert result.accuracy == pytest.approx(4 / 6)
    assert result.balanced == pytest.approx((3 / 4 + 0 + 1) / 3)
    assert result.majority == pytest.approx(4 / 6)
    assert result.chance == pytest.approx(1 / 3)
    assert result.counts == (4, 1, 1)


@pytest.mark.parametrize(
    ("similarity", "labels", "plain", "balanced", "majority"),
    [
        (np.tile([1.0, 0.0], (4, 1)), [0, 0, 0, 1], 0.75, 0.5, 0.75),  # a constant answer
        (np.zeros((2, 4)), [0, 3], 0.25, 0.25, 0.5),  # a tie between all classes is shared
        (np.eye(3)[[0, 1]], [0, 1], 1.0, 1.0, 0.5),  # an absent class stays a candidate, but has no recall
    ],
)
def test_accuracies_of_constant_tied_and_absent_classes(
    similarity: np.ndarray, labels: list[int], plain: float, balanced: float, majority: float
) -> None:
    result = nearest_class(similarity, np.array(labels))
    assert (result.accuracy, result.balanced, result.majority) == (plain, balanced, majority)
    assert result.chance == pytest.approx(1 / similarity.shape[1])
