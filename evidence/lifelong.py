"""Sequences of runs: their study, and what is lost and carried over from stage to stage.

Legend: T stages, score_TT[i][j] is the score on the data of stage j after stage i.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from evidence.study import Metric, Stage, Study, Variant
from mmmoe_pretrain.evaluate.report import Report

AVERAGE, FORGETTING, BACKWARD, FORWARD = (
    f"sequence/{name}" for name in ("average", "forgetting", "backward", "forward")
)


def measures(score_TT: np.ndarray, chance_T: np.ndarray) -> dict[str, float]:
    """Of a sequence: the mean score at the end; how far stages but the last are below their best before (arXiv
    1801.10112); how later stages changed them since they were trained, and how far each stage but the first is above
    chance before it is trained (backward and forward transfer, arXiv 1706.08840)."""
    last, stages = score_TT[-1], len(score_TT)
    later = np.arange(1, stages)
    return {
        AVERAGE: float(last.mean()),
        FORGETTING: float((score_TT[:-1].max(axis=0) - last)[:-1].mean()),
        BACKWARD: float((last - score_TT.diagonal())[:-1].mean()),
        FORWARD: float((score_TT[later - 1, later] - chance_T[later]).mean()),
    }


def of_reports(reports: Sequence[Report], groups: Sequence[Sequence[str]], metric: str) -> dict[str, float]:
    """``measures`` of the evaluations after each stage, by ``metric``/VALUE for the values of each stage's group.
    Of a single run that had the data of all stages at once the average alone. Raises ValueError where a score is
    missing."""
    scores = np.array([[_mean(report, group, metric, "value") for group in groups] for report in reports])
    if len(reports) == 1:
        return {AVERAGE: float(scores.mean())}
    return measures(scores, np.array([_mean(reports[0], group, metric, "chance") for group in groups]))


def _mean(report: Report, group: Sequence[str], metric: str, field: str) -> float:
    """An empty group is all held-out rows."""
    rows: Mapping[str, float] = {row["metric"]: row[field] for row in report.results}
    names = [f"{metric}/{value}" for value in group] or [metric]
    if missing := [name for name in names if name not in rows]:
        raise ValueError(
            f"the evaluation of {report.run} has no {missing[0]}; score held-out rows of all stages, with "
            f"evaluate.within"
        )
    return float(np.mean([rows[name] for name in names]))


LANGUAGES = (("da", "no", "sv"), ("de", "en", "nl"), ("es", "it", "pt"), ("fr", "pl", "ro"))
NAME = "text_to_image_r10"
DATA = "data/evidence/lifelong"
STEPS = 120  # of a stage
OF_ALL = (
    f"train.steps={STEPS}",
    "optimizer.warmup_steps=20",
    f"checkpoint.every={STEPS}",
    f"evaluate.every={STEPS}",
    "evaluate.samples=256",
    "evaluate.test=[data/evidence/europe/shards/test]",
    "evaluate.within=language",
)
NEW_EXPERTS = 4


def data_of(stage: int, memory: bool = False) -> str:
    """The override of ``data.train``. ``memory``: of each stage before 256 samples, which together are a third."""
    sources = [f"{{path: {DATA}/stage-{stage}/train, weight: 2.0}}"]
    if memory:
        sources += [f"{{path: {DATA}/memory-{i}/train, weight: {1 / (stage - 1):.4g}}}" for i in range(1, stage)]
    return f"data.train=[{', '.join(sources)}]"


def sequence(name: str, label: str, *later: str, memory: bool = False, experts: bool = False) -> Variant:
    """``later``: overrides of the stages after the first."""
    stages = [Stage((data_of(1),))]
    for number in range(2, len(LANGUAGES) + 1):
        overrides, options = [data_of(number, memory), *later], tuple[str, ...]()
        if experts:
            old = 16 + NEW_EXPERTS * (number - 2)
            rows = [f"mmmoe.trunk.blocks.*.ffn.{each}[:{old}]" for each in ("experts.*", "router.weight")]
            overrides += [f"moe.num_experts={old + NEW_EXPERTS}", "moe.wake_steps=20",
                          f"optimizer.hold={{frozen: ['{rows[0]}', '{rows[1]}']}}"]  # fmt: skip
            options = (f"--add-experts={NEW_EXPERTS}", "--wake-steps=20")
        stages.append(Stage(tuple(overrides), options))
    return Variant(name, label, OF_ALL, stages=tuple(stages))


LIFELONG = Study(
    name="lifelong",
    title="Four groups of languages, one after the other",
    question="What is left of the names of emoji in the first languages when others are learned after them?",
    config="evidence/configs/retrieval.yaml",
    corpus="lifelong",
    metrics=(
        Metric(AVERAGE, "name → image at the end, recall@10", False, percent=True),
        Metric(FORGETTING, "forgetting", percent=True, compared=False),
        Metric(BACKWARD, "backward transfer", False, percent=True, compared=False),
        Metric(FORWARD, "forward transfer", False, percent=True, compared=False),
    ),
    reference="naive",
    variants=(
        sequence("naive", "nothing is done"),
        sequence("replay", "replay of 256 samples a stage", memory=True),
        sequence("ewc", "pull by the Fisher information", "optimizer.hold={strength: 20.0}"),
        sequence("l2_sp", "pull of all weights alike", "optimizer.hold={strength: 20.0, importance: uniform}"),
        sequence(
            "distillation",
            "distillation from the run before",
            "optimizer.average=1.0",
            "objectives.kept={kind: distillation, representations: [image, text]}",
        ),
        sequence("experts", "old experts frozen, four new ones a stage", experts=True),
        Variant(
            "together",
            "all at once",
            (*OF_ALL, f"train.steps={STEPS * len(LANGUAGES)}", f"evaluate.every={STEPS * len(LANGUAGES)}"),
        ),
    ),
    panels=(),
    setting="Stages have the names in Danish, Norwegian and Swedish, then German, English and Dutch, then Spanish, "
    "Italian and Portuguese, then French, Polish and Romanian. A stage is a run of 120 steps, made of the run before "
    "by `mmmoe extend`. A name in one language is held out; candidates are the held-out images of its language. "
    "Forgetting is the mean distance of the first three stages from their best, backward transfer their change since "
    "they were trained, forward transfer the score of a stage before it is trained less that of chance. The last "
    "row has the steps of all stages and their data mixed: a bound, not a sequence. Strengths were not tuned. Scores "
    "are of `mmmoe evaluate`.",
    evaluated=True,
    groups=LANGUAGES,
    scored=NAME,
)
