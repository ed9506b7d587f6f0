"""From what a step returned to what the log keeps."""

from __future__ import annotations

import time

from mmmoe_pretrain.data.loader import LoadStats
from mmmoe_pretrain.engines.base import StepResult
from mmmoe_pretrain.parallel.groups import Group
from mmmoe_pretrain.train.metrics import StepRecord
from mmmoe_pretrain.train.tally import Tally
from mmmoe_pretrain.train.telemetry import gather_routing, of_all_stages


class Recorder:
    """Turns steps into records: losses and routing are those of the logged step, so that a resumed
    run logs the same; times and tokens add up since the record before."""

    def __init__(self, group: Group = None, pipeline: Group = None) -> None:
        self._group, self._pipeline = group, pipeline
        self.steps = 0  # counted so far
        self.begin_interval()

    def begin_interval(self) -> None:
        """Times and tokens count from now on."""
        self._began = time.perf_counter()
        self._tokens = 0
        self._data_seconds = 0.0

    def add(self, result: StepResult, stats: LoadStats) -> None:
        """Count a step."""
        self.steps += 1
        self._tokens += result.tokens
        self._data_seconds += stats.wait_seconds

    def record(self, step: int, result: StepResult, learning_rate: float, samples: Tally) -> StepRecord:
        """The record of ``step`` (the first is 1), the same on every rank, all of which
        must call it; begins a new interval. ``samples``: since the start of the run."""
        now = time.perf_counter()
        record = StepRecord(
            step=step,
            losses=result.losses,
            counts=result.counts.terms,
            learning_rate=learning_rate,
            grad_norm=result.grad_norm,
            tokens=self._tokens,
            seconds=now - self._began,
            data_seconds=self._data_seconds,
            bad_samples=samples.bad,
            cut_audio=samples.cut_audio,
            cut_text=samples.cut_text,
            routing=of_all_stages(gather_routing(result.routing, self._group), self._pipeline),
        )
        self.begin_interval()
        return record
