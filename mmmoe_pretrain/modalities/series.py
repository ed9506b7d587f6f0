"""Time series of sensors: arrays [channels, steps], cut into patches of steps (PatchTST, arXiv 2211.14730).

A step that was not measured is NaN: it is replaced by the channel's mean, and the embedder gets a mask of the
measured values. Legend: n series, C channels, N tokens of all series together, P steps a patch, D hidden size.
"""

from __future__ import annotations

import io
import math
import tokenize
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.lib import format as npy
from pydantic import Field
from torch import Tensor, nn

from mmmoe_pretrain.kinds import READS
from mmmoe_pretrain.modalities.base import BadSampleError, Collated, Modality, ModalitySettings, quarantine
from mmmoe_pretrain.modalities.transforms import Transform, of_time
from mmmoe_pretrain.parallel.groups import SINGLE, Groups
from mmmoe_pretrain.untrusted import brief

NOISE = 0.05  # of training, in standard deviations
SCALE = 0.1  # of training: the amplitude times 1 - SCALE to 1 + SCALE
SMALLEST_STD = 1e-6  # of a channel that is divided by it
LARGEST = 1e4  # standard deviations; beyond are error codes of sensors, and what half precision cannot hold


class SeriesSettings(ModalitySettings):
    """``normalize``: each channel of each series to mean 0 and standard deviation 1 (instance), or all of them
    divided by ``std`` (none)."""

    not_of_the_model = ("augment",)

    kind: Literal["series"] = "series"
    channels: int = Field(ge=1)
    max_steps: int = Field(512, ge=1)  # longer series are cut, and counted
    patch: int = Field(16, ge=1)  # steps a token
    normalize: Literal["instance", "none"] = "instance"
    std: float = Field(1.0, gt=0)
    positions: Literal["learned", "rotary"] = "rotary"
    augment: bool = True


class Series(Modality):
    """A value is float32 [channels, steps] with whole patches; NaN where nothing was measured."""

    Settings = SeriesSettings
    formats = READS["series"].formats
    hideable = True

    def decode(self, data: bytes, rng: np.random.Generator | None = None) -> np.ndarray | None:
        """See ``Modality.decode``. NumPy's ``.npy`` holds [channels, steps]; CSV has a line a step and no header."""
        with quarantine("series"):
            value = _read_npy(data) if data.startswith(npy.MAGIC_PREFIX) else _read_csv(data)
        if value.shape[0] != self.settings.channels:
            raise BadSampleError(
                f"series has {value.shape[0]} channels, and modalities.{self.name}.channels is "
                f"{self.settings.channels}"
            )
        if value.shape[1] > self.settings.max_steps:
            value = value[:, : self.settings.max_steps]
            self.cut += 1
        observed = np.isfinite(value)
        if not observed.any():
            return None
        value = np.where(observed, value, np.nan)
        instance = self.settings.normalize == "instance"
        with np.errstate(over="ignore", invalid="ignore"):
            value = _normalized(value, observed) if instance else value / self.settings.std
        if not np.abs(value[observed]).max() <= LARGEST:  # or it is no number any more
            raise BadSampleError(
                f"series holds numbers beyond {LARGEST:g} standard deviations; put NaN where nothing was measured, "
                f"or correct modalities.{self.name}.std"
            )
        if rng is not None and self.settings.augment:
            value = value * (1 + SCALE * (2 * rng.random() - 1)) + NOISE * rng.standard_normal(value.shape)
        missing = -value.shape[1] % self.settings.patch
        return np.pad(value, ((0, 0), (0, missing)), constant_values=np.nan).astype(np.float32)

    def num_tokens(self, value: np.ndarray) -> int:
        return int(value.shape[1] // self.settings.patch)

    @property
    def max_tokens(self) -> int:
        return int(-(-self.settings.max_steps // self.settings.patch))

    def _patches(self, value: np.ndarray) -> np.ndarray:
        """[tokens, channels, patch]."""
        return value.reshape(self.settings.channels, -1, self.settings.patch).swapaxes(0, 1)

    def may_hide(self, value: np.ndarray) -> np.ndarray:
        """See ``Modality.may_hide``: tokens with a measured step."""
        return np.flatnonzero(np.isfinite(self._patches(value)).any(axis=(1, 2)))

    @property
    def transforms(self) -> Mapping[str, Transform]:
        return of_time(self.settings.patch, math.nan)

    def hide(self, value: np.ndarray, hidden: np.ndarray) -> np.ndarray:
        """See ``Modality.hide``: as if its steps had not been measured."""
        return np.where(hidden.repeat(self.settings.patch), np.float32(np.nan), value)

    def contents(self, value: np.ndarray) -> np.ndarray:
        return self._patches(value).reshape(self.num_tokens(value), -1)

    def rebuilt(self, content: np.ndarray) -> np.ndarray:
        """See ``Modality.rebuilt``; normalised as the values are."""
        patches = content.reshape(len(content), self.settings.channels, self.settings.patch)
        return patches.swapaxes(0, 1).reshape(self.settings.channels, -1).astype(np.float32)

    @property
    def content_size(self) -> int:
        return int(self.settings.channels * self.settings.patch)

    def collate(self, values: Sequence[np.ndarray]) -> Collated:
        patch, channels = self.settings.patch, self.settings.channels
        tokens = np.asarray([self.num_tokens(value) for value in values], dtype=np.int64)
        patches = [self._patches(value) for value in values]
        steps = np.concatenate([np.zeros((0, channels, patch), dtype=np.float32), *patches])
        positions = np.concatenate([np.zeros(0, dtype=np.int64), *(np.arange(n) for n in tokens.tolist())])
        observed = np.isfinite(steps)
        arrays = {"steps": np.where(observed, steps, 0), "observed": observed, "positions": positions}
        return Collated(arrays, np.cumsum(tokens) - tokens)

    def embedder(self, hidden_size: int, vocab_size: int, groups: Groups = SINGLE) -> nn.Module:
        return SeriesEmbedder(self.settings, hidden_size)

    def describe(self, value: np.ndarray, token: int) -> dict[str, Any]:
        return {"steps": [token * self.settings.patch, (token + 1) * self.settings.patch]}

    def example(self, rng: np.random.Generator, vocab_size: int = 0) -> np.ndarray:
        steps = self.settings.patch * int(rng.integers(1, self.max_tokens + 1))
        return rng.normal(size=(self.settings.channels, steps)).astype(np.float32)


class SeriesEmbedder(nn.Module):
    """steps [N, C, P], observed [N, C, P] -> [N, D]; ``positions`` [N] count from the start of each series."""

    def __init__(self, settings: SeriesSettings, hidden_size: int) -> None:
        super().__init__()
        self.project = nn.Linear(2 * settings.channels * settings.patch, hidden_size)
        self.positions: nn.Parameter | None = None
        if settings.positions == "learned":
            self.positions = nn.Parameter(0.02 * torch.randn(-(-settings.max_steps // settings.patch), hidden_size))

    def forward(self, steps: Tensor, observed: Tensor, positions: Tensor) -> Tensor:
        both = torch.cat([steps.flatten(1), observed.flatten(1)], dim=1)
        rows = self.project(both.to(self.project.weight.dtype))
        return rows if self.positions is None else rows + self.positions[positions]


def _normalized(value: np.ndarray, observed: np.ndarray) -> np.ndarray:
    count = np.maximum(observed.sum(1, keepdims=True), 1)
    mean = np.where(observed, value, 0).sum(1, keepdims=True) / count
    deviation = np.where(observed, value - mean, 0)
    std = np.sqrt(np.square(deviation).sum(1, keepdims=True) / count)
    return (value - mean) / np.where(std > SMALLEST_STD, std, 1)


def _read_npy(data: bytes) -> np.ndarray:
    """Checked against the file's size before memory is asked for; nothing is unpickled."""
    file = io.BytesIO(data)
    version = npy.read_magic(file)
    read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    try:
        shape, by_column, dtype = read_header(file)
    except (tokenize.TokenError, MemoryError) as error:  # of Python's parser, which NumPy gives the header to
        raise BadSampleError(f"series has a header that cannot be read: {type(error).__name__}") from None
    if len(shape) != 2 or dtype.kind not in "fiu" or 0 in shape:
        raise BadSampleError(f"series is {dtype} {list(shape)}, not numbers [channels, steps]")
    if shape[0] * shape[1] * dtype.itemsize != len(data) - file.tell():
        raise BadSampleError(f"series says that it is {dtype} {list(shape)}, and its file has another size")
    numbers = np.frombuffer(data, dtype, offset=file.tell())
    return numbers.reshape(shape, order="F" if by_column else "C").astype(np.float64)


def _read_csv(data: bytes) -> np.ndarray:
    rows = [line.split(",") for line in data.decode("utf-8-sig").splitlines() if line.strip()]
    if not rows or len({len(row) for row in rows}) != 1:
        raise BadSampleError("series in CSV has no lines, or lines of different length")
    return np.asarray([list(map(_number, row)) for row in rows]).T


def _number(cell: str) -> float:
    try:
        return float(cell) if cell.strip() else math.nan
    except ValueError:
        raise BadSampleError(f"series in CSV holds {brief(cell)}, which is not a number") from None
