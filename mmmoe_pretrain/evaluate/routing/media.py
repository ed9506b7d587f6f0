"""What top-activating tokens are of, to look at and to listen to: small images and sounds as data URIs.

All are encoded here from what was decoded: no byte of a file that others made is passed on.
"""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from mmmoe_pretrain.batch import SampleMeta
from mmmoe_pretrain.data.decode import bytes_of_item
from mmmoe_pretrain.data.sources.source import Indexed, open_indexed
from mmmoe_pretrain.data.storage.files import Files, read_settings
from mmmoe_pretrain.evaluate.routing.top_tokens import TopToken
from mmmoe_pretrain.evaluate.rows import HeldOutRows
from mmmoe_pretrain.modalities import Modality
from mmmoe_pretrain.urls import redacted

if TYPE_CHECKING:
    from PIL import Image

SIDE = 144  # pixels of the longer side of an image, which the page shows on 104 to 156
ASPECT = 2.0  # longer images, as spectrograms of long clips are, are squeezed
SOUND_SECONDS = 10.0  # longer sounds are cut
JPEG_QUALITY = 82


class Media:
    """Makes the media of tokens. The sounds are read again from their shards."""

    def __init__(self, rows: HeldOutRows) -> None:
        self._rows = rows
        self._places: dict[str, tuple[Indexed, int]] | None = None

    def thumbnail(self, top: TopToken) -> Callable[[], dict[str, Any]] | None:
        """Makes ``{"uri", "width", "height"}`` of the token's item; None where its modality draws nothing."""
        drawn = self._rows.modalities[top.modality].draw(top.item.value, top.token)
        return None if drawn is None else functools.partial(thumbnail_of, drawn[0])

    def sound(self, top: TopToken) -> Callable[[], dict[str, Any] | None] | None:
        """Makes ``{"uri", "seconds"}`` of the token's item; None where its modality has no sounds."""
        has_none = type(self._rows.modalities[top.modality]).sound is Modality.sound
        return None if has_none else functools.partial(self._sound, top)

    def _sound(self, top: TopToken) -> dict[str, Any] | None:
        source, i = self._place(top.sample.meta)
        data = bytes_of_item(source.read(i), self._rows.modalities, top.number)
        sound = self._rows.modalities[top.modality].sound(data)
        return None if sound is None else sound_of(*sound)

    def _place(self, meta: SampleMeta) -> tuple[Indexed, int]:
        if self._places is None:
            files = Files(read_settings(self._rows.config))
            sources = [open_indexed(path, files, self._rows.modalities) for path in self._rows.paths]
            self._places = {_identity(source, i): (source, i) for source in sources for i in range(len(source))}
        return self._places[meta.identity]


def _identity(source: Indexed, i: int) -> str:
    return SampleMeta(source.key(i), shard=redacted(source.places(i)[0])).identity


def thumbnail_of(drawn: Image.Image) -> dict[str, Any]:
    """A copy of at most ``SIDE`` pixels, as PNG or JPEG, whichever is smaller."""
    from PIL import Image

    aspect = min(ASPECT, max(1 / ASPECT, drawn.width / drawn.height))
    longer = min(SIDE, max(drawn.width, drawn.height))
    size = (longer, max(1, round(longer / aspect))) if aspect >= 1 else (max(1, round(longer * aspect)), longer)
    small = drawn.convert("RGB")
    small = small if small.size == size else small.resize(size, Image.Resampling.BICUBIC)
    png, jpeg = io.BytesIO(), io.BytesIO()
    small.save(png, "PNG", optimize=True)
    small.save(jpeg, "JPEG", quality=JPEG_QUALITY, optimize=True)
    kind, best = min(("png", png), ("jpeg", jpeg), key=lambda found: found[1].tell())
    return {"uri": _uri(f"image/{kind}", best.getvalue()), "width": size[0], "height": size[1]}


def sound_of(wave: np.ndarray, rate: int) -> dict[str, Any]:
    """Its first ``SOUND_SECONDS`` as FLAC of 16 bits."""
    import soundfile

    wave = np.clip(wave[: int(SOUND_SECONDS * rate)], -1, 1)
    out = io.BytesIO()
    soundfile.write(out, wave, rate, format="FLAC", subtype="PCM_16")
    return {"uri": _uri("audio/flac", out.getvalue()), "seconds": len(wave) / rate}


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
