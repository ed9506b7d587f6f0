"""Word vectors as semantic anchors (DeViSE, Frome et al., NIPS 2013): a learned linear map M takes a representation
into the space of word vectors, near the anchor of its sample.

The anchor is the mean of the vectors of the words of one of the sample's texts, or of a field of its JSON such as
``label``, with norm 1. The loss of a sample is a hinge rank: the mean over its negatives a' of
max(0, margin - a M v + a' M v). Negatives are the anchors of the global microbatch that are of another group and
another vector; DeViSE sums over all classes. A sample without the representation or a known word takes no part.

Vectors are of `mmmoe-data words`; they are not trained here.

Shapes: B samples of a microbatch, G samples of a global microbatch, P joint space, W space of word vectors.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmmoe_pretrain import kinds
from mmmoe_pretrain.batch import Batch, Sample
from mmmoe_pretrain.config.base import ModalitySettings, PathText, StepSizes
from mmmoe_pretrain.kinds import nearest
from mmmoe_pretrain.modalities.word_vectors import WordVectors
from mmmoe_pretrain.objectives.base import ObjectiveModule, Outputs
from mmmoe_pretrain.objectives.pooled import OneRepresentationSettings, PooledObjective
from mmmoe_pretrain.parallel.collectives import gather_rows
from mmmoe_pretrain.parallel.groups import Groups


class SemanticAnchorsSettings(OneRepresentationSettings):
    """``text``: the modality whose texts have the words, or
    ``field``: the field of a sample's JSON that has them. ``vectors``: the file of `mmmoe-data words`; ``size``: the
    numbers of a vector. ``fingerprint``: of that file; filled in when the run starts."""

    file_setting = "vectors"

    kind: Literal["semantic_anchors"] = "semantic_anchors"
    text: str = ""
    field: str = ""
    vectors: PathText
    size: int = Field(ge=1, le=1 << 16)
    margin: float = Field(0.1, gt=0, le=2)
    fingerprint: str = ""

    @model_validator(mode="after")
    def _one_source_of_words(self) -> Self:
        if bool(self.text) == bool(self.field):
            raise ValueError("give the modality of the words as text, or the field of a sample's JSON as field: one")
        return self

    def check_names(
        self, name: str, modalities: Mapping[str, ModalitySettings], representations: Mapping[str, tuple[str, ...]]
    ) -> None:
        """See ``ObjectiveSettings.check_names``."""
        super().check_names(name, modalities, representations)
        readers = [one for one, its in modalities.items() if kinds.MODALITIES.load(its.kind).needs_tokenizer]
        if self.text and self.text not in readers:
            raise ValueError(
                f"objectives.{name}.text {self.text} is no modality of texts; "
                f"{nearest(self.text, readers, 'there are') if readers else 'name a field of the JSON as field'}"
            )

    def with_file(self) -> Self:
        """See ``ObjectiveSettings.with_file``."""
        return self.model_copy(update={"fingerprint": self.read().fingerprint})

    def read(self) -> WordVectors:
        """The vectors. Raises ValueError where they are not those of the run, or of another size."""
        vectors = WordVectors(self.vectors, expected_fingerprint=self.fingerprint)
        if vectors.size != self.size:
            raise ValueError(
                f"the word vectors {self.vectors} have {vectors.size} numbers each, and the objective has size "
                f"{self.size}; set size: {vectors.size}, or name another file"
            )
        return vectors

    def batch_problem(self, name: str, sizes: StepSizes) -> str | None:
        """See ``ObjectiveSettings.batch_problem``."""
        if not self.on or sizes.global_batch_size > sizes.num_microbatches:
            return None
        return (
            f"train.global_batch_size {sizes.global_batch_size} in train.num_microbatches {sizes.num_microbatches}: "
            f"with one sample a microbatch objectives.{name} has no negatives; use train.global_batch_size "
            f"{2 * sizes.num_microbatches} or more, or objectives.{name}.weight: 0"
        )


class SemanticAnchors(PooledObjective):
    """Has its representation of samples without an anchor, too, since lengths are known without words; the file of
    vectors is read for the first sample with words."""

    Settings = SemanticAnchorsSettings

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.anchor_size = self.settings.size

    @functools.cached_property
    def vectors(self) -> WordVectors:
        return self.settings.read()

    def anchor(self, sample: Sample) -> np.ndarray | None:
        """See ``Objective.anchor``."""
        settings = self.settings
        if settings.field:
            words = sample.meta.get(settings.field)
        else:
            words = next((item.raw for item in sample.items if item.modality == settings.text and item.raw), "")
        return self.vectors.mean(words) if words else None

    def class_features(self, module: ObjectiveModule, names: Sequence[str]) -> np.ndarray:
        """See ``Objective.class_features``: of the anchor a of a name, a M."""
        empty = np.zeros(self.settings.size, dtype=np.float32)
        found = [self.vectors.mean(name) for name in names]
        anchors_CW = np.stack([empty if anchor is None else anchor for anchor in found])
        return anchors_CW @ module.get_parameter("map").detach().float().cpu().numpy()

    @property
    def losses(self) -> dict[str, float]:
        return {f"{self.name}/{self.settings.of}": 1.0}

    def counts(self, batch: Batch) -> dict[str, int]:
        return {f"{self.name}/{self.settings.of}": int(self.taking_part(batch).sum())}

    def taking_part(self, batch: Batch) -> Tensor:
        """bool [B]: the samples with both the representation and an anchor."""
        return (batch.pooled[self.settings.of] >= 0) & batch.anchors[self.name].present

    def module(self, embedding_size: int) -> ObjectiveModule:
        return _HingeRank(self, embedding_size)

    def needs(self) -> dict[str, set[str]]:
        words = {self.settings.text} if self.settings.text else set()
        return {what: way | words for what, way in self.ways(f"of {self.settings.of}", (self.settings.of,)).items()}

    def flops(self, embedding_size: int, samples: float) -> float:
        return 2 * self.settings.size * (embedding_size + samples)  # the map, and products with all anchors

    def why_idle(self, loss: str, count: int, so_far: str) -> str:
        settings = self.settings
        words = f"the field {settings.field}" if settings.field else settings.text
        if count:
            return (
                f"objectives.{self.name} was 0 {so_far}: each sample is nearest to its own anchor by the margin "
                f"{settings.margin:g}, or no sample met an anchor of another group. Raise its margin, or lower "
                f"train.num_microbatches"
            )
        return (
            f"objectives.{self.name} had no sample with {settings.of} and a word of {words} that has a vector "
            f"{so_far}. Train vectors on such texts by mmmoe-data words, or give the data such samples"
        )


class _HingeRank(ObjectiveModule):
    """The map into the space of word vectors."""

    def __init__(self, objective: SemanticAnchors, embedding_size: int) -> None:
        super().__init__()
        self.objective, self.settings = objective, objective.settings
        self.map = nn.Parameter(torch.empty(objective.settings.size, embedding_size))

    def forward(self, outputs: Outputs, batch: Batch, groups: Groups) -> dict[str, Tensor]:
        """The sum of the hinge losses over this rank's samples."""
        anchors, name = batch.anchors[self.objective.name], self.objective.name
        mapped_BW = outputs.features[self.settings.of].float() @ self.map.float().t()
        flags_BF = torch.stack([anchors.present.to(torch.int64), batch.group_ids, anchors.ids], dim=1)
        present_G, group_ids_G, ids_G = gather_rows(flags_BF, groups.data).unbind(1)
        scores_BG = mapped_BW @ gather_rows(anchors.vectors, groups.data).t()
        own_B1 = (mapped_BW * anchors.vectors).sum(dim=1, keepdim=True)
        negative_BG = (batch.group_ids[:, None] != group_ids_G) & (anchors.ids[:, None] != ids_G) & present_G.bool()
        hinge_BG = (self.settings.margin - own_B1 + scores_BG).clamp(min=0) * negative_BG
        mean_B = hinge_BG.sum(dim=1) / negative_BG.sum(dim=1).clamp(min=1)
        return {f"{name}/{self.settings.of}": (mean_B * self.objective.taking_part(batch)).sum()}
