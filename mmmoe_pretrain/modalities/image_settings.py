"""The settings of the image modality. What they mean is drawn in ``image_view.py``."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from mmmoe_pretrain.config.base import ModalitySettings

# Mean and standard deviation of the pixels of a set, as shares of white, by the name that the field uses.
PRESETS: dict[str, tuple[Any, Any]] = {
    "half": (0.5, 0.5),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}

Fit = Literal["letterbox", "crop", "stretch"]
Level = Annotated[int, Field(ge=0, le=255)]
Colour = tuple[Level, Level, Level]


def _preset(place: int, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value not in PRESETS:
        raise ValueError(f"{value!r} is not {', '.join(PRESETS)}, a number or three numbers")
    return PRESETS[value][place]


Share = Annotated[float, Field(gt=0)]
Mean = Annotated[float | tuple[float, float, float], BeforeValidator(lambda value: _preset(0, value))]
Std = Annotated[Share | tuple[Share, Share, Share], BeforeValidator(lambda value: _preset(1, value))]
Range = tuple[Share, Share]


class ImageSettings(ModalitySettings):
    """Pixels of a side: ``size`` of the image, ``patch`` of a token.

    ``fit``: the whole image between bars (letterbox); its shorter side cut to ``size`` and the centre taken, in
    training a random resized crop (crop); or both sides at ``size`` (stretch). ``background``: the colour of bars
    and of what is behind transparency. ``aspect`` native: no square; each image at its own aspect and, up to
    ``max_tokens`` patches, its own resolution, with learned positions of rows and columns (NaViT, arXiv 2307.06304).

    ``mean`` and ``std``: of the pixels as shares of white, a number, one for each of red, green and blue, or
    imagenet, clip or half.

    Training (``augment``) shows a random part of the frame: ``crop_scale`` is its share of the area, ``crop_ratio``
    its shape, both from and to; rotated by up to ``rotation`` degrees; mirrored half of the time with ``flip`` (false
    where images hold letters: a mirrored b is a d); ``brightness`` and ``contrast`` change by up to these shares.
    """

    not_of_the_model = ("augment", "crop_scale", "crop_ratio", "rotation", "flip", "brightness", "contrast")

    kind: Literal["image"] = "image"
    aspect: Literal["square", "native"] = "square"
    fit: Fit = "letterbox"
    size: int = Field(48, ge=8)
    max_tokens: int = Field(256, ge=1)  # of an image at its own aspect
    patch: int = Field(8, ge=2)
    interpolation: Literal["bilinear", "bicubic", "lanczos"] = "bicubic"
    background: Colour = (255, 255, 255)
    stem: Literal["linear", "conv"] = "conv"
    stem_channels: int = Field(32, ge=4)
    positions: Literal["learned", "rotary"] = "learned"
    mean: Mean = 0.5
    std: Std = 0.5
    augment: bool = True
    crop_scale: Range = (0.49, 1.0)
    crop_ratio: Range = (0.82, 1.22)
    rotation: float = Field(12.0, ge=0, le=180)
    flip: bool = True
    brightness: float = Field(0.15, ge=0, le=1)
    contrast: float = Field(0.2, ge=0, le=1)

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.aspect == "native" and (self.stem != "linear" or self.positions != "learned"):
            raise ValueError(
                f"aspect native of an image has rows of different lengths, which stem {self.stem} and positions "
                f"{self.positions} do not know; use stem: linear and positions: learned, or aspect: square"
            )
        if self.aspect == "native" and self.fit != "letterbox":
            raise ValueError(f"aspect native shows whole images, so fit: {self.fit} does nothing; leave fit out")
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

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        for name, (low, high) in (("crop_scale", self.crop_scale), ("crop_ratio", self.crop_ratio)):
            if low > high or (name == "crop_scale" and high > 1):
                raise ValueError(
                    f"{name} {low} to {high} is no range; give the smaller first"
                    + (", both at most 1" if name == "crop_scale" else "")
                )
        return self
