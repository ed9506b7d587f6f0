"""Classification: a linear head on a representation gives each class a logit, and the label of a sample is a field of
its JSON. The loss is the mean cross-entropy over the samples of the step that have the representation and a label.

The head stands in the model beside the language heads (``MMMoE.class_heads``), so that held-out samples are scored by
the same outputs as those of training. It reads the projected vector before that gets unit length.

Shapes: B samples of a microbatch, P joint space, C classes.
"""

from __future__ import annotations

import functools
from typing import Annotated, Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor

from mmmoe_pretrain.batch import Batch, send
from mmmoe_pretrain.objectives.base import ObjectiveModule, Outputs
from mmmoe_pretrain.objectives.pooled import OneRepresentationSettings, PooledObjective
from mmmoe_pretrain.parallel.groups import Groups

MOST_CLASSES = 1 << 16


def _names(value: Any) -> Any:
    """Numbers in a list are names, too."""
    if isinstance(value, list | tuple) and (wrong := [one for one in value if type(one) in (bool, float)]):
        raise ValueError(f"classes has {wrong[0]!r}, which is no text; write it in quotes, as the samples have it")
    return [str(one) if type(one) is int else one for one in value] if isinstance(value, list | tuple) else value


class ClassifySettings(OneRepresentationSettings):
    """``field``: of a sample's JSON, with its label. ``classes``: the values of that field that are classes, or their
    number, where the values are ``0``, ``1`` and so on. Samples with another value take no part.
    ``label_smoothing``: the share of a target that is spread evenly over the classes (arXiv 1512.00567)."""

    kind: Literal["classify"] = "classify"
    field: str = Field("label", min_length=1)
    classes: Annotated[int | tuple[str, ...], BeforeValidator(_names)]
    label_smoothing: float = Field(0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _several_once(self) -> Self:
        if isinstance(self.classes, int) and not 2 <= self.classes <= MOST_CLASSES:
            raise ValueError(f"classes {self.classes}: give a number from 2 to {MOST_CLASSES}, or a list of values")
        names = () if isinstance(self.classes, int) else self.classes
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice or (not isinstance(self.classes, int) and len(names) < 2):
            raise ValueError(
                f"classes {list(names)} {f'names {twice[0]!r} twice' if twice else 'has fewer than two'}; name every "
                f"class once, and two or more"
            )
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Of the classes, in the order of the logits."""
        return tuple(map(str, range(self.classes))) if isinstance(self.classes, int) else self.classes


class Classify(PooledObjective):
    """See the module."""

    Settings = ClassifySettings

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.classes = self.settings.names

    @functools.cached_property
    def numbers(self) -> dict[str, int]:
        """Of the classes, by name."""
        return {name: number for number, name in enumerate(self.classes)}

    def labels(self, batch: Batch) -> Tensor:
        """int64 [B]: the class of each sample that takes part, else -1."""
        found = torch.tensor([self.numbers.get(meta.get(self.settings.field), -1) for meta in batch.metas])
        pooled_B = batch.pooled[self.settings.of]
        return send(found.to(torch.int64), pooled_B.device).masked_fill(pooled_B < 0, -1)

    @property
    def losses(self) -> dict[str, float]:
        return {self.name: 1.0}

    def counts(self, batch: Batch) -> dict[str, int]:
        return {self.name: int((self.labels(batch) >= 0).sum())}

    def module(self, embedding_size: int) -> ObjectiveModule:
        return _CrossEntropy(self)

    def needs(self) -> dict[str, set[str]]:
        return self.ways(f"of {self.settings.of}", (self.settings.of,))

    def flops(self, embedding_size: int, samples: float) -> float:
        return 2 * embedding_size * len(self.classes)

    def why_idle(self, loss: str, count: int, so_far: str) -> str:
        shown = f"{', '.join(self.classes[:5])}{', ...' * (len(self.classes) > 5)}"
        return (
            f"objectives.{self.name} was 0 over {count} terms {so_far}: no sample with {self.settings.of} has one of "
            f"its classes ({shown}) in the field {self.settings.field}. Correct its field or classes, or set its "
            f"weight: 0"
        )


class _CrossEntropy(ObjectiveModule):
    def __init__(self, objective: Classify) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, outputs: Outputs, batch: Batch, groups: Groups) -> dict[str, Tensor]:
        """The sum of the cross-entropies in nats over this rank's samples with a label."""
        name = self.objective.name
        smoothing, labels_B = self.objective.settings.label_smoothing, self.objective.labels(batch)
        logits_BC = outputs.class_logits[name].float()
        nll_B = F.cross_entropy(logits_BC, labels_B.clamp(min=0), reduction="none", label_smoothing=smoothing)
        return {name: (nll_B * (labels_B >= 0)).sum()}
