"""Scores where a modality is missing: what stands in for the vector of a representation, the ``target``, of which
a sample still has other representations, the ``observed``.

The cases are those of ``evaluate.impute`` and of each objective that completes a representation
(``Objective.completed``). The target of rows that have all of it is replaced in several ways, each a representation
of its own in the report:

* ``scene_given_image``: the target's own vector without the modalities that are not observed, where it allows that
  (``missing``);
* ``scene_given_image_neighbours``: imputed by retrieval, the mean of the targets of the ``neighbours`` training
  samples that are nearest in the observed vectors (by the sum of their cosines);
* ``scene_given_image_by_NAME``: predicted by the objective NAME;
* ``scene_given_image_present``: as it is, for comparison.

Each is scored as a query (``scores.py``): ``_to_text_r1`` for every representation that is aligned with the target,
unless it has an observed modality; ``_to_scene_r1``, the true vector among those of all rows; and ``_cosine`` with
the true one. A query is a distinct content of observed and target together, so all ways have the same queries.

Shapes: N rows, M samples of the bank, P the joint space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mmmoe_pretrain.checkpoint import trained_module
from mmmoe_pretrain.config import EvaluateConfig
from mmmoe_pretrain.evaluate import retrieval
from mmmoe_pretrain.evaluate.features import HeldOut, collect, encode
from mmmoe_pretrain.evaluate.rows import HeldOutRows
from mmmoe_pretrain.evaluate.scores import Score, Scored, retrieval_scores
from mmmoe_pretrain.models.mmmoe import MMMoE
from mmmoe_pretrain.objectives import Objectives

BANK = 8192  # training samples, of which those that have observed and target are the bank
CHUNK = 1024  # rows that are compared with the bank at once
SHOWN = ("_r1", "_r10")


@dataclass(frozen=True)
class Case:
    """``parts``: the modalities of the target. ``completing``: names of the objectives that predict it from these
    observed ones."""

    target: str
    observed: tuple[str, ...]
    parts: tuple[str, ...]
    neighbours: int = 0
    completing: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.target}_given_{'_'.join(self.observed)}"

    @property
    def sides(self) -> str:
        """What a row must have, in words."""
        return " and ".join((*self.observed, self.target))

    def contents(self, data: HeldOut) -> list[str]:
        """By row, the contents of observed and target together; empty where one lacks, or a part of the target."""
        of_rows = zip(*(data.content[side] for side in (*self.observed, self.target)), strict=True)
        return [
            " ".join(sides) if all(sides) and has.issuperset(self.parts) else ""
            for sides, has in zip(of_rows, data.modalities, strict=True)
        ]


def cases_of(objectives: Objectives, settings: EvaluateConfig) -> list[Case]:
    """Each target and observed once, in any order. Raises ValueError where the model has no vector of one."""
    objectives.check_imputed(settings.impute)
    representations = objectives.representations
    cases: dict[tuple[str, frozenset[str]], Case] = {}
    for target, its in settings.impute.items():
        parts = representations[target].modalities
        cases[target, frozenset(its.observed)] = Case(target, its.observed, parts, its.neighbours)
    for name, objective in objectives.items():
        if objective.completed is not None:
            observed, target = objective.completed
            key = target, frozenset(observed)
            case = cases.get(key, Case(target, observed, representations[target].modalities))
            cases[key] = replace(case, completing=(*case.completing, name))
    return list(cases.values())


@dataclass(frozen=True)
class Bank:
    """Training samples, for imputation by retrieval; ``absent``: shards that cannot be read, so that there are
    none."""

    data: HeldOut | None = None
    absent: str = ""

    def complete(self, case: Case) -> np.ndarray:
        """The numbers of the samples that have all sides of ``case``."""
        contents = [] if self.data is None else case.contents(self.data)
        return np.flatnonzero(np.array(contents, dtype=bool))

    def impute(self, case: Case, data: HeldOut) -> np.ndarray:
        """[N, P]: for each row the mean of its nearest samples, with length 1."""
        assert self.data is not None
        rows_M = self.complete(case)
        observed_MX = np.concatenate([self.data.features[name][rows_M] for name in case.observed], axis=1)
        query_NX = np.concatenate([data.features[name] for name in case.observed], axis=1)
        target_MP, number = self.data.features[case.target][rows_M], min(case.neighbours, len(rows_M))
        found: list[np.ndarray] = []
        for start in range(0, len(query_NX), CHUNK):
            similarity_NM = query_NX[start : start + CHUNK] @ observed_MX.T
            nearest_Nk = np.argpartition(-similarity_NM, number - 1, axis=1)[:, :number]
            found.append(target_MP[nearest_Nk].mean(axis=1))
        return _unit(np.concatenate(found))


def bank_of(model: MMMoE, rows: HeldOutRows, cases: Sequence[Case]) -> Bank:
    """Raises ValueError where a case finds no sample with all of its sides."""
    asking = [case for case in cases if case.neighbours]
    if not asking:
        return Bank()
    if absent := rows.absent_training:
        return Bank(absent=absent)
    bank = Bank(collect(model, rows.training_batches(BANK, "the bank")))
    for case in asking:
        if not len(bank.complete(case)):
            assert bank.data is not None
            raise ValueError(
                f"evaluate.impute.{case.target}: none of the {len(bank.data.metas):,} training samples that were "
                f"read has {case.sides}, so there is no bank to impute {case.target} from; name "
                f"training shards that have them (data.train), or set evaluate.impute.{case.target}.neighbours: 0"
            )
    return bank


def scores_of(
    data: HeldOut, model: MMMoE, rows: HeldOutRows, run_dir: Path, cases: Sequence[Case], bank: Bank
) -> list[Scored]:
    """Of every case."""
    found: list[Scored] = []
    for case in cases:
        content = case.contents(data)
        if not any(content):
            found.append(([], [f"no held-out row has {case.sides}, with all parts: no score of {case.name}"]))
            continue
        others = _others(case, model.objectives)
        ways = _ways(case, data, model, rows, run_dir, bank)
        parts = [_scores(case, *way, data, content, others, rows.config.evaluate) for way in ways.items()]
        found.append(([score for part in parts for score in part], _notes(case, bank)))
    return found


def _ways(
    case: Case, data: HeldOut, model: MMMoE, rows: HeldOutRows, run_dir: Path, bank: Bank
) -> dict[str, np.ndarray]:
    """What stands for the target [N, P], by the name of it as a representation."""
    ways: dict[str, np.ndarray] = {}
    representations = model.objectives.representations
    seen = _modalities(case.observed, model.objectives)
    if representations[case.target].settings.missing != "skip" and seen & {*representations[case.target].modalities}:
        ways[case.name] = encode(model, case.target, rows.batches_of(seen))
    if case.neighbours and bank.data is not None:
        ways[f"{case.name}_neighbours"] = bank.impute(case, data)
    for name in case.completing:
        objective = model.objectives[name]
        module = trained_module(run_dir, rows.config, objective)
        ways[f"{case.name}_by_{name}"] = objective.complete(module, data.features)
    return {**ways, f"{case.name}_present": data.features[case.target]}


def _others(case: Case, objectives: Objectives) -> list[str]:
    """Representations that the target is compared with: those that it is aligned with, without any observed
    modality, of which a query would hold the answer."""
    aligned = [b if a == case.target else a for a, b in objectives.aligned if case.target in (a, b)]
    seen = _modalities(case.observed, objectives)
    return [name for name in aligned if not seen & {*objectives.representations[name].modalities}]


def _modalities(names: Sequence[str], objectives: Objectives) -> set[str]:
    return {part for name in names for part in objectives.representations[name].modalities}


def _scores(
    case: Case,
    name: str,
    vectors_NP: np.ndarray,
    data: HeldOut,
    content: Sequence[str],
    others: Sequence[str],
    settings: EvaluateConfig,
) -> list[Score]:
    """Of one way, as the representation ``name``, whose rows have these contents."""
    features, contents = {**data.features, name: vectors_NP}, {**data.content, name: tuple(content)}
    shown = replace(data, features=features, content=contents)
    wanted = {frozenset(pair.split("-")): of_pair for pair, of_pair in settings.rows.items()}
    made: list[Score] = []
    is_true = name == f"{case.name}_present"
    for other in others if is_true else (*others, case.target):
        rows = {f"{name}-{other}": wanted.get(frozenset((case.target, other)), {})}
        here = settings.model_copy(update={"rows": rows})
        found, _ = retrieval_scores(shown, (name, other), here, ways=((0, 1),))
        made += [score for score in found if score.metric.endswith(SHOWN)]
    return made if is_true else [*made, _cosine(case, name, vectors_NP, data, content)]


def _cosine(case: Case, name: str, vectors_NP: np.ndarray, data: HeldOut, content: Sequence[str]) -> Score:
    """The mean cosine with the true vector. Majority is that of the best fixed answer, the mean of the true ones;
    chance of another row's true vector."""
    rows = sorted({one: i for i, one in reversed(list(enumerate(content))) if one}.values())
    true_NP, count = data.features[case.target][rows].astype(np.float64), len(rows)
    cosine_N = (vectors_NP[rows] * true_NP).sum(axis=1)
    fixed = float(np.linalg.norm(true_NP.mean(axis=0)))
    value, half = float(cosine_N.mean()), retrieval.Z95 * float(cosine_N.std(ddof=min(1, count - 1))) / count**0.5
    chance = (count * fixed**2 - 1) / (count - 1) if count > 1 else None
    return Score(f"{name}_cosine", value, chance, fixed, count, (value - half, value + half), None, "cosine")


def _notes(case: Case, bank: Bank) -> list[str]:
    observed = " and ".join(case.observed)
    notes = [
        f"{case.name}: what stands in for {case.target} where only {observed} is given, of rows with {case.sides}"
    ]
    if case.neighbours and bank.data is not None:
        size = len(bank.complete(case))
        notes[0] += f"; _neighbours: the mean of the {case.neighbours} nearest of {size:,} training samples"
    elif case.neighbours:
        notes.append(f"no {case.name}_neighbours: the training shards {bank.absent} are missing")
    return notes


def _unit(rows_NP: np.ndarray) -> np.ndarray:
    return rows_NP / np.maximum(np.linalg.norm(rows_NP, axis=1, keepdims=True), 1e-12)
