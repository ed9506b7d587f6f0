"""Audio as the codes of a discrete tokenizer of its log-mel spectrogram, in the order of time (``codes.py``), and the
way back to sound (``audio_wave.py``).

A column of the grid, ``patch`` frames, has a code for each ``patch`` bands, the lowest first.
"""

from __future__ import annotations

import io
import wave
from typing import Any, ClassVar, Literal

import numpy as np

from mmmoe_pretrain.kinds import READS
from mmmoe_pretrain.modalities.audio_settings import AudioSettings
from mmmoe_pretrain.modalities.codes import Codes, CodesSettings
from mmmoe_pretrain.modalities.fsq import Codebook

PEAK = 0.9  # of the sound that is made: loudness is not in the codes


class AudioCodesSettings(CodesSettings):
    """``max_tokens``: the codes of a clip, at most; longer ones are cut."""

    kind: Literal["audio_codes"] = "audio_codes"
    positions: Literal["learned", "rotary"] = "rotary"


class AudioCodes(Codes):
    """A clip has whole columns of codes."""

    Settings = AudioCodesSettings
    formats = READS["audio"].formats
    media_defaults: ClassVar = {"augment": False, "patch": 1, "stem": "linear"}
    patch = (16, 8)

    @staticmethod
    def check_patch(media: Any, patch: tuple[int, int]) -> None:
        """See ``Codes.check_patch``."""
        if media.n_mels % patch[0]:
            raise ValueError(
                f"n_mels {media.n_mels} are not whole patches of {patch[0]} bands; give --setting "
                f"n_mels={-(-media.n_mels // patch[0]) * patch[0]}, or another --patch"
            )

    @staticmethod
    def grid(value: np.ndarray, patch: tuple[int, int]) -> np.ndarray:
        missing = -value.shape[1] % patch[1]
        return np.pad(value, ((0, 0), (0, missing)), constant_values=float(value.min()))[None].astype(np.float32)

    def rendered(self, grid: np.ndarray) -> tuple[bytes, str]:
        heard = self.media.audible(grid[0])
        assert heard is not None
        sound, rate = heard
        samples = np.rint(sound * (PEAK * 32767)).astype("<i2")
        file = io.BytesIO()
        with wave.open(file, "wb") as out:
            out.setnchannels(1)
            out.setsampwidth(2)
            out.setframerate(rate)
            out.writeframes(samples.tobytes())
        return file.getvalue(), "wav"

    @staticmethod
    def sizes(book: Codebook) -> dict[str, int]:
        settings = AudioSettings(**book.media)
        bands, frames = book.network.patch
        return {"codes": book.codes, "max_tokens": settings.n_mels // bands * -(-settings.max_frames // frames)}

    @staticmethod
    def size_problem(book: Codebook, max_tokens: int) -> str:
        """See ``Codes.size_problem``."""
        bands = int(book.media["n_mels"]) // book.network.patch[0]
        return "" if max_tokens >= bands else f"a column has {bands} codes; set max_tokens: {bands} or more"

    def ordered(self, codes: np.ndarray) -> np.ndarray:
        columns = self.settings.max_tokens // codes.shape[0]
        if codes.shape[1] > columns:
            self.cut += 1
        return codes[:, :columns].T.ravel()

    def placed(self, codes: np.ndarray) -> np.ndarray:
        """The codes of a column that is not whole are left out; without a whole one there is a column of code 0."""
        bands = int(self.book.media["n_mels"]) // self.book.network.patch[0]
        whole = codes[: len(codes) // bands * bands].reshape(-1, bands).T
        return whole if whole.size else np.zeros((bands, 1), dtype=np.int64)

    def describe(self, value: np.ndarray, token: int) -> dict[str, Any]:
        if not 0 < token < len(value) - 1:
            return {"mark": "end" if token else "begin"}
        return {"code": int(value[token]), "number": token - 1}
