"""A view of one modality: its value after transforms of its kind (``modalities/transforms.py``), as a segment of its
own. The vector is the mean over its tokens.

A contrastive loss between a modality and its view makes the representation invariant to the transforms:
pretext-invariant learning (PIRL, arXiv 1912.01991) with a jigsaw or a rotation, SimCLR (arXiv 2002.05709) with a
crop.
Between modalities and within each it is the objective of AVID (arXiv 2004.12943). A memory queue takes the place of
their memory banks.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from mmmoe_pretrain.batch import Spans
from mmmoe_pretrain.config.base import RepresentationSettings
from mmmoe_pretrain.models.fusion.base import Fusion


class ViewSettings(RepresentationSettings):
    """``transforms``: names of those of the modality's kind, done one after the other."""

    joined: ClassVar[bool] = True

    kind: Literal["view"] = "view"
    parts: tuple[str, ...] = Field(min_length=1, max_length=1)
    transforms: tuple[str, ...] = Field(min_length=1)

    @property
    def changes(self) -> tuple[str, ...]:
        """See ``RepresentationSettings.changes``."""
        return self.transforms


class View(Fusion):
    """See the module. It has no parameters."""

    Settings = ViewSettings

    def forward(self, x_nD: Tensor, mean_PBD: Tensor, present_PB: Tensor, spans_P: tuple[Spans, ...]) -> Tensor:
        return mean_PBD[0]
