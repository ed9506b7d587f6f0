"""A plan as text: one table for a person, and two plans side by side. All numbers are those of ``--json``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Values = Mapping[str, Any]  # a plan, as --json prints it
GB = 1e9
LEFT = 34  # columns of a row's name


def text_of(plan: Values) -> str:
    """The whole table."""
    return "\n".join(_lines(plan))


def _lines(plan: Values) -> Iterator[str]:
    memory, step = plan["memory"], plan["step"]
    yield f"{plan['config']} on {plan['gpus']:,} x {plan['gpu']}: {plan['layout']['degrees']}"
    yield ""
    yield from _rows(("parameters", "total", "active"), plan["parameters"]["by_part"], count)
    yield _row("", count(plan["parameters"]["total"]), count(plan["parameters"]["active"]))
    yield ""
    fullest = f"memory of the fullest GPU (pipeline rank {memory['pipeline_rank']})"
    yield _row(fullest, "GB")
    for name, value in memory["terms"].items():
        yield _row(f"  {name}", gigabytes(value))
    yield _row("", f"{gigabytes(memory['total'])} of {gigabytes(memory['capacity'])}")
    yield ""
    yield _row("bytes sent a step by that GPU", "GB in its node", "GB across nodes")
    for kind, links in step["traffic"].items():
        yield _row(f"  {kind}", *(gigabytes(links[link]) for link in ("inside", "across")))
    yield ""
    yield _row("time of a step", "ms", "share")
    for name, seconds in sorted(step["parts"].items(), key=lambda part: -part[1]):
        if seconds > 0:
            yield _row(f"  {name}", f"{1e3 * seconds:,.1f}", f"{seconds / step['seconds']:.1%}")
    yield _row("", f"{1e3 * step['seconds']:,.1f}")
    yield ""
    yield from _summary(plan)


def _summary(plan: Values) -> Iterator[str]:
    step = plan["step"]
    yield _row(f"a step: {step['samples']:,} samples in {step['microbatches']} microbatches", count(step["tokens"]),
               "tokens")  # fmt: skip
    yield _row("FLOPs a token, forward and backward", f"{step['flops_per_token'] / 1e9:,.2f}", "GFLOP")
    yield _row("tokens a second", count(step["tokens_per_second"]))
    yield _row("MFU", f"{step['mfu']:.1%}")
    budget = plan["budget"]
    of = count(budget["tokens"])
    yield _row(f"{of} tokens take", f"{budget['days']:,.1f}", "days")
    yield _row("", f"{budget['gpu_hours']:,.0f}", "GPU-hours")
    yield _row("", f"{budget['kwh']:,.0f}", "kWh")
    yield ""
    yield f"limit: {plan['limit']}"
    for assumed in plan["assumptions"]:
        yield f"  assumed: {assumed}"


def _rows(heads: Sequence[str], by_part: Mapping[str, Sequence[float]], shown: Any) -> Iterator[str]:
    yield _row(*heads)
    for name, values in by_part.items():
        yield _row(f"  {name}", *map(shown, values))


def _row(name: str, *cells: str) -> str:
    return (f"{name:<{LEFT}}" + "".join(f"{cell:>18}" for cell in cells)).rstrip()


def ranking_of(found: Values) -> str:
    """The best layouts and, below, why those next to the first one are worse."""
    lines = [
        f"{found['config']} on {found['gpus']:,} x {found['gpu']}: {found['legal']:,} legal layouts with this "
        f"global batch and number of microbatches; what {found['held_fits']:,} hold from step to step fits",
        "",
        f"{'':<4}{'ms a step':>10}{'tokens/s':>12}{'MFU':>8}{'GB':>8}   layout",
    ]
    for place, plan in enumerate(found["best"], 1):
        step = plan["step"]
        lines.append(
            f"{place:<4}{1e3 * step['seconds']:>10,.1f}{count(step['tokens_per_second']):>12}{step['mfu']:>8.1%}"
            f"{gigabytes(plan['memory']['total']):>8}   {plan['layout']['degrees']}"
        )
    lines += ["", "as overrides of the first:", "  " + " ".join(found["best"][0]["overrides"]), ""]
    lines += [f"limit of the first: {found['best'][0]['limit']}", "", "next to the first:"]
    for each in found["beside"]:
        lines += [f"  {each['layout']}", f"      {each['why']}"]
    return "\n".join(lines)


def side_by_side(a: Values, b: Values, names: tuple[str, str]) -> str:
    """Rows that differ first, then those that are equal."""
    left, right = dict(_flat(a)), dict(_flat(b))
    keys = list(dict.fromkeys((*left, *right)))
    differing = [key for key in keys if left.get(key) != right.get(key)]
    equal = [key for key in keys if key not in differing]
    width = max(map(len, keys))
    lines = [f"{'differs':<{width}}{names[0][-30:]:>32}{names[1][-30:]:>32}"]
    for key in differing:
        sides = left.get(key), right.get(key)
        lines.append(f"{key:<{width}}{_shown(sides[0]):>32}{_shown(sides[1]):>32}{_ratio(*sides)}")
    lines += ["", "equal"] + [f"{key:<{width}}{_shown(left[key]):>32}" for key in equal]
    return "\n".join(lines)


def _flat(values: Values, before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return "-" if value is None else str(value).lower()
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) and abs(value) < 1e6 else f"{value:.4g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " ".join(map(_shown, value))
    return str(value)[:31]


def _ratio(a: Any, b: Any) -> str:
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (a, b))
    return f"  x {b / a:.3g}" if numbers and a else ""


def count(number: float) -> str:
    """1,234,567 as 1.23 M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:,.2f} {unit}"
    return f"{number:,.0f}"


def gigabytes(number: float) -> str:
    """Bytes as GB of 10^9."""
    return f"{number / GB:,.2f}"
