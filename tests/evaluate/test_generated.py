"""Measures of generated values against closed forms."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mmmoe_pretrain.batch import Item, Sample, SampleMeta
from mmmoe_pretrain.config.evaluate import GenerateConfig
from mmmoe_pretrain.evaluate.generated import alignment, frechet_distance, gaussian_distance, scores_of
from mmmoe_pretrain.models.pretraining import PretrainingModel
from tests.export.support import make_run
from tests.support import png_of, things


def test_the_distance_of_one_dimension_is_that_of_means_and_deviations() -> None:
    """(m1 - m2)^2 + (s1 - s2)^2: of N(1, 4) and N(4, 25) 9 + 9."""
    given = (np.array([1.0]), np.array([[4.0]]), np.array([4.0]), np.array([[25.0]]))
    assert gaussian_distance(*given) == pytest.approx(18)


def test_covariances_that_commute_have_the_distance_of_their_roots() -> None:
    """Of one basis of eigenvectors: the sum of (s1 - s2)^2 over eigenvalues s^2; a rotation changes nothing."""
    a, b, angle = np.diag([1.0, 9.0]), np.diag([4.0, 16.0]), 0.7
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    zero = np.zeros(2)
    assert gaussian_distance(zero, a, zero, b) == pytest.approx(1 + 1)
    assert gaussian_distance(zero, turn @ a @ turn.T, zero, turn @ b @ turn.T) == pytest.approx(2)


def test_covariances_that_do_not_commute_by_hand() -> None:
    """C1 = diag(1, 0) and C2 = [[2, 1], [1, 2]]: C1^1/2 C2 C1^1/2 = diag(2, 0), so 1 + 4 - 2 sqrt 2."""
    zero = np.zeros(2)
    found = gaussian_distance(zero, np.diag([1.0, 0.0]), zero, np.array([[2.0, 1.0], [1.0, 2.0]]))
    assert found == pytest.approx(5 - 2 * 2**0.5)


def test_the_distance_of_sets_is_that_of_their_means_and_covariances() -> None:
    """{0, 2} has mean 1 and variance 2 (of n - 1), {3, 7} mean 5 and variance 8: 16 + (sqrt 8 - sqrt 2)^2 = 18."""
    assert frechet_distance(np.array([[0.0], [2.0]]), np.array([[3.0], [7.0]])) == pytest.approx(18)
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(50, 6)).astype(np.float32)
    assert frechet_distance(rows, rows) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(rows, rows + 2) == pytest.approx(4 * 6, rel=1e-6)  # fp32 features
    assert frechet_distance(rows[:3], rows[3:6]) > 0  # of fewer values than numbers, too


def test_alignment_is_the_cosine_of_pairs() -> None:
    asked = np.array([[1.0, 0.0], [3.0, 4.0], [1.0, 0.0], [0.0, 0.0]])
    made = np.array([[2.0, 0.0], [4.0, 3.0], [-1.0, 0.0], [1.0, 0.0]])
    np.testing.assert_allclose(alignment(asked, made), [1, 0.96, 0, 0])


def test_what_cannot_be_compared_is_told() -> None:
    rows = np.ones((4, 3))
    with pytest.raises(ValueError, match=r"generated features .*two or more rows"):
        frechet_distance(rows, rows[:1])
    with pytest.raises(ValueError, match="finite"):
        frechet_distance(rows * np.nan, rows)
    with pytest.raises(ValueError, match="3 and 2 numbers are not of one model"):
        frechet_distance(rows, rows[:, :2])
    with pytest.raises(ValueError, match="give pairs"):
        alignment(rows, rows[:2])


def drawer(judge: Path, model: PretrainingModel, shift: int) -> tuple[Any, list[tuple[Any, Any]]]:
    """A task that draws the image of another sample, ``shift`` behind, for the name of each; and what it made."""
    rows = things(6)
    images = [png_of(row) for row in rows]

    def image(number: int) -> tuple[bytes, str]:
        return images[number % len(rows)], "png"

    task = SimpleNamespace(
        name="drawing", how=GenerateConfig(judge=str(judge)), model=model.mmmoe,
        file=lambda prompt, _: image(prompt.position + shift), own_file=lambda prompt: image(prompt.position),
    )  # fmt: skip
    made = []
    for number, row in enumerate(rows):
        items = (Item("text", np.zeros(3), row["name"]), Item("picture", np.zeros(2)))
        prompt = SimpleNamespace(position=number, sample=Sample(SampleMeta(str(number)), items), whole=items[1])
        made.append((prompt, None))
    return task, made


def test_a_run_judges_images_by_the_texts_they_were_made_from(tmp_path: Path, tiny_data: Path) -> None:
    """Own images are as near as the majority says. Images of the next sample are as near as chance says of own ones,
    which compares each with the text of the sample before."""
    config, _ = make_run(tmp_path, tiny_data)
    rows: Any = SimpleNamespace(config=config)
    found = {}
    for shift in (0, 1, -1):
        task, made = drawer(config.run_dir, PretrainingModel(config), shift)
        (frechet, aligned), (note,) = scores_of(task, rows, made)
        assert frechet.value == pytest.approx(0, abs=1e-6)  # the same images in another order
        assert (aligned.n, note) == (6, f"drawing is judged by {config.name}")
        found[shift] = aligned
    assert found[0].value == found[0].majority == found[1].majority
    assert found[1].value != found[0].value
    assert found[0].chance == pytest.approx(found[1].value)  # texts roll by one: text i with the image of i + 1
    assert found[-1].chance == pytest.approx(found[0].value)
    task, made = drawer(config.run_dir, PretrainingModel(config), 0)
    task.file = lambda *_: (b"", "mid")
    with pytest.raises(
        ValueError, match=r"cannot judge .mid files that are generated from text, as it compares image"
    ):
        scores_of(task, rows, made)
    task.how = GenerateConfig(judge=str(tmp_path / "gone"))
    with pytest.raises(ValueError, match="no run in"):
        scores_of(task, rows, (pytest.fail("generated first") for _ in made))
    task.how = GenerateConfig()
    assert scores_of(task, rows, made) == (
        [], ["no score of what drawing generates: set evaluate.generate.drawing.judge to a run"],
    )  # fmt: skip
