"""Saves a run while it trains: training waits for a copy to host memory, a thread does the rest.

``Saver.save`` copies what this rank writes and returns. A daemon thread writes and hashes the copy, agrees with the
other ranks, has rank 0 commit, and deletes what is no longer kept. At most one save is in flight: the next waits
for it. A save that fails leaves the checkpoints before it and says why, on every rank, in its report.
"""

from __future__ import annotations

import atexit
import copy
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from mmmoe_pretrain.checkpoint import store
from mmmoe_pretrain.checkpoint.folders import Retention
from mmmoe_pretrain.checkpoint.save_plan import SavePlan, plan_save, write_checkpoint
from mmmoe_pretrain.checkpoint.state import ShardedState
from mmmoe_pretrain.checkpoint.storage import open_storage
from mmmoe_pretrain.parallel.agreement import agree, any_rank

RESTARTABLE = (OSError, RuntimeError, MemoryError)  # of a disk, a service or another rank
FAILURES = (*RESTARTABLE, ValueError)  # not of this program
REST = 1.0  # seconds
# Bytes. Torch rounds pinned memory up to a power of two, which one large block may double; of small parts any block
# but the last is full up to a part.
BLOCK, PART = 2**28, 2**24


@dataclass(frozen=True)
class SaveReport:
    """How a save went. ``path``, ``error`` and ``restartable`` are the same on every rank."""

    step: int
    path: str  # of the checkpoint; empty if there is none
    seconds_blocked: float  # that ``save`` took: waiting, planning (once a run) and copying
    seconds_waited: float  # of those, for the save before it
    seconds_writing: float  # from then until it was committed
    bytes: int  # that this rank wrote
    error: str | None = None  # why there is no checkpoint
    restartable: bool = False  # the error is a disk's, a service's or a peer's: a later start may do better
    warning: str | None = None  # on rank 0: the checkpoint is complete, but old ones could not be deleted


class Saver:
    """Saves checkpoints under ``root`` (a path or an fsspec URL), one after the other.

    ``group``: of all ranks, on CPUs (gloo), used by nothing else while a save is in flight; None in one process.
    Every rank calls the same methods in the same order. After an error that the other ranks do not have, end
    without ``wait`` or ``close``: the thread is a daemon and holds up the exit for ``REST`` at most.
    """

    def __init__(
        self, root: str | Path, group: ProcessGroup | None, retention: Retention, asynchronous: bool = True
    ) -> None:
        self._root = root
        self._storage = agree(group, lambda: open_storage(root))
        self._group = group
        self._first = group is None or dist.get_rank(group) == 0
        self._retention = retention
        self._asynchronous = asynchronous
        self._layout: Any = None  # of the state that plan and staging are made for
        self._plan: SavePlan | None = None
        self._staging: Staging | None = None
        self._thread: _Thread | None = None
        self._reports: list[SaveReport] = []
        self._cleaned = False
        # A thread that is inside torch when the interpreter ends aborts the process (up to Python 3.13).
        atexit.register(self._rest)

    def prepare(self, state: ShardedState) -> None:
        """Plan, and allocate the host memory, so that the first save need not: optional. Collective.

        Raises on every rank what failed on one: ValueError where the pieces do not make up the whole, RuntimeError
        where memory is missing.
        """
        layout = _layout(state)
        if not any_rank(self._group, layout != self._layout):
            return
        self._layout = self._plan = self._staging = None
        plan = plan_save(state, self._group)
        self._staging = agree(self._group, lambda: Staging(plan.views(state)))
        self._layout, self._plan = layout, plan

    def save(self, step: int, state: ShardedState, meta: Mapping[str, Any], metric: float | None = None) -> None:
        """Copy ``state`` and start to write it; a report has the result, failures included. ``metric``: for
        ``Retention.best``, the lower the better. Collective.
        """
        began = time.perf_counter()
        self.wait()
        waited = time.perf_counter() - began
        try:
            self.prepare(state)
        except FAILURES as error:
            blocked, restartable = time.perf_counter() - began, isinstance(error, RESTARTABLE)
            self._reports.append(SaveReport(step, "", blocked, waited, 0.0, 0, str(error), restartable))
            return
        assert self._plan is not None and self._staging is not None
        tensors = self._staging.fill(self._plan.views(state))
        facts = copy.deepcopy(dict(meta) if metric is None else {**meta, "metric": metric})
        blocked = time.perf_counter() - began
        self._thread = _Thread(partial(self._write, step, self._plan, tensors, facts, blocked, waited))
        self._thread.start()
        if not self._asynchronous:
            self.wait()
            self._reports[-1] = replace(self._reports[-1], seconds_blocked=time.perf_counter() - began)

    def poll(self) -> list[SaveReport]:
        """The saves that ended since the last call. Raises unexpected errors of the thread."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()
        reports, self._reports = self._reports, []
        return reports

    def wait(self) -> None:
        """Wait for the save in flight; ``poll`` then has the report. Raises unexpected errors of the thread."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._reports.append(thread.result())

    def close(self) -> None:
        """Wait, and give the host memory back."""
        self.wait()
        self._layout = self._plan = self._staging = None
        atexit.unregister(self._rest)

    def _rest(self) -> None:
        """Let the thread end, or reach a write or a wait for another rank."""
        if self._thread is not None:
            self._thread.join(REST)

    def _write(
        self, step: int, plan: SavePlan, tensors: list[Tensor], meta: dict[str, Any], blocked: float, waited: float
    ) -> SaveReport:
        """In the thread."""
        began = time.perf_counter()
        path, error, restartable, warning = "", None, False, None
        if self._first and not self._cleaned:
            self._cleaned = True
            warning = _warning(lambda: store.clean(self._root))
        try:
            path = str(write_checkpoint(self._storage, step, plan, tensors, meta, self._group))
        except FAILURES as failure:
            error, restartable = str(failure), isinstance(failure, RESTARTABLE)
        seconds = time.perf_counter() - began
        if self._first and error is None:
            warning = _warning(lambda: store.prune(self._root, self._retention)) or warning
        # Deleting may take long. Ranks that continue training would wait for rank 0 in a collective that ends
        # the job sooner than this one.
        _warning(lambda: agree(self._group, lambda: None))
        return SaveReport(step, path, blocked, waited, seconds, plan.nbytes, error, restartable, warning)


class _Thread(threading.Thread):
    """Never delays the exit of the process, and never loses an error."""

    def __init__(self, work: Callable[[], SaveReport]) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self._work = work
        self._report: SaveReport | None = None
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._report = self._work()
        except BaseException as error:
            self._error = error
            raise  # printed at once, and raised in the main thread when it asks

    def result(self) -> SaveReport:
        self.join()
        if self._error is not None:
            raise self._error
        assert self._report is not None
        return self._report


def _layout(state: ShardedState) -> Any:
    """The properties that a plan and its host memory depend on; equal for states that can share them. Without
    tensors."""
    return [
        (key, tensor.shape, [(at, piece.shape, piece.dtype, piece.is_cuda) for at, piece in tensor.pieces.items()])
        for key, tensor in state.items()
    ]


def _warning(deletes: Callable[[], object]) -> str | None:
    try:
        deletes()
    except FAILURES as error:
        return str(error)
    return None


class Staging:
    """Copies of tensors in memory that is allocated once: pinned where one of them is on a GPU.

    Small tensors are adjacent, as in the file, so that many of them are written at once. A copy has the type and
    shape of its tensor and is contiguous; that of a large one is in several parts, which follow each other.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        pinned = any(tensor.is_cuda for tensor in tensors)
        self._copies: list[Tensor] = []
        for run in _runs(part for tensor in tensors for part in _parts(tensor)):
            block = torch.empty(sum(t.nbytes for t in run), dtype=torch.uint8, pin_memory=pinned)
            block.zero_()  # its pages are there before training waits for them
            begin = 0
            for tensor in run:
                part = block[begin : begin + tensor.nbytes]
                self._copies.append(part.view(tensor.dtype).view(tensor.shape))
                begin += tensor.nbytes

    @torch.no_grad()
    def fill(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The copies, once the numbers of ``tensors`` are in them; they hold until the next call."""
        for copied, part in zip(self._copies, (part for t in tensors for part in _parts(t)), strict=True):
            copied.copy_(part, non_blocking=True)
        for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        return self._copies


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """Views of at most ``PART`` bytes, in the order of the numbers."""
    if tensor.nbytes <= PART:
        yield tensor
        return
    flat = tensor.view(-1) if tensor.is_contiguous() else tensor
    dim = next(d for d, n in enumerate(flat.shape) if n > 1)
    for part in flat.split(max(1, PART * flat.shape[dim] // flat.nbytes), dim):
        yield from _parts(part)


def _runs(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours that can share a block: of at most ``BLOCK`` bytes, each aligned to its type."""
    run: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if run and (size + tensor.nbytes > BLOCK or size % tensor.element_size()):
            yield run
            run, size = [], 0
        run.append(tensor)
        size += tensor.nbytes
    if run:
        yield run
