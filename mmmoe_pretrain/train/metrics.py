"""The metrics of a run: one record a logged step, written as JSON lines, TensorBoard events and an image.

``metrics.jsonl`` is the complete record. TensorBoard gets a part of it; its groups are numbered so that the important
ones come first. ``routing_training.png`` shows the latest routing of training (``routing.png`` is that of an
evaluation). Only rank 0 makes a ``MetricsLog``. Shapes: M modalities, E experts.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import mmap
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch

from mmmoe_pretrain.data.loader import LoadStats
from mmmoe_pretrain.engines.base import StepResult
from mmmoe_pretrain.evaluate import heatmap
from mmmoe_pretrain.parallel.agreement import largest
from mmmoe_pretrain.parallel.groups import Group
from mmmoe_pretrain.train.held_out import HeldOutScores
from mmmoe_pretrain.train.journal import LineWriter
from mmmoe_pretrain.train.memory import GROWN, growth, largest_resident, peak_memory
from mmmoe_pretrain.train.planned import Planned
from mmmoe_pretrain.train.scalars import held_out_scalars, scalars
from mmmoe_pretrain.train.telemetry import (
    LayerRouting,
    gather_balance,
    gather_routing,
    gather_stages,
    layer_json,
    number,
)

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)
CPU = torch.device("cpu")
NO_EVENTS = "TensorBoard gets no more of this run"


@dataclass(frozen=True)
class SampleCounts:
    """Samples and tokens since the start of a run, over all data-parallel ranks and restarts; rolled-back steps do
    not count."""

    read: int = 0
    bad: int = 0  # could not be used
    cut: dict[str, int] = field(default_factory=dict)  # values longer than a modality's settings allow, by modality
    tokens: int = 0  # trained on, padding not counted

    def __add__(self, other: SampleCounts) -> SampleCounts:
        cut = dict(Counter(self.cut) + Counter(other.cut))
        return SampleCounts(self.read + other.read, self.bad + other.bad, cut, self.tokens + other.tokens)

    def to_json(self) -> dict[str, int]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: object) -> SampleCounts:
        """Raises ValueError for anything but counts of these names; earlier versions did not count tokens."""
        names = {"read", "bad", "cut"}
        if isinstance(value, dict) and value.keys() - {"tokens"} == names and isinstance(value["cut"], dict):
            counts = (value["read"], value["bad"], value.get("tokens", 0), *value["cut"].values())
            if all(type(count) is int and count >= 0 for count in counts):
                return cls(**value)
        raise ValueError(f"samples must be counts of bad, cut by modality, read and tokens, not {str(value)[:80]}")


@dataclass(frozen=True)
class StepRecord:
    """One logged step. Times and tokens are counted since the previous record.

    ``losses`` holds the terms as they enter the loss (weights applied), and their sum as "total".
    """

    step: int  # the first is 1
    losses: dict[str, float]  # "total", those of the objectives, "aux/balance", ...
    learning_rate: float
    grad_norm: float
    tokens: int  # over all ranks, padding not counted
    seconds: float
    data_seconds: float  # of them, spent waiting for data, by the rank that waited longest
    samples: SampleCounts = field(default_factory=SampleCounts)  # since the start of the run
    routing: tuple[LayerRouting, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)  # by loss: the targets or samples that it is the mean of
    loading_seconds: dict[str, float] = field(default_factory=dict)  # of all workers of rank 0, by stage
    memory: dict[str, float] = field(default_factory=dict)  # ``peak_memory`` of the fullest rank
    flops_a_token: float = 0.0  # of the model, forward and backward; 0: not known
    peak_flops: float = 0.0  # a second, of the devices of all ranks together; 0: not known
    balance: dict[str, float] = field(default_factory=dict)  # ``PretrainingModel.balance``
    held_out: HeldOutScores | None = None  # of the model after this step
    planned: Planned | None = None  # where mmmoe plan knows the machine

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def data_fraction(self) -> float:
        return self.data_seconds / self.seconds if self.seconds > 0 else 0.0

    @property
    def flops_per_second(self) -> float | None:
        """Of all ranks together; what recomputation adds is not counted."""
        return self.flops_a_token * self.tokens_per_second if self.flops_a_token else None

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B)."""
        achieved = self.flops_per_second
        return achieved / self.peak_flops if achieved is not None and self.peak_flops else None

    @property
    def dead_experts(self) -> int:
        """Experts without a token in the logged step, over all layers."""
        return sum(int((layer.load_over_even_E == 0).sum()) for layer in self.routing)

    @property
    def load_over_even(self) -> tuple[float, float]:
        """The least and the largest over all experts of all layers. Needs ``routing``."""
        load = np.concatenate([layer.load_over_even_E for layer in self.routing])
        return float(load.min()), float(load.max())


@dataclass(frozen=True)
class Compute:
    """What is needed beside the tokens to tell how well the devices are used; 0: not known."""

    flops_a_token: float = 0.0  # of the model, forward and backward
    peak_flops: float = 0.0  # a second, of the devices of all ranks together


UNKNOWN = Compute()


class Recorder:
    """Turns step results into records: losses and routing are those of the logged step, so that a resumed run logs
    the same; times and tokens are summed since the record before."""

    def __init__(
        self,
        group: Group = None,
        pipeline: Group = None,
        ranks: Group = None,
        device: torch.device = CPU,
        compute: Compute = UNKNOWN,
        before_model: float = 0.0,
    ) -> None:
        """``ranks``: all of them, on the host. ``before_model``: bytes of the process before it built the model."""
        self._group, self._pipeline, self._ranks = group, pipeline, ranks
        self._device, self._compute = device, compute
        self._before_model, self._before_steps = before_model, 0.0
        self.steps = 0  # counted so far
        self.begin_interval()

    def begin_steps(self) -> None:
        """Before the first step of this process: the model is there, and its checkpoint is loaded."""
        self._before_steps = largest_resident()

    def begin_interval(self) -> None:
        """Start counting times and tokens."""
        self._began = time.perf_counter()
        self._tokens = 0
        self._data_seconds = 0.0
        self._loading_seconds = Counter[str]()

    @property
    def seconds(self) -> float:
        """Since the interval began."""
        return time.perf_counter() - self._began

    def add(self, result: StepResult, stats: LoadStats) -> None:
        """Count a step."""
        self.steps += 1
        self._tokens += result.tokens
        self._data_seconds += stats.wait_seconds
        self._loading_seconds += stats.seconds

    def record(self, step: int, result: StepResult, learning_rate: float, samples: SampleCounts) -> StepRecord:
        """The record of ``step`` (the first is 1), equal on every rank; begins a new interval. Collective."""
        now = time.perf_counter()
        memory = self._memory()
        data_seconds, *peaks = largest(self._ranks, [self._data_seconds, *memory.values()])
        record = StepRecord(
            step=step,
            losses=result.losses,
            counts=result.counts.terms,
            learning_rate=learning_rate,
            grad_norm=result.grad_norm,
            tokens=self._tokens,
            seconds=now - self._began,
            data_seconds=data_seconds,
            loading_seconds=dict(self._loading_seconds),
            samples=samples,
            routing=gather_stages(gather_routing(result.routing, self._group), self._pipeline),
            balance=gather_balance(result.balance, self._pipeline),
            memory={kind: peak for kind, peak in zip(memory, peaks, strict=True) if peak},
            flops_a_token=self._compute.flops_a_token,
            peak_flops=self._compute.peak_flops,
        )
        self.begin_interval()
        return record

    def _memory(self) -> dict[str, float]:
        found = peak_memory(self._device)
        if "resident" in found and self._before_model:
            found[GROWN] = growth(found["resident"], self._before_model, self._before_steps)
        return found


class MetricsLog:
    """Appends records under ``run_dir``; those of an earlier start after ``resume_step`` are dropped.

    If the disk fails, records are lost and the error is logged; no method raises an OSError.
    """

    def __init__(self, run_dir: Path, resume_step: int = 0, heatmap_every: int = 200) -> None:
        self.run_dir = Path(run_dir)
        self.heatmap_every = heatmap_every
        self._lines: LineWriter | None = None
        self._events: SummaryWriter | None = None
        with _logging_failure("metrics.jsonl cannot be cut; no step is logged"):
            self.run_dir.mkdir(parents=True, exist_ok=True)
            truncate_after(self.run_dir / "metrics.jsonl", resume_step)
            self._lines = LineWriter(self.run_dir / "metrics.jsonl")
        with _logging_failure(NO_EVENTS):
            self._events = _summary_writer(self.run_dir / "tensorboard", resume_step + 1)
        self._drawn_step = resume_step
        self._undrawn: StepRecord | None = None

    def write(self, record: StepRecord) -> dict[str, Any]:
        """Log one step; its line. A killed process loses no line that was written before."""
        values = to_json(record)
        if self._lines is not None:
            self._lines.write(_line(values))
        self._show(lambda events: _add_scalars(events, record.step, scalars(values)))
        if record.routing:
            self._undrawn = record
            if record.step // self.heatmap_every > self._drawn_step // self.heatmap_every:
                self._draw()
        return values

    def add_held_out(self, step: int, found: HeldOutScores) -> dict[str, Any] | None:
        """Give the record of ``step``, the last one, its held-out scores; its line, if it is there."""
        path, values = self.run_dir / "metrics.jsonl", None
        with _logging_failure("metrics.jsonl lacks the held-out scores of the last step"):
            if record := record_of(path, step):
                values = {**record, "held_out": held_out_json(found)}
                truncate_after(path, step - 1)
        if values is not None and self._lines is not None:
            self._lines.write(_line(values))
            self._show(lambda events: _add_scalars(events, step, held_out_scalars(values["held_out"])))
        return values

    def close(self) -> None:
        """Draw the last routing, and end the files."""
        self._draw()
        self._show(lambda events: events.close())
        if self._lines is not None:
            self._lines.close()

    def _draw(self) -> None:
        record, self._undrawn = self._undrawn, None
        if record is None:
            return
        panels = [heatmap.Panel(f"layer {r.layer}", r.seen_load_ME.T, r.names.modalities) for r in record.routing]
        image_HWC = heatmap.draw(panels, f"Where each modality's tokens go, step {record.step}")
        self._drawn_step = record.step
        with _logging_failure("routing_training.png is not drawn"):
            heatmap.save(image_HWC, self.run_dir / "routing_training.png")
        self._show(lambda events: events.add_image("routing", image_HWC, record.step, dataformats="HWC"))
        self._show(lambda events: events.flush())

    def _show(self, write: Callable[[SummaryWriter], object]) -> None:
        """Writes to TensorBoard, until the first failure ends the writer's thread."""
        events, self._events = self._events, None
        if events is None:
            return
        with _logging_failure(NO_EVENTS):
            write(events)
            self._events = events


@contextmanager
def _logging_failure(what: str) -> Iterator[None]:
    """A log that cannot be written does not end the run."""
    try:
        yield
    except OSError as error:
        log.error("%s: %s", what, error)


def truncate_after(path: Path, step: int) -> None:
    """Cut a log of ascending steps after ``step``, and a half-written last line. Reads from the end of the
    file, so that resuming a long run costs no more than resuming a short one."""
    if not path.exists() or not path.stat().st_size:
        return
    with path.open("r+b") as file:
        end, _ = _last_until(path, file, step)
        file.truncate(end)


def record_of(path: Path, step: int) -> dict[str, Any] | None:
    """The record of ``step`` in a log of ascending steps, read from its end; None where it has none."""
    if not path.exists() or not path.stat().st_size:
        return None
    with path.open("rb") as file:
        _, record = _last_until(path, file, step)
    return record if record is not None and record["step"] == step else None


def _last_until(path: Path, file: BinaryIO, step: int) -> tuple[int, dict[str, Any] | None]:
    """Where the last record of a step up to ``step`` ends, and that record."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as log:
        end = log.rfind(b"\n") + 1
        while end:
            begin = log.rfind(b"\n", 0, end - 1) + 1
            try:
                record = json.loads(log[begin:end])
                past = record["step"] > step
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(
                    f"{path}: the line at byte {begin} is not a record of a step; fix the line or move the file"
                ) from error
            if not past:
                return end, record
            end = begin
    return 0, None


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values, allow_nan=False, separators=(",", ":"))


def to_json(record: StepRecord) -> dict[str, Any]:
    """The record in plain values, modalities by name; null where a number is not finite."""
    return {
        "step": record.step,
        "losses": {name: number(value) for name, value in record.losses.items()},
        "counts": record.counts,
        **({"balance": {name: number(value) for name, value in record.balance.items()}} if record.balance else {}),
        "learning_rate": number(record.learning_rate),
        "grad_norm": number(record.grad_norm),
        "tokens": record.tokens,
        "tokens_total": record.samples.tokens,
        "seconds": number(record.seconds),
        "tokens_per_second": number(record.tokens_per_second),
        "flops_per_second": _known(record.flops_per_second),
        "mfu": _known(record.mfu),
        "peak_memory": {kind: round(size) for kind, size in record.memory.items()},  # bytes
        "data_seconds": number(record.data_seconds),
        "data_stall": number(record.data_fraction),
        "loading_seconds": {stage: number(seconds) for stage, seconds in record.loading_seconds.items()},
        "bad_samples": record.samples.bad,
        "cut": record.samples.cut,
        "routing": [layer_json(layer) for layer in record.routing],
        **({} if record.held_out is None else {"held_out": held_out_json(record.held_out)}),
        **({} if record.planned is None else {"planned": _planned_json(record, record.planned)}),
    }


def _planned_json(record: StepRecord, planned: Planned) -> dict[str, Any]:
    speed = planned.tokens_per_second
    return {
        "tokens_per_second": number(speed),
        "peak_memory": round(planned.peak_memory),
        "speed_over_plan": number(record.tokens_per_second / speed),
    }


def held_out_json(found: HeldOutScores) -> dict[str, Any]:
    return {
        "losses": {name: number(value) for name, value in found.losses.items()},
        "scores": {name: number(value) for name, value in found.scores.items()},
        "samples": found.samples,
        "seconds": number(found.seconds),
    }


def _known(value: float | None) -> float | None:
    return None if value is None else number(value)


def _summary_writer(folder: Path, first_step: int) -> SummaryWriter:
    from torch.utils.tensorboard import SummaryWriter  # takes half a second to import

    # purge_step: events of an earlier run from this step on are hidden.
    return SummaryWriter(str(folder), purge_step=first_step)


def _add_scalars(events: SummaryWriter, step: int, values: Iterable[tuple[str, float | None]]) -> None:
    for tag, value in values:
        events.add_scalar(tag, math.nan if value is None else value, step)
