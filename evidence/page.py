"""docs/evidence.md and its pictures, made of the records alone: figures that no run gave are not there.

Sections of studies and cells of tables are made here for docs/methods.md, too (methods_page.py).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from evidence import pictures, records
from evidence.intervals import Interval, interval, ratio
from evidence.pictures import Runs
from evidence.records import Record
from evidence.studies import STUDIES
from evidence.study import Metric, Study, Variant
from mmmoe_pretrain.train.console import short

HEAD = """# Evidence

What sparse experts gain at equal active FLOPs, and what they do not, on real data that a CPU can train on in minutes.
`make evidence` writes this page. It trains the runs that have no record yet (hours on two cores; repeat it to
continue), and shows only what runs gave. The runs are listed in `evidence/studies.py`. Each has a record in
`evidence/records/`, with its config, commit, machine and held-out scores over training.

How to read the tables:

- *Active* parameters are those that one token uses. *FLOPs* are those of the model, forward and backward, as
  `mmmoe_pretrain/models/costs.py` counts them. The column includes the router, whose FLOPs grow with the number of
  experts; models of *equal active FLOPs* have equal FLOPs without the router. *Core-hours* are CPU time, held-out
  scores included.
- Values are the mean of the seeds and the half width of its 95% interval by Student's t; one seed has no interval.
  *Change* compares with the reference seed by seed: the ratio of the values, and its 95% interval. Of twenty rows
  that do not differ, one is shown as different, by chance.
- All variants of a study have the same data, order, steps and recipe, except where a row says so.
- In the pictures a band is the 95% interval of the mean. It may reach beyond the axis.
- If a record was made with other settings than its study has now, the section ends with them.
"""
# What README.md has of a study: lines between these two.
BEGIN, END = "<!-- evidence {}, by python -m evidence --render -->\n", "<!-- end of evidence -->\n"
PLACE = re.compile(BEGIN.format(r"(\w+)") + "(.*?)" + END, re.DOTALL)
WIDEST = 12  # columns of a table; one with more has a row a metric
NOTHING: Mapping[str, Sequence[str]] = {}


def write(docs: Path, folder: Path = records.FOLDER, studies: Sequence[Study] = STUDIES,
          remarks: Mapping[str, Sequence[str]] = NOTHING, head: str = HEAD) -> Path:  # fmt: skip
    """Pictures go to ``docs``/evidence. ``remarks`` end the section of their study. The same records give the same
    bytes."""
    path = docs / "evidence.md"
    path.write_text("\n".join([head, *sections(studies, folder, remarks, docs / "evidence")]), encoding="utf-8")
    return path


def sections(studies: Sequence[Study], folder: Path, remarks: Mapping[str, Sequence[str]], shown: Path) -> list[str]:
    """One a study; its picture goes to ``shown``, a folder beside the page."""
    shown.mkdir(parents=True, exist_ok=True)
    parts = []
    for study in studies:
        runs = records.read_study(study, folder)
        if runs and not (list(runs) == [study.reference] and study.variant(study.reference).same_as):
            if study.panels:
                pictures.draw(study, runs, shown / f"{study.name}.svg")
            parts.append(section(study, runs, remarks.get(study.name, ()), Path(shown.name)))
        else:
            parts.append(f"## {study.title}\n{study.question} Not run yet.\n")
    return parts


def write_readme(readme: Path, folder: Path = records.FOLDER, studies: Sequence[Study] = STUDIES) -> None:
    """Replace the picture and table in each place that names its study."""
    text, by_name = readme.read_text(encoding="utf-8"), {study.name: study for study in studies}
    found = [match[1] for match in PLACE.finditer(text)]
    marks = [text.count(BEGIN.partition("{}")[0]), text.count(END)]
    if not found or marks != [len(found)] * 2 or not by_name.keys() >= set(found):
        raise ValueError(
            f"{readme} has no place for the table of a study: the lines {BEGIN.format('STUDY').strip()} and "
            f"{END.strip()}, with a STUDY of {', '.join(by_name)}"
        )

    def place(match: re.Match[str]) -> str:
        study = by_name[match[1]]
        runs = records.read_study(study, folder)
        not_run = [f"Not run yet: `make evidence ONLY={study.name}`."]
        lines = [*_results(study, runs, Path("docs/evidence")), _origin(study, runs)] if runs else not_run
        return BEGIN.format(study.name) + "\n".join(lines) + "\n" + END

    readme.write_text(PLACE.sub(place, text), encoding="utf-8")


def _results(study: Study, runs: Runs, folder: Path) -> list[str]:
    """The picture in ``folder``, if the study has one, and the table."""
    picture = [f"![{study.title}]({(folder / study.name).as_posix()}.svg)", ""] if study.panels else []
    return [*picture, *_table(study, runs), ""]


def section(study: Study, runs: Runs, remarks: Sequence[str], shown: Path) -> str:
    """``shown``: the folder of its picture, from that of the page."""
    lines = [f"## {study.title}", study.question, ""]
    if study.setting:
        lines += [study.setting, ""]
    lines += _results(study, runs, shown)
    if read := _reading(study, runs):
        lines += [read, ""]
    lines.append(_origin(study, runs))
    lines += [line for remark in remarks for line in ("", remark)]
    return "\n".join(lines) + "\n"


def _table(study: Study, runs: Runs) -> list[str]:
    titles = ["", "parameters", "active", "MFLOPs a token", "core-hours"]
    for metric in study.metrics:
        titles += [metric.title, *(["change"] if metric.compared else [])]
    rows = [titles, *(_row(study, runs, variant) for variant in study.variants if variant.name in runs)]
    return table(rows if len(titles) <= WIDEST else [list(cells) for cells in zip(*rows, strict=True)])


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of Markdown; the first row has the titles."""
    head, *others = [f"| {' | '.join(cells)} |" for cells in rows]
    return [head, f"|{'---|' * len(rows[0])}", *others]


def _row(study: Study, runs: Runs, variant: Variant) -> list[str]:
    by_seed = runs[variant.name]
    one = next(iter(by_seed.values()))
    seconds = [record.core_seconds for record in by_seed.values() if record.core_seconds is not None]
    cells = [variant.label + few_seeds(study, by_seed), short(one.parameters), short(one.active_parameters)]
    cells.append(f"{one.flops_per_token / 1e6:.2f}")
    cells.append(f"{sum(seconds) / len(seconds) / 3600:.2f}" if seconds else "-")
    for metric in study.metrics:
        cells.append(final(by_seed.values(), study.metric_of(variant.name, metric)))
        cells += [change(study, runs, variant, metric)] if metric.compared else []
    return cells


def few_seeds(study: Study, by_seed: Collection[int]) -> str:
    """The number of seeds where some have no record."""
    return "" if len(by_seed) == len(study.seeds) else f" ({len(by_seed)} seed{'s' * (len(by_seed) > 1)})"


def final(found: Iterable[Record], metric: Metric) -> str:
    """The value at the end of training; - where a run has none, as a dense model has no load."""
    values = [record.find(metric.name) for record in found]
    known = [metric.scale * value for value in values if value is not None]
    return _value(interval(known), metric) if len(known) == len(values) else "-"


def _value(value: Interval, metric: Metric) -> str:
    unit, digits = ("%", 1) if metric.percent else ("", 2 if value.mean < 100 else 1)
    half = "" if value.half is None else f" ± {value.half:.{digits}f}{unit}"
    return f"{value.mean:.{digits}f}{unit}{half}"


def paired(study: Study, runs: Runs, variant: str, metric: Metric) -> tuple[float, float | None, float | None] | None:
    """The variant over the reference, over the seeds that both have; None without any, and where a value is not
    positive."""
    own, reference = runs.get(variant, {}), runs.get(study.reference, {})
    seeds = sorted(set(own) & set(reference))
    name, other = (study.metric_of(each, metric).name for each in (variant, study.reference))
    values, others = [own[s].score(name) for s in seeds], [reference[s].score(other) for s in seeds]
    return ratio(values, others) if seeds and min(*values, *others) > 0 else None


def change(study: Study, runs: Runs, variant: Variant, metric: Metric) -> str:
    if variant.name == study.reference:
        return "reference"
    found = paired(study, runs, variant.name, metric)
    if found is None:
        return "-"
    mean, low, high = (None if value is None else _signed(100 * (value - 1)) for value in found)
    return f"{mean}%" if low is None else f"{mean}% ({low} to {high})"


def _signed(value: float) -> str:
    return f"{round(value, 1) or 0.0:+.1f}"  # no -0.0


def _reading(study: Study, runs: Runs) -> str:
    """What the table says of each variant beside the reference, in words."""
    metric = study.metrics[0]
    if not metric.compared:
        return ""
    told: dict[str, list[str]] = {}
    for variant in study.variants:
        if variant.name != study.reference and (found := paired(study, runs, variant.name, metric)) is not None:
            verdict, size = _verdict(*found, metric)
            told.setdefault(verdict, []).append(f"{variant.label}{size}")
    reference = study.variant(study.reference).label
    verdicts = [f"{verdict}: {', '.join(told[verdict])}." for verdict in VERDICTS if verdict in told]
    return " ".join([f"Compared with *{reference}* by {metric.title}.", *verdicts]) if told else ""


VERDICTS = ("Better", "No clear difference", "Worse", "Without an interval")


def _verdict(mean: float, low: float | None, high: float | None, metric: Metric) -> tuple[str, str]:
    """One of VERDICTS, and how large the difference is where there is one."""
    size = f" ({abs(mean - 1):.1%} {'lower' if mean < 1 else 'higher'})"
    if low is None or high is None:
        return "Without an interval", size
    if low <= 1 <= high:
        return "No clear difference", ""
    return ("Better" if (mean < 1) == metric.lower_is_better else "Worse"), size


def _origin(study: Study, runs: Runs) -> str:
    """Where the figures come from, and what is missing."""
    found = [record for by_seed in runs.values() for record in by_seed.values()]
    dates, cpus = sorted({record.date for record in found}), sorted({record.machine.cpu for record in found})
    commits = sorted({_short_commit(record.commit) for record in found})
    steps = sorted({record.last.step for record in found})
    missing = [told for variant in study.variants if (told := _missing(study, runs, variant))]
    told = (
        f"`{study.config}`, {' and '.join(f'{number:,}' for number in steps)} steps; {len(found)} "
        f"{'run' if len(found) == 1 else 'runs'} of {' to '.join(dict.fromkeys((dates[0], dates[-1])))} on "
        f"{', '.join(cpus)}, {_core_hours(found)}; {'commit' if len(commits) == 1 else 'commits'} "
        f"{' and '.join(commits)}."
    )
    return told + (f" Not run: {'; '.join(missing)}." if missing else "")


def _missing(study: Study, runs: Runs, variant: Variant) -> str:
    lacking = [str(seed) for seed in study.seeds if seed not in runs.get(variant.name, {})]
    if not lacking:
        return ""
    seeds = f" ({'seed' if len(lacking) == 1 else 'seeds'} {', '.join(lacking)})" if variant.name in runs else ""
    return f"{variant.label}{seeds}"


def _short_commit(commit: str) -> str:
    return commit[:10] + (" with changes" if commit.endswith("+") else "")


def _core_hours(found: Sequence[Record]) -> str:
    known = [record.core_seconds for record in found if record.core_seconds is not None]
    if not known:
        return "of unknown cost"
    lacking = f" without {len(found) - len(known)} of unknown cost" if len(known) < len(found) else ""
    return f"{sum(known) / 3600:.1f} core-hours{lacking}"
