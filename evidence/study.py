"""What a study is: variants of a run that are trained over several seeds and compared. studies.py and methods.py have
the tables of them.

A study trains each of its variants by one config, unless a variant has its own; a variant overrides some settings of
it. All variants of a seed see the same samples in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SEEDS = (1, 2, 3)
TRAINER, TOWERS = "mmmoe_pretrain.cli", "evidence.two_towers"  # programs that train a run
TEST = "test/"  # begins the scores of mmmoe evaluate, beside those on validation data over training
CONFIGS = "configs/methods"  # of methods, from the root of the repository


@dataclass(frozen=True)
class Metric:
    """``name`` of a held-out loss or score in metrics.jsonl, or of a measure of routing (evidence/measures.py);
    ``title`` of its column. ``compared``: whether another column has its change from the reference."""

    name: str
    title: str
    lower_is_better: bool = True
    percent: bool = False
    compared: bool = True

    @property
    def scale(self) -> int:
        """Of the numbers that are shown."""
        return 100 if self.percent else 1


def recall(source: str, target: str, what: str = "") -> Metric:
    """Recall@10 of ``target`` by ``source``, scored by mmmoe evaluate. ``what``: the source in words."""
    return Metric(f"{TEST}{source}_to_{target}_r10", f"{what or source} → {target}, recall@10", False, percent=True)


@dataclass(frozen=True)
class Start:
    """What a run goes on from: another run, with ``overrides`` of the study's config, that trains the first ``share``
    of the variant's steps (at least one) and is changed by ``mmmoe`` with the arguments ``command``."""

    share: float
    overrides: tuple[str, ...]
    command: tuple[str, ...]


@dataclass(frozen=True)
class Stage:
    """A run of a sequence, with ``overrides`` after those of its variant. ``options`` of ``mmmoe extend``, which
    makes it of the run before."""

    overrides: tuple[str, ...]
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Variant:
    """``label`` of its row and curve. ``overrides`` of the study's config, as on the command line of mmmoe train.
    ``experts`` where it is a point of the curve over the number of experts; ``line`` and ``x`` where it is one of the
    panel "sweep". ``same_as``: STUDY/VARIANT trained by the same config, whose records count here
    too. ``program``: ``TRAINER``, or a module with its command line and another model. ``small``: overrides
    that follow those of quick.SIZES where its run is made small; ``{data}`` stands for the folder of its data.
    ``stages``: of a sequence of runs, the last of which is recorded. ``scores``: metrics of the study, each with the
    score that the tables, not the pictures, show in its place."""

    name: str
    label: str
    overrides: tuple[str, ...] = ()
    experts: int | None = None
    same_as: str = ""
    program: str = TRAINER
    start: Start | None = None
    stages: tuple[Stage, ...] = ()
    line: str = ""
    x: float | None = None
    small: tuple[str, ...] = ()
    scores: tuple[tuple[str, str], ...] = ()

    @property
    def config(self) -> str:
        """Its own config, from the root of the repository; empty: that of the study."""
        return ""


@dataclass(frozen=True)
class Method(Variant):
    """A multimodal method, trained by ``configs/methods/NAME.yaml``; ``label``: what it is called. ``item``: its
    section of the page, a key of ``methods.ITEMS``. ``local``: why its losses on several ranks are not those of one
    process, where that is so. ``also``: settings of ``methods.SHARED`` in which its config may differ from its
    reference."""

    item: str = ""
    paper: str = ""
    local: str = ""
    also: tuple[str, ...] = ()

    @property
    def config(self) -> str:
        return f"{CONFIGS}/{self.name}.yaml"


@dataclass(frozen=True)
class Study:
    """``config``: its path from the root of the repository. ``reference``: the variant that the others are compared
    with, seed by seed. ``corpus``: the argument of evidence/data.sh. ``question`` begins its section of the page.
    ``evaluated``: runs are scored by mmmoe evaluate after training; the record has these scores as test/METRIC.
    ``groups``: of each stage of a sequence, the values of ``evaluate.within`` that are its data, by the score
    ``scored``; the record has ``lifelong.measures`` of them."""

    name: str
    title: str
    question: str
    config: str
    corpus: str
    metrics: tuple[Metric, ...]
    reference: str
    variants: tuple[Variant, ...]
    panels: tuple[str, ...] = ("steps", "flops", "hours")  # of pictures.PANELS; none: no picture
    setting: str = ""  # what a reader of the page must know beside the question
    seeds: tuple[int, ...] = SEEDS
    axis: str = ""  # title of the x axis of the panel "sweep"
    evaluated: bool = False
    groups: tuple[tuple[str, ...], ...] = ()
    scored: str = ""

    def path_of(self, variant: Variant) -> Path:
        """The config that trains it."""
        return ROOT / (variant.config or self.config)

    def variant(self, name: str) -> Variant:
        """Raises ValueError for an unknown one."""
        for variant in self.variants:
            if variant.name == name:
                return variant
        known = ", ".join(variant.name for variant in self.variants)
        raise ValueError(f"study {self.name} has no variant {name!r}; it has {known}")

    def metric_of(self, variant: str, metric: Metric) -> Metric:
        """``metric`` as the records of this variant have it."""
        return replace(metric, name=dict(self.variant(variant).scores).get(metric.name, metric.name))

    def owner_of(self, variant: Variant) -> tuple[str, str]:
        """The study and variant whose runs are those of ``variant``."""
        owner, _, name = (variant.same_as or f"{self.name}/{variant.name}").partition("/")
        return owner, name


def find(name: str, studies: Iterable[Study]) -> Study:
    """The one of this name. Raises ValueError where there is none."""
    known = {study.name: study for study in studies}
    if name not in known:
        raise ValueError(f"there is no study {name!r}; there are {', '.join(known)}")
    return known[name]
