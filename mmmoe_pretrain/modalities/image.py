"""Pictures: the codec (bytes -> uint8 [3, size, size]) and the embedder (-> tokens).

Owns decoding of any Pillow mode, the letterbox on white, the light training augmentation, and the
patch stem. Legend: n pictures, S side in pixels, C channels, D hidden size, N tokens a picture.
The convolutional stem follows "Early Convolutions Help Transformers See Better" (arXiv 2106.14881).
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from mmmoe_pretrain.config import ImageConfig
from mmmoe_pretrain.flatten import WHITE, open_image, upright_rgb
from mmmoe_pretrain.modalities.errors import quarantine
from mmmoe_pretrain.modalities.stem import ChannelNorm, stem_widths

PIXEL_MEAN, PIXEL_STD = 0.7, 0.35  # of drawings on white; photographs land at -0.7 and 0.8

CROP_SCALE = (0.7, 1.0)  # of the side
ASPECT_JITTER = 0.1
ROTATION_DEGREES = 12.0
BRIGHTNESS = 0.15
CONTRAST = 0.2


class ImageCodec:
    """Decodes one picture; with a generator it also augments it (``flip``: mirrors every second one)."""

    def __init__(self, config: ImageConfig, flip: bool = True) -> None:
        self.config = config
        self.flip = flip

    def decode(self, data: bytes, rng: np.random.Generator | None = None) -> np.ndarray:
        """uint8 [3, size, size]. Raises BadSampleError for anything that is no usable picture."""
        with quarantine("image"):
            image = upright_rgb(open_image(data, 4 * self.config.size))
            canvas = _on_white_square(image, 2 * self.config.size)
        pixels = self._square(canvas) if rng is None else self._augmented(canvas, rng)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def _square(self, canvas: Image.Image) -> np.ndarray:
        side = self.config.size
        return np.asarray(canvas.resize((side, side), Image.Resampling.BICUBIC))

    def _augmented(self, canvas: Image.Image, rng: np.random.Generator) -> np.ndarray:
        side, full = self.config.size, canvas.width
        turn, flip, aspect, zoom, x, y, brightness, contrast = rng.random(8)
        canvas = canvas.rotate((2 * turn - 1) * ROTATION_DEGREES, Image.Resampling.BILINEAR, fillcolor=WHITE)
        crop = full * (CROP_SCALE[0] + (CROP_SCALE[1] - CROP_SCALE[0]) * zoom)
        stretch = 1 + ASPECT_JITTER * (2 * aspect - 1)
        width, height = min(full, crop * stretch), min(full, crop / stretch)
        left, top = x * (full - width), y * (full - height)
        box = (left, top, min(full, left + width), min(full, top + height))
        pixels = np.asarray(canvas.resize((side, side), Image.Resampling.BICUBIC, box=box))
        if self.flip and flip < 0.5:
            pixels = pixels[:, ::-1]
        gain = 1 + CONTRAST * (2 * contrast - 1)
        shift = 255 * (BRIGHTNESS * (2 * brightness - 1) + 0.5 * (1 - gain))
        levels = np.clip(np.arange(256) * gain + shift, 0, 255).astype(np.uint8)
        return levels[pixels]


def _on_white_square(image: Image.Image, limit: int) -> Image.Image:
    longest = max(image.size)
    if longest > limit:
        width, height = (max(1, round(side * limit / longest)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2.0)
    side = max(image.size)
    if image.size == (side, side):
        return image
    canvas = Image.new("RGB", (side, side), WHITE)
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


class ImageEmbedder(nn.Module):
    """uint8 [n, 3, S, S] -> [n * N, D]; the tokens of a picture run row by row."""

    def __init__(self, config: ImageConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.stem: nn.Module = (
            nn.Conv2d(3, hidden_size, config.patch, stride=config.patch)
            if config.stem == "linear"
            else _conv_stem(config, hidden_size)
        )
        self.positions: nn.Parameter | None = None
        if config.positions == "learned":
            self.positions = nn.Parameter(0.02 * torch.randn(config.num_tokens, hidden_size))

    def forward(self, images: Tensor) -> Tensor:
        dtype = next(self.parameters()).dtype
        pixels = images.to(dtype=dtype, memory_format=torch.channels_last)
        x = self.stem((pixels / 255 - PIXEL_MEAN) / PIXEL_STD)
        tokens = x.flatten(2).transpose(1, 2)  # [n, N, D]
        if self.positions is not None:
            tokens = tokens + self.positions
        return tokens.flatten(0, 1)


class _Residual2d(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.gelu(self.conv(self.norm(x)))


def _conv_stem(config: ImageConfig, hidden_size: int) -> nn.Sequential:
    steps = config.patch.bit_length() - 1
    widths = [3, *stem_widths(config.stem_channels, steps, hidden_size)]
    layers: list[nn.Module] = []
    for i in range(steps):
        layers += [
            nn.Conv2d(widths[i], widths[i + 1], 3, stride=2, padding=1),
            ChannelNorm(widths[i + 1]),
            nn.GELU(),
        ]
        if i >= steps - 2:
            layers.append(_Residual2d(widths[i + 1]))
    layers.append(nn.Conv2d(widths[-1], hidden_size, 1))
    return nn.Sequential(*layers)
