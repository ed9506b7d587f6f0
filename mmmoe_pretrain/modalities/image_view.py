"""Which part of an image is shown, on how many pixels, and how it is drawn: one resize, or one rotation.

A view is a rectangle of the upright image in full-resolution pixels; outside of the image is the background. Nothing
here draws random numbers by itself: a view of training is a function of the generator that it gets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from mmmoe_pretrain.modalities.image_file import Decoded
from mmmoe_pretrain.modalities.image_settings import Colour, Fit, ImageSettings

Box = tuple[float, float, float, float]  # left, top, right, bottom

FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
MODES = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}  # torch's names
ALIGNED, TINY = 1e-3, 1e-9  # of a pixel; of a scale, so that a product is not rounded below the size
# A rotated pixel is the mean of SAMPLES x SAMPLES nearest pixels: less than half the time of bilinear sampling of
# an image that was resized first, and nearer to exact (docs/decisions.md, 83).
SAMPLES = 3
SMALLEST = 0.75  # of an output pixel, in the image's: below it sampling of nearest pixels shows steps
LARGEST = 3.0  # above it samples would miss pixels


@dataclass(frozen=True)
class View:
    """``size`` pixels (width, height) that show ``width`` x ``height`` pixels, from ``left`` and ``top`` on, of an
    image of ``of`` pixels that was turned by ``angle`` degrees counter-clockwise about its centre."""

    size: tuple[int, int]
    of: tuple[int, int]
    left: float
    top: float
    width: float
    height: float
    angle: float = 0.0
    mirrored: bool = False

    @property
    def shrinks(self) -> float:
        """Pixels of the image for one of the output, along the side where there are fewer."""
        return min(self.width / self.size[0], self.height / self.size[1])


def whole_view(of: tuple[int, int], size: tuple[int, int], fit: Fit) -> View:
    """All of the image (letterbox, stretch), or the largest centred part of the output's shape (crop)."""
    return View(size, of, *_frame(of, size, fit))


def random_view(
    of: tuple[int, int], size: tuple[int, int], fit: Fit, settings: ImageSettings, rng: np.random.Generator
) -> tuple[View, list[int] | None]:
    """A part of the image for training, and the new value of each of the 256 levels (None: unchanged)."""
    turn, flip, ratio, scale, x, y, brightness, contrast = rng.random(8)
    area = settings.crop_scale[0] + (settings.crop_scale[1] - settings.crop_scale[0]) * scale
    shape = settings.crop_ratio[0] * (settings.crop_ratio[1] / settings.crop_ratio[0]) ** ratio
    if fit == "crop":  # RandomResizedCrop; one that does not fit is shrunk, so that its shape stays
        left, top, width, height = 0.0, 0.0, float(of[0]), float(of[1])
        shape *= size[0] / size[1]
        wide, high = math.sqrt(area * width * height * shape), math.sqrt(area * width * height / shape)
        fitting = min(1.0, width / wide, height / high)
        wide, high = wide * fitting, high * fitting
    else:
        left, top, width, height = _frame(of, size, fit)
        wide, high = width * min(1.0, math.sqrt(area * shape)), height * min(1.0, math.sqrt(area / shape))
    view = View(
        size, of, left + x * (width - wide), top + y * (height - high), wide, high,
        angle=(2 * turn - 1) * settings.rotation, mirrored=settings.flip and bool(flip < 0.5),
    )  # fmt: skip
    if not settings.brightness and not settings.contrast:
        return view, None
    gain = 1 + settings.contrast * (2 * contrast - 1)
    shift = 255 * (settings.brightness * (2 * brightness - 1) + 0.5 * (1 - gain))
    return view, np.clip(np.arange(256) * gain + shift, 0, 255).astype(np.uint8).tolist()


def render(
    decoded: Decoded, view: View, resample: Image.Resampling, background: Colour, levels: list[int] | None = None
) -> np.ndarray:
    """The view, uint8 [3, height, width]."""
    if view.angle:
        shown: Image.Image | np.ndarray = _turned(decoded.image, decoded.content, view, resample, background)
    else:
        shown = _straight(decoded, view, resample, background)
    if levels is not None:
        if not isinstance(shown, Image.Image):
            shown = Image.fromarray(np.ascontiguousarray(shown.transpose(1, 2, 0)))
        shown = shown.point(levels * 3)
    return shown if isinstance(shown, np.ndarray) else np.stack([np.asarray(channel) for channel in shown.split()])


def _frame(of: tuple[int, int], size: tuple[int, int], fit: Fit) -> tuple[float, float, float, float]:
    """Left, top, width and height of what is shown without augmentation."""
    if fit == "stretch":
        return 0.0, 0.0, float(of[0]), float(of[1])
    choose = max if fit == "letterbox" else min
    pixel = choose(of[0] / size[0], of[1] / size[1])  # a side of an output pixel
    width, height = pixel * size[0], pixel * size[1]
    return (of[0] - width) / 2, (of[1] - height) / 2, width, height


def _straight(
    decoded: Decoded, view: View, resample: Image.Resampling, background: Colour
) -> Image.Image | np.ndarray:
    content, (width, height) = decoded.content, decoded.size
    across = _visible(view.left, view.width, view.of[0], view.size[0], content[0], content[2], width)
    down = _visible(view.top, view.height, view.of[1], view.size[1], content[1], content[3], height)
    if across is None or down is None:
        return Image.new("RGB", view.size, background)
    size = across[1] - across[0], down[1] - down[0]
    part = resized(decoded, size, resample, (across[2], down[2], across[3], down[3]))
    if view.mirrored:
        part = np.ascontiguousarray(part[..., ::-1])
    if size == view.size:
        return part
    shown = np.empty((3, view.size[1], view.size[0]), dtype=np.uint8)
    shown[:] = np.array(background, dtype=np.uint8)[:, None, None]
    left = view.size[0] - across[1] if view.mirrored else across[0]
    shown[:, down[0] : down[1], left : left + size[0]] = part
    return shown


def resized(decoded: Decoded, size: tuple[int, int], resample: Image.Resampling, box: Box) -> np.ndarray:
    """uint8 [3, height, width] of a box of the image. torch's antialiased resize takes a quarter of the time of
    Pillow's for the same pixels (within 2 of 255); it knows no box that begins within a pixel, and no LANCZOS."""
    left, top = round(box[0]), round(box[1])
    mode = MODES.get(resample)
    if (
        mode is None
        or isinstance(decoded.pixels, Image.Image)
        or max(abs(left - box[0]), abs(top - box[1])) > ALIGNED
    ):
        part = decoded.image.resize(size, resample, box=box, reducing_gap=2.0)
        return np.stack([np.asarray(channel) for channel in part.split()])
    pixels = torch.from_numpy(decoded.pixels[top : math.ceil(box[3]), left : math.ceil(box[2])])
    scale = size[1] / (box[3] - box[1]) * (1 + TINY), size[0] / (box[2] - box[0]) * (1 + TINY)
    shown = F.interpolate(pixels.permute(2, 0, 1)[None], scale_factor=scale, mode=mode, antialias=True)
    assert shown.shape[2:] == size[::-1], (shown.shape, size, box)
    return shown[0].contiguous().numpy()


def _visible(
    start: float, length: float, of: int, size: int, low: float, high: float, limit: int
) -> tuple[int, int, float, float] | None:
    """Along one axis: the first and last output pixel that show the image, and from where to where they show it; None
    where nothing of it is seen."""
    first, last = max(0.0, start), min(float(of), start + length)
    if last <= first:
        return None
    begin = min(size - 1, round((first - start) / length * size))
    end = max(begin + 1, round((last - start) / length * size))
    scale = (high - low) / of
    return begin, end, max(0.0, low + first * scale), min(float(limit), low + last * scale)


def _turned(
    image: Image.Image, content: Box, view: View, resample: Image.Resampling, background: Colour
) -> Image.Image:
    coarse = [
        (content[2 + axis] - content[axis]) / view.of[axis] * shown / view.size[axis]
        for axis, shown in enumerate((view.width, view.height))
    ]  # pixels of the image for one of the output
    if max(coarse) > LARGEST:
        across, down = (
            min(side, max(1, int(2 * pixels / LARGEST))) for side, pixels in zip(image.size, coarse, strict=True)
        )
        image = image.reduce((across, down))
        content = content[0] / across, content[1] / down, content[2] / across, content[3] / down
    samples = SAMPLES if min(coarse) >= SMALLEST else 1
    width, height = samples * view.size[0], samples * view.size[1]
    smooth = Image.Resampling.BICUBIC if resample == Image.Resampling.LANCZOS else resample
    turned = image.transform(
        (width, height), Image.Transform.AFFINE, _matrix(content, view, width, height),
        smooth if samples == 1 else Image.Resampling.NEAREST, fillcolor=background,
    )  # fmt: skip
    return turned.reduce(samples) if samples > 1 else turned


def _matrix(content: Box, view: View, width: int, height: int) -> tuple[float, ...]:
    """From pixels of an output of ``width`` x ``height`` to those of the image, as Pillow's affine transform."""
    across, down = view.width / width, view.height / height
    left, top = view.left - view.of[0] / 2, view.top - view.of[1] / 2  # from the centre
    if view.mirrored:
        left, across = left + view.width, -across
    cos, sin = math.cos(math.radians(view.angle)), math.sin(math.radians(view.angle))
    x, y = (content[2] - content[0]) / view.of[0], (content[3] - content[1]) / view.of[1]
    middle_x, middle_y = (content[0] + content[2]) / 2, (content[1] + content[3]) / 2
    return (
        cos * across * x, -sin * down * x, (cos * left - sin * top) * x + middle_x,
        sin * across * y, cos * down * y, (sin * left + cos * top) * y + middle_y,
    )  # fmt: skip
