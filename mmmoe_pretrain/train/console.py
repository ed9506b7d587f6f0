"""The console output of a run: a progress bar on a terminal, plain lines anywhere else.

Plain lines suit the logs of Slurm and CI. All ranks but the first pass ``enabled=False`` and print nothing. After
an error of the stream (a closed terminal, a full disk behind a log) nothing more is printed, and training continues.
"""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

from mmmoe_pretrain.progress import clock
from mmmoe_pretrain.train.held_out import HeldOutScores
from mmmoe_pretrain.train.metrics import StepRecord
from mmmoe_pretrain.train.scalars import GIB

if TYPE_CHECKING:
    from rich.progress import Progress

LATEST_WEIGHT = 0.2  # of the newest record in the running mean of the seconds a step takes
NOTABLE_WAIT = 0.1  # share of the time spent waiting for data; a larger one is printed


class Console:
    """Shows one record at a time; ``say`` prints a line of its own above the bar."""

    def __init__(self, total_steps: int, enabled: bool = True, stream: TextIO | None = None) -> None:
        self.total_steps = total_steps
        self.enabled = enabled
        self._stream = sys.stdout if stream is None else stream
        self._step = 0
        self._seconds_a_step: float | None = None
        self._progress: Progress | None = None

    def __enter__(self) -> Self:
        if self.enabled and self._stream.isatty():
            self._progress = _progress(self._stream)
            self._progress.add_task("train", total=self.total_steps, completed=self._step, text="", eta="")
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._until_it_fails():
            if self._progress is not None:
                self._progress.stop()
        self._progress = None

    def set_step(self, step: int) -> None:
        """``step`` steps are done: the run resumed or rolled back, or has a record of this step that is not shown."""
        self._step = step
        self._show(completed=step)

    def update(self, record: StepRecord) -> None:
        """Show a step."""
        latest, mean = record.seconds / max(1, record.step - self._step), self._seconds_a_step
        self._seconds_a_step = latest if mean is None else mean + LATEST_WEIGHT * (latest - mean)
        self._step = record.step
        text, eta = describe(record), f"eta {clock((self.total_steps - record.step) * self._seconds_a_step)}"
        if self._progress is None:
            self.say(f"step {record.step}/{self.total_steps}  {text}  {eta}")
        else:
            self._show(completed=record.step, text=text, eta=eta)

    def first_step(self, step: int, losses: Mapping[str, float], seconds: float) -> None:
        """The first step of this process, which is not waited for ``train.log_every`` to show."""
        self.say(f"step {step}/{self.total_steps}  {describe_losses(losses)}  {seconds:.1f} s for the first step")

    def say(self, text: str) -> None:
        """Print a message, e.g. that a checkpoint is written."""
        if not self.enabled:
            return
        with self._until_it_fails():
            if self._progress is None:
                print(text, file=self._stream, flush=True)
            else:
                self._progress.console.print(text, markup=False, highlight=False)

    def _show(self, completed: int, **fields: Any) -> None:
        """On the bar, if there is one."""
        with self._until_it_fails():
            if self._progress is not None:
                self._progress.update(self._progress.task_ids[0], completed=completed, **fields)

    @contextmanager
    def _until_it_fails(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self.enabled, self._progress = False, None
            with suppress(OSError):  # what is still in the buffer would fail once more as the process ends
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)


def describe(record: StepRecord) -> str:
    """``loss 3.21 (pairs 2.90, captions 0.26, aux 0.05)  lr 1.0e-03  grad 0.80  12.3k tok/s  load 0.4-1.9``."""
    parts = [describe_losses(record.losses), f"lr {record.learning_rate:.1e}", f"grad {record.grad_norm:.2g}"]
    parts.append(f"{short(record.tokens_per_second)} tok/s")
    if record.flops_per_second is not None:
        parts.append(f"{short(record.flops_per_second)}FLOP/s")
    if record.mfu is not None:
        parts.append(f"MFU {record.mfu:.0%}")
    if record.routing:
        least, most = record.load_over_even
        parts.append(f"load {least:.2g}-{most:.2g}")  # of an expert, over an even share
        if record.dead_experts:
            parts.append(f"dead {record.dead_experts}")
    if record.memory:
        parts.append(f"mem {max(record.memory.values()) / GIB:.1f} GiB")
    if record.data_fraction > NOTABLE_WAIT:
        parts.append(f"data wait {record.data_fraction:.0%}")
    if record.samples.bad:
        parts.append(f"bad {record.samples.bad}")
    return "  ".join(parts)


def describe_held_out(step: int, found: HeldOutScores) -> str:
    """``step 200, held out (1024 samples): loss 3.21 (pairs 2.90, captions 0.31)  image_to_text_r1 0.31``."""
    scores = (f"{name} {value:.3g}" for name, value in found.scores.items() if not name.endswith(("_r5", "_r10")))
    return "  ".join([f"step {step}, held out ({found.samples} samples): {describe_losses(found.losses)}", *scores])


def describe_losses(losses: Mapping[str, float]) -> str:
    """``loss 3.21 (pairs 2.90, captions 0.26, aux 0.05)``: the total, and each objective's terms added up; ``aux``
    are the losses of the routers. A single term is not repeated."""
    by_task: defaultdict[str, float] = defaultdict(float)
    for name, value in losses.items():
        by_task[name.partition("/")[0]] += value
    total = f"loss {by_task.pop('total'):.3g}"
    if len(by_task) == 1:
        return total
    return f"{total} ({', '.join(f'{name} {value:.3g}' for name, value in by_task.items())})"


def short(value: float) -> str:
    """12345 -> ``12.3k``."""
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:.0f}"


def _progress(stream: TextIO) -> Progress:
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    return Progress(
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[eta]}"),  # before the text, which a narrow terminal cuts at its end
        TextColumn("{task.fields[text]}", markup=False),
        console=RichConsole(file=stream, highlight=False),
    )
