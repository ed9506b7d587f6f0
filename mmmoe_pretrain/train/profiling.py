"""A trace of some steps by torch's profiler, and a snapshot of the GPU's memory, in RUN/profile/.

The trace (``train.profile``) opens in https://ui.perfetto.dev and chrome://tracing. The snapshot, on CUDA alone,
opens in https://docs.pytorch.org/memory_viz: every block of the allocator with the stack that took it. Neither
changes what is computed; the profiled steps are slower.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from mmmoe_pretrain.config.watching import ProfileConfig
from mmmoe_pretrain.train.journal import replacing

log = logging.getLogger(__name__)
FOLDER = "profile"  # in the run's folder
MEMORY_EVENTS = 100_000  # the latest ones of a snapshot; about 50 MB
T = TypeVar("T")


class StepProfiler:
    """Profiles the steps of ``settings`` on this rank, if they name it. ``steps`` goes around the loader."""

    def __init__(self, settings: ProfileConfig | None, run_dir: Path, device: torch.device) -> None:
        self._settings, self._device = settings, device
        self._own = settings is not None and dist.get_rank() in settings.ranks
        self._folder = run_dir / FOLDER
        self._profile: profile | None = None

    def steps(self, data: Iterable[T], step: Callable[[], int], phase: Callable[[str], None]) -> Iterator[T]:
        """``data``, of which each item is a step's. ``step()``: how many are done. ``phase`` is told on every rank
        that files are written, which may take a while, and that data follows."""
        batches, settings = iter(data), self._settings
        while True:
            if settings is not None and step() == settings.steps[1]:
                phase("save")
                self.close(step())
                phase("data")
            if settings is not None and step() + 1 == settings.steps[0] and self._own:
                self._start()
            with record_function("data"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def drop(self) -> None:
        """Stop without files: the run rolled back, and the steps come again."""
        if self._profile is not None:
            self._stop()
        self._profile = None

    def close(self, last: int) -> None:
        """Stop, and write the steps up to ``last``, the last one that is done; nothing where none is whole."""
        if self._profile is None or self._settings is None:
            return
        first = self._settings.steps[0]
        if last < first:
            log.warning("train.profile: the run ended in step %d, the first of the trace; nothing is written", first)
            self.drop()
            return
        name = self._folder / f"steps_{first}-{last}_rank_{dist.get_rank()}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
                with replacing(name.with_name(f"{name.name}_memory.pickle")) as draft:
                    torch.cuda.memory._dump_snapshot(str(draft))
            else:
                log.info("train.profile: a CPU has no snapshot of memory")
            self._stop()
            path, draft = name.with_name(f"{name.name}.json.gz"), name.with_name(f"{name.name}.tmp.json.gz")
            self._profile.export_chrome_trace(str(draft))  # torch compresses by the name's end
            os.replace(draft, path)
            log.info("train.profile: wrote %s", path)
        except (OSError, RuntimeError) as error:
            log.error("train.profile: %s cannot be written: %s; training continues", name, error)
        self._profile = None

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
        self._profile = profile(activities=activities)
        self._profile.start()

    def _stop(self) -> None:
        assert self._profile is not None
        self._profile.stop()
        if self._device.type == "cuda":
            torch.cuda.memory._record_memory_history(enabled=None)
