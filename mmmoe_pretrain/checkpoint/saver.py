"""Saves a run while it trains: a thread copies the state to host memory during the next forward pass, and writes it.

``Saver.save`` copies what a forward pass may change and returns. A daemon thread copies the rest, writes and hashes
the copy, agrees with the other ranks, has rank 0 commit, and deletes what is no longer kept. Training waits for the
copy (``wait_for_copy``) before it updates weights. At most one save is in flight: the next waits for it. A save that
fails leaves the checkpoints before it and says why, on every rank, in its report.
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

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from mmmoe_pretrain.checkpoint import store
from mmmoe_pretrain.checkpoint.folders import Retention
from mmmoe_pretrain.checkpoint.save_plan import SavePlan, plan_save, write_checkpoint
from mmmoe_pretrain.checkpoint.staging import Copying, Staging
from mmmoe_pretrain.checkpoint.state import ShardedState
from mmmoe_pretrain.checkpoint.storage import open_storage
from mmmoe_pretrain.parallel.agreement import agree, any_rank

RESTARTABLE = (OSError, RuntimeError, MemoryError)  # of a disk, a service or another rank
FAILURES = (*RESTARTABLE, ValueError)  # not of this program
REST = 1.0  # seconds


@dataclass(frozen=True)
class SaveReport:
    """How a save went. ``path``, ``error`` and ``restartable`` are the same on every rank."""

    step: int
    path: str  # of the checkpoint; empty if there is none
    seconds_blocked: float  # that training waited, in ``save`` (planning once a run) and in ``wait_for_copy``
    seconds_waited: float  # of those, for the save before it
    seconds_writing: float  # from when ``save`` returned until it was committed, copying included
    bytes: int  # that this rank wrote
    error: str | None = None  # why there is no checkpoint
    restartable: bool = False  # the error is a disk's, a service's or a peer's: a later start may do better
    warning: str | None = None  # on rank 0: the checkpoint is complete, but old ones could not be deleted
    seconds_before_update: float = 0.0  # of those blocked, in ``wait_for_copy``


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
        self._copying: Copying | None = None  # of the save in flight
        self._copy_waited = 0.0  # seconds of training, for it
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
        """Start to save ``state``; a report has the result, failures included. Its steady tensors must not change
        until ``wait_for_copy`` has returned. ``metric``: for ``Retention.best``, the lower the better. Collective.
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
        steady = [state[key].steady for key in self._plan.state_keys()]
        copying = self._staging.start(self._plan.views(state), steady)
        facts = copy.deepcopy(dict(meta) if metric is None else {**meta, "metric": metric})
        blocked = time.perf_counter() - began
        self._thread = _Thread(partial(self._write, step, self._plan, copying, facts, blocked, waited))
        self._thread.start()
        self._copying = copying
        if not self._asynchronous:
            self.wait()
            self._reports[-1] = replace(self._reports[-1], seconds_blocked=time.perf_counter() - began)

    def wait_for_copy(self) -> None:
        """Return once the state of the last save may change. The report has the copy's errors."""
        if self._copying is not None:
            self._copy_waited += self._copying.wait()

    def poll(self) -> list[SaveReport]:
        """The saves that ended since the last call. Raises unexpected errors of the thread."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()
        reports, self._reports = self._reports, []
        return reports

    def wait(self) -> None:
        """Wait for the save in flight; ``poll`` then has the report. Raises unexpected errors of the thread."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        report, seconds = thread.result(), self._copy_waited
        self._copying, self._copy_waited = None, 0.0
        blocked = report.seconds_blocked + seconds
        self._reports.append(replace(report, seconds_blocked=blocked, seconds_before_update=seconds))

    def close(self) -> None:
        """Wait, and give the host memory back."""
        self.wait()
        self._layout = self._plan = self._staging = None
        atexit.unregister(self._rest)

    def _rest(self) -> None:
        """Let the thread end, or reach a write or a wait for another rank."""
        if self._thread is not None:
            self._thread.join(REST)
        if self._copying is not None:
            self._copying.abandon()
            self._copying.wait(REST)

    def _write(
        self, step: int, plan: SavePlan, copying: Copying, meta: dict[str, Any], blocked: float, waited: float
    ) -> SaveReport:
        """In the thread."""
        began = time.perf_counter()
        path, error, restartable, warning = "", None, False, None
        try:
            tensors = agree(self._group, lambda: _copied(plan, copying))
            if self._first and not self._cleaned:
                self._cleaned = True
                warning = _warning(lambda: store.clean(self._root))
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


def _copied(plan: SavePlan, copying: Copying) -> list[Tensor]:
    """The whole copy, for ``write_checkpoint``. Raises ValueError where it may be of two steps."""
    tensors = copying.run()
    if copying.changed:
        keys = plan.state_keys()
        first, *others = sorted({keys[place] for place in copying.changed})
        more = f" and {len(others)} more" if others else ""
        raise ValueError(
            f"no checkpoint is written: {first}{more} changed before the update of the step, while it was copied; "
            f"change parameters only in the optimizer's update (state that a forward pass changes belongs in "
            f"buffers), or set checkpoint.asynchronous: false"
        )
    return tensors


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
