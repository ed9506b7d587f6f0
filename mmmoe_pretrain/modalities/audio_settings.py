"""The settings of the audio modality: its log-mel spectrogram, what a token is, and the stem."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from mmmoe_pretrain.config.base import ModalitySettings

KERNEL = 5  # of the convolutional stem's layers that halve the frames


class AudioSettings(ModalitySettings):
    """The log-mel spectrogram, and the frames of a token (``patch``).

    Bands lie between ``fmin`` and ``fmax`` Hz (none: half of the sample rate), on the ``mel_scale`` of HTK, or of
    Slaney with triangles of equal area, as librosa and Whisper have it. ``resampling``: soxr's quality.

    ``normalization`` of log10 energies: per_clip (its peak at 1, less its mean), global (less ``mean``, by ``std``,
    which are those of a data set), or none. ``trim``: without silence at both ends. ``crop``: what is taken of a clip
    of more than ``max_seconds``, its start or, in training, a random part.
    """

    not_of_the_model = ("augment", "crop")

    kind: Literal["audio"] = "audio"
    sample_rate: int = Field(16_000, ge=4_000)  # Hz
    resampling: Literal["quick", "low", "medium", "high", "very_high"] = "medium"
    n_fft: int = Field(512, ge=16)
    hop_length: int = Field(160, ge=1)  # samples between two frames
    n_mels: int = Field(64, ge=8)
    fmin: float = Field(30.0, ge=0)
    fmax: float | None = Field(None, gt=0)
    mel_scale: Literal["htk", "slaney"] = "htk"
    normalization: Literal["per_clip", "global", "none"] = "per_clip"
    mean: float = 0.0
    std: float = Field(1.0, gt=0)
    trim: bool = True
    crop: Literal["start", "random"] = "start"
    max_seconds: float = Field(4.0, gt=0)
    patch: int = Field(8, ge=1)
    stem: Literal["linear", "conv"] = "conv"
    stem_channels: int = Field(64, ge=4)
    positions: Literal["learned", "rotary"] = "rotary"
    augment: bool = True

    @property
    def highest(self) -> float:
        """Hz."""
        return self.sample_rate / 2 if self.fmax is None else self.fmax

    @property
    def max_frames(self) -> int:
        """Frames of the longest clip, a multiple of ``patch``."""
        frames = 1 + int(self.max_seconds * self.sample_rate) // self.hop_length
        return -(-frames // self.patch) * self.patch

    @property
    def gap(self) -> int:
        """Tokens between two clips of a microbatch, as far as a layer of the convolutional stem sees."""
        return -(-(KERNEL // 2) // self.patch) if self.stem == "conv" else 0

    @model_validator(mode="after")
    def _band(self) -> Self:
        if not self.fmin < self.highest <= self.sample_rate / 2:
            raise ValueError(
                f"fmin {self.fmin:g} to fmax {self.highest:g} Hz is no band below half of sample_rate "
                f"{self.sample_rate}; lower them, or raise sample_rate"
            )
        if self.normalization != "global" and (self.mean, self.std) != (0.0, 1.0):
            raise ValueError(f"mean and std need normalization: global, and it is {self.normalization}")
        return self

    @model_validator(mode="after")
    def _power_of_two(self) -> Self:
        if self.stem == "conv" and self.patch & (self.patch - 1):
            raise ValueError(
                f"stem conv of audio halves the frames step by step, so patch must be a power of two, not "
                f"{self.patch}; use 8 or stem: linear"
            )
        return self
