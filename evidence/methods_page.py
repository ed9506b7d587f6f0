"""docs/methods.md: each multimodal method beside the same run without it, made of records and configs alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from evidence import page, records, survey_map
from evidence.intervals import ratio
from evidence.methods import ITEMS, METHODS, study
from evidence.pictures import Runs
from evidence.runs import Task
from evidence.studies import STUDIES
from evidence.study import Method, Metric, Study

HEAD = """# Methods

Multimodal methods, each beside the same run without it, on real data that a CPU can train on in minutes. `make
methods` writes this page. It trains the runs that have no record yet (hours on two cores; repeat it to continue;
`make methods ONLY=NAME` trains those of one method), and shows only what runs gave. The methods are listed in
`evidence/methods.py`. Each has a config in `configs/methods/`, and each run a record in `evidence/records/`, with its
config, commit, machine and held-out scores over training. A method that does not help stays here.

How to read the tables:

- *Without* is the baseline of the data set. *With* is the same run with the method: the same data, order, steps and
  recipe, except for the settings that are listed below the table. Each data set has a section behind them, with all
  of its runs. The page ends with a map: the headings of the field's surveys, and what serves each here.
- Values are the mean of the seeds and the half width of its 95% interval by Student's t; one seed has no interval.
  *Change* compares seed by seed: the ratio of the values, and its 95% interval. Of twenty rows that do not differ,
  one is shown as different, by chance.
- *Core-seconds* is the CPU time of the run with the method over that without it, seed by seed, of runs on the same
  machine. Other programs of the machine change it by about a tenth.
- If a record was made with other settings than its study has now, the section of its data ends with them.
"""
TITLES = ("method", "paper", "config", "data", "metric", "without", "with", "change", "core-seconds")
NOT_RUN = "not run yet"


def write(docs: Path, folder: Path = records.FOLDER, studies: Sequence[Study] = METHODS,
          remarks: Mapping[str, Sequence[str]] = page.NOTHING, head: str = HEAD) -> Path:  # fmt: skip
    """Pictures go to ``docs``/methods. ``remarks`` end the section of their study. The same records and configs give
    the same bytes."""
    parts = [head, *(_item(item, studies, folder) for item in ITEMS)]
    path = docs / "methods.md"
    parts += page.sections(studies, folder, remarks, docs / "methods")
    if tuple(studies) == METHODS:  # all, in full
        parts.append(survey_map.section((*STUDIES, *METHODS), folder))
    path.write_text("\n".join(parts), encoding="utf-8")
    return path


def _item(item: str, studies: Sequence[Study], folder: Path) -> str:
    """The methods of an item of ``ITEMS``."""
    rows: list[Sequence[str]] = [TITLES]
    told = []
    for of in studies:
        runs = records.read_study(of, folder)
        for method in of.variants:
            if isinstance(method, Method) and method.item == item:
                rows += [_row(of, runs, method, metric) for metric in of.metrics if metric.compared]
                told.append(f"- `{method.name}`: {_told(differences(of, method))}.")
    lines = [*page.table(rows), "", "What the configs change:", "", *told] if told else ["None yet."]
    return "\n".join([f"## {ITEMS[item]}", *lines]) + "\n"


def _told(settings: Mapping[str, str]) -> str:
    told = (f"`{key}: {value}`" if value else f"no `{key}`" for key, value in settings.items())
    return ", ".join(told) or "nothing, it is the reference"


def _row(of: Study, runs: Runs, method: Method, metric: Metric) -> tuple[str, ...]:
    path = f"[`{method.name}.yaml`](../{method.config})"
    values = (_value(of, runs, of.reference, metric), _value(of, runs, method.name, metric))
    costs = page.change(of, runs, method, metric), core_seconds(of, runs, method)
    return (method.label, method.paper, path, of.title, metric.title, *values, *costs)


def _value(of: Study, runs: Runs, variant: str, metric: Metric) -> str:
    if variant not in runs:
        return NOT_RUN
    return page.final(runs[variant].values(), of.metric_of(variant, metric)) + page.few_seeds(of, runs[variant])


def core_seconds(of: Study, runs: Runs, method: Method) -> str:
    """With the method over without it, over the seeds that both have with a known cost on the same machine."""
    own, others = runs.get(method.name, {}), runs.get(of.reference, {})
    pairs = [(own[seed], others[seed]) for seed in sorted(own.keys() & others.keys())]
    costs = [(one.core_seconds, other.core_seconds) for one, other in pairs if one.machine == other.machine]
    known = [(one, other) for one, other in costs if one and other]
    if not known:
        return "-"
    mean, low, high = ratio(*zip(*known, strict=True))
    return f"{mean:.2f}" if low is None or high is None else f"{mean:.2f} ({low:.2f} to {high:.2f})"


def differences(of: Study, method: Method) -> dict[str, str]:
    """The settings of the method's config that are not those of its reference, by dotted key, as YAML; empty: it
    lacks the setting."""
    owner, name = of.owner_of(of.variant(of.reference))
    before = _written(study(owner) if owner != of.name else of, name)
    return dict(_differences(before, _written(of, method.name), ""))


def _written(of: Study, variant: str) -> dict[str, Any]:
    """The settings that the config of a run gives, without its name."""
    config = Task(of, of.variant(variant), of.seeds[0], Path("runs")).config()
    return config.model_dump(mode="json", exclude_unset=True, exclude={"name"})


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], where: str) -> Iterator[tuple[str, str]]:
    for key in sorted(before.keys() | now.keys()):
        one, other = before.get(key), now.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            yield from _differences(one, other, f"{where}{key}.")
        elif key not in now:
            yield f"{where}{key}", ""
        elif key not in before or one != other:
            yield f"{where}{key}", yaml.safe_dump(other, default_flow_style=True, width=sys.maxsize).split("\n")[0]
