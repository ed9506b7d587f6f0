"""Sound: the codec (bytes -> log-mel [n_mels, frames]) and the embedder (-> tokens).

Owns decoding, resampling, the log-mel spectrogram, the light training augmentation and the stem.
Legend: n clips, F frames, D hidden size. Frames of a decoded clip are a multiple of ``patch``.
The whole analysis is numpy, so that a forked worker never touches torch's threads.

Tempo and vocal tract are perturbed inside the analysis, at no cost: frames are taken every
``hop * tempo`` samples, and the mel filters move by ``warp`` (VTLP, Jaitly and Hinton 2013).
Masks follow SpecAugment (arXiv 1904.08779).
"""

from __future__ import annotations

import io

import numpy as np
import soundfile
import soxr
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor, nn
from torch.nn import functional as F

from mmmoe_pretrain.config import AudioConfig
from mmmoe_pretrain.limits import sound_problem, sound_start_problem
from mmmoe_pretrain.modalities.errors import BadSampleError, quarantine
from mmmoe_pretrain.modalities.stem import ChannelNorm, stem_widths

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


class AudioCodec:
    """Decodes one clip; with a generator it also augments it. ``cut`` counts clips that were too long."""

    def __init__(self, config: AudioConfig) -> None:
        self.config = config
        self.cut = 0
        self._window = np.hanning(config.n_fft + 1)[:-1].astype(np.float32)
        self._filters = [mel_filters(config, warp) for warp in np.linspace(1 - WARP, 1 + WARP, NUM_WARPS)]

    def decode(self, data: bytes, rng: np.random.Generator | None = None) -> np.ndarray:
        """float32 log-mel [n_mels, frames]. Raises BadSampleError for anything that is no usable clip."""
        with quarantine("audio"):
            wave, rate = _read(data, self.config.max_seconds)
        wave = self._level(wave, rate)
        tempo = 1.0 if rng is None else 1 + TEMPO * (2 * rng.random() - 1)
        warp = NUM_WARPS // 2 if rng is None else int(rng.integers(NUM_WARPS))
        mel = self._log_mel(wave, tempo, self._filters[warp])
        return _pad_frames(mel if rng is None else _spec_augment(mel, rng), self.config.patch)

    def _level(self, wave: np.ndarray, rate: int) -> np.ndarray:
        """At the configured rate, with a peak of 1 (loudness does not matter), without silent ends."""
        peak = float(np.abs(wave).max(initial=0))
        if not np.isfinite(peak):
            raise BadSampleError("audio holds NaN or infinite samples")
        wave = wave / peak if peak > 0 else wave  # before soxr, where loud floats would overflow
        if rate != self.config.sample_rate:
            wave = soxr.resample(wave, rate, self.config.sample_rate, quality="MQ")
        return _trim(wave, self.config.sample_rate)

    def _log_mel(self, wave: np.ndarray, tempo: float, filters: np.ndarray) -> np.ndarray:
        config = self.config
        hop = config.hop_length * tempo
        frames = 1 + int(wave.shape[0] / hop)
        if frames > config.max_frames:
            frames = config.max_frames
            self.cut += 1
        starts = (np.arange(frames) * hop).astype(np.int64)
        half = config.n_fft // 2
        wave = np.pad(wave, (half, config.n_fft + half))
        windows = sliding_window_view(wave, config.n_fft)[starts]
        windows *= self._window
        spectrum = np.fft.rfft(windows)
        power = np.square(spectrum.real) + np.square(spectrum.imag)
        mel = np.log10(np.maximum(filters @ power.T, 1e-10, dtype=np.float32))
        np.maximum(mel, mel.max() - FLOOR_DECADES, out=mel)
        return (mel - mel.mean()) / LOG_STD


def mel_filters(config: AudioConfig, warp: float = 1.0) -> np.ndarray:
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
    problem = sound_start_problem(data)
    if problem:
        raise BadSampleError(f"audio cannot be decoded: {problem}")
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        _check_header(file)
        # Twice the longest clip leaves room for silence that is trimmed and for a fast tempo.
        wanted = int(2 * max_seconds * file.samplerate)
        wave = file.read(min(file.frames, wanted), dtype="float32", always_2d=True)
        rate = file.samplerate
    if not wave.size:
        raise BadSampleError("audio has no samples")
    return wave[:, 0] if wave.shape[1] == 1 else wave.mean(axis=1), rate


def _check_header(file: soundfile.SoundFile) -> None:
    problem = sound_problem(file.samplerate, file.channels, file.frames)
    if problem:
        raise BadSampleError(f"audio {problem}")


def _trim(wave: np.ndarray, rate: int) -> np.ndarray:
    """Without the silence at both ends, save a margin."""
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

    Frames past the valid ones are zeroed before and after every layer that looks at neighbours, so
    a clip's tokens do not depend on how far its batch pads it.
    """

    def __init__(self, config: AudioConfig, hidden_size: int) -> None:
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
            self.positions = nn.Parameter(0.02 * torch.randn(config.max_tokens, hidden_size))

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
        self.conv = nn.Conv1d(inputs, outputs, 5, stride=stride, padding=2)
        self.norm = ChannelNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.norm(self.conv(x)))


class _Residual1d(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, 3, padding=1)
        self.norm = ChannelNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.gelu(self.norm(self.conv(x)))


def _widths(config: AudioConfig, hidden_size: int) -> list[int]:
    return stem_widths(config.stem_channels, max(1, config.patch.bit_length() - 1), hidden_size)


def _conv_layers(config: AudioConfig, hidden_size: int) -> list[nn.Module]:
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
