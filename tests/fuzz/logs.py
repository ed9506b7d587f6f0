"""What a run writes for people and later commands to read: its log, its report, the recorded comparison."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from launch import compare
from mmmoe_pretrain.evaluate import report
from mmmoe_pretrain.evaluate.routing import history
from mmmoe_pretrain.surgery.probe import logged_usage
from mmmoe_pretrain.train.journal import EVENTS, read_events
from mmmoe_pretrain.train.metrics import truncate_after
from mmmoe_pretrain.train.rollback import SKIPPED_BATCHES, read_skipped_batches
from tests.fuzz.mutate import damage_json

NAMES = ("metrics.jsonl", "metrics.jsonl", "report.json", "results.json", SKIPPED_BATCHES, EVENTS)
MODALITIES = ("image", "audio", "text")
ROW = {"metric": "m", "value": 0.5, "unit": "share", "chance": 0.1, "majority": None, "n": 10}


def record(step: int) -> dict[str, Any]:
    by_modality = dict.fromkeys(MODALITIES, 8)
    layer = {"layer": 1, "load": {m: [0.5, 0.25, 0.25, 0.0] for m in MODALITIES}, "tokens": by_modality,
             "assignments": by_modality}  # fmt: skip
    return {"step": step, "losses": {"total": 1.5}, "routing": [layer]}


def make(rng: Random, place: object) -> tuple[str, bytes]:
    name = rng.choice(NAMES)
    if name == "report.json":
        whole = json.dumps({"results": [ROW, ROW]}).encode()
        return name, damage_json(rng, whole, whole)
    if name == "results.json":
        whole = json.dumps({"dense": {"test": ["a"], "results": [ROW]}}).encode()
        return name, damage_json(rng, whole, whole)
    if name == SKIPPED_BATCHES:
        whole = json.dumps({"skipped_batches": [[3, 5], [9, 10]], "rollbacks": 1}).encode()
        return name, damage_json(rng, whole, whole)
    one = (lambda step: {"event": "saved", "step": step}) if name == EVENTS else record
    lines = [json.dumps(one(step)).encode() for step in range(1, 5)]
    at = rng.randrange(4)
    lines[at] = damage_json(rng, lines[at], lines[0])
    return name, b"\n".join(lines) + b"\n" * rng.randrange(2)


def use(data: tuple[str, bytes], folder: Path) -> tuple[str, str]:
    name, content = data
    path = folder / name
    path.write_bytes(content)
    if name == "report.json":
        compare.summarise([compare.read_report(path)])
    elif name == "results.json":
        report.read_dense(path, ["a"])
    elif name == SKIPPED_BATCHES:
        cursor = read_skipped_batches(folder).cursor
        [cursor.batch(step) for step in (0, 3, 100)]
    elif name == EVENTS:
        read_events(folder)
    else:
        readers = (history.read, lambda path: logged_usage(path, 3, {1: 4}), lambda path: truncate_after(path, 2))
        for i in range(3):  # each is the first one in a third of the cases: a refusal ends the case
            readers[(len(content) + i) % 3](path)
    return "accepted", ""
