"""A series becomes patches of steps; values that were not measured are masked and replaced by the mean."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
import torch

from mmmoe_pretrain.modalities import BadSampleError
from mmmoe_pretrain.modalities.series import Series, SeriesEmbedder, SeriesSettings
from tests.support import npy_bytes as npy

RAW = SeriesSettings(channels=2, patch=4, max_steps=16, normalize="none")


def header(text: str, data: bytes = b"", version: tuple[int, int] = (1, 0)) -> bytes:
    """A .npy whose header reads ``text`` (format of NumPy Enhancement Proposal 1)."""
    padded = text.encode().ljust(118 - 10 - 1) + b"\n"
    size = struct.pack("<H" if version == (1, 0) else "<I", len(padded))
    return b"\x93NUMPY" + bytes(version) + size + padded + data


def decode(data: bytes, settings: SeriesSettings = RAW, rng: np.random.Generator | None = None) -> np.ndarray:
    value = Series("heart", settings).decode(data, rng)
    assert value is not None
    return value


STEPS = np.array([[1.0, 2, 3, 4, 5], [10, 20, np.nan, 40, 50]])  # two channels, five steps
WHOLE = np.pad(STEPS, ((0, 0), (0, 3)), constant_values=np.nan)  # in whole patches of four
CSV = "1,10\r\n2, 20\n\n3,\n4,40\n5,5e1\n"  # a line a step


@pytest.mark.parametrize(
    "data",
    [
        npy(STEPS),
        npy(STEPS.astype(np.float32)),
        npy(STEPS.astype(">f8")),
        npy(np.asfortranarray(STEPS)),
        npy(np.where(np.isnan(STEPS), np.inf, STEPS)),
        CSV.encode(),
        b"\xef\xbb\xbf" + CSV.encode(),  # with a byte order mark
    ],
)
def test_arrays_and_csv_give_channels_of_steps_in_whole_patches(data: bytes) -> None:
    value = decode(data)
    assert value.dtype == np.float32
    np.testing.assert_array_equal(value, WHOLE)
    assert Series("heart", RAW).num_tokens(value) == 2


@pytest.mark.parametrize("dtype", ["i1", "u2", "i8", "f2"])
def test_whole_numbers_and_halves_are_read(dtype: str) -> None:
    np.testing.assert_array_equal(decode(npy(np.arange(8).reshape(2, 4).astype(dtype))), [[0, 1, 2, 3], [4, 5, 6, 7]])


def test_each_channel_is_normalized_by_what_was_measured() -> None:
    """Channel 0: mean 3, variance (4 + 1 + 0 + 1 + 4) / 5 = 2. Channel 1: mean of 10, 20, 40, 50 is 30, variance
    (400 + 100 + 100 + 400) / 4 = 250."""
    value = decode(npy(STEPS), RAW.model_copy(update={"normalize": "instance"}))
    np.testing.assert_allclose(value[0, :5], (np.arange(5) - 2) / np.sqrt(2), rtol=1e-6)
    np.testing.assert_allclose(value[1, :5], [-20 / 250**0.5, -10 / 250**0.5, np.nan, 10 / 250**0.5, 20 / 250**0.5])
    assert np.isnan(value[:, 5:]).all()


def test_a_constant_or_unmeasured_channel_is_not_divided_by_nothing() -> None:
    value = decode(npy(np.array([[7.0, 7, 7, 7], [np.nan] * 4])), RAW.model_copy(update={"normalize": "instance"}))
    np.testing.assert_array_equal(value, [[0, 0, 0, 0], [np.nan] * 4])


def test_a_long_series_is_cut_and_counted_and_an_unmeasured_one_is_nothing() -> None:
    series = Series("heart", RAW)
    value = series.decode(npy(np.arange(40.0).reshape(2, 20)))
    assert value is not None and value.shape == (2, 16) and series.cut == 1
    assert series.num_tokens(value) == series.max_tokens == 4
    assert series.decode(npy(np.full((2, 5), np.nan))) is None
    assert series.cut == 1


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no lines, or lines of different length"),
        (b"1,2\n3\n", "lines of different length"),
        (b"one,two\n", "series in CSV holds 'one', which is not a number"),
        (b"1," + b"9\0" * 5000, r"series in CSV holds '.{0,200}which is not a number"),
        (b"\xff\xfe1", "cannot be decoded"),
        (b"1,2,3\n", r"has 3 channels, and modalities\.heart\.channels is 2"),
        (npy(np.zeros((3, 4))), "has 3 channels"),
        (npy(np.zeros(8)), r"float64 \[8\], not numbers"),
        (npy(np.zeros((2, 0))), r"\[2, 0\], not numbers"),
        (npy(np.zeros((2, 4), dtype=bool)), "bool .* not numbers"),
        (npy(np.zeros((2, 4), dtype=complex)), "complex128 .* not numbers"),
        (npy(np.array([["a", "b"], ["c", "d"]])), "not numbers"),
        (npy(np.zeros((2, 4)))[:-1], "its file has another size"),
        (npy(np.zeros((2, 4))) + b"x", "its file has another size"),
        (npy(np.zeros((2, 4)))[:30], "cannot be decoded"),
        (b"\x93NUMPY", "cannot be decoded"),
        (b"\x93NUMPY\x09\x00", "cannot be decoded"),
        # headers that ask for more memory than there is, for less than nothing, and for code to run
        (header("{'descr': '<f8', 'fortran_order': False, 'shape': (2, 10**12)}"), "cannot be decoded"),
        (header("{'descr': '<f8', 'fortran_order': False, 'shape': (2, 1000000000000)}"), "has another size"),
        (header("{'descr': '<f8', 'fortran_order': False, 'shape': (-2, -4)}", bytes(64)), "."),
        (header("{'descr': '|O', 'fortran_order': False, 'shape': (2, 4)}", bytes(64)), "not numbers"),
        (header("{'descr': '<f8', 'fortran_order': False, 'shape': ('2', 4)}", bytes(64)), "cannot be decoded"),
        (header("{'descr': [('a', '<f8')], 'fortran_order': False, 'shape': (2, 4)}", bytes(64)), "not numbers"),
        (header("__import__('os').getpid()"), "cannot be decoded"),
        (header("{" * 90), "header that cannot be read"),
        (header("-" * 9000 + "1", version=(2, 0)), "header that cannot be read|cannot be decoded"),
        (header("1 +" * 3000 + "1", version=(2, 0)), "header that cannot be read|cannot be decoded"),
        (header("[" * 9000, version=(2, 0)), "header that cannot be read|cannot be decoded"),
        (header(" " * (1 << 20), version=(2, 0)), "cannot be decoded"),
    ],
)  # fmt: skip
def test_damage_is_a_bad_sample_with_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(BadSampleError, match=reason) as error:
        Series("heart", RAW).decode(data)
    assert "series" in str(error.value)


def test_later_versions_of_the_format_are_read() -> None:
    text = "{'descr': '<f8', 'fortran_order': False, 'shape': (2, 4)}"
    data = np.arange(8.0).tobytes()
    for version in ((1, 0), (2, 0), (3, 0)):
        np.testing.assert_array_equal(decode(header(text, data, version)), [[0, 1, 2, 3], [4, 5, 6, 7]])


def test_training_perturbs_as_the_generator_says_and_the_settings_allow() -> None:
    data = npy(np.random.default_rng(0).normal(size=(2, 16)))
    plain = decode(data)
    first, again, other = (decode(data, RAW, np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).all() and (first != plain).all()
    assert np.abs(first - plain).max() < 0.1 * np.abs(plain).max() + 5 * 0.05  # amplitude, and noise
    np.testing.assert_array_equal(
        decode(data, RAW.model_copy(update={"augment": False}), np.random.default_rng(1)), plain
    )


def rows_of(embedder: Any, series: Series, values: list[np.ndarray]) -> torch.Tensor:
    arrays = series.collate(values).arrays
    return embedder(**{name: torch.from_numpy(array) for name, array in arrays.items()})


def test_what_was_not_measured_is_zero_with_a_sign_beside_it() -> None:
    """A token is a linear function of its steps, zero where there is none, and of which there are."""
    embedder = SeriesEmbedder(RAW, 12)
    series = Series("heart", RAW)
    [row] = rows_of(embedder, series, [WHOLE[:, :4].astype(np.float32)])
    steps, seen = [1, 2, 3, 4, 10, 20, 0, 40], [1, 1, 1, 1, 1, 1, 0, 1]
    weight, bias = embedder.project.weight, embedder.project.bias
    torch.testing.assert_close(row, weight @ torch.tensor([*steps, *seen], dtype=torch.float32) + bias)


def test_where_a_token_stands_is_said_in_steps() -> None:
    series = Series("heart", RAW)
    assert series.describe(WHOLE, 1) == {"steps": [4, 8]}
    assert series.draw(WHOLE, 1) is None and series.excerpt(WHOLE, 1) is None and series.sound(b"") is None


@pytest.mark.parametrize("normalize", ["none", "instance"])
def test_numbers_that_would_end_a_step_make_a_bad_sample(normalize: str) -> None:
    """An error code of 1e308 is no measurement; its sum is infinite."""
    settings = RAW.model_copy(update={"normalize": normalize})
    with pytest.raises(BadSampleError, match=r"beyond 10000 standard deviations.*modalities.heart.std"):
        decode(npy(np.full((2, 4), 1e308)), settings)
