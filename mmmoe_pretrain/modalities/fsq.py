"""A discrete tokenizer of images and of spectrograms: a small convolutional autoencoder with finite scalar
quantization between its halves (FSQ, Mentzer et al., arXiv 2309.15505), and the file that `mmmoe-data codes` writes.

Each of d channels is bounded and rounded to one of L_i values, so a place of the grid has one of L_1 x ... x L_d
codes. There is no codebook to learn, and so no loss of one. Here both halves are numpy, for data workers, which must
not touch torch's threads; training (``data_prep/codes.py``) runs the same layers in torch.

Shapes: C channels, H x W pixels or bands x frames, rows x columns the grid of codes, d channels that are quantized.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.lib.stride_tricks import sliding_window_view

from mmmoe_pretrain.limits import DECODER_ERRORS, MAX_MEMBER_BYTES
from mmmoe_pretrain.modalities.base import blas
from mmmoe_pretrain.untrusted import brief, read_bytes

KERNEL = 3  # of layers that see their neighbours
EPS = 1e-3  # the outermost values are reached by finite inputs
MOST_CODES = 1 << 16
# What numpy and zipfile raise on damaged files. MemoryError: of a shape in a header; the file itself is limited.
_DAMAGE: tuple[type[Exception], ...] = (*DECODER_ERRORS, zipfile.BadZipFile, TokenError, MemoryError, TypeError)


@dataclass(frozen=True)
class Levels:
    """The numbers of values of each quantized channel, and the codes that they make: code = sum of digit_i times the
    product of the levels before i."""

    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.counts or min(self.counts) < 2 or math.prod(self.counts) > MOST_CODES:
            raise ValueError(
                f"levels {list(self.counts)}: give two or more for each channel, with a product of at most "
                f"{MOST_CODES:,}; e.g. 8,5,5,5 for 1,000 codes"
            )

    @property
    def codes(self) -> int:
        return math.prod(self.counts)

    @property
    def half(self) -> np.ndarray:
        """What a digit is divided by, so that values lie between -1 and 1."""
        return np.asarray([count // 2 for count in self.counts], dtype=np.float32)

    def bounds(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(scale, offset, shift) of the bound tanh(z + shift) scale - offset, whose rounded values are the digits
        less ``half``. An even number of values has no middle: it is moved by a half, and z = 0 still gives 0."""
        counts = np.asarray(self.counts, dtype=np.float64)
        scale = (counts - 1) * (1 + EPS) / 2
        offset = np.where(counts % 2 == 0, 0.5, 0.0)
        return tuple(each.astype(np.float32) for each in (scale, offset, np.arctanh(offset / scale)))  # type: ignore[return-value]

    def codes_of(self, digits: np.ndarray) -> np.ndarray:
        """Whole numbers [d, ...] from 0 on -> int64 [...]."""
        bases = np.cumprod((1, *self.counts[:-1]))
        return np.tensordot(bases, digits.astype(np.int64), axes=1)

    def digits_of(self, codes: np.ndarray) -> np.ndarray:
        """The inverse: int64 [...] -> int64 [d, ...]."""
        bases = np.cumprod((1, *self.counts[:-1]))
        return np.stack([codes // base % count for base, count in zip(bases, self.counts, strict=True)])


class Layer(NamedTuple):
    """``conv``: a convolution; ``residual``: its input and a convolution of silu(input); ``fold``: blocks of
    ``factors`` places become channels; ``unfold``: the inverse. Its parameters are ``name``.weight and .bias."""

    op: str
    name: str = ""
    channels: tuple[int, int] = (0, 0)  # into it and out of it
    kernel: int = 1
    factors: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class Network:
    """The sizes of an autoencoder: ``channels`` of its input, the ``patch`` (rows, columns) of a code, and the
    ``width`` of its layers, which doubles at the grid of codes."""

    channels: int
    patch: tuple[int, int]
    width: int
    levels: Levels

    @property
    def steps(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The patch as two foldings, the second by two where it can be."""
        second = tuple(2 if side % 2 == 0 else 1 for side in self.patch)
        return (self.patch[0] // second[0], self.patch[1] // second[1]), (second[0], second[1])

    def encoder(self) -> list[Layer]:
        (first, second), wide = self.steps, 2 * self.width
        return [
            Layer("fold", factors=first),
            Layer("conv", "encoder.0", (self.channels * math.prod(first), self.width), KERNEL),
            Layer("residual", "encoder.1", (self.width, self.width), KERNEL),
            Layer("fold", factors=second),
            Layer("conv", "encoder.2", (self.width * math.prod(second), wide)),
            Layer("residual", "encoder.3", (wide, wide), KERNEL),
            Layer("residual", "encoder.4", (wide, wide)),
            Layer("conv", "encoder.5", (wide, len(self.levels.counts))),
        ]

    def decoder(self) -> list[Layer]:
        (first, second), wide = self.steps, 2 * self.width
        return [
            Layer("conv", "decoder.0", (len(self.levels.counts), wide), KERNEL),
            Layer("residual", "decoder.1", (wide, wide), KERNEL),
            Layer("residual", "decoder.2", (wide, wide)),
            Layer("conv", "decoder.3", (wide, self.width * math.prod(second))),
            Layer("unfold", factors=second),
            Layer("residual", "decoder.4", (self.width, self.width), KERNEL),
            Layer("residual", "decoder.5", (self.width, self.width), KERNEL),
            Layer("conv", "decoder.6", (self.width, self.channels * math.prod(first))),
            Layer("unfold", factors=first),
        ]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every parameter, by name."""
        found: dict[str, tuple[int, ...]] = {}
        for layer in (*self.encoder(), *self.decoder()):
            if layer.name:
                into, out = layer.channels
                found |= {
                    f"{layer.name}.weight": (out, into, layer.kernel, layer.kernel),
                    f"{layer.name}.bias": (out,),
                }
        return found


class Codebook:
    """A trained autoencoder. ``media``: the settings of the modality whose values it reads. ``made``: how it was made
    and what was measured."""

    def __init__(
        self, network: Network, weights: Mapping[str, np.ndarray], media: Mapping[str, Any], made: Mapping[str, Any]
    ) -> None:
        self.network, self.media, self.made, self.fingerprint = network, dict(media), dict(made), ""
        self._weights = dict(weights)

    @classmethod
    def read(cls, path: str | Path, *, expected_fingerprint: str = "") -> Codebook:
        """Raises ValueError where the file is missing or damaged, or not the one of that fingerprint."""
        if not Path(path).is_file():
            raise ValueError(f"no tokenizer of codes at {path}; make the file by mmmoe-data codes")
        data = read_bytes(Path(path), MAX_MEMBER_BYTES)
        fingerprint = xxhash.xxh3_128_hexdigest(data)
        if expected_fingerprint and fingerprint != expected_fingerprint:
            raise ValueError(
                f"the tokenizer of codes {path} has fingerprint {fingerprint}, but the run was made with "
                f"{expected_fingerprint}; name the file that the run started with"
            )
        try:
            found = _parse(data)
        except _DAMAGE as error:
            why = f"{type(error).__name__}: {brief(str(error))}"
            raise ValueError(f"{path} is no tokenizer of codes ({why}); make one by mmmoe-data codes") from None
        found.fingerprint = fingerprint
        return found

    def write(self, path: Path) -> None:
        network = {**vars(self.network), "levels": self.network.levels.counts}
        about = json.dumps({"network": network, "media": self.media, "made": self.made})
        with path.open("wb") as file:
            np.savez(file, **{"about": np.asarray(about), **self._weights})  # type: ignore[arg-type]

    @property
    def codes(self) -> int:
        return self.network.levels.codes

    def encode(self, x: np.ndarray) -> np.ndarray:
        """float32 [C, H, W], of whole patches -> int64 [rows, columns]."""
        scale, offset, shift = (each[:, None, None] for each in self.network.levels.bounds())
        with blas().limit(limits=1, user_api="blas"):  # more threads would wait for one another on cores in use
            z = run(self.network.encoder(), self._weights, x)
        digits = np.rint(np.tanh(z + shift) * scale - offset) + self.network.levels.half[:, None, None]
        return self.network.levels.codes_of(digits)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """int64 [rows, columns] -> float32 [C, H, W]."""
        half = self.network.levels.half[:, None, None]
        values = (self.network.levels.digits_of(codes) - half) / half
        return run(self.network.decoder(), self._weights, values.astype(np.float32))


def run(layers: Sequence[Layer], weights: Mapping[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """The layers on one value [C, H, W]."""
    for layer in layers:
        if layer.op == "fold":
            x = fold(x, layer.factors)
        elif layer.op == "unfold":
            x = unfold(x, layer.factors)
        else:
            weight, bias = weights[f"{layer.name}.weight"], weights[f"{layer.name}.bias"]
            made = _convolved(_silu(x) if layer.op == "residual" else x, weight, bias)
            x = x + made if layer.op == "residual" else made
    return x


def fold(x: np.ndarray, factors: tuple[int, int]) -> np.ndarray:
    """[..., C, H, W] -> [..., C r c, H / r, W / c]: blocks of places as channels."""
    *most, channels, height, width = x.shape
    rows, columns = factors
    x = x.reshape(*most, channels, height // rows, rows, width // columns, columns)
    x = np.einsum("...chrwk->...crkhw", x)
    return x.reshape(*most, channels * rows * columns, height // rows, width // columns)


def unfold(x: np.ndarray, factors: tuple[int, int]) -> np.ndarray:
    """The inverse of ``fold``."""
    *most, channels, height, width = x.shape
    rows, columns = factors
    x = x.reshape(*most, channels // (rows * columns), rows, columns, height, width)
    return np.einsum("...crkhw->...chrwk", x).reshape(*most, -1, height * rows, width * columns)


def _convolved(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """[C, H, W] -> [out, H, W], with zeros around it."""
    kernel, (_, height, width) = weight.shape[2], x.shape
    if kernel > 1:
        around = kernel // 2
        padded = np.pad(x, ((0, 0), (around, around), (around, around)))
        windows = sliding_window_view(padded, (kernel, kernel), axis=(1, 2))  # [C, H, W, k, k]
        x = windows.transpose(0, 3, 4, 1, 2)
    flat = weight.reshape(len(weight), -1) @ x.reshape(-1, height * width)
    return (flat + bias[:, None]).reshape(-1, height, width)


def _silu(x: np.ndarray) -> np.ndarray:
    return x * (np.float32(0.5) + np.float32(0.5) * np.tanh(np.float32(0.5) * x))


def _parse(data: bytes) -> Codebook:
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        about = json.loads(str(file["about"]))
        sizes = about["network"]
        rows, columns = map(int, sizes["patch"])
        levels = Levels(tuple(map(int, sizes["levels"])))
        network = Network(int(sizes["channels"]), (rows, columns), int(sizes["width"]), levels)
        wanted = network.shapes()
        weights = {name: np.asarray(file[name]) for name in wanted}
    for name, shape in wanted.items():
        weight = weights[name]
        if weight.shape != shape or weight.dtype != np.float32 or not np.isfinite(weight).all():
            raise ValueError(f"{name} is {weight.dtype} {weight.shape}, not finite float32 {shape}")
    return Codebook(network, weights, about["media"], about["made"])
