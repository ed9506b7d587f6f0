"""What a user of the framework writes in a package of their own: a modality, a representation, an objective and a
router, a file each in real life. Entry points name them (``write_package``); nothing in mmmoe_pretrain is changed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from mmmoe_pretrain.batch import Batch, Sample, Segment, Spans
from mmmoe_pretrain.config import ModelConfig
from mmmoe_pretrain.config.base import ModalitySettings, ObjectiveSettings, RepresentationSettings
from mmmoe_pretrain.modalities.base import BadSampleError, Collated, Modality
from mmmoe_pretrain.models.fusion.base import Fusion
from mmmoe_pretrain.moe.routing import Choice, RouterInputs
from mmmoe_pretrain.objectives.base import Expected, Objective, ObjectiveModule, Outputs
from mmmoe_pretrain.parallel.groups import SINGLE, Groups


class PointSettings(ModalitySettings):
    kind: Literal["points"] = "points"
    max_points: int = 16
    positions: Literal["none"] = "none"


class Points(Modality):
    """Clouds of points in the plane: a text file of ``x y`` lines, a token a point."""

    Settings = PointSettings
    formats = ("xy",)

    def decode(self, data: bytes, rng: np.random.Generator | None = None) -> np.ndarray | None:
        try:
            value = np.asarray([[float(number) for number in line.split()] for line in data.decode().splitlines()])
        except ValueError as error:
            raise BadSampleError(f"points: {error}") from None
        if value.ndim != 2 or value.shape[1] != 2:
            raise BadSampleError(f"points are {list(value.shape)}, not [n, 2]")
        if rng is not None:
            value = value + 0.01 * rng.standard_normal(value.shape)
        return value[: self.settings.max_points].astype(np.float32)

    def num_tokens(self, value: np.ndarray) -> int:
        return len(value)

    @property
    def max_tokens(self) -> int:
        return int(self.settings.max_points)

    def collate(self, values: Sequence[np.ndarray]) -> Collated:
        lengths = np.asarray([len(value) for value in values], dtype=np.int64)
        places = np.concatenate([np.zeros((0, 2), dtype=np.float32), *values])
        return Collated({"input": places}, np.cumsum(lengths) - lengths)

    def embedder(self, hidden_size: int, vocab_size: int, groups: Groups = SINGLE) -> nn.Module:
        return nn.Linear(2, hidden_size)

    def describe(self, value: np.ndarray, token: int) -> dict[str, Any]:
        return {"x": round(float(value[token, 0]), 3), "y": round(float(value[token, 1]), 3)}

    def example(self, rng: np.random.Generator, vocab_size: int = 0) -> np.ndarray:
        return rng.normal(size=(int(rng.integers(1, self.max_tokens + 1)), 2)).astype(np.float32)


class RectifiedSettings(RepresentationSettings):
    joined: ClassVar[bool] = True

    kind: Literal["rectified"] = "rectified"


class Rectified(Fusion):
    """The mean over the tokens, through a layer of rectified units."""

    Settings = RectifiedSettings

    def __init__(self, settings: RectifiedSettings, model: ModelConfig) -> None:
        super().__init__(settings, model)
        self.width = 12
        self.layer = nn.Linear(model.hidden_size, self.width)

    def forward(self, x_nD: Tensor, mean_PBD: Tensor, present_PB: Tensor, spans_P: tuple[Spans, ...]) -> Tensor:
        return self.layer(mean_PBD[0]).relu()


class LabelSettings(ObjectiveSettings):
    kind: Literal["label_regression"] = "label_regression"
    reads: str


class LabelRegression(Objective):
    """The label of a sample, a number, from a representation: a head of the objective's own, squared error."""

    Settings = LabelSettings

    def __init__(self, name: str, settings: Any, modalities: Any, representations: Any) -> None:
        super().__init__(name, settings, modalities, representations)
        self.representations = (settings.reads,)

    def segments(self, sample: Sample, rng: np.random.Generator) -> Iterator[Segment]:
        if sample.meta.label:
            yield from self.all_representations[self.settings.reads].segments(sample, self.name, self.modalities, rng)

    @property
    def losses(self) -> dict[str, float]:
        return {self.name: 1.0}

    def counts(self, batch: Batch) -> dict[str, int]:
        return {self.name: int(labelled(batch, self.settings.reads).sum())}

    def module(self, embedding_size: int) -> ObjectiveModule:
        return _SquaredError(self.name, self.settings.reads)

    def needs(self) -> dict[str, set[str]]:
        (needed,) = self.all_representations[self.settings.reads].ways
        return {self.name: needed}

    def expected(self) -> list[Expected]:
        return list(self.all_representations[self.settings.reads].expected(self.modalities).values())


def labelled(batch: Batch, representation: str) -> Tensor:
    """[B]: which samples have the representation and a label; others may have it for another objective."""
    pooled_B = batch.pooled[representation]
    return (pooled_B >= 0) & torch.tensor([bool(meta.label) for meta in batch.metas], device=pooled_B.device)


class _SquaredError(ObjectiveModule):
    def __init__(self, name: str, reads: str) -> None:
        super().__init__()
        self.name, self.reads = name, reads
        self.slope = nn.Parameter(torch.ones(1))
        self.offset = nn.Parameter(torch.zeros(1))

    def forward(self, outputs: Outputs, batch: Batch, groups: Groups) -> dict[str, Tensor]:
        features_BP = outputs.features[self.reads]
        labels = [float(meta.label or 0) for meta in batch.metas]
        wanted_B = torch.tensor(labels, dtype=torch.float32, device=features_BP.device)
        error_B = self.slope * features_BP[:, 0] + self.offset - wanted_B
        return {self.name: (error_B.square() * labelled(batch, self.reads)).sum()}


def round_robin(inputs: RouterInputs) -> Choice:
    """Token i of its item visits the experts i, i + 1, ... in turn, with weights that the router learns."""
    num_experts, top_k = inputs.logits_nE.shape[-1], inputs.config.experts_per_token
    steps = torch.arange(top_k, device=inputs.logits_nE.device)
    ids_nK = (inputs.tokens.keys_n[:, None] + steps) % num_experts
    weights_nK = inputs.logits_nE.gather(-1, ids_nK).sigmoid() / top_k
    log_p_nE = torch.full_like(inputs.logits_nE, -1e30).scatter(-1, ids_nK, -math.log(top_k))
    return Choice(ids_nK, weights_nK, log_p_nE, weights_nK[:, 0].detach())


def write_package(folder: Path) -> None:
    """What an installed package with these entry points leaves in ``folder``, which is put on ``sys.path``."""
    info = folder / "outside-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[mmmoe.modalities]\npoints = outside:Points\n\n[mmmoe.objectives]\n"
        "label_regression = outside:LabelRegression\n\n[mmmoe.routers]\nround_robin = outside:round_robin\n\n"
        "[mmmoe.representations]\nrectified = outside:Rectified\n"
    )
    (folder / "outside.py").write_bytes(Path(__file__).read_bytes())
