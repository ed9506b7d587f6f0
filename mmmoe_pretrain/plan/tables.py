"""A plan as text: one table for a person, and two plans side by side. All numbers are those of ``--json``."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Values = Mapping[str, Any]  # a plan, as --json prints it
GB, MB = 1e9, 1e6
TIGHT = 0.05  # share of the memory
LEFT = 44  # columns of a row's name
DETAILS = ("parameters.by_part", "step.traffic")  # not named where they are equal
# What a person reads for the short names of --json.
MEMORY = {
    "masters": "master weights (fp32)",
    "moments": "optimizer moments",
    "transient": "temporary tensors",
    "communication": "communication buffers",
    "allowance": "allowance (CUDA, NCCL, fragmentation)",
}
TIME = {
    "products": "dense matmuls",
    "heads": "output heads",
    "memory bound": "memory-bound operations",
    "host": "host (launch overhead)",
    "tensor parallel": "tensor-parallel collectives",
    "pipeline messages": "pipeline send and receive",
    "gradients": "gradient reduction",
    "parameters": "parameter gathering",
    "statistics": "small reductions",
}


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
    unit, prefix = unit_of(memory["total"])
    yield _row(fullest, f"{prefix}B")
    for name, value in memory["terms"].items():
        yield _row(f"  {MEMORY.get(name, name)}", f"{value / unit:,.2f}")
    yield _row("", f"{memory['total'] / unit:,.2f} of {memory['capacity'] / unit:,.2f}")
    yield ""
    sent = [(kind, [links[link] for link in ("inside", "across")]) for kind, links in step["traffic"].items()]
    unit, prefix = unit_of(max((sum(each) for _, each in sent), default=GB))
    heads = (f"{prefix}B in its node", f"{prefix}B across nodes")
    yield _row("sent a step by a GPU of the slowest stage", *heads)
    for kind, each in sent:
        yield _row(f"  {kind}", *(f"{value / unit:,.2f}" for value in each))
    yield ""
    yield _row("time of a step", "ms", "share")
    for name, seconds in sorted(step["parts"].items(), key=lambda part: -part[1]):
        if seconds > 0:
            yield _row(f"  {TIME.get(name, name)}", f"{1e3 * seconds:,.1f}", f"{seconds / step['seconds']:.1%}")
    yield _row("", f"{1e3 * step['seconds']:,.1f}")
    yield ""
    yield from _summary(plan)


def _summary(plan: Values) -> Iterator[str]:
    step = plan["step"]
    yield _row(f"a step: {step['samples']:,} samples in {step['microbatches']} microbatches", count(step["tokens"]),
               "tokens")  # fmt: skip
    unit, prefix = unit_of(step["flops_per_token"])
    flops = f"{step['flops_per_token'] / unit:,.2f}"
    yield _row("FLOPs a token, forward and backward", flops, f"{prefix}FLOP")
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
    """The best layouts and, below, why those one step from the first one are worse."""
    lines = [
        f"{found['config']} on {found['gpus']:,} x {found['gpu']}: {found['legal']:,} legal layouts with this "
        f"global batch and number of microbatches; weights, gradients and optimizer state of {found['held_fits']:,} "
        f"fit",
        "",
        f"{'':<4}{'ms a step':>10}{'tokens/s':>12}{'MFU':>8}{'GB':>8}   layout",
    ]
    for place, plan in enumerate(found["best"], 1):
        step = plan["step"]
        lines.append(
            f"{place:<4}{1e3 * step['seconds']:>10,.1f}{count(step['tokens_per_second']):>12}{step['mfu']:>8.1%}"
            f"{plan['memory']['total'] / GB:>8,.2f}   {plan['layout']['degrees']}{_tight(plan)}"
        )
    if any(_tight(plan) for plan in found["best"]):
        lines += ["", f"tight: less than {TIGHT:.0%} of the memory is free, and plans of memory are off by up to 2%"]
    lines += ["", "overrides for the first:", "  " + " ".join(found["best"][0]["overrides"]), ""]
    lines += [f"limit of the first: {found['best'][0]['limit']}", "", "layouts one step from the first:"]
    for each in found["beside"]:
        lines += [f"  {each['layout']}", f"      {each['why']}"]
    return "\n".join(lines)


def _tight(plan: Values) -> str:
    memory = plan["memory"]
    return "  (tight)" if memory["total"] > (1 - TIGHT) * memory["capacity"] else ""


def side_by_side(a: Values, b: Values, names: tuple[str, str]) -> str:
    """Rows that differ, texts that differ in full, and the names of what is equal."""
    left, right = dict(_flat(a)), dict(_flat(b))
    keys = list(dict.fromkeys((*left, *right)))
    equal = [key for key in keys if _alike(left.get(key), right.get(key))]
    texts = [value for its in (left, right) for value in its.items() if isinstance(value[1], str)]
    long = {key for key, text in texts if len(text) > 30}.difference(equal)
    width = max(map(len, keys))
    lines = [f"{'differs':<{width}}{names[0][-30:]:>32}{names[1][-30:]:>32}"]
    for key in keys:
        if key in equal or key in long:
            continue
        sides = left.get(key), right.get(key)
        lines.append(f"{key:<{width}}{_shown(sides[0], key):>32}{_shown(sides[1], key):>32}{_ratio(*sides)}")
    for key in filter(long.__contains__, keys):
        lines += [f"{key}:", f"  {left.get(key)}", f"  {right.get(key)}"]
    named = ", ".join(key for key in equal if not key.startswith(DETAILS))
    return "\n".join([*lines, *textwrap.wrap(f"equal: {named}", 118, subsequent_indent="  ", break_on_hyphens=False)])


def _alike(a: Any, b: Any) -> bool:
    """Equal in what a row shows."""
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (a, b))
    return math.isclose(a, b, rel_tol=5e-4) if numbers else a == b


def _flat(values: Values, before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _shown(value: Any, key: str = "") -> str:
    """``key``: bytes and seconds are shown in a unit."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        if key.startswith(("memory.terms", "memory.total", "memory.capacity", "step.traffic")):
            return size(value)
        if key.startswith(("step.seconds", "step.parts")):
            return f"{1e3 * value:,.1f} ms"
    if isinstance(value, bool) or value is None:
        return "-" if value is None else str(value).lower()
    if isinstance(value, int | float):
        return count(value) if abs(value) >= 1e6 else f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
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


def unit_of(number: float) -> tuple[float, str]:
    """10^9 and its prefix, or 10^6 where ``number`` is less."""
    return (GB, "G") if number >= GB else (MB, "M")


def size(number: float) -> str:
    """Bytes as 24.5 GB."""
    unit, prefix = unit_of(number)
    return f"{number / unit:,.1f} {prefix}B"
