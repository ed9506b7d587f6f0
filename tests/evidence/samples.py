"""Records and a study made up by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from evidence import records
from evidence.records import Machine, Point, Record
from evidence.study import Metric, Study, Variant

STUDY = Study(
    name="names", title="Names of things", question="Which is better?", config="evidence/configs/captions.yaml",
    corpus="mini",
    metrics=(Metric("perplexity", "perplexity of names"), Metric("recall", "recall", False, percent=True)),
    reference="dense",
    variants=(
        Variant("dense", "dense", experts=1),
        Variant("four", "4 experts", experts=4),
        Variant("more", "16 experts", experts=16),
    ),
    panels=("steps", "flops", "hours", "experts", "specialisation", "load"),
)  # fmt: skip


def record(variant: str = "dense", seed: int = 1, perplexity: float = 20.0, **more: Any) -> Record:
    """Of three points; ``perplexity`` and a recall of 25% are those of the last one."""
    values: dict[str, Any] = {
        "study": STUDY.name, "variant": variant, "seed": seed, "date": f"2026-01-0{seed}",
        "commit": "0123456789abcdef", "machine": Machine(cpu="A CPU", cores=2, torch="2.0"), "config": {"seed": seed},
        "parameters": 12_000,
        "active_parameters": 3_000, "flops_per_token": 2.5e6, "core_seconds": 1800.0,
        "points": [point(10, 4 * perplexity), point(20, 2 * perplexity), point(30, perplexity)],
        "load": [{"image": [0.25] * 4, "audio": [None] * 4}],
    }  # fmt: skip
    return Record(**{**values, **more})


def point(step: int, perplexity: float, recall: float = 0.25) -> Point:
    return Point(step, 100 * step, {"perplexity": perplexity, "recall": recall}, [0.1, 0.3], [1.5, 2.0])


def write_study(folder: Path, by_variant: dict[str, list[float]]) -> None:
    """Records of STUDY with these perplexities, from seed 1 on."""
    for variant, values in by_variant.items():
        for seed, value in enumerate(values, start=1):
            records.write(record(variant, seed, value), folder)


def changed_file(path: Path, record: Record, **changes: Any) -> Path:
    """The record, with these values, in the file of another name."""
    made = records.write(replace(record, **changes), path.parents[1] / "made")
    path.parent.mkdir(parents=True, exist_ok=True)
    return made.rename(path)
