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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from mmmoe_pretrain.checkpoint import store
from mmmoe_pretrain.checkpoint.exchange import agree
from mmmoe_pretrain.checkpoint.retention import Retention
from mmmoe_pretrain.checkpoint.save_plan import SavePlan, plan_save, write_checkpoint
from mmmoe_pretrain.checkpoint.sharded import ShardedState
from mmmoe_pretrain.checkpoint.staging import Staging
from mmmoe_pretrain.checkpoint.storage import open_storage

RESTARTABLE = (OSError, RuntimeError, MemoryError)  # of a disk, a service, a peer
FAILURES = (*RESTARTABLE, ValueError)  # not of this program
REST = 1.0  # seconds


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
    warning: str | None = None  # on rank 0: it is there, but so is what should have been deleted


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
        self._storage = open_storage(root)
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
        if not self._any_rank(layout != self._layout):
            return
        self._layout = self._plan = self._staging = None
        plan = plan_save(state, self._group)
        self._staging = agree(self._group, lambda: Staging(plan.views(state)))
        self._layout, self._plan = layout, plan

    def save(self, step: int, state: ShardedState, meta: Mapping[str, Any], metric: float | None = None) -> None:
        """Take a copy of ``state`` and begin to write it; what comes of it is in a report, failures too.

        ``metric``: by which retention knows the best checkpoints, the lower the better. Collective.
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
        """The saves that ended since the last call. Raises what the thread did not expect."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()
        reports, self._reports = self._reports, []
        return reports

    def wait(self) -> None:
        """Until no save is in flight; ``poll`` then has the report. Raises what the thread did not expect."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._reports.append(thread.result())

    def close(self) -> None:
        """Wait, and give the host memory back."""
        self.wait()
        self._layout = self._plan = self._staging = None
        atexit.unregister(self._rest)

    def _rest(self) -> None:
        """Let the thread end, or come to where it writes or waits for a peer."""
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
        # Deleting may take long. Ranks that trained on meanwhile would wait for rank 0 in a collective that ends
        # the job sooner than this one.
        _warning(lambda: agree(self._group, lambda: None))
        return SaveReport(step, path, blocked, waited, seconds, plan.nbytes, error, restartable, warning)

    def _any_rank(self, here: bool) -> bool:
        if self._group is None:
            return here
        anywhere = torch.tensor(int(here))
        dist.all_reduce(anywhere, op=dist.ReduceOp.MAX, group=self._group)
        return bool(anywhere)


class _Thread(threading.Thread):
    """Holds up no exit of the process, and loses no error."""

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
    """What a plan and its host memory depend on; equal for states that can share them. Holds no tensors."""
    return [
        (key, parameter.shape, [(p.offset, p.tensor.shape, p.tensor.dtype, p.tensor.is_cuda) for p in pieces])
        for name, parameter in state.items()
        for key, pieces in parameter.named(name).items()
    ]


def _warning(deletes: Callable[[], object]) -> str | None:
    try:
        deletes()
    except FAILURES as error:
        return str(error)
    return None
