"""Views of values, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mmmoe_pretrain.modalities import transforms


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_a_jigsaw_has_the_tiles_of_the_image_and_keeps_a_rest() -> None:
    value = np.arange(3 * 7 * 7).reshape(3, 7, 7)
    view = transforms.jigsaw(value, rng())
    tiles = [
        sorted(its[:, y : y + 2, x : x + 2].tobytes() for y in (0, 2, 4) for x in (0, 2, 4)) for its in (value, view)
    ]
    assert tiles[0] == tiles[1] and not np.array_equal(value, view)
    np.testing.assert_array_equal(view[:, 6], value[:, 6])
    np.testing.assert_array_equal(view[:, :, 6], value[:, :, 6])


def test_a_rotation_is_one_of_three() -> None:
    value = np.asarray([[[1, 2], [3, 4]]])
    turned = {tuple(transforms.rotate(value, rng(seed)).ravel().tolist()) for seed in range(30)}
    assert turned == {(2, 4, 1, 3), (4, 3, 2, 1), (3, 1, 4, 2)}


def test_a_crop_shows_a_part_of_the_image() -> None:
    """Of a ramp from left to right a crop is a ramp too, over a part of the numbers."""
    value = np.broadcast_to(np.arange(0, 256, 4, dtype=np.uint8), (3, 64, 64))
    for seed in range(20):
        view = transforms.crop(value, rng(seed))
        assert view.shape == value.shape and view.dtype == np.uint8
        row = view[0, 0].astype(int)
        assert (np.diff(row) >= 0).all() and 0.4 * 252 / 1.34 < np.ptp(row) <= 252


def test_time_is_permuted_in_whole_patches() -> None:
    value = np.arange(16.0)[None]
    view = transforms.permute_time(value, rng(), patch=2)
    np.testing.assert_array_equal(np.sort(view), value)
    assert (view[0, 1::2] - view[0, ::2] == 1).all() and not np.array_equal(view, value)
    short = np.arange(3.0)[None]
    np.testing.assert_array_equal(np.sort(transforms.permute_time(short, rng(1), patch=2)), short)


def test_a_run_of_time_is_masked() -> None:
    view = transforms.mask_time(np.ones((2, 20)), rng(), fill=np.nan)
    lost = np.flatnonzero(np.isnan(view[0]))
    assert len(lost) == 6 and np.array_equal(lost, np.arange(lost[0], lost[0] + 6))
    np.testing.assert_array_equal(np.isnan(view[0]), np.isnan(view[1]))


@pytest.mark.parametrize("frames", [2, 8, 40])
def test_a_crop_of_time_has_half_of_it_at_least(frames: int) -> None:
    value = np.arange(float(frames))[None]
    for seed in range(10):
        view = transforms.crop_time(value, rng(seed), patch=2)
        assert view.shape[1] % 2 == 0 and frames / 2 - 2 < view.shape[1] <= frames and view[0, 0] % 2 == 0
        assert (np.diff(view) == 1).all()


def test_pieces_are_dropped_and_one_stays() -> None:
    for seed in range(50):
        view = transforms.drop_pieces(np.asarray([1, 7, 8, 2]), rng(seed)).tolist()
        assert view[0] == 1 and view[-1] == 2 and len(view) >= 3
    assert transforms.drop_pieces(np.asarray([1, 2]), rng()).tolist() == [1, 2]
    counts = [len(transforms.drop_pieces(np.arange(102), rng(seed))) - 2 for seed in range(100)]
    assert np.mean(counts) == pytest.approx(70, abs=2)  # 4 standard deviations of the mean
