"""Audio: bytes -> log-mel [n_mels, frames], and the stem that embeds it.

Owns decoding, resampling, the log-mel spectrogram, the light training augmentation and the stem.
Legend: n clips, F frames, D hidden size. Frames of a decoded clip are a multiple of ``patch``.
The whole analysis is numpy, so that a forked worker never touches torch's threads.

Tempo and vocal tract are perturbed inside the analysis, at no cost: frames are taken every
``hop * tempo`` samples, and the mel filters move by ``warp`` (VTLP, Jaitly and Hinton 2013).
Masks follow SpecAugment (arXiv 1904.08779).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal, Self

import numpy as np
import PIL.Image
import soxr
import torch
from numpy.lib.stride_tricks import sliding_window_view
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from mmmoe_pretrain.modalities.audio_file import open_audio, read_mono
from mmmoe_pretrain.modalities.base import BadSampleError, Collated, Modality, ModalitySettings, quarantine
from mmmoe_pretrain.modalities.stem import ChannelNorm, stem_widths
from mmmoe_pretrain.modalities.tokenizer import Tokenizer
from mmmoe_pretrain.parallel.groups import SINGLE, Groups

FMIN = 30.0  # Hz
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
KERNEL, RESIDUAL_KERNEL = 5, 3  # of the convolutional stem


class AudioSettings(ModalitySettings):
    """The log-mel spectrogram, and the frames of a token (``patch``)."""

    not_of_the_model = ("augment",)

    kind: Literal["audio"] = "audio"
    sample_rate: int = Field(16_000, ge=4_000)  # Hz
    n_fft: int = Field(512, ge=16)
    hop_length: int = Field(160, ge=1)  # samples between two frames
    n_mels: int = Field(64, ge=8)
    max_seconds: float = Field(4.0, gt=0)
    patch: int = Field(8, ge=1)
    stem: Literal["linear", "conv"] = "conv"
    stem_channels: int = Field(64, ge=4)
    positions: Literal["learned", "rotary"] = "rotary"
    augment: bool = True

    @property
    def max_frames(self) -> int:
        """Frames of the longest clip, a multiple of ``patch``."""
        frames = 1 + int(self.max_seconds * self.sample_rate) // self.hop_length
        return -(-frames // self.patch) * self.patch

    @model_validator(mode="after")
    def _power_of_two(self) -> Self:
        if self.stem == "conv" and self.patch & (self.patch - 1):
            raise ValueError(
                f"stem conv of audio halves the frames step by step, so patch must be a power of two, not "
                f"{self.patch}; use 8 or stem: linear"
            )
        return self


class Audio(Modality):
    """A value is float32 log-mel [n_mels, frames]; a token is ``patch`` frames."""

    Settings = AudioSettings
    formats = ("flac", "ogg", "oga", "opus", "wav", "wave", "mp3")

    def __init__(self, name: str, settings: Any, tokenizer: Tokenizer | None = None) -> None:
        super().__init__(name, settings, tokenizer)
        self._window = np.hanning(settings.n_fft + 1)[:-1].astype(np.float32)

    @functools.cached_property
    def _filters(self) -> list[np.ndarray]:
        return [mel_filters(self.settings, warp) for warp in np.linspace(1 - WARP, 1 + WARP, NUM_WARPS)]

    def decode(self, data: bytes, rng: np.random.Generator | None = None) -> np.ndarray | None:
        """See ``Modality.decode``."""
        with quarantine("audio"):
            wave, rate = _read(data, self.settings.max_seconds)
        if not self.settings.augment:
            rng = None
        wave = self._level(wave, rate)
        tempo = 1.0 if rng is None else 1 + TEMPO * (2 * rng.random() - 1)
        warp = NUM_WARPS // 2 if rng is None else int(rng.integers(NUM_WARPS))
        mel = self._log_mel(wave, tempo, self._filters[warp])
        mel = mel if rng is None else _spec_augment(mel, rng)  # which draws in fp64
        return _pad_frames(mel, self.settings.patch).astype(np.float32, copy=False)

    def num_tokens(self, value: np.ndarray) -> int:
        return int(-(-value.shape[1] // self.settings.patch))

    @property
    def max_tokens(self) -> int:
        return int(self.settings.max_frames // self.settings.patch)

    def collate(self, values: Sequence[np.ndarray]) -> Collated:
        """Clips padded with their own silence to the longest one, in whole tokens."""
        frames = np.asarray([value.shape[1] for value in values], dtype=np.int64)
        rows = -(-int(frames.max(initial=1)) // self.settings.patch)
        log_mel = np.zeros((len(values), self.settings.n_mels, rows * self.settings.patch), dtype=np.float32)
        for row, value in zip(log_mel, values, strict=True):
            row[:, : value.shape[1]] = value
            row[:, value.shape[1] :] = value.min()
        return Collated({"log_mel": log_mel, "frames_valid": frames}, np.arange(len(values)) * rows)

    def embedder(self, hidden_size: int, vocab_size: int, groups: Groups = SINGLE) -> nn.Module:
        return AudioEmbedder(self.settings, hidden_size)

    def describe(self, value: np.ndarray, token: int) -> dict[str, Any]:
        return {"seconds": [round(second, 4) for second in self._seconds(token)]}

    def caption(self, value: np.ndarray, token: int) -> str:
        return "{:.2f} to {:.2f} s".format(*self._seconds(token))

    def draw(self, value: np.ndarray, token: int) -> tuple[PIL.Image.Image, tuple[float, float, float, float]] | None:
        """The spectrogram: low pitch at the bottom, loud is dark."""
        low, high = float(value.min()), float(value.max())
        grey = 255 * (1 - (value[::-1] - low) / max(high - low, 1e-6))
        shares = (
            frame / value.shape[1] for frame in (token * self.settings.patch, (token + 1) * self.settings.patch)
        )
        left, right = (min(1.0, share) for share in shares)
        return PIL.Image.fromarray(grey.astype(np.uint8)).convert("RGB"), (left, 0.0, right, 1.0)

    def _seconds(self, token: int) -> tuple[float, float]:
        """Start and end of a token in the clip without its silent ends: frame f is at f hops."""
        second = self.settings.patch * self.settings.hop_length / self.settings.sample_rate
        return token * second, (token + 1) * second

    def example(self, rng: np.random.Generator, vocab_size: int = 0) -> np.ndarray:
        frames = self.settings.patch * int(rng.integers(1, self.max_tokens + 1))
        return rng.normal(size=(self.settings.n_mels, frames)).astype(np.float32)

    def _level(self, wave: np.ndarray, rate: int) -> np.ndarray:
        """At the configured rate, with a peak of 1 (loudness does not matter), without silent ends."""
        peak = float(np.abs(wave).max(initial=0))
        if not np.isfinite(peak):
            raise BadSampleError("audio holds NaN or infinite samples")
        wave = wave / peak if peak > 0 else wave  # before soxr, where loud floats would overflow
        if rate != self.settings.sample_rate:
            wave = soxr.resample(wave, rate, self.settings.sample_rate, quality="MQ")
        return _trim(wave, self.settings.sample_rate)

    def _log_mel(self, wave: np.ndarray, tempo: float, filters: np.ndarray) -> np.ndarray:
        settings = self.settings
        hop = settings.hop_length * tempo
        frames = 1 + int(wave.shape[0] / hop)
        if frames > settings.max_frames:
            frames = settings.max_frames
            self.cut += 1
        starts = (np.arange(frames) * hop).astype(np.int64)
        half = settings.n_fft // 2
        wave = np.pad(wave, (half, settings.n_fft + half))
        windows = sliding_window_view(wave, settings.n_fft)[starts]
        windows *= self._window
        spectrum = np.fft.rfft(windows)
        power = np.square(spectrum.real) + np.square(spectrum.imag)
        mel = np.log10(np.maximum(filters @ power.T, 1e-10, dtype=np.float32))
        np.maximum(mel, mel.max() - FLOOR_DECADES, out=mel)
        return (mel - mel.mean()) / LOG_STD


def mel_filters(config: AudioSettings, warp: float = 1.0) -> np.ndarray:
    """Triangles [n_mels, n_fft // 2 + 1] on the HTK mel scale, all bands moved up by ``warp``."""
    top = config.sample_rate / 2
    points = 700 * (10 ** (np.linspace(_mel(FMIN), _mel(top), config.n_mels + 2) / 2595) - 1)
    points = np.minimum(points * warp, top)
    bins = np.linspace(0, top, config.n_fft // 2 + 1)
    left, centre, right = points[:-2, None], points[1:-1, None], points[2:, None]
    rising = (bins - left) / np.maximum(centre - left, 1e-6)
    falling = (right - bins) / np.maximum(right - centre, 1e-6)
    return np.maximum(0, np.minimum(rising, falling)).astype(np.float32)


def _mel(hertz: float) -> float:
    return 2595 * float(np.log10(1 + hertz / 700))


def _read(data: bytes, max_seconds: float) -> tuple[np.ndarray, int]:
    """Mono float32 and its rate; of a longer clip no more than can be needed."""
    try:
        with open_audio(data) as file:
            # Twice the longest clip leaves room for silence that is trimmed and for a fast tempo.
            return read_mono(file, int(2 * max_seconds * file.samplerate)), file.samplerate
    except ValueError as error:
        raise BadSampleError(str(error)) from None


def _trim(wave: np.ndarray, rate: int) -> np.ndarray:
    """Without the silence at both ends, except for a margin."""
    loud = np.flatnonzero(np.abs(wave) > 10 ** (-TRIM_DECIBELS / 20))
    if not loud.size:
        return wave
    margin = int(TRIM_MARGIN * rate)
    return wave[max(0, int(loud[0]) - margin) : int(loud[-1]) + margin + 1]


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


class AudioEmbedder(nn.Module):
    """Log-mel [n, n_mels, F] and valid frames [n] -> [n * F / patch, D].

    Frames past the valid ones are zeroed before and after every layer with a receptive field of several frames, so
    a clip's tokens do not depend on how far its batch pads it.
    """

    def __init__(self, config: AudioSettings, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(_conv_layers(config, hidden_size) if config.stem == "conv" else ())
        self.project = (
            nn.Conv1d(config.n_mels, hidden_size, config.patch, stride=config.patch)
            if config.stem == "linear"
            else nn.Conv1d(_widths(config, hidden_size)[-1], hidden_size, 1)
        )
        self.positions: nn.Parameter | None = None
        if config.positions == "learned":
            self.positions = nn.Parameter(0.02 * torch.randn(config.max_frames // config.patch, hidden_size))

    def forward(self, log_mel: Tensor, frames_valid: Tensor) -> Tensor:
        assert log_mel.shape[2] % self.config.patch == 0, (log_mel.shape, self.config.patch)
        x, valid = _mask(log_mel.to(self.project.weight.dtype), frames_valid), frames_valid
        for layer in self.layers:
            x = layer(x)
            if isinstance(layer, _Halve):
                valid = (valid + layer.stride - 1) // layer.stride
            x = _mask(x, valid)
        tokens = self.project(x).transpose(1, 2)  # [n, F / patch, D]
        if self.positions is not None:
            tokens = tokens + self.positions[: tokens.shape[1]]
        return tokens.flatten(0, 1)


class _Halve(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv1d(inputs, outputs, KERNEL, stride=stride, padding=2)
        self.norm = ChannelNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.norm(self.conv(x)))


class _Residual1d(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, RESIDUAL_KERNEL, padding=1)
        self.norm = ChannelNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.gelu(self.norm(self.conv(x)))


def _widths(config: AudioSettings, hidden_size: int) -> list[int]:
    return stem_widths(config.stem_channels, max(1, config.patch.bit_length() - 1), hidden_size)


def _conv_layers(config: AudioSettings, hidden_size: int) -> list[nn.Module]:
    widths = [config.n_mels, *_widths(config, hidden_size)]
    steps, stride = len(widths) - 1, 2 if config.patch > 1 else 1
    layers: list[nn.Module] = []
    for i in range(steps):
        layers.append(_Halve(widths[i], widths[i + 1], stride))
        if i >= steps - 2:
            layers.append(_Residual1d(widths[i + 1]))
    return layers


def _mask(x: Tensor, valid: Tensor) -> Tensor:
    """``x`` [n, C, F] with zeros in the frames from ``valid`` [n] on."""
    past_end = torch.arange(x.shape[2], device=x.device) >= valid[:, None]
    return x.masked_fill(past_end[:, None], 0)
