"""The plan of a run beside what it measures: ``mmmoe plan``, made by rank 0 in a process of its own as training
starts, since a plan needs fake process groups and no GPU."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Self

from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.paths import python_path
from mmmoe_pretrain.plan.machines import find_machine
from mmmoe_pretrain.plan.tables import MEMORY
from mmmoe_pretrain.progress import clock
from mmmoe_pretrain.train.memory import GROWN

log = logging.getLogger(__name__)
GB, DAY = 1e9, 86_400
OF_THE_JOB = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "MMMOE_")
RECORDS = 5  # whose median is compared with the plan: single ones are slow, such as those of a checkpoint
LONGEST_ERROR = 1 << 14  # bytes of the end of its errors that are read
ALLOWANCE = "allowance"  # of the plan's memory: what is outside of torch's allocator, and fragmentation


@dataclass(frozen=True)
class Planned:
    """Of an optimizer step, at full length of every sample. ``lines``: for the console."""

    tokens_per_second: float
    peak_memory: float  # bytes of the fullest GPU, without the allowance
    lines: tuple[str, ...]

    @classmethod
    def of(cls, values: dict[str, Any], steps_left: int) -> Self:
        """``values``: what ``mmmoe plan --json`` prints."""
        memory, step, terms = values["memory"], values["step"], values["memory"]["terms"]
        largest = max(terms, key=lambda name: terms[name])
        left = (f"planned: {_duration(steps_left * step['seconds'])} for the {steps_left:,} steps that are left",)
        room = f" of {memory['capacity'] / GB:.0f}" if memory["capacity"] else ""
        return cls(
            step["tokens_per_second"],
            memory["total"] - terms[ALLOWANCE],
            (
                f"planned on {values['gpus']} x {values['gpu']}: {memory['total'] / GB:.1f}{room} GB on the fullest, "
                f"most in {MEMORY.get(largest, largest)}",
                f"planned: {step['seconds']:.3g} s a step of {step['tokens']:,.0f} tokens, "
                f"{step['tokens_per_second']:,.0f} tok/s, MFU {step['mfu']:.1%}; {values['limit']}",
                *(left if steps_left else ()),
            ),
        )

    def beside(self, tokens_per_second: Sequence[float], memory: Mapping[str, float]) -> str:
        """``tokens_per_second``: of records. ``memory``: the measured peak by kind. That of a CPU's process is no
        torch allocator's; how much its resident set grew is closest to what a plan counts."""
        ratio, count = median(tokens_per_second) / self.tokens_per_second, len(tokens_per_second)
        told = [f"tok/s {ratio:.2f} of the plan ({f'median of {count} records' if count > 1 else 'one record'})"]
        if "allocated" in memory:
            told.append(f"peak memory {memory['allocated'] / self.peak_memory:.2f} of it")
        elif GROWN in memory:
            told.append(
                f"peak memory {memory[GROWN] / self.peak_memory:.2f} of it (the process grew by "
                f"{memory[GROWN] / GB:.2f} GB since before the model was built)"
            )
        return "measured: " + ", ".join(told)


def _duration(seconds: float) -> str:
    return clock(seconds) if seconds < DAY else f"{seconds / DAY:.1f} days"


def check_machine(config: RunConfig) -> None:
    """Raises ValueError where ``train.machine`` names a machine that ``mmmoe plan`` cannot read; for rank 0."""
    if config.train.machine is None:
        return
    try:
        find_machine(config.train.machine)
    except ValueError as error:
        raise ValueError(f"train.machine: {error}; or leave train.machine out, and no plan is shown") from None


def arguments(config: RunConfig, world_size: int, gpu: str | None) -> list[str] | None:
    """Of ``mmmoe plan`` for a run on ``world_size`` GPUs of the kind ``gpu``, or on the machine that
    ``train.machine`` describes; None where neither is known."""
    if config.train.machine is not None:
        where = ["--machine", config.train.machine]
    elif gpu is not None:
        where = ["--gpu", gpu]
    else:
        return None
    return [str(config.run_dir / "config.yaml"), "--gpus", str(world_size), *where, "--json"]


class PlanInBackground:
    """``poll`` until it has an answer; ``close`` ends it."""

    def __init__(self, command: Sequence[str]) -> None:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(OF_THE_JOB)}
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - closed by ``close``, as the next
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
            ["nice", *command],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._errors,
            env={**kept, "PYTHONPATH": python_path(), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )

    @classmethod
    def of(cls, arguments: Sequence[str]) -> Self | None:
        """None, after a warning, where there is no room for a process or its file."""
        try:
            return cls([sys.executable, "-m", "mmmoe_pretrain.cli", "plan", *arguments])
        except OSError as error:
            log.warning("no plan of this run is shown: mmmoe plan cannot start: %s; training continues", error)
            return None

    def poll(self, steps_left: int) -> Planned | None:
        """Once, when the plan is ready; a plan that failed is a warning."""
        if self._process is None or self._process.poll() is None:
            return None
        code, self._process = self._process.returncode, None
        self._output.seek(0)
        try:
            return Planned.of(json.loads(self._output.read()), steps_left)
        except (ValueError, LookupError, TypeError):
            log.warning("no plan of this run is shown: mmmoe plan ended with %d: %s", code, self._reason())
            return None

    def _reason(self) -> str:
        """The last line that the process wrote to its standard error: its error, or that of a traceback."""
        self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - LONGEST_ERROR))
        lines = self._errors.read().decode(errors="replace").split("\n")
        return next((line.strip().removeprefix("mmmoe: ") for line in reversed(lines) if line.strip()), "no message")

    @property
    def running(self) -> bool:
        return self._process is not None

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = None
        self._output.close()
        self._errors.close()


class Comparison:
    """The plan of a run beside its records, which rank 0 gives to ``add``. Lines are for the console."""

    def __init__(self, plan: PlanInBackground | None) -> None:
        self.planned: Planned | None = None  # when it is ready
        self._plan, self._due = plan, RECORDS  # records until the comparison is told
        self._speeds = deque[float](maxlen=RECORDS)
        self._memory: Mapping[str, float] = {}

    def add(self, steps_left: int, tokens_per_second: float, memory: Mapping[str, float]) -> list[str]:
        """What a record measured; lines when the plan is ready and when it is compared."""
        if self._plan is None:
            return []
        self._speeds.append(tokens_per_second)
        self._memory = memory
        if self.planned is None:
            return self._poll(self._plan, steps_left)
        self._due -= 1
        return [self.planned.beside(self._speeds, self._memory)] if self._due == 0 else []

    def close(self) -> list[str]:
        """At the end of the run: what was not told yet."""
        if self._plan is None:
            return []
        lines = self._poll(self._plan, 0) if self.planned is None else []
        if self.planned is not None and self._due > 0 and self._speeds:
            lines.append(self.planned.beside(self._speeds, self._memory))
        elif self._plan.running:
            lines.append("no plan of this run is shown: the run ended before its plan was ready")
        self._plan.close()
        return lines

    def _poll(self, plan: PlanInBackground, steps_left: int) -> list[str]:
        self.planned = plan.poll(steps_left)
        return [] if self.planned is None else [*self.planned.lines]
