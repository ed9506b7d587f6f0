"""Early fusion: the parts are one segment, whose tokens attend to each other in every block of the trunk; the vector
is the mean over all of its tokens. Of one part it is the representation of a modality alone.

An absent part (``missing: allow``) has no tokens in the segment.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from mmmoe_pretrain.batch import Spans
from mmmoe_pretrain.config.base import RepresentationSettings
from mmmoe_pretrain.models.fusion.base import Fusion


class EarlySettings(RepresentationSettings):
    joined: ClassVar[bool] = True

    kind: Literal["early"] = "early"


class Early(Fusion):
    """See the module. It has no parameters."""

    Settings = EarlySettings

    def forward(self, x_nD: Tensor, mean_PBD: Tensor, present_PB: Tensor, spans_P: tuple[Spans, ...]) -> Tensor:
        return mean_PBD[0]
