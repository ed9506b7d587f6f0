"""The plan of a run beside what it measures: ``mmmoe plan``, made by rank 0 in a process of its own as training
starts, since a plan needs fake process groups and no GPU."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.paths import python_path
from mmmoe_pretrain.progress import clock

log = logging.getLogger(__name__)
GB, DAY = 1e9, 86_400
OF_THE_JOB = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "MMMOE_")
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
        room = f" of {memory['capacity'] / GB:.0f}" if memory["capacity"] else ""
        return cls(
            step["tokens_per_second"],
            memory["total"] - terms[ALLOWANCE],
            (
                f"planned on {values['gpus']} x {values['gpu']}: {memory['total'] / GB:.1f}{room} GB on the fullest, "
                f"most in {largest}",
                f"planned: {step['seconds']:.3g} s a step of {step['tokens']:,.0f} tokens, "
                f"{step['tokens_per_second']:,.0f} tok/s, MFU {step['mfu']:.1%}; {values['limit']}",
                f"planned: {_duration(steps_left * step['seconds'])} for the {steps_left:,} steps that are left",
            ),
        )

    def beside(self, tokens_per_second: float, memory: dict[str, float]) -> str:
        """``memory``: the measured peak by kind; that of a CPU's process is no torch allocator's."""
        told = [f"tok/s {tokens_per_second / self.tokens_per_second:.2f} of the plan"]
        if "allocated" in memory:
            told.append(f"peak memory {memory['allocated'] / self.peak_memory:.2f} of it")
        return "measured: " + ", ".join(told)


def _duration(seconds: float) -> str:
    return clock(seconds) if seconds < DAY else f"{seconds / DAY:.1f} days"


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
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - closed by ``close``
        self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
            ["nice", *command],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.DEVNULL,
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
            log.warning("no plan of this run is shown: mmmoe plan ended with %d; run it by hand to see why", code)
            return None

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = None
        self._output.close()
