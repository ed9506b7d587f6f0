"""Images as the codes of a discrete tokenizer, row by row (``codes.py``)."""

from __future__ import annotations

import io
from typing import Any, ClassVar, Literal

import numpy as np
import PIL.Image

from mmmoe_pretrain.kinds import READS
from mmmoe_pretrain.modalities.codes import Codes, CodesSettings
from mmmoe_pretrain.modalities.fsq import Codebook


class ImageCodesSettings(CodesSettings):
    """``max_tokens``: the codes of every image."""

    kind: Literal["image_codes"] = "image_codes"


class ImageCodes(Codes):
    """All images have the size that the tokenizer was trained with, and as many codes."""

    Settings = ImageCodesSettings
    formats = READS["image"].formats
    media_defaults: ClassVar = {"augment": False}
    patch = (8, 8)

    @staticmethod
    def check_patch(media: Any, patch: tuple[int, int]) -> None:
        """See ``Codes.check_patch``."""
        if media.aspect != "square" or media.size % patch[0] or media.size % patch[1]:
            fits = media.size // patch[0] * patch[0] or patch[0]
            raise ValueError(
                f"images of size {media.size} and aspect {media.aspect} are not all of the same whole patches "
                f"{list(patch)}; give --setting size={fits} and aspect=square"
            )

    @staticmethod
    def grid(value: np.ndarray, patch: tuple[int, int]) -> np.ndarray:
        return value.astype(np.float32) / np.float32(127.5) - 1

    def rendered(self, grid: np.ndarray) -> tuple[bytes, str]:
        pixels = np.clip(np.rint((grid + 1) * 127.5), 0, 255).astype(np.uint8).transpose(1, 2, 0)
        file = io.BytesIO()
        PIL.Image.fromarray(np.ascontiguousarray(pixels)).save(file, "png")
        return file.getvalue(), "png"

    @staticmethod
    def sizes(book: Codebook) -> dict[str, int]:
        rows, columns = _grid_of(book)
        return {"codes": book.codes, "max_tokens": rows * columns}

    @staticmethod
    def size_problem(book: Codebook, max_tokens: int) -> str:
        """See ``Codes.size_problem``."""
        rows, columns = _grid_of(book)
        number = rows * columns
        return "" if max_tokens == number else f"its images have {number} codes each; set max_tokens: {number}"

    def ordered(self, codes: np.ndarray) -> np.ndarray:
        return codes.ravel()

    def placed(self, codes: np.ndarray) -> np.ndarray:
        """The first codes of a shorter value are repeated to fill the image: there is no code for nothing."""
        rows, columns = _grid_of(self.book)
        return np.resize(codes if len(codes) else np.zeros(1, np.int64), rows * columns).reshape(rows, columns)

    def describe(self, value: np.ndarray, token: int) -> dict[str, Any]:
        if not 0 < token < len(value) - 1:
            return {"mark": "end" if token else "begin"}
        return {"code": int(value[token]), "number": token - 1}


def _grid_of(book: Codebook) -> tuple[int, int]:
    size, (rows, columns) = int(book.media["size"]), book.network.patch
    return size // rows, size // columns
