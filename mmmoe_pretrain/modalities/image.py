"""Images: bytes -> uint8 [3, size, size], and the patch stem that embeds them.

Owns decoding of any Pillow mode, the letterbox on white and the light training augmentation.
Legend: n images, S side in pixels, C channels, D hidden size, N tokens an image.
The convolutional stem follows "Early Convolutions Help Transformers See Better" (arXiv 2106.14881).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, Self

import numpy as np
import PIL.Image
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from mmmoe_pretrain.modalities.base import Collated, Modality, ModalitySettings, quarantine
from mmmoe_pretrain.modalities.image_file import WHITE, open_image, upright_rgb
from mmmoe_pretrain.modalities.stem import ChannelNorm, stem_widths
from mmmoe_pretrain.parallel.groups import SINGLE, Groups

CROP_SCALE = (0.7, 1.0)  # of the side
ASPECT_JITTER = 0.1
ROTATION_DEGREES = 12.0
BRIGHTNESS = 0.15
CONTRAST = 0.2
KERNEL = 3  # of the convolutional stem, a side


class ImageSettings(ModalitySettings):
    """Pixels of a side: ``size`` of the image, ``patch`` of a token. ``mean`` and ``std``: of the pixels, as shares
    of white. ``flip``: training mirrors every second image; false where images hold letters (a mirrored b is a d).

    ``aspect`` square: every image on a white square of ``size``. Native: at its own aspect and, up to ``max_tokens``
    patches, its own resolution, with learned positions of rows and columns (NaViT, arXiv 2307.06304).
    """

    not_of_the_model = ("augment", "flip")

    kind: Literal["image"] = "image"
    aspect: Literal["square", "native"] = "square"
    size: int = Field(48, ge=8)
    max_tokens: int = Field(256, ge=1)  # of an image at its own aspect
    patch: int = Field(8, ge=2)
    stem: Literal["linear", "conv"] = "conv"
    stem_channels: int = Field(32, ge=4)
    positions: Literal["learned", "rotary"] = "learned"
    mean: float = 0.5
    std: float = Field(0.5, gt=0)
    augment: bool = True
    flip: bool = True

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.aspect == "native" and (self.stem != "linear" or self.positions != "learned"):
            raise ValueError(
                f"aspect native of an image has rows of different lengths, which stem {self.stem} and positions "
                f"{self.positions} do not know; use stem: linear and positions: learned, or aspect: square"
            )
        if self.aspect == "square" and self.size % self.patch:
            raise ValueError(
                f"size {self.size} of an image is not a multiple of patch {self.patch}; "
                f"use size {self.size // self.patch * self.patch}"
            )
        if self.stem == "conv" and self.patch & (self.patch - 1):
            raise ValueError(
                f"stem conv of an image halves it step by step, so patch must be a power of two, not {self.patch}; "
                f"use 8 or stem: linear"
            )
        return self


class Image(Modality):
    """A value is uint8 [3, height, width]; its tokens run row by row."""

    Settings = ImageSettings
    formats = ("png", "jpg", "jpeg", "jpe", "jfif", "webp", "gif", "bmp", "tif", "tiff")

    def decode(self, data: bytes, rng: np.random.Generator | None = None) -> np.ndarray | None:
        """See ``Modality.decode``."""
        with quarantine("image"):
            if self._native:
                image = upright_rgb(open_image(data, 4 * self.settings.patch * math.isqrt(self.max_tokens)))
                width, height = self._fitting(image.size)
                canvas = _at_most(image, 2 * width, 2 * height)
            else:
                width = height = self.settings.size
                canvas = _on_white_square(upright_rgb(open_image(data, 4 * width)), 2 * width)
        if rng is not None and self.settings.augment:
            pixels = self._augmented(canvas, width, height, rng)
        else:
            pixels = np.asarray(canvas.resize((width, height), PIL.Image.Resampling.BICUBIC))
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    @property
    def _native(self) -> bool:
        return bool(self.settings.aspect == "native")

    def _fitting(self, size: tuple[int, int]) -> tuple[int, int]:
        """Whole patches of width and height at the aspect of ``size``, not above it and within ``max_tokens``."""
        patch, most = self.settings.patch, self.max_tokens
        scale = min(1.0, (most * patch**2 / (size[0] * size[1])) ** 0.5)
        columns, rows = (min(most, max(1, round(side * scale / patch))) for side in size)
        while columns * rows > most:  # rounding, or a strip of one patch
            columns, rows = (columns - 1, rows) if columns > rows else (columns, rows - 1)
        return columns * patch, rows * patch

    def num_tokens(self, value: np.ndarray) -> int:
        return int(value.shape[1] // self.settings.patch * (value.shape[2] // self.settings.patch))

    @property
    def max_tokens(self) -> int:
        return int(self.settings.max_tokens if self._native else (self.settings.size // self.settings.patch) ** 2)

    def collate(self, values: Sequence[np.ndarray]) -> Collated:
        if self._native:
            return self._collate_patches(values)
        side = self.settings.size
        pixels = np.stack(values) if values else np.zeros((0, 3, side, side), dtype=np.uint8)
        return Collated({"pixels": pixels}, np.arange(len(values)) * self.max_tokens)

    def _collate_patches(self, values: Sequence[np.ndarray]) -> Collated:
        patch = self.settings.patch
        patches, places = [np.zeros((0, 3 * patch**2), dtype=np.uint8)], [np.zeros((0, 2), dtype=np.int64)]
        for value in values:
            rows, columns = value.shape[1] // patch, value.shape[2] // patch
            grid = value.reshape(3, rows, patch, columns, patch).transpose(1, 3, 0, 2, 4)
            patches.append(grid.reshape(rows * columns, -1))
            places.append(np.stack(np.divmod(np.arange(rows * columns), columns), axis=1))
        lengths = np.asarray([len(found) for found in patches[1:]], dtype=np.int64)
        arrays = {"patches": np.concatenate(patches), "places": np.concatenate(places)}
        return Collated(arrays, np.cumsum(lengths) - lengths)

    def embedder(self, hidden_size: int, vocab_size: int, groups: Groups = SINGLE) -> nn.Module:
        if self._native:
            return PatchEmbedder(self.settings, hidden_size)
        return ImageEmbedder(self.settings, hidden_size)

    def describe(self, value: np.ndarray, token: int) -> dict[str, Any]:
        return {"pixels": list(self._box(value, token))}

    def draw(self, value: np.ndarray, token: int) -> tuple[PIL.Image.Image, tuple[float, float, float, float]] | None:
        left, top, right, bottom = self._box(value, token)
        _, height, width = value.shape
        box = (left / width, top / height, right / width, bottom / height)
        return PIL.Image.fromarray(np.ascontiguousarray(value.transpose(1, 2, 0))), box

    def _box(self, value: np.ndarray, token: int) -> tuple[int, int, int, int]:
        """The box of a token in pixels: left, top, right, bottom."""
        patch = self.settings.patch
        row, column = divmod(token, value.shape[2] // patch)
        return column * patch, row * patch, (column + 1) * patch, (row + 1) * patch

    def example(self, rng: np.random.Generator, vocab_size: int = 0) -> np.ndarray:
        width = height = self.settings.size
        if self._native:
            width, height = self._fitting((int(rng.integers(8, 500)), int(rng.integers(8, 500))))
        return rng.integers(0, 256, (3, height, width), dtype=np.uint8)

    def _augmented(self, canvas: PIL.Image.Image, width: int, height: int, rng: np.random.Generator) -> np.ndarray:
        """uint8 [height, width, 3]: turned, cropped, mirrored, brighter or darker."""
        turn, flip, aspect, zoom, x, y, brightness, contrast = rng.random(8)
        canvas = canvas.rotate((2 * turn - 1) * ROTATION_DEGREES, PIL.Image.Resampling.BILINEAR, fillcolor=WHITE)
        crop = CROP_SCALE[0] + (CROP_SCALE[1] - CROP_SCALE[0]) * zoom
        stretch = 1 + ASPECT_JITTER * (2 * aspect - 1)
        wide, high = canvas.width * min(1, crop * stretch), canvas.height * min(1, crop / stretch)
        left, top = x * (canvas.width - wide), y * (canvas.height - high)
        box = (left, top, min(canvas.width, left + wide), min(canvas.height, top + high))
        pixels = np.asarray(canvas.resize((width, height), PIL.Image.Resampling.BICUBIC, box=box))
        if self.settings.flip and flip < 0.5:
            pixels = pixels[:, ::-1]
        gain = 1 + CONTRAST * (2 * contrast - 1)
        shift = 255 * (BRIGHTNESS * (2 * brightness - 1) + 0.5 * (1 - gain))
        levels = np.clip(np.arange(256) * gain + shift, 0, 255).astype(np.uint8)
        return levels[pixels]


def _at_most(image: PIL.Image.Image, width: int, height: int) -> PIL.Image.Image:
    """Shrunk where it is larger, at its own aspect."""
    scale = min(width / image.width, height / image.height)
    if scale >= 1:
        return image
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, PIL.Image.Resampling.BICUBIC, reducing_gap=2.0)


def _on_white_square(image: PIL.Image.Image, limit: int) -> PIL.Image.Image:
    image = _at_most(image, limit, limit)
    side = max(image.size)
    if image.size == (side, side):
        return image
    canvas = PIL.Image.new("RGB", (side, side), WHITE)
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


class ImageEmbedder(nn.Module):
    """uint8 [n, 3, S, S] -> [n * N, D]."""

    def __init__(self, config: ImageSettings, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.stem: nn.Module = (
            nn.Conv2d(3, hidden_size, config.patch, stride=config.patch)
            if config.stem == "linear"
            else _conv_stem(config, hidden_size)
        )
        self.positions: nn.Parameter | None = None
        if config.positions == "learned":
            self.positions = nn.Parameter(0.02 * torch.randn((config.size // config.patch) ** 2, hidden_size))

    def forward(self, pixels: Tensor) -> Tensor:
        dtype = next(self.parameters()).dtype
        shares = pixels.to(dtype=dtype, memory_format=torch.channels_last) / 255
        x = self.stem((shares - self.config.mean) / self.config.std)
        tokens = x.flatten(2).transpose(1, 2)  # [n, N, D]
        if self.positions is not None:
            tokens = tokens + self.positions
        return tokens.flatten(0, 1)


class PatchEmbedder(nn.Module):
    """uint8 patches [N, 3 * patch^2] of images of any shape, and their ``places`` [N, 2] (row, column) -> [N, D]."""

    def __init__(self, config: ImageSettings, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.project = nn.Linear(3 * config.patch**2, hidden_size)
        self.row_positions = nn.Parameter(0.02 * torch.randn(config.max_tokens, hidden_size))
        self.column_positions = nn.Parameter(0.02 * torch.randn(config.max_tokens, hidden_size))

    def forward(self, patches: Tensor, places: Tensor) -> Tensor:
        pixels = (patches.to(self.project.weight.dtype) / 255 - self.config.mean) / self.config.std
        row, column = places.unbind(1)
        return self.project(pixels) + self.row_positions[row] + self.column_positions[column]


class _Residual2d(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.conv = nn.Conv2d(channels, channels, KERNEL, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.gelu(self.conv(self.norm(x)))


def _conv_stem(config: ImageSettings, hidden_size: int) -> nn.Sequential:
    steps = config.patch.bit_length() - 1
    widths = [3, *stem_widths(config.stem_channels, steps, hidden_size)]
    layers: list[nn.Module] = []
    for i in range(steps):
        layers += [
            nn.Conv2d(widths[i], widths[i + 1], KERNEL, stride=2, padding=1),
            ChannelNorm(widths[i + 1]),
            nn.GELU(),
        ]
        if i >= steps - 2:
            layers.append(_Residual2d(widths[i + 1]))
    layers.append(nn.Conv2d(widths[-1], hidden_size, 1))
    return nn.Sequential(*layers)
