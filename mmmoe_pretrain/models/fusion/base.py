"""The base class of representation kinds: the module that makes one vector of a sample's segments.

A fusion module is on the last pipeline stage, between the trunk and a joint head, in fp32. Under tensor parallelism
every rank holds all of it and computes it from the same numbers, as it does with joint heads: gradients are whole on
each rank, and engines average them (``cuts.computed_alike``).

Shapes: n tokens of the stream, B samples, P parts (segments of a representation), D hidden size, W of the result.
"""

from __future__ import annotations

import abc
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmmoe_pretrain import kinds
from mmmoe_pretrain.batch import Spans
from mmmoe_pretrain.config import ModelConfig
from mmmoe_pretrain.config.base import RepresentationSettings

PARTS = "parts"  # name of the dictionaries of modules or parameters by modality
MASKED = -1e4  # a logit that weighs nothing; finite, so that a sample without any part has a gradient of zero


class Fusion(nn.Module, abc.ABC):
    """A kind has ``Settings``, ``forward`` and the ``width`` of its result. Parameters of a part are kept in
    dictionaries called ``PARTS``, so that initial weights do not depend on the names of modalities."""

    Settings: ClassVar[type[RepresentationSettings]]
    width: int

    def __init__(self, settings: Any, model: ModelConfig) -> None:
        super().__init__()
        self.width = model.hidden_size

    @abc.abstractmethod
    def forward(self, x_nD: Tensor, mean_PBD: Tensor, present_PB: Tensor, spans_P: tuple[Spans, ...]) -> Tensor:
        """[B, W] of the trunk's output and the mean of each part, in fp32. An absent part has a mean of zero; rows of
        samples that lack the representation do not matter, but must be finite. ``spans_P``: of the parts' tokens, if
        the settings ask for them (``reads_tokens``). Runs on every rank, also without a sample or a token, and uses
        all of its parameters."""


def build_fusion(settings: RepresentationSettings, model: ModelConfig) -> Fusion:
    """The module of a representation with these settings."""
    fusion = kinds.REPRESENTATIONS.load(settings.kind)(settings, model)
    assert isinstance(fusion, Fusion), type(fusion)
    return fusion


def softmax_over_present(logit_PB: Tensor, present_PB: Tensor) -> Tensor:
    """[P, B, ...]: weights of the present parts of each sample, which add up to one."""
    absent = ~present_PB.view(*present_PB.shape, *[1] * (logit_PB.ndim - 2))
    return torch.softmax(logit_PB.masked_fill(absent, MASKED), dim=0)
