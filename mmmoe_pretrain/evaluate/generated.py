"""How near generated values are to real ones, by features of one of the project's own models: a Frechet distance, as
FID is (Heusel et al., arXiv 1706.08500), and a cosine between what was asked for and what was made, as CLIPScore is
(Hessel et al., arXiv 2104.08718).

Features are vectors of a run of the project's own, the judge (``evaluate.generate.TASK.judge``), not those of
Inception or CLIP, so figures compare models that have the same judge, and nothing beyond. What is generated is
compared with the samples' own values after these became codes and were rendered, too, so that the tokenizer's losses
do not count.

* ``drawing_frechet``: the Frechet distance of generated and real values.
* ``drawing_alignment``: the mean of max(0, cosine) of a generated value and what it was generated from. Chance is
  with what other values were generated from; majority is of the real values.

Shapes: N and M values, P numbers of a feature.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mmmoe_pretrain.batch import Item, Sample, SampleMeta
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.evaluation import eval_settings
from mmmoe_pretrain.data.pack import pack
from mmmoe_pretrain.evaluate.features import device_of
from mmmoe_pretrain.evaluate.retrieval import Z95
from mmmoe_pretrain.evaluate.rows import BATCH_SIZE, HeldOutRows
from mmmoe_pretrain.evaluate.scores import Score, Scored
from mmmoe_pretrain.generate.command import open_model
from mmmoe_pretrain.generate.growing import Generated
from mmmoe_pretrain.generate.tasks import Prompt, Task
from mmmoe_pretrain.modalities import Modalities
from mmmoe_pretrain.models.mmmoe import MMMoE


@dataclass(frozen=True)
class Judge:
    """A run that compares generated values with what they are generated from."""

    folder: Path
    model: MMMoE
    config: RunConfig
    modalities: Modalities

    @classmethod
    def open(cls, folder: Path, device: torch.device) -> Judge:
        return cls(folder, *open_model(folder, (), device))

    def sides(self, extension: str, asked: Iterable[str]) -> tuple[str, str]:
        """Its representation of a file with this extension, and the one of ``asked`` that it compares that with.
        Raises ValueError where it has none."""
        made, others = self.modalities.read_as(extension), list(asked)
        pairs = [pair for pair in self.model.objectives.aligned if made in pair]
        for pair in pairs:
            if other := next((side for side in pair if side != made and side in others), None):
                return str(made), other
        compared = "; ".join(" with ".join(pair) for pair in self.model.objectives.aligned) or "nothing"
        raise ValueError(
            f"{self.folder} cannot judge .{extension} files that are generated from "
            f"{', '.join(others) or 'nothing'}, as it compares {compared}; name a run that compares the two "
            f"(evaluate.generate)"
        )

    def reads(self, item: Item, config: RunConfig) -> bool:
        """Whether it can read an item of a run with ``config``: a text, or of a modality with equal settings."""
        own = self.config.modalities.get(item.modality)
        return own is not None and (bool(item.raw) or own == config.modalities[item.modality])

    def vectors(self, name: str, values: Sequence[bytes | Item | None]) -> np.ndarray:
        """float32 [N, P]; zero without a value, and of those that cannot be read."""
        settings, found = eval_settings(self.config, self.modalities), []
        for start in range(0, len(values), BATCH_SIZE):
            samples = [self._sample(name, value) for value in values[start : start + BATCH_SIZE]]
            with torch.inference_mode():
                outputs, _ = self.model(pack(samples, settings).to(device_of(self.model)))
            found.append(outputs.features[name].cpu().numpy())
        return np.concatenate(found)

    def _sample(self, name: str, given: bytes | Item | None) -> Sample:
        if given is None or (isinstance(given, Item) and not given.raw):
            return Sample(SampleMeta(""), () if given is None else (given,))
        data = given if isinstance(given, bytes) else given.raw.encode()
        value = self.modalities[name].decode(data)
        items = () if value is None else (Item(name, value, given.raw if isinstance(given, Item) else ""),)
        return Sample(SampleMeta(""), items)


def scores_of(task: Task, rows: HeldOutRows, made: Iterable[tuple[Prompt, Generated]]) -> Scored:
    """Of what ``task``, which generates no text, ``made`` of held-out samples. Raises ValueError where the judge does
    not compare such values with what they are generated from."""
    if not task.how.judge:
        return [], [f"no score of what {task.name} generates: set evaluate.generate.{task.name}.judge to a run"]
    judge = Judge.open(Path(task.how.judge), device_of(task.model))  # fails before anything is generated
    found = [(prompt, generated) for prompt, generated in made if prompt.whole is not None]
    if len(found) < 2:
        return [], [f"{len(found)} held-out rows have a value that {task.name} generates from others: no score of it"]
    files = [task.file(*each) for each in found]
    before = [[item for item in prompt.sample.items[:-1] if judge.reads(item, rows.config)] for prompt, _ in found]
    name, asked = judge.sides(files[0][1], dict.fromkeys(item.modality for item in itertools.chain(*before)))
    made_NP = judge.vectors(name, [content for content, _ in files])
    real_NP = judge.vectors(name, [task.own_file(prompt)[0] for prompt, _ in found])
    asked_NP = judge.vectors(
        asked, [next((item for item in items if item.modality == asked), None) for items in before]
    )
    return scores(task.name, made_NP, real_NP, asked_NP), [f"{task.name} is judged by {judge.config.name}"]


def scores(name: str, made_NP: np.ndarray, real_NP: np.ndarray, asked_NP: np.ndarray) -> list[Score]:
    """Of rows of the same samples in the same order."""
    distance, number = frechet_distance(real_NP, made_NP), len(made_NP)
    aligned_N = alignment(asked_NP, made_NP)
    others, own = (float(x.mean()) for x in (alignment(np.roll(asked_NP, 1, axis=0), made_NP),
                                             alignment(asked_NP, real_NP)))  # fmt: skip
    value, half = float(aligned_N.mean()), Z95 * float(aligned_N.std(ddof=1)) / number**0.5
    return [
        Score(f"{name}_frechet", distance, None, None, number, (distance, distance), unit="distance"),
        Score(f"{name}_alignment", value, others, own, number, (value - half, value + half), unit="cosine"),
    ]


def frechet_distance(real_NP: np.ndarray, made_MP: np.ndarray) -> float:
    """Between the normal distributions that have the means and covariances of the two sets. Of fewer values than P
    covariances are singular, and the distance of two samples of one distribution is far from 0: compare like numbers.
    Raises ValueError where a set has no covariance, or features are not finite or of other sizes."""
    sets = [np.asarray(x, dtype=np.float64) for x in (real_NP, made_MP)]
    for what, x in zip(("real", "generated"), sets, strict=True):
        if x.ndim != 2 or len(x) < 2 or not np.isfinite(x).all():
            raise ValueError(
                f"{what} features {x.shape}: a Frechet distance needs two or more rows of finite numbers; give more "
                f"values, or the features of a model that did not diverge"
            )
    if sets[0].shape[1] != sets[1].shape[1]:
        raise ValueError(
            f"features of {sets[0].shape[1]} and {sets[1].shape[1]} numbers are not of one model; encode both by one"
        )
    (mean, covariance), (other_mean, other) = ((x.mean(axis=0), np.cov(x, rowvar=False, ddof=1)) for x in sets)
    return gaussian_distance(mean, np.atleast_2d(covariance), other_mean, np.atleast_2d(other))


def gaussian_distance(mean_P: np.ndarray, cov_PP: np.ndarray, other_P: np.ndarray, other_PP: np.ndarray) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2) (Dowson and Landau, 1982), in fp64."""
    root_PP = _root(cov_PP)
    between = _root(root_PP @ other_PP @ root_PP)
    distance = np.square(mean_P - other_P).sum() + np.trace(cov_PP) + np.trace(other_PP) - 2 * np.trace(between)
    return float(max(distance, 0.0))  # rounding of equal distributions


def alignment(asked_NP: np.ndarray, made_NP: np.ndarray) -> np.ndarray:
    """float64 [N]: max(0, cosine) of each generated value with what it was to show, in the joint space of a run that
    aligns the two; CLIPScore is 2.5 times that of CLIP. Zero where either has no vector."""
    asked, made = (np.asarray(x, dtype=np.float64) for x in (asked_NP, made_NP))
    if asked.shape != made.shape or asked.ndim != 2:
        raise ValueError(f"features {asked.shape} and {made.shape} are not one row for each pair; give pairs")
    norms = np.linalg.norm(asked, axis=1) * np.linalg.norm(made, axis=1)
    products = (asked * made).sum(axis=1)
    return np.maximum(np.divide(products, norms, out=np.zeros_like(products), where=norms > 0), 0.0)


def _root(matrix_PP: np.ndarray) -> np.ndarray:
    """The symmetric square root of a covariance; eigenvalues that rounding made negative are 0."""
    values, vectors = np.linalg.eigh((matrix_PP + matrix_PP.T) / 2)
    return np.asarray((vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T)
