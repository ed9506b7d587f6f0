"""Audio: bytes -> log-mel [n_mels, frames].

Owns resampling, the log-mel spectrogram and the light training augmentation; ``audio_file.py`` decodes, and
``audio_stem.py`` embeds. Frames of a decoded clip are a multiple of ``patch``.
The whole analysis is numpy, so that a forked worker never touches torch's threads.

Tempo and vocal tract are perturbed inside the analysis, at no cost: frames are taken every
``hop * tempo`` samples, and the mel filters move by ``warp`` (VTLP, Jaitly and Hinton 2013).
Masks follow SpecAugment (arXiv 1904.08779).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image
import soxr
from numpy.lib.stride_tricks import sliding_window_view
from torch import nn

from mmmoe_pretrain.kinds import READS
from mmmoe_pretrain.modalities.audio_file import decoders, open_audio, read_mono
from mmmoe_pretrain.modalities.audio_settings import AudioSettings
from mmmoe_pretrain.modalities.audio_stem import AudioEmbedder
from mmmoe_pretrain.modalities.audio_wave import wave_of_mel
from mmmoe_pretrain.modalities.base import BadSampleError, Collated, Modality, blas, quarantine
from mmmoe_pretrain.modalities.tokenizer import Tokenizer
from mmmoe_pretrain.modalities.transforms import Transform, of_time
from mmmoe_pretrain.parallel.groups import SINGLE, Groups

FLOOR = 1e-10  # of the energy in a band
FLOOR_DECADES = 7.0  # below the clip's loudest band everything counts as silence
LOG_STD = 1.5  # typical standard deviation of log10 mel energy in a clip
TRIM_DECIBELS = 50.0  # below the clip's peak, at its ends
TRIM_MARGIN = 0.05  # seconds that stay

TEMPO = 0.08
WARP = 0.08
NUM_WARPS = 9
TILT = 0.3  # of LOG_STD, over the whole band
TIME_MASK = 0.15  # of the frames
FREQUENCY_MASK = 0.15  # of the bands
BLOCK = 64  # frames that are analysed at once: small arrays stay in the cache, and need no new pages of memory
QUALITIES = {"quick": "QQ", "low": "LQ", "medium": "MQ", "high": "HQ", "very_high": "VHQ"}  # soxr's names


class Audio(Modality):
    """A value is float32 log-mel [n_mels, frames]; a token is ``patch`` frames."""

    Settings = AudioSettings
    formats = READS["audio"].formats
    hideable = True

    def __init__(self, name: str, settings: Any, tokenizer: Tokenizer | None = None) -> None:
        super().__init__(name, settings, tokenizer)
        self._window = np.hanning(settings.n_fft + 1)[:-1].astype(np.float32)
        blas()

    @functools.cached_property
    def _filters(self) -> list[np.ndarray]:
        return [mel_filters(self.settings, warp) for warp in np.linspace(1 - WARP, 1 + WARP, NUM_WARPS)]

    @property
    def decoder(self) -> str:
        """See ``Modality.decoder``."""
        return decoders()

    def decode(self, data: bytes, rng: np.random.Generator | None = None) -> np.ndarray | None:
        """See ``Modality.decode``."""
        with quarantine("audio"):
            wave, rate = self._read(data, rng)
        began = time.perf_counter()
        if not self.settings.augment:
            rng = None
        wave = self._prepared(wave, rate)
        tempo = 1.0 if rng is None else 1 + TEMPO * (2 * rng.random() - 1)
        warp = NUM_WARPS // 2 if rng is None else int(rng.integers(NUM_WARPS))
        mel = self._normalized(self._log_mel(wave, tempo, self._filters[warp]))
        mel = mel if rng is None else _spec_augment(mel, rng)  # which draws in fp64
        mel = _pad_frames(mel, self.settings.patch).astype(np.float32, copy=False)
        self.transform_seconds += time.perf_counter() - began
        return mel

    def num_tokens(self, value: np.ndarray) -> int:
        return int(-(-value.shape[1] // self.settings.patch))

    @property
    def max_tokens(self) -> int:
        return int(self.settings.max_frames // self.settings.patch)

    @property
    def transforms(self) -> Mapping[str, Transform]:
        return of_time(self.settings.patch, 0.0)

    def hide(self, value: np.ndarray, hidden: np.ndarray) -> np.ndarray:
        """See ``Modality.hide``: hidden frames are at the mean."""
        return np.where(hidden.repeat(self.settings.patch), np.float32(0), value)

    def contents(self, value: np.ndarray) -> np.ndarray:
        frames = value.reshape(len(value), -1, self.settings.patch)
        return frames.swapaxes(0, 1).reshape(self.num_tokens(value), -1)

    def rebuilt(self, content: np.ndarray) -> np.ndarray:
        """See ``Modality.rebuilt``."""
        frames = content.reshape(len(content), self.settings.n_mels, self.settings.patch)
        return frames.swapaxes(0, 1).reshape(self.settings.n_mels, -1).astype(np.float32)

    def audible(self, value: np.ndarray) -> tuple[np.ndarray, int] | None:
        """See ``Modality.audible``: phases are not in a log-mel spectrogram, and are made up."""
        settings = self.settings
        per_clip = settings.normalization == "per_clip"
        log_energy = value * LOG_STD if per_clip else value * settings.std + settings.mean
        filters = self._filters[NUM_WARPS // 2]
        wave = wave_of_mel(10.0 ** (log_energy - log_energy.max()), filters, settings.n_fft, settings.hop_length)
        return wave / max(1e-6, float(np.abs(wave).max(initial=0))), settings.sample_rate

    @property
    def content_size(self) -> int:
        return int(self.settings.n_mels * self.settings.patch)

    def collate(self, values: Sequence[np.ndarray]) -> Collated:
        """Clips one after the other, in whole tokens, with a gap between two: short clips cost what they hold."""
        patch, gap = self.settings.patch, self.settings.gap
        frames = np.asarray([value.shape[1] for value in values], dtype=np.int64)
        tokens = -(-frames // patch) + gap
        starts = np.cumsum(tokens) - tokens
        total = max(1, int(tokens.sum()) - gap) * patch
        log_mel = np.zeros((min(1, len(values)), self.settings.n_mels, total), dtype=np.float32)
        for start, value in zip((starts * patch).tolist(), values, strict=True):
            log_mel[0, :, start : start + value.shape[1]] = value
        return Collated({"log_mel": log_mel, "frames_valid": frames}, starts)

    def embedder(self, hidden_size: int, vocab_size: int, groups: Groups = SINGLE) -> nn.Module:
        return AudioEmbedder(self.settings, hidden_size)

    def describe(self, value: np.ndarray, token: int) -> dict[str, Any]:
        return {"seconds": [round(second, 4) for second in self._seconds(token)]}

    def draw(self, value: np.ndarray, token: int) -> tuple[PIL.Image.Image, tuple[float, float, float, float]] | None:
        """The spectrogram: low pitch at the bottom, loud is dark."""
        low, high = float(value.min()), float(value.max())
        grey = 255 * (1 - (value[::-1] - low) / max(high - low, 1e-6))
        shares = (
            frame / value.shape[1] for frame in (token * self.settings.patch, (token + 1) * self.settings.patch)
        )
        left, right = (min(1.0, share) for share in shares)
        return PIL.Image.fromarray(grey.astype(np.uint8)).convert("RGB"), (left, 0.0, right, 1.0)

    def sound(self, data: bytes) -> tuple[np.ndarray, int] | None:
        """The clip that the spectrogram is of: without silent ends, and at the configured rate."""
        with quarantine("audio"):
            wave = self._prepared(*self._read(data, None))
        peak = max(1.0, float(np.abs(wave).max(initial=0)))
        rate = self.settings.sample_rate
        return wave[: int(self.settings.max_seconds * rate)] / np.float32(peak), rate

    def _seconds(self, token: int) -> tuple[float, float]:
        """Start and end of a token in the clip without its silent ends: frame f is at f hops."""
        second = self.settings.patch * self.settings.hop_length / self.settings.sample_rate
        return token * second, (token + 1) * second

    def example(self, rng: np.random.Generator, vocab_size: int = 0) -> np.ndarray:
        frames = self.settings.patch * int(rng.integers(1, self.max_tokens + 1))
        return rng.normal(size=(self.settings.n_mels, frames)).astype(np.float32)

    def _read(self, data: bytes, rng: np.random.Generator | None) -> tuple[np.ndarray, int]:
        """Mono float32 and its rate; of a longer clip no more than can be needed."""
        settings = self.settings
        try:
            with open_audio(data) as file:
                wanted, start = int(settings.max_seconds * file.samplerate), 0
                if rng is not None and settings.crop == "random" and file.frames > wanted:
                    start = int(rng.integers(file.frames - wanted + 1))
                # Twice the longest clip leaves room for silence that is trimmed and for a fast tempo.
                return read_mono(file, 2 * wanted, start), file.samplerate
        except ValueError as error:
            raise BadSampleError(str(error)) from None

    def _prepared(self, wave: np.ndarray, rate: int) -> np.ndarray:
        """At the configured rate, without silent ends, and with a peak of 1 where loudness does not matter."""
        settings = self.settings
        peak = max(float(wave.max(initial=0)), -float(wave.min(initial=0)))
        if not np.isfinite(peak):
            raise BadSampleError("audio holds NaN or infinite samples")
        if peak > 0:
            wave = wave / peak  # before soxr, where loud floats would overflow
        if rate != settings.sample_rate:
            wave = soxr.resample(wave, rate, settings.sample_rate, quality=QUALITIES[settings.resampling])
        if settings.trim:
            wave = _trim(wave, settings.sample_rate)
        return wave if settings.normalization == "per_clip" or not peak else wave * np.float32(peak)

    def _log_mel(self, wave: np.ndarray, tempo: float, filters: np.ndarray) -> np.ndarray:
        settings = self.settings
        hop = settings.hop_length * tempo
        frames = 1 + int(wave.shape[0] / hop)
        if frames > settings.max_frames:
            frames = settings.max_frames
            self.cut += 1
        starts = (np.arange(frames) * hop).astype(np.int64)
        half = settings.n_fft // 2
        windows = sliding_window_view(np.pad(wave, (half, settings.n_fft + half)), settings.n_fft)
        mel = np.empty((settings.n_mels, frames), dtype=np.float32)
        with blas().limit(limits=1, user_api="blas"):  # more threads would wait for one another on cores in use
            for first in range(0, frames, BLOCK):
                spectrum = np.fft.rfft(windows[starts[first : first + BLOCK]] * self._window)
                power = np.square(spectrum.real) + np.square(spectrum.imag)
                mel[:, first : first + BLOCK] = filters @ power.T
        return np.log10(np.maximum(mel, np.float32(FLOOR)))

    def _normalized(self, mel: np.ndarray) -> np.ndarray:
        if self.settings.normalization == "per_clip":
            mel = np.maximum(mel, mel.max() - np.float32(FLOOR_DECADES))
            return (mel - mel.mean()) / np.float32(LOG_STD)
        return (mel - np.float32(self.settings.mean)) / np.float32(self.settings.std)


def mel_filters(config: AudioSettings, warp: float = 1.0) -> np.ndarray:
    """Triangles [n_mels, n_fft // 2 + 1] on the mel scale, all bands moved up by ``warp``."""
    top = config.highest
    to_mel, to_hertz = SCALES[config.mel_scale]
    points = to_hertz(np.linspace(to_mel(np.array(config.fmin)), to_mel(np.array(top)), config.n_mels + 2))
    points = np.minimum(points * warp, top)
    bins = np.linspace(0, config.sample_rate / 2, config.n_fft // 2 + 1)
    left, centre, right = points[:-2, None], points[1:-1, None], points[2:, None]
    rising = (bins - left) / np.maximum(centre - left, 1e-6)
    falling = (right - bins) / np.maximum(right - centre, 1e-6)
    filters = np.maximum(0, np.minimum(rising, falling))
    if config.mel_scale == "slaney":
        filters *= 2 / np.maximum(right - left, 1e-6)
    return filters.astype(np.float32)


def _htk(hertz: np.ndarray) -> np.ndarray:
    return 2595 * np.log10(1 + hertz / 700)


def _htk_hertz(mel: np.ndarray) -> np.ndarray:
    return 700 * (10 ** (mel / 2595) - 1)


def _slaney(hertz: np.ndarray) -> np.ndarray:
    """Linear up to 1000 Hz (15 mel), from there on 27 mel for a factor of 6.4 (Auditory Toolbox, 1998)."""
    return np.where(hertz < 1000, hertz * 3 / 200, 15 + 27 * np.log(np.maximum(hertz, 1000) / 1000) / np.log(6.4))


def _slaney_hertz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27))


SCALES = {"htk": (_htk, _htk_hertz), "slaney": (_slaney, _slaney_hertz)}


def _trim(wave: np.ndarray, rate: int) -> np.ndarray:
    """Without the silence at both ends, except for a margin."""
    loud = np.abs(wave) > 10 ** (-TRIM_DECIBELS / 20)
    first, last = int(loud.argmax()) if loud.size else 0, len(loud) - int(loud[::-1].argmax()) if loud.size else 0
    if not loud.size or not loud[first]:
        return wave
    margin = int(TRIM_MARGIN * rate)
    return wave[max(0, first - margin) : last + margin]


def _spec_augment(mel: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random tilt over the band, one band of frames and one of mels silenced to the mean."""
    bands, frames = mel.shape
    tilt, width, start, height, low = rng.random(5)
    mel = mel + (TILT * (2 * tilt - 1) * np.linspace(-1, 1, bands, dtype=np.float32))[:, None]
    wide, high = int(width * TIME_MASK * frames), int(height * FREQUENCY_MASK * bands)
    first, lowest = int(start * (frames - wide + 1)), int(low * (bands - high + 1))
    mel[:, first : first + wide] = 0
    mel[lowest : lowest + high] = 0
    return mel


def _pad_frames(mel: np.ndarray, multiple: int) -> np.ndarray:
    missing = -mel.shape[1] % multiple
    if not missing:
        return np.ascontiguousarray(mel)
    return np.pad(mel, ((0, 0), (0, missing)), constant_values=float(mel.min()))
