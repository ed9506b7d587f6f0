"""The stem of audio: log-mel frames -> the embeddings of tokens. n clips, F frames, C channels, D hidden size."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmmoe_pretrain.modalities.audio_settings import KERNEL, AudioSettings
from mmmoe_pretrain.modalities.stem import ChannelNorm, stem_widths

RESIDUAL_KERNEL = 3


class AudioEmbedder(nn.Module):
    """Log-mel [1, n_mels, F] of n clips as ``collate`` lays them out, and their frames [n] -> [F / patch, D].

    Frames that are not of a clip are zeroed before and after every layer with a receptive field of several frames,
    and such a field is no wider than the gap between two clips: a clip's tokens do not depend on the others.
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
        within, valid = _places(frames_valid, log_mel.shape[2], self.config)
        x = _mask(log_mel.to(self.project.weight.dtype), valid)
        for layer in self.layers:
            x = layer(x)
            if isinstance(layer, _Halve):
                valid = valid[:: layer.stride]
            x = _mask(x, valid)
        tokens = self.project(x).transpose(1, 2)  # [1, F / patch, D]
        if self.positions is not None:
            place = within[:: self.config.patch] // self.config.patch
            tokens = tokens + self.positions[place.clamp(max=len(self.positions) - 1)]  # of gaps: any
        return tokens.flatten(0, 1)


def _places(frames: Tensor, total: int, config: AudioSettings) -> tuple[Tensor, Tensor]:
    """Of each of ``total`` frames: its number in its clip, and whether it is one of the clip's ``frames`` [n]."""
    frame = torch.arange(total, device=frames.device)
    if not len(frames):
        return frame, frame < 0
    taken = ((frames + config.patch - 1) // config.patch + config.gap) * config.patch
    start = taken.cumsum(0) - taken
    clip = torch.searchsorted(start, frame, right=True) - 1
    within = frame - start[clip]
    return within, within < frames[clip]


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
    """``x`` [n, C, F] with zeros in the frames that are not ``valid`` [F]."""
    return x.masked_fill(~valid, 0)
