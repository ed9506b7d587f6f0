"""The pictures of a study, drawn from its records as SVG: the same records give the same bytes.

A panel shows the mean over seeds of each variant, and its 95% interval as a band. The means set the scale: a band
may reach beyond it. Colours are of Okabe and Ito's palette, which colour-blind readers can distinguish.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from evidence.intervals import Interval, interval
from evidence.records import Record
from evidence.study import Metric, Study
from mmmoe_pretrain.evaluate.figures import COLOURS
from mmmoe_pretrain.evaluate.heatmap import INK, QUIET

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Runs = Mapping[str, Mapping[int, Record]]  # by variant and seed
SIZE = (4.0, 3.1)  # inches of a panel
LETTERS = 13  # of the legend, an inch
FROM = 0.3  # of training: held-out scores before it are not shown, since they would set the scale
NARROW = 3.0  # ratio of the ends of an axis up to which its ticks are evenly spaced


def draw(study: Study, runs: Runs, path: Path) -> None:
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": study.name, "svg.fonttype": "path", "font.size": 9}):
        metadata = {"Date": None, "Creator": None}
        figure_of(study, runs).savefig(path, format="svg", metadata=metadata, facecolor="white")


def figure_of(study: Study, runs: Runs) -> Figure:
    """All panels of ``study``, two or three side by side, with one legend under them."""
    from matplotlib.figure import Figure

    number = len(study.panels)
    columns = 2 if number in (2, 4) else min(number, 3)
    rows = math.ceil(number / columns)
    figure = Figure(figsize=(SIZE[0] * columns, SIZE[1] * rows + 0.4), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax, name in zip(axes, study.panels, strict=False):
        PANELS[name](ax, study, runs)
        _style(ax)
    for ax in axes[number:]:
        ax.axis("off")
    _legend(figure, SIZE[0] * columns)
    return figure


def _legend(figure: Figure, inches: float) -> None:
    handles = {label: line for ax in figure.axes for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    if handles:
        fitting = int(inches * LETTERS / (max(map(len, handles)) + 6))
        columns = max(1, min(len(handles), fitting))
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns, frameon=False)


def _style(ax: Axes) -> None:
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.tick_params(colors=QUIET)
    ax.xaxis.label.set_color(INK)
    ax.yaxis.label.set_color(INK)
    ax.grid(alpha=0.25, linewidth=0.6)


def _line(study: Study, variant: str) -> tuple[str, str]:
    """Its colour and style."""
    number = [each.name for each in study.variants].index(variant)
    return COLOURS[number % len(COLOURS)], ("-", "--", ":")[number // len(COLOURS) % 3]


def _curves(ax: Axes, study: Study, runs: Runs, x_of: Callable[[Record], Sequence[float] | None],
            y_of: Callable[[Record], Sequence[float]], begin: float = 0.0) -> None:  # fmt: skip
    """Runs of a variant have the same steps; their x is the mean of the seeds. Points before the share ``begin`` of
    training are left out, but for the last one."""
    shown: list[float] = []
    for variant, by_seed in runs.items():
        found = [x_of(record) for record in by_seed.values()]
        xs = [x for x in found if x is not None]
        if len(xs) < len(found):
            continue
        steps = next(iter(by_seed.values())).steps
        kept = slice(sum(step < begin * steps[-1] for step in steps), None)
        x = [statistics.fmean(values) for values in zip(*xs, strict=True)][kept]
        ys = [interval(values) for values in zip(*map(y_of, by_seed.values()), strict=True)][kept]
        label, (colour, style) = study.variant(variant).label, _line(study, variant)
        ax.plot(x, [y.mean for y in ys], style, color=colour, label=label, linewidth=1.6, marker="o", markersize=2.5)
        ax.fill_between(x, [y.low for y in ys], [y.high for y in ys], color=colour, alpha=0.18, linewidth=0)
        shown += [y.mean for y in ys]
    if shown:
        _limits(ax, shown)


def _limits(ax: Axes, shown: Sequence[float]) -> None:
    """A margin around the values: intervals of two seeds are wide enough to hide how they differ."""
    margin = 0.12 * (max(shown) - min(shown)) or 0.1 * abs(max(shown)) or 1.0
    low = min(shown) - margin
    ax.set_ylim(max(low, 0.9 * min(shown)) if min(shown) > 0 else low, max(shown) + margin)


def _scores(metric: Metric) -> Callable[[Record], Sequence[float]]:
    return lambda record: [metric.scale * score for score in record.scores(metric.name)]


def _held_out(ax: Axes, study: Study, runs: Runs, x_of: Callable[[Record], Sequence[float] | None], x: str) -> None:
    metric = study.metrics[0]
    _curves(ax, study, runs, x_of, _scores(metric), begin=FROM)
    low, high = ax.get_ylim()
    if metric.lower_is_better and low > 0:
        ax.set_yscale("log")
        _plain_ticks(ax, wide=high > NARROW * low)
    ax.set_xlabel(x)
    ax.set_ylabel(f"held-out {metric.title}{', %' if metric.percent else ''}")


def _plain_ticks(ax: Axes, wide: bool) -> None:
    """Numbers without powers, also where an axis spans less than a factor of ten."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, ScalarFormatter

    ax.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 1.5, 2, 3, 4, 5, 7)) if wide else MaxNLocator(6))
    ax.yaxis.set_major_formatter(ScalarFormatter())
    ax.yaxis.set_minor_locator(NullLocator())


def _steps(record: Record) -> Sequence[float]:
    return record.steps


def _flops(record: Record) -> Sequence[float]:
    return [record.flops_at(point) / 1e15 for point in record.points]


def _hours(record: Record) -> Sequence[float] | None:
    """The run's CPU time, shared out evenly over its steps."""
    if record.core_seconds is None:
        return None
    return [record.core_seconds / 3600 * point.step / record.last.step for point in record.points]


def _by_experts(ax: Axes, study: Study, runs: Runs) -> None:
    """The end of training over the number of experts; the dense model is that of one."""
    metric = study.metrics[0]
    found = sorted((number, variant) for variant in runs if (number := study.variant(variant).experts))
    ys = [_at_the_end(runs[name], metric) for _, name in found]
    x = range(len(found))
    ax.errorbar(x, [y.mean for y in ys], yerr=[y.half or 0 for y in ys], color=INK, marker="o", capsize=3)
    ax.set_xticks(x, ["dense" if number == 1 else str(number) for number, _ in found])
    ax.set_xlabel("experts of an MoE layer")
    ax.set_ylabel(f"{metric.title}{', %' if metric.percent else ''}, at the end")


def _sweep(ax: Axes, study: Study, runs: Runs, number: int = 0) -> None:
    """The end of training over ``Variant.x``, a line by ``Variant.line``; the axis is linear below the least x above
    0, and all of it where the others are near."""
    metric = study.metrics[number]
    points: dict[str, list[tuple[float, Interval]]] = {}
    for variant in study.variants:
        if variant.name in runs and variant.x is not None:
            points.setdefault(variant.line, []).append((variant.x, _at_the_end(runs[variant.name], metric)))
    for place, (line, found) in enumerate(points.items()):
        found.sort(key=lambda point: point[0])
        x, y, ends = zip(*((x, value.mean, value.half or 0) for x, value in found), strict=True)
        ax.errorbar(x, y, yerr=ends, color=COLOURS[place % len(COLOURS)], marker="o", capsize=3, label=line)
    xs = [x for found in points.values() for x, _ in found]
    least = min((x for x in xs if x > 0), default=1.0)
    if max(xs, default=0.0) > NARROW * least:
        ax.set_xscale("symlog", linthresh=least)
    ax.set_xticks(xs, [f"{x:g}" for x in xs])
    ax.minorticks_off()
    ax.set_xlabel(study.axis)
    ax.set_ylabel(f"held-out {metric.title}{', %' if metric.percent else ''}")


def _final(ax: Axes, study: Study, runs: Runs) -> None:
    """The end of training, a row a variant in the order of the table."""
    metric = study.metrics[0]
    shown = [variant for variant in study.variants if variant.name in runs]
    for row, variant in enumerate(shown):
        value = _at_the_end(runs[variant.name], metric)
        colour, _ = _line(study, variant.name)
        ax.errorbar(value.mean, row, xerr=value.half or 0, color=colour, marker="o", capsize=3)
    ax.set_yticks(range(len(shown)), [variant.label for variant in shown])
    ax.invert_yaxis()
    ax.set_xlabel(f"held-out {metric.title}{', %' if metric.percent else ''}")


def _at_the_end(by_seed: Mapping[int, Record], metric: Metric) -> Interval:
    return interval([metric.scale * record.score(metric.name) for record in by_seed.values()])


def _specialisation(ax: Axes, study: Study, runs: Runs) -> None:
    """The mean of the MoE layers."""
    _curves(
        ax, study, _routed(runs), _steps, lambda its: [100 * statistics.fmean(p.specialisation) for p in its.points]
    )
    ax.set_xlabel("steps")
    ax.set_ylabel("specialisation by modality, %")


def _load(ax: Axes, study: Study, runs: Runs) -> None:
    """That of the expert of any layer that has most."""
    _curves(ax, study, _routed(runs), _steps, lambda its: [max(point.largest_load) for point in its.points])
    ax.set_xlabel("steps")
    ax.set_ylabel("largest load over the mean")


def _routed(runs: Runs) -> Runs:
    """Those of models with several experts."""
    return {name: by_seed for name, by_seed in runs.items() if _experts(next(iter(by_seed.values()))) > 1}


def _experts(record: Record) -> int:
    return max((len(loads) for layer in record.load for loads in layer.values()), default=0)


PANELS: dict[str, Callable[[Axes, Study, Runs], None]] = {
    "steps": lambda ax, study, runs: _held_out(ax, study, runs, _steps, "steps"),
    "flops": lambda ax, study, runs: _held_out(ax, study, runs, _flops, "training, PFLOPs of the model"),
    "hours": lambda ax, study, runs: _held_out(ax, study, runs, _hours, "training, core-hours"),
    "experts": _by_experts,
    "sweep": _sweep,
    "sweep of the second metric": functools.partial(_sweep, number=1),
    "sweep of the third metric": functools.partial(_sweep, number=2),
    "final": _final,
    "specialisation": _specialisation,
    "load": _load,
}
