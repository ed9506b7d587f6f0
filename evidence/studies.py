"""The table of studies: what is compared, on which corpus, by which metric.

A study trains each of its variants over several seeds by one config; a variant overrides some of its settings. All
variants of a seed see the same samples in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "evidence" / "configs"
SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class Metric:
    """``name`` of a held-out loss or score in metrics.jsonl; ``title`` of its column."""

    name: str
    title: str
    lower_is_better: bool = True
    percent: bool = False

    @property
    def scale(self) -> int:
        """Of the numbers that are shown."""
        return 100 if self.percent else 1


@dataclass(frozen=True)
class Variant:
    """``label`` of its row and curve. ``overrides`` of the study's config, as on the command line of mmmoe train.
    ``experts`` where it is a point of the curve over the number of experts. ``same_as``: STUDY/VARIANT of another
    study, trained by the same config, whose records count here too."""

    name: str
    label: str
    overrides: tuple[str, ...] = ()
    experts: int | None = None
    same_as: str = ""


@dataclass(frozen=True)
class Study:
    """``reference``: the variant that the others are compared with, seed by seed. ``corpus``: the argument of
    evidence/data.sh. ``question`` begins its section of the page."""

    name: str
    title: str
    question: str
    config: str
    corpus: str
    metrics: tuple[Metric, ...]
    reference: str
    variants: tuple[Variant, ...]
    panels: tuple[str, ...] = ("steps", "flops", "hours")  # of pictures.PANELS
    setting: str = ""  # what a reader of the page must know beside the question
    seeds: tuple[int, ...] = SEEDS

    @property
    def path(self) -> Path:
        return CONFIGS / self.config

    def variant(self, name: str) -> Variant:
        """Raises ValueError for an unknown one."""
        for variant in self.variants:
            if variant.name == name:
                return variant
        known = ", ".join(variant.name for variant in self.variants)
        raise ValueError(f"study {self.name} has no variant {name!r}; it has {known}")

    def owner_of(self, variant: Variant) -> tuple[str, str]:
        """The study and variant whose runs are those of ``variant``."""
        owner, _, name = (variant.same_as or f"{self.name}/{variant.name}").partition("/")
        return owner, name


def dense(width: int) -> tuple[str, ...]:
    """Overrides that make every MoE layer one expert of ``width``."""
    return ("moe.num_experts=1", "moe.experts_per_token=1", f"moe.expert_hidden_size={width}")


def experts(*numbers: int) -> tuple[Variant, ...]:
    return tuple(
        Variant(f"e{number}", f"{number} experts", (f"moe.num_experts={number}",), experts=number)
        for number in numbers
    )


CAPTIONS = Metric("captions_perplexity", "perplexity of names")
PROSE = Metric("prose_perplexity", "perplexity")
WIDTH = 128  # of an expert, and of the dense layer of equal active FLOPs


def scaling(long_steps: int) -> tuple[Variant, ...]:
    """``long_steps``: those that a dense model takes in the core-hours of 16 experts, by the time of a step of each;
    the page shows the core-hours of both."""
    return (
        Variant("dense", "dense", dense(WIDTH), experts=1),
        *experts(4, 16, 64),
        Variant("long", "dense, as many core-hours as 16 experts", (*dense(WIDTH), f"train.steps={long_steps}")),
        Variant("wide", "dense, as many parameters as 16 experts", dense(16 * WIDTH)),
    )


STUDIES = (
    Study(
        name="captions",
        title="Emoji named in 91 languages",
        question="Does a sparse model name images in many languages better than a dense one of equal active FLOPs?",
        config="captions.yaml",
        corpus="emoji",
        metrics=(CAPTIONS,),
        reference="dense",
        variants=scaling(2660),
        panels=("steps", "flops", "hours", "experts"),
    ),
    Study(
        name="prose",
        title="The entries of a dictionary",
        question="Does a sparse language model predict prose better than a dense one of equal active FLOPs?",
        config="prose.yaml",
        corpus="gcide",
        metrics=(PROSE,),
        reference="dense",
        variants=scaling(1420),
        panels=("steps", "flops", "hours", "experts"),
    ),
)


def study(name: str) -> Study:
    """Raises ValueError for an unknown one."""
    for found in STUDIES:
        if found.name == name:
            return found
    raise ValueError(f"there is no study {name!r}; there are {', '.join(each.name for each in STUDIES)}")
