"""Any picture that Pillow reads as an upright RGB picture on white, in no more memory than twice its own.

Shared by the image codec and by ``mmmoe-data shard``. Imports Pillow alone at its top.
"""

from __future__ import annotations

from PIL import Image, ImageOps

WHITE = (255, 255, 255)
STRIP = 1 << 20  # pixels that are laid on white at once


def upright_rgb(image: Image.Image) -> Image.Image:
    """Turned as its EXIF says, 16 bits scaled to 8, transparency on white. May change ``image``."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    if image.has_transparency_data:
        return _on_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Pillow's own conversion would clip, not scale."""
    import numpy as np

    levels = np.asarray(image).clip(0, 65535) // 257
    return Image.fromarray(levels.astype(np.uint8))


def _on_white(image: Image.Image) -> Image.Image:
    flat = Image.new("RGB", image.size)
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(image.height, top + rows))).convert("RGBA")
        white = Image.new("RGBA", strip.size, (*WHITE, 255))
        flat.paste(Image.alpha_composite(white, strip).convert("RGB"), (0, top))
    return flat
