"""Images: bytes -> uint8 [3, size, size], and the patch stem that embeds them.

Files are read by ``image_file.py``; what of them is shown is decided in ``image_view.py``.
Legend: n images, S side in pixels, C channels, D hidden size, N tokens an image.
The convolutional stem follows "Early Convolutions Help Transformers See Better" (arXiv 2106.14881).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmmoe_pretrain.kinds import READS
from mmmoe_pretrain.modalities.base import Collated, Modality, quarantine
from mmmoe_pretrain.modalities.image_file import ImageReader, decoders
from mmmoe_pretrain.modalities.image_settings import Fit, ImageSettings
from mmmoe_pretrain.modalities.image_view import FILTERS, random_view, render, whole_view
from mmmoe_pretrain.modalities.stem import ChannelNorm, stem_widths
from mmmoe_pretrain.modalities.transforms import IMAGE, Transform
from mmmoe_pretrain.parallel.groups import SINGLE, Groups

# A JPEG is decoded with at least this many pixels for one of the output, a side. Bound on photographs, against a
# full decode and the same filter: 2.5 of 255 in the mean and 45 at most (measured on 3 megapixels: 1.0 in the mean of
# ten; the choice of bilinear or bicubic makes 0.9 and 31).
MARGIN = 1.25
KERNEL = 3  # of the convolutional stem, a side


class Image(Modality):
    """A value is uint8 [3, height, width]; its tokens run row by row."""

    Settings = ImageSettings
    formats = READS["image"].formats
    hideable = True

    @property
    def decoder(self) -> str:
        """See ``Modality.decoder``."""
        return decoders()

    def decode(self, data: bytes, rng: np.random.Generator | None = None) -> np.ndarray | None:
        """See ``Modality.decode``."""
        settings = self.settings
        with quarantine("image"):
            reader = ImageReader(data)
            size = self._fitting(reader.size) if self._native else (settings.size, settings.size)
            fit: Fit = "stretch" if self._native else settings.fit
            if rng is None or not settings.augment:
                view, levels = whole_view(reader.size, size, fit), None
            else:
                view, levels = random_view(reader.size, size, fit, settings, rng)
            decoded = reader.pixels(view.shrinks / MARGIN, settings.background)
            began = time.perf_counter()
            value = render(decoded, view, FILTERS[settings.interpolation], settings.background, levels)
        self.transform_seconds += time.perf_counter() - began
        return value

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
            patches.append(self._patches(value))
            numbers = np.arange(len(patches[-1]))
            places.append(np.stack(np.divmod(numbers, value.shape[2] // patch), axis=1))
        lengths = np.asarray([len(found) for found in patches[1:]], dtype=np.int64)
        arrays = {"patches": np.concatenate(patches), "places": np.concatenate(places)}
        return Collated(arrays, np.cumsum(lengths) - lengths)

    def _patches(self, value: np.ndarray) -> np.ndarray:
        """[tokens, 3 * patch^2]."""
        patch = self.settings.patch
        rows, columns = value.shape[1] // patch, value.shape[2] // patch
        grid = value.reshape(3, rows, patch, columns, patch).transpose(1, 3, 0, 2, 4)
        return grid.reshape(rows * columns, -1)

    @property
    def transforms(self) -> Mapping[str, Transform]:
        return IMAGE

    @property
    def fixed_places(self) -> bool:
        return not self._native

    def hide(self, value: np.ndarray, hidden: np.ndarray) -> np.ndarray:
        """See ``Modality.hide``: hidden patches have the colour that the model sees as 0."""
        patch = self.settings.patch
        grid = hidden.reshape(value.shape[1] // patch, value.shape[2] // patch)
        pixels = grid.repeat(patch, axis=0).repeat(patch, axis=1)
        grey = np.broadcast_to(np.round(255 * np.asarray(self.settings.mean)), (3,)).astype(np.uint8)
        return np.where(pixels, grey[:, None, None], value)

    def contents(self, value: np.ndarray) -> np.ndarray:
        mean, std = (np.broadcast_to(np.asarray(its), (3,)) for its in (self.settings.mean, self.settings.std))
        normalized = (value / 255 - mean[:, None, None]) / std[:, None, None]
        return self._patches(normalized.astype(np.float32))

    def rebuilt(self, content: np.ndarray) -> np.ndarray:
        """See ``Modality.rebuilt``; of square images."""
        patch, count = self.settings.patch, self.settings.size // self.settings.patch
        grid = content.reshape(count, count, 3, patch, patch).transpose(2, 0, 3, 1, 4)
        mean, std = (np.broadcast_to(np.asarray(its), (3,)) for its in (self.settings.mean, self.settings.std))
        shares = grid.reshape(3, count * patch, -1) * std[:, None, None] + mean[:, None, None]
        return np.clip(np.round(255 * shares), 0, 255).astype(np.uint8)

    @property
    def content_size(self) -> int:
        return int(3 * self.settings.patch**2)

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
        x = self.stem(_normalized(shares, self.config))
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
        shares = patches.to(self.project.weight.dtype).unflatten(1, (3, -1)) / 255
        pixels = _normalized(shares, self.config).flatten(1)
        row, column = places.unbind(1)
        return self.project(pixels) + self.row_positions[row] + self.column_positions[column]


def _normalized(shares: Tensor, config: ImageSettings) -> Tensor:
    """[n, 3, ...] -> the same shape."""
    if isinstance(config.mean, float) and isinstance(config.std, float):
        return (shares - config.mean) / config.std
    means, stds = (value if isinstance(value, tuple) else (value,) * 3 for value in (config.mean, config.std))
    channels = shares.split(1, dim=1)
    return torch.cat([(x - mean) / std for x, mean, std in zip(channels, means, stds, strict=True)], dim=1)


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
