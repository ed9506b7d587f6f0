"""The record of a run: a JSON file by study, variant and seed, of which the page is made.

A record has the run's config, the commit and the machine, its size and cost, and its held-out scores over training.
Its last point also has the scores of mmmoe evaluate, as test/METRIC, where the study asks for them. ``core_seconds``:
CPU time of the run's processes, data workers, held-out scores and evaluation included; other programs of the machine
raise it by about a tenth. None where it is not known, as of a run that was killed once.
"""

from __future__ import annotations

import json
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError
from pydantic.dataclasses import dataclass

from evidence.measures import ROUTING, Routing, measure
from evidence.study import Study
from mmmoe_pretrain.config.base import explain
from mmmoe_pretrain.untrusted import read_json

FOLDER = Path(__file__).resolve().parent / "records"
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True, config=STRICT)
class Point:
    """Held-out losses and scores after ``step`` steps and ``tokens`` tokens of training, by name. By MoE layer:
    ``specialisation``, the share of a modality's bits that the expert tells; and the largest load over the mean."""

    step: int
    tokens: int
    scores: dict[str, float]
    specialisation: list[float]
    largest_load: list[float]


@dataclass(frozen=True, config=STRICT)
class Machine:
    """What decides how long a run takes, and its last bits."""

    cpu: str
    cores: int
    torch: str


@dataclass(frozen=True, config=STRICT)
class Record:
    """Raises ValidationError, a ValueError, for values of other types."""

    study: str
    variant: str
    seed: int
    date: str
    commit: str  # ends with + where files of the checkout were changed since
    machine: Machine
    config: dict[str, Any]
    parameters: PositiveInt
    active_parameters: PositiveInt
    flops_per_token: PositiveFloat  # forward and backward, by models/costs.py
    core_seconds: float | None
    points: Annotated[list[Point], Field(min_length=1)]
    # At the end: by MoE layer, the share of each modality's tokens by expert; None for a modality without tokens.
    load: list[dict[str, list[float | None]]]
    dropped: list[dict[str, float | None]] = field(default_factory=list)  # likewise: the share that was dropped
    # Of ``tokens`` those of the run that this one was made of (``studies.Start``), and the FLOPs of its training.
    before_tokens: int = 0
    before_flops: float = 0.0

    @property
    def last(self) -> Point:
        return self.points[-1]

    @property
    def steps(self) -> list[int]:
        return [point.step for point in self.points]

    def flops_at(self, point: Point) -> float:
        """Of training up to ``point``, that of the run before included."""
        return self.before_flops + self.flops_per_token * (point.tokens - self.before_tokens)

    def scores(self, name: str) -> list[float]:
        """Of all points. Raises ValueError where one has no such score."""
        for point in self.points:
            if name not in point.scores:
                raise self._lacks(name, point)
        return [point.scores[name] for point in self.points]

    def find(self, name: str) -> float | None:
        """A score, a loss or a measure of routing at the end of training; None where the run has no such."""
        if name.startswith(ROUTING):
            last = self.last
            return measure(name, Routing(last.specialisation, last.largest_load, self.load, self.dropped))
        return self.last.scores.get(name)

    def score(self, name: str) -> float:
        """``find``. Raises ValueError where it is None."""
        value = self.find(name)
        if value is None:
            raise self._lacks(name, self.last)
        return value

    def _lacks(self, name: str, point: Point) -> ValueError:
        return ValueError(
            f"the run {self.study}/{self.variant}, seed {self.seed} has no {name} at step {point.step}; "
            f"it has {', '.join(sorted(point.scores)) or 'none'}"
        )


def path_of(study: str, variant: str, seed: int, folder: Path = FOLDER) -> Path:
    return folder / study / f"{variant}-seed{seed}.json"


def write(record: Record, folder: Path = FOLDER) -> Path:
    """One line a point, so that a change of one is seen in a diff."""
    path = path_of(record.study, record.variant, record.seed, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    values = asdict(record)
    rows = {key: values.pop(key) for key in ("points", "load", "dropped")}
    lines = [f" {json.dumps(key)}: {_compact(value)}" for key, value in values.items()]
    for key, row in rows.items():
        each = ",\n  ".join(_compact(value) for value in row)
        lines.append(f" {json.dumps(key)}: [\n  {each}\n ]" if row else f" {json.dumps(key)}: []")
    draft = path.with_name(path.name + ".tmp")
    draft.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    draft.replace(path)
    return path


def _compact(value: Any) -> str:
    return json.dumps(value, allow_nan=False, separators=(", ", ": "), ensure_ascii=False)


def read(path: Path) -> Record:
    """Raises ValueError where the file is no record of its name."""
    try:
        record = Record(**read_json(path))
    except ValidationError as error:
        first, *more = explain(error)
        also = f", and {len(more)} more" if more else ""
        raise ValueError(f"{path} is not a record of a run ({first}{also}); remove it to run it again") from None
    if path_of(record.study, record.variant, record.seed, path.parents[1]) != path:
        name = f"{record.study}/{record.variant}, seed {record.seed}"
        raise ValueError(f"{path} is the record of another run ({name}); move it to its place, or remove it")
    return record


def read_study(study: Study, folder: Path = FOLDER) -> dict[str, dict[int, Record]]:
    """Records by variant and seed; variants without any are left out."""
    found: dict[str, dict[int, Record]] = {}
    for variant in study.variants:
        owner, name = study.owner_of(variant)
        paths = [path_of(owner, name, seed, folder) for seed in study.seeds]
        records = [read(path) for path in paths if path.is_file()]
        if len({tuple(record.steps) for record in records}) > 1:
            steps = "; ".join(f"seed {record.seed}: {', '.join(map(str, record.steps))}" for record in records)
            raise ValueError(
                f"the runs of {owner}/{name} have scores of different steps ({steps}); remove the records of older "
                f"settings, and the folders of their runs"
            )
        if records:
            found[variant.name] = {record.seed: record for record in records}
    return found
