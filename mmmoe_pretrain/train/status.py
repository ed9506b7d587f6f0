"""``mmmoe status RUN``: what a run does, how far and how fast it is, from its folder alone. Imports no torch.

Reads config.yaml, the lock, events.jsonl, the end of metrics.jsonl, hangs/, launch/ and trackers/, while the run may
be writing them: a half-written line is passed over. Nothing is changed.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from mmmoe_pretrain.progress import clock
from mmmoe_pretrain.train.journal import EVENTS
from mmmoe_pretrain.train.lock import holder_of
from mmmoe_pretrain.untrusted import read_json, read_yaml

CONFIG, METRICS = "config.yaml", "metrics.jsonl"
RECORDS, LAST_EVENTS = 20, 6  # that are read, that are shown
BLOCK, MOST_BYTES = 1 << 16, 1 << 26  # of the end of a file
LONGEST_LINE = 1 << 20  # bytes of the journal
MESSAGE = 2000  # letters of a hang that are shown
DEEPEST = 8  # of values in an event
LEAST, LARGEST = 1e-30, 1e30  # numbers that are taken for one; of seconds
OVERDUE, OVERDUE_SECONDS = 5.0, 60.0  # times the usual pause between two records; and at least so long
EVENT = re.compile(rb'"event":"([a-z_]+)"')
STARTS, SAVED = ("started", "resumed"), "saved"
ENDS = {"finished": "finished", "preempted": "stopped"}  # event -> state


@dataclass
class Status:
    """What is not known is None."""

    run: str
    folder: str
    state: str  # starting, running, finished, stopped (saved after a signal), hung, failed, new, unknown
    holder: str = ""  # the process that trains it
    step: int = 0
    steps: int | None = None
    tokens: int | None = None
    tokens_per_second: float | None = None  # median of the last records, as the five that follow
    seconds_a_step: float | None = None
    data_stall: float | None = None
    flops_per_second: float | None = None
    mfu: float | None = None
    speed_over_plan: float | None = None  # 1: as fast as mmmoe plan has planned it
    peak_memory: float | None = None  # bytes
    dead_experts: int | None = None
    seconds_left: float | None = None
    losses: dict[str, float | None] = field(default_factory=dict)
    balance: dict[str, float | None] = field(default_factory=dict)  # of the last records
    record_age: float | None = None  # seconds, as the next
    checkpoint_age: float | None = None
    checkpoint_step: int | None = None
    checkpoint: str | None = None
    counts: dict[str, int] = field(default_factory=dict)  # of events, and bad samples
    events: list[dict[str, Any]] = field(default_factory=list)  # the last ones, without saves
    hang: str = ""  # the message of the last hang, where the run has not started since
    launched: str = ""  # the newest copy in launch/
    trackers: dict[str, dict[str, Any]] = field(default_factory=dict)
    note: str = ""  # what looks wrong


def status_of(folder: Path) -> Status:
    """Raises ValueError where ``folder`` is not a run's, or cannot be read."""
    try:
        return _status_of(folder)
    except OSError as error:
        raise ValueError(f"{folder} cannot be read: {error}; run mmmoe status as a user who may read it") from None


def _status_of(folder: Path) -> Status:
    config = folder / CONFIG
    if not config.is_file() and not (folder / EVENTS).is_file():
        there = "is not the folder of a run" if folder.is_dir() else "is not there"
        raise ValueError(f"{folder} {there}: it has no {CONFIG}; give RUNS_DIR/NAME, e.g. runs/demo")
    train = _section(config, "train")
    steps, every = train.get("steps"), train.get("log_every")
    counts, by_kind, last = read_journal(folder / EVENTS)
    held, holder = holder_of(folder)
    found = Status(folder.resolve().name, str(folder.resolve()), _state(held, by_kind))
    found.holder = holder.partition(", started")[0] if held else ""
    found.steps, found.events = _known(steps), last
    _add_records(found, folder / METRICS, _known(every))
    found.step = max(found.step, _journaled_step(by_kind))
    _add_checkpoint(found, by_kind.get(SAVED))
    found.counts = {
        "restarts": counts["resumed"],
        "rollbacks": counts["rollback"],
        "skipped_steps": counts["skipped_step"],
        "spikes": counts["spike"],
        "failed_saves": counts["save_failed"],
        "worker_restarts": counts["worker_restarted"],
        **found.counts,
    }
    found.hang = _hang(folder, max((_seconds(by_kind[kind]) for kind in STARTS if kind in by_kind), default=0.0))
    if found.hang and found.state == "failed":
        found.state = "hung"
    launches = sorted(path.name for path in folder.glob("launch/*/") if path.is_dir())
    found.launched = launches[-1] if launches else ""
    found.trackers = {path.stem: _values(path) for path in sorted(folder.glob("trackers/*.json"))}
    return found


def _state(held: bool | None, by_kind: dict[str, dict[str, Any]]) -> str:
    if held:
        return "running" if any(kind in by_kind for kind in STARTS) else "starting"
    last = next((kind for kind in reversed(by_kind) if kind in (*STARTS, *ENDS)), None)
    if last in ENDS:
        return ENDS[last]
    if last is None:
        return "new"
    return "failed" if held is False else "unknown"


def _journaled_step(by_kind: Mapping[str, Mapping[str, Any]]) -> int:
    """How far the run is as its journal tells: the step of a save or an end, of which there may be no record."""
    step = 0
    for kind, event in by_kind.items():  # in the order of the last one of each
        at = _known(event.get("to_step" if kind == "rollback" else "step")) or 0
        if kind in (*STARTS, "rollback"):
            step = at
        elif kind in (SAVED, *ENDS):
            step = max(step, at)
    return step


def _add_records(found: Status, path: Path, every: int | None) -> None:
    records = [record for record in map(_parsed, last_lines(path, RECORDS)) if _is_record(record)]
    if not records:
        return
    last = records[-1]
    found.step, found.losses = last["step"], {name: _known(value) for name, value in last["losses"].items()}
    for record in records:  # conflicts are measured now and then
        balance = record.get("balance")
        found.balance |= {name: _known(value) for name, value in balance.items()} if isinstance(balance, dict) else {}
    found.record_age = max(0.0, time.time() - path.stat().st_mtime)
    found.tokens, found.counts["bad_samples"] = _known(last.get("tokens_total")), _known(last.get("bad_samples")) or 0
    steady = [record for record in records if record["step"] > 1] or records  # the first step is slow
    found.flops_per_second, found.mfu = (_median_of(steady, name) for name in ("flops_per_second", "mfu"))
    plans = [plan for record in steady if isinstance(plan := record.get("planned"), dict)]
    found.speed_over_plan = _median_of(plans, "speed_over_plan")
    sizes = last.get("peak_memory")
    known = [_known(size) for size in sizes.values()] if isinstance(sizes, dict) else []
    found.peak_memory = max((size for size in known if size is not None), default=None)
    found.dead_experts = _dead_experts(last.get("routing"))
    timed = [(r["tokens"], r["seconds"], r["data_seconds"]) for r in steady if r["seconds"] > LEAST]
    if timed:
        found.tokens_per_second = median(tokens / seconds for tokens, seconds, _ in timed)
        found.data_stall = median(wait / seconds for _, seconds, wait in timed)
    spans = [now["step"] - before["step"] for before, now in pairwise(records)]
    timed_steps = [r["seconds"] / n for n, r in zip(spans, records[1:], strict=True) if n > 0]
    if not timed_steps and every:
        timed_steps = [last["seconds"] / max(1, min(every, last["step"]))]
    if not timed_steps:
        return
    found.seconds_a_step = median(timed_steps)
    if found.state == "running" and found.steps is not None:
        found.seconds_left = max(0.0, (found.steps - last["step"]) * found.seconds_a_step - found.record_age)
        usual = found.seconds_a_step * max(every or 1, *spans, 1)
        if found.record_age > max(OVERDUE * usual, OVERDUE_SECONDS):
            found.note = f"no record for {clock(found.record_age)}, where one takes {clock(usual)}"


def _median_of(records: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [value for record in records if (value := _known(record.get(name))) is not None]
    return median(values) if values else None


def _dead_experts(routing: Any) -> int | None:
    loads: list[Any] = []
    for layer in routing if isinstance(routing, list) else ():
        load = layer.get("load_over_even") if isinstance(layer, dict) else None
        loads += load if isinstance(load, list) else []
    return loads.count(0) if loads else None


def _add_checkpoint(found: Status, saved: Mapping[str, Any] | None) -> None:
    if saved is not None:
        found.checkpoint_step, found.checkpoint = _known(saved.get("step")), str(saved.get("path"))
        found.checkpoint_age = max(0.0, time.time() - _seconds(saved))


def read_journal(path: Path) -> tuple[Counter[str], dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """How many events there are of each kind, the last one of each kind (in the order of these), and the last ones of
    all but saves. A line is only parsed if it is one of the last."""
    counts: Counter[str] = Counter()
    of_kind: dict[str, bytes] = {}
    last: deque[bytes] = deque(maxlen=LAST_EVENTS)
    if path.is_file():
        with path.open("rb") as file:
            for line in iter(lambda: file.readline(LONGEST_LINE), b""):  # one that is longer is damaged
                if line.endswith(b"}\n") and (match := EVENT.search(line)):
                    kind = match[1].decode()
                    counts[kind] += 1
                    of_kind.pop(kind, None)  # to the end
                    of_kind[kind] = line
                    if kind != SAVED:  # which would crowd out all else, and is told by itself
                        last.append(line)
    parsed = {kind: event for kind, line in of_kind.items() if "event" in (event := _parsed(line))}
    return counts, parsed, [event for event in map(_parsed, last) if "event" in event]


def last_lines(path: Path, count: int) -> list[bytes]:
    """The last whole lines of a file, which is read from its end."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        at, data, size = file.seek(0, 2), b"", BLOCK
        while at > 0 and data.count(b"\n") <= count and len(data) < MOST_BYTES:
            size = min(2 * size, at)
            at -= size
            file.seek(at)
            data = file.read(size) + data
    lines = data.split(b"\n")[:-1]  # what stands behind the last end is not whole
    return (lines if at == 0 else lines[1:])[-count:]


def _is_record(value: Mapping[str, Any]) -> bool:
    needed = ("step", "tokens", "seconds", "data_seconds")
    return all(_known(value.get(name)) is not None for name in needed) and isinstance(value.get("losses"), dict)


def _known(value: Any) -> Any:
    """A number of a run's files, which may hold anything; else None."""
    return value if type(value) in (int, float) and abs(value) < LARGEST else None  # NaN is not


def _parsed(line: bytes) -> dict[str, Any]:
    """Empty where the line is damaged."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return _bounded(value) if isinstance(value, dict) else {}


def _bounded(value: Any, depth: int = DEEPEST) -> Any:
    """Values that JSON has: None for NaN and infinity, and for what is nested too deeply."""
    if isinstance(value, dict | list) and not depth:
        return None
    if isinstance(value, dict):
        return {key: _bounded(each, depth - 1) for key, each in value.items()}
    if isinstance(value, list):
        return [_bounded(each, depth - 1) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _section(path: Path, name: str) -> dict[str, Any]:
    try:
        values = read_yaml(path) if path.is_file() else {}
    except ValueError:  # being written, or damaged: the rest is still worth showing
        return {}
    section = values.get(name) if isinstance(values, dict) else None
    return section if isinstance(section, dict) else {}


def _values(path: Path) -> dict[str, Any]:
    try:
        return dict(_bounded(read_json(path)))
    except (ValueError, OSError):
        return {}


def _hang(folder: Path, since: float) -> str:
    messages = [path for path in folder.glob("hangs/*/message.txt") if path.is_file()]
    newest = max(messages, key=lambda path: path.stat().st_mtime, default=None)
    if newest is None or newest.stat().st_mtime <= since:
        return ""
    with newest.open(encoding="utf-8", errors="replace") as file:
        return file.read(MESSAGE).strip()


def _seconds(event: Mapping[str, Any]) -> float:
    """Since 1970; 0 where the event has no time."""
    try:
        return datetime.fromisoformat(str(event.get("time"))).replace(tzinfo=UTC).timestamp()
    except ValueError:
        return 0.0
