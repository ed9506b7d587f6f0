"""The discrete tokenizer: its quantization by hand, its layers against torch, and its file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mmmoe_pretrain.data_prep import codes as training
from mmmoe_pretrain.modalities.fsq import Codebook, Levels, Network, fold, run, unfold

NETWORK = Network(channels=3, patch=(6, 4), width=8, levels=Levels((4, 3, 3)))


def book(seed: int = 1) -> Codebook:
    weights = training.first_weights(NETWORK, seed, torch.device("cpu"))
    rng = np.random.default_rng(seed)
    arrays = {name: weight.detach().numpy() for name, weight in weights.items()}
    arrays |= {name: rng.normal(size=x.shape).astype(np.float32) for name, x in arrays.items() if x.ndim == 1}
    return Codebook(NETWORK, arrays, {"kind": "image", "size": 48}, {})


def test_a_code_is_the_number_whose_digits_are_the_levels() -> None:
    """Levels 4 and 3: digits (d0, d1) are code d0 + 4 d1, by hand; values are (d - floor(L / 2)) / floor(L / 2)."""
    levels = Levels((4, 3))
    assert levels.codes == 12
    digits = np.array([[0, 1, 3, 2], [0, 0, 1, 2]])
    np.testing.assert_array_equal(levels.codes_of(digits), [0, 1, 7, 10])
    np.testing.assert_array_equal(levels.digits_of(np.array([0, 1, 7, 10])), digits)
    np.testing.assert_array_equal(levels.half, [2, 1])


def test_every_value_of_a_channel_can_be_reached_and_none_beyond() -> None:
    """Section 3.1 of the paper: f(z) = floor(L / 2) tanh(z) rounds to L values; an even L is moved by a half."""
    for count in (2, 3, 4, 5, 8):
        scale, offset, shift = Levels((count,)).bounds()
        z = np.linspace(-9, 9, 20_001)
        digits = np.rint(np.tanh(z + shift) * scale - offset) + Levels((count,)).half
        assert sorted(set(digits.tolist())) == list(range(count))
        assert np.tanh(shift) * scale - offset == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("counts", [(), (1, 5), (300, 300)])
def test_levels_that_make_no_codes_or_too_many_are_refused(counts: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"levels \[.*give two or more for each channel"):
        Levels(counts)


def test_folding_is_the_inverse_of_unfolding_and_torch_s_pixel_unshuffle() -> None:
    x = np.random.default_rng(0).normal(size=(3, 12, 8)).astype(np.float32)
    np.testing.assert_array_equal(unfold(fold(x, (3, 2)), (3, 2)), x)
    np.testing.assert_array_equal(fold(x, (2, 2)), F.pixel_unshuffle(torch.from_numpy(x), 2).numpy())


def test_the_layers_of_data_workers_are_those_of_training() -> None:
    """numpy and torch sum in another order: 1e-5 of values of order 1."""
    its, x = book(), np.random.default_rng(1).normal(size=(2, 3, 12, 16)).astype(np.float32)
    weights = {name: torch.from_numpy(array) for name, array in its._weights.items()}
    made, digits_Ndhw = training.reconstructed(NETWORK, weights, torch.from_numpy(x))
    for n in range(2):
        hidden = run(NETWORK.encoder(), its._weights, x[n])
        expected = training.forward(NETWORK.encoder(), weights, torch.from_numpy(x[n : n + 1]))[0]
        np.testing.assert_allclose(hidden, expected.numpy(), atol=1e-5)
        digits = digits_Ndhw[n].numpy() + NETWORK.levels.half[:, None, None]
        np.testing.assert_array_equal(its.encode(x[n]), NETWORK.levels.codes_of(np.rint(digits)))
        assert its.encode(x[n]).shape == (2, 4)  # of patches of 6 x 4
        np.testing.assert_allclose(its.decode(its.encode(x[n])), made[n].numpy(), atol=1e-5)


def test_rounding_passes_its_gradient_through() -> None:
    """Of the bound tanh(z + shift) scale - offset over floor(L / 2), as if nothing were rounded."""
    weights = {n: torch.from_numpy(x).requires_grad_() for n, x in book()._weights.items()}
    x = torch.randn(1, 3, 6, 4, generator=torch.Generator().manual_seed(0))
    made, _ = training.reconstructed(NETWORK, weights, x)
    made.sum().backward()
    gradient = weights["encoder.5.bias"].grad
    assert gradient is not None and gradient.abs().min() > 0


def test_a_file_gives_back_the_codebook_and_damage_is_told(tmp_path: Path) -> None:
    its, path = book(), tmp_path / "codes.npz"
    its.write(path)
    again = Codebook.read(path)
    x = np.random.default_rng(2).normal(size=(3, 6, 8)).astype(np.float32)
    np.testing.assert_array_equal(again.encode(x), its.encode(x))
    assert (again.codes, again.media, len(again.fingerprint)) == (36, {"kind": "image", "size": 48}, 32)
    Codebook.read(path, expected_fingerprint=again.fingerprint)
    with pytest.raises(ValueError, match=r"has fingerprint .* but the run was made with another"):
        Codebook.read(path, expected_fingerprint="another")
    with pytest.raises(
        ValueError, match=r"no tokenizer of codes at .*absent\.npz; make the file by mmmoe-data codes"
    ):
        Codebook.read(tmp_path / "absent.npz")
    whole = path.read_bytes()
    for number, damaged in enumerate(
        (whole[:1000], b"text", whole.replace(b"encoder.0.weight", b"encoder.0.wrongs"))
    ):
        path.with_name(f"{number}.npz").write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{number}\.npz is no tokenizer of codes"):
            Codebook.read(path.with_name(f"{number}.npz"))
