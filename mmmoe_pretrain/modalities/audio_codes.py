"""Audio as the codes of a discrete tokenizer of its log-mel spectrogram, in the order of time (``codes.py``), and the
way back to sound by Griffin-Lim (Griffin and Lim, 1984).

A column of the grid, ``patch`` frames, has a code for each ``patch`` bands, the lowest first.
"""

from __future__ import annotations

import io
import wave
from typing import Any, ClassVar, Literal, cast

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from mmmoe_pretrain.kinds import READS
from mmmoe_pretrain.modalities.audio import LOG_STD, mel_filters
from mmmoe_pretrain.modalities.audio_settings import AudioSettings
from mmmoe_pretrain.modalities.codes import Codes, CodesSettings
from mmmoe_pretrain.modalities.fsq import Codebook

ROUNDS = 60  # of Griffin-Lim
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
        settings = cast(AudioSettings, self.media.settings)
        sound = sound_of(grid[0], settings)
        samples = np.rint(sound * (PEAK * 32767 / max(float(np.abs(sound).max(initial=0)), 1e-9))).astype("<i2")
        file = io.BytesIO()
        with wave.open(file, "wb") as out:
            out.setnchannels(1)
            out.setsampwidth(2)
            out.setframerate(settings.sample_rate)
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


def sound_of(log_mel: np.ndarray, settings: AudioSettings) -> np.ndarray:
    """A sound, float32, whose log-mel spectrogram is about ``log_mel`` [n_mels, frames] as ``Audio.decode`` makes it,
    up to its loudness."""
    decades = log_mel * LOG_STD if settings.normalization == "per_clip" else log_mel * settings.std + settings.mean
    mel = 10 ** (decades - decades.max())
    filters = mel_filters(settings).astype(np.float64)
    magnitude = np.sqrt(_spectrum_of(mel.astype(np.float64), filters))
    return _griffin_lim(magnitude.T, settings).astype(np.float32)


def _spectrum_of(mel: np.ndarray, filters: np.ndarray) -> np.ndarray:
    """The energies [bins, frames], none below 0, whose sums by ``filters`` are about ``mel``: multiplicative updates
    of least squares (Lee and Seung, 2001)."""
    found = filters.T @ mel + 1e-10
    for _ in range(ROUNDS):
        found *= (filters.T @ mel) / (filters.T @ (filters @ found) + 1e-12)
    return found


def _griffin_lim(magnitude: np.ndarray, settings: AudioSettings) -> np.ndarray:
    """A sound whose frames have the ``magnitude`` [frames, bins]; its first phases are drawn from one seed."""
    angle = np.random.default_rng(0).uniform(0, 2 * np.pi, magnitude.shape)
    spectrum = magnitude * np.exp(1j * angle)
    for _ in range(ROUNDS):
        analysed = _frames(_overlap_add(spectrum, settings), settings, len(magnitude))
        spectrum = magnitude * np.exp(1j * np.angle(analysed))
    return _overlap_add(spectrum, settings)


def _window(settings: AudioSettings) -> np.ndarray:
    return np.hanning(settings.n_fft + 1)[:-1]


def _frames(sound: np.ndarray, settings: AudioSettings, count: int) -> np.ndarray:
    """The spectra [frames, bins] of frames around every hop, as ``Audio`` takes them."""
    half = settings.n_fft // 2
    windows = sliding_window_view(np.pad(sound, (half, half + settings.n_fft)), settings.n_fft)
    return np.fft.rfft(windows[: count * settings.hop_length : settings.hop_length][:count] * _window(settings))


def _overlap_add(spectrum: np.ndarray, settings: AudioSettings) -> np.ndarray:
    """The least-squares inverse of ``_frames``."""
    size, hop, half, window = settings.n_fft, settings.hop_length, settings.n_fft // 2, _window(settings)
    frames = np.fft.irfft(spectrum, size) * window
    total = np.zeros(size + hop * (len(frames) - 1))
    weight = np.zeros_like(total)
    for number, frame in enumerate(frames):
        total[number * hop : number * hop + size] += frame
        weight[number * hop : number * hop + size] += window**2
    return (total / np.maximum(weight, 1e-8))[half : half + hop * (len(frames) - 1) + 1]
