"""``mmmoe status`` as text: one run in lines, several in a table."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from mmmoe_pretrain.progress import clock
from mmmoe_pretrain.train.status import Status, status_of

GIB = 1 << 30
CENTURY = 100 * 365 * 86_400.0  # seconds
COLUMNS = ("run", "state", "step", "tok/s", "s/step", "ends in", "loss", "saved", "last event")


def command(folders: Sequence[Path], as_json: bool) -> None:
    """Print one run in lines, several in a table, or each as a line of JSON."""
    if len(folders) == 1 and not as_json:
        print(page(status_of(folders[0])))
        return
    found = []
    for folder in folders:
        try:
            found.append(status_of(folder))
        except ValueError as error:
            if len(folders) == 1:
                raise
            found.append(Status(folder.name, str(folder), "no run", note=str(error)))
    if as_json:
        for each in found:
            print(json.dumps(asdict(each), allow_nan=False))
        return
    rows = [COLUMNS, *map(_row, found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(_plain("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()))


def page(its: Status) -> str:
    """One run in lines."""
    return "\n".join(map(_plain, _lines(its)))


def _row(its: Status) -> tuple[str, ...]:
    return (
        its.run,
        its.state + (" (!)" if its.note else ""),
        f"{its.step:,}" + (f"/{its.steps:,}" if its.steps else ""),
        _number(its.tokens_per_second, ",.0f"),
        _number(its.seconds_a_step, ".3g"),
        "-" if its.seconds_left is None else clock(its.seconds_left),
        _number(its.losses.get("total"), ".4g"),
        _number(its.checkpoint_step, ","),
        f"{its.events[-1]['event']}" if its.events else "-",
    )


def _lines(its: Status) -> Iterator[str]:
    yield f"{its.run}: {its.state}{f', {its.holder}' if its.holder else ''}  ({its.folder})"
    parts = {
        "warning": its.note,
        "step": _step(its),
        "speed": _speed(its),
        "ends": _end(its),
        "losses": ", ".join(f"{name} {_number(value, '.4g')}" for name, value in its.losses.items()),
        "balance": ", ".join(f"{name} {_number(value, '.3g')}" for name, value in its.balance.items()),
        "experts": "" if its.dead_experts is None else f"{its.dead_experts} dead in the last record",
        "checkpoint": _checkpoint(its),
        "counts": ", ".join(f"{name} {count}" for name, count in its.counts.items()).replace("_", " "),
        "launched": its.launched,
    }
    for name, text in parts.items():
        if text:
            yield f"  {name:<11} {text}"
    for name, state in its.trackers.items():
        failing = f", failing: {state['error']}" if state.get("error") else ""
        ended = f", its process failed {count} times" if (count := state.get("failures")) else ""
        yield f"  {'tracker':<11} {name}: step {state.get('step')}, {state.get('lost')} lost{ended}{failing}"
    for line in its.hang.splitlines():
        yield f"  {'hang':<11} {line}"
    for event in its.events:
        facts = ", ".join(f"{key} {value}" for key, value in event.items() if key not in ("time", "event"))
        yield f"  {str(event.get('time'))[:19]}  {event['event']}{f': {facts[:200]}' if facts else ''}"


def _step(its: Status) -> str:
    share = f" of {its.steps:,} ({its.step / its.steps:.0%})" if its.steps else ""
    tokens = f", {its.tokens:,} tokens" if its.tokens else ""
    record = "no record yet" if its.record_age is None else f"last record {clock(its.record_age)} ago"
    return f"{its.step:,}{share}{tokens}; {record}"


def _speed(its: Status) -> str:
    if its.tokens_per_second is None:
        return ""
    of_plan = "" if its.speed_over_plan is None else f" ({its.speed_over_plan:.2f} of the plan)"
    parts = [f"{its.tokens_per_second:,.0f} tokens/s{of_plan}", f"{_number(its.seconds_a_step, '.3g')} s a step"]
    if its.flops_per_second:
        parts.append(f"{its.flops_per_second:.3g} FLOP/s")
    if its.mfu:
        parts.append(f"MFU {its.mfu:.1%}")
    parts.append(f"{_number(its.data_stall, '.0%')} waiting for data")
    if its.peak_memory:
        parts.append(f"peak memory {its.peak_memory / GIB:.1f} GiB")
    return ", ".join(parts)


def _end(its: Status) -> str:
    if its.seconds_left is None:
        return ""
    if its.seconds_left > CENTURY:
        return "in more than 100 years"
    ends = datetime.fromtimestamp(time.time() + its.seconds_left, UTC)
    return f"in {clock(its.seconds_left)}, at {ends:%Y-%m-%d %H:%M} UTC"


def _checkpoint(its: Status) -> str:
    if its.checkpoint is None:
        return ""
    return f"step {_number(its.checkpoint_step, ',')}, {clock(its.checkpoint_age or 0.0)} ago: {its.checkpoint}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _plain(text: str) -> str:
    """A line without control characters: files of a run may hold any text."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
