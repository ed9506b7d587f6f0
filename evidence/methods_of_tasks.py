"""The studies of docs/methods.md of many tasks on one trunk: emoji and their names in twelve languages."""

from __future__ import annotations

from evidence.studies import RECALL
from evidence.study import Method, Metric, Study, Variant

PERPLEXITY = Metric("captions_perplexity", "perplexity of names after images")
READING = Metric("names_perplexity", "perplexity of names alone")
ACCURACY = Metric("groups_accuracy", "group of the image", lower_is_better=False, percent=True)
CONFIG = "evidence/configs/tasks.yaml"
LABELS = {
    "pairs": "images and names found by each other",
    "captions": "names after images",
    "groups": "groups of images",
}
FOUR = (
    "The four tasks: a name and its image find each other (InfoNCE), a name is predicted after its image, a name is "
    "predicted alone, and an image tells its group (one of nine: flags, food & drink, ...)."
)
# Of the small corpora, whose samples have other labels.
SMALL = ("objectives.groups.field=subset", "objectives.groups.classes=[a, b, named, spoken, constructed]")
SIZES = "3 blocks of width 64 with 8 experts, one a token; 300 steps of 48 samples."


def _only(*tasks: str) -> tuple[str, ...]:
    """Overrides that leave these of ``LABELS`` alone."""
    off = [name for name in LABELS if name not in tasks]
    return ("objectives.names.weight=0", *(f"objectives.{name}.weight=0" for name in off))


def _transfer(task: str, metric: Metric) -> Study:
    """Of ``task`` alone, with each other one, and with both. Runs that two studies show are those of the first."""
    names = list(LABELS)
    variants = [Variant("alone", f"{LABELS[task]}, alone", _only(task))]
    for other in names:
        if other == task:
            continue
        first, second = sorted((task, other), key=names.index)
        same_as = "" if first == task else f"transfer_{first}/with_{second}"
        variants.append(Variant(f"with_{other}", f"with {LABELS[other]}", _only(task, other), same_as=same_as))
    same_as = "" if task == names[0] else f"transfer_{names[0]}/together"
    variants.append(Variant("together", "all three", _only(*names), same_as=same_as))
    return Study(
        name=f"transfer_{task}",
        title=f"Transfer to {LABELS[task]}",
        question="What do other tasks on the same trunk add, or take?",
        config=CONFIG,
        corpus="europe",
        metrics=(metric,),
        reference="alone",
        variants=tuple(variants),
        panels=(),
        setting=f"All runs have as many steps of as many samples; a task that is added costs more tokens. {SIZES}",
    )


TASKS = (
    Study(
        name="tasks",
        title="Four tasks on emoji and their names",
        question="What helps many tasks on one trunk?",
        config=CONFIG,
        corpus="europe",
        metrics=(RECALL, PERPLEXITY, READING, ACCURACY),
        reference="together",
        variants=(
            Variant("together", "all at once, one language head"),
            Method("own_heads", "a language head for each task", item="tasks", paper="-", small=SMALL),
            Method(
                "task_routing", "routers see the task", item="tasks", paper="Task-MoE, arXiv 2110.03742", small=SMALL
            ),
            Method(
                "pcgrad",
                "projected gradients",
                item="tasks",
                paper="PCGrad, arXiv 2001.06782",
                also=("train.task_gradients",),
                small=SMALL,
            ),
            Method("entering_tasks", "groups enter when names alone leave", item="tasks", paper="-"),
        ),
        panels=(),
        setting=f"{FOUR} {SIZES}",
    ),
    _transfer("pairs", RECALL),
    _transfer("captions", PERPLEXITY),
    _transfer("groups", ACCURACY),
)
