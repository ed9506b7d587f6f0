"""One rank of a model replica loads, and its tensor and pipeline ranks get the same batches."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NoReturn, Protocol

from mmmoe_pretrain.batch import to_arrays, to_tensors
from mmmoe_pretrain.data.cursor import Cursor
from mmmoe_pretrain.data.loader import Loader, LoadStats, StepData
from mmmoe_pretrain.data.sources import stream_state
from mmmoe_pretrain.data.sources.source import Indexed
from mmmoe_pretrain.data.sources.stream import Stream
from mmmoe_pretrain.data.workers.arena import dump, load
from mmmoe_pretrain.exit_codes import Restartable

_KINDS: dict[str, type[Exception]] = {  # the first that fits counts
    "Restartable": Restartable,
    "ValueError": ValueError,
    "RuntimeError": RuntimeError,
}


class Channel(Protocol):
    """Bytes from one rank to others: ``parallel.replica.ReplicaChannel``."""

    is_source: bool

    def post(self, content: Sequence[bytes | memoryview] = ()) -> None: ...
    def finish(self) -> memoryview: ...
    def abandon(self) -> None: ...


class ReplicaLoader:
    """A ``Loader`` whose batches the source of ``channel`` reads and sends. Every rank of the replica iterates, seeks
    and closes in the same order. A step's data is sent while the step before it is computed, if it is there by then.
    An error of the source is raised on all ranks, at the same step.
    """

    def __init__(self, channel: Channel, make: Callable[[], Loader], start_step: int, stop_step: int) -> None:
        """``make`` is called on the source alone."""
        self._channel, self._loader = channel, make() if channel.is_source else None
        self._step, self._stop = start_step, stop_step
        self._awaited = False  # the receivers have posted a frame, and the source must
        self._posted = False  # this rank has posted it
        self._data: StepData | None = None  # of the frame that the source has posted
        self._error: Exception | None = None
        self._sending = 0.0  # seconds

    @property
    def sources(self) -> list[Indexed | Stream]:
        """Those of data.train; none on a rank that does not read."""
        return [] if self._loader is None else self._loader.sources

    def digest(self, batches: int | None = None) -> str | None:
        """See ``Loader.digest``; None on a rank that does not read."""
        return None if self._loader is None else self._loader.digest(batches)

    @property
    def notes(self) -> list[str]:
        """See ``Loader.notes``."""
        return [] if self._loader is None else self._loader.notes

    @property
    def stream_states(self) -> stream_state.Table:
        """How far this rank has read the streams, up to the last step that it was given."""
        return {} if self._loader is None else self._loader.stream_states

    @property
    def worker_pids(self) -> list[int]:
        """The worker processes that run now."""
        return [] if self._loader is None else self._loader.worker_pids

    def __iter__(self) -> ReplicaLoader:
        return self

    def __next__(self) -> StepData:
        if self._step >= self._stop:
            self.close()
            raise StopIteration
        began = time.perf_counter()
        if not self._posted:
            self._post()
        data = self._finish()
        if self._loader is not None:
            self._loader.deliver(data)
        self._step += 1
        self._awaited = self._step < self._stop
        if self._awaited and (self._loader is None or self._loader.is_ready()):
            self._post()
        seconds = data.stats.seconds + Counter({"transfer": self._sending})
        self._sending = 0.0
        stats = dataclasses.replace(data.stats, wait_seconds=time.perf_counter() - began, seconds=seconds)
        return data._replace(stats=stats)

    def __enter__(self) -> ReplicaLoader:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._drop()
        self.close()

    def seek(self, step: int, cursor: Cursor, streams: stream_state.Table | None = None) -> list[str]:
        """See ``Loader.seek``. Collective."""
        self._drop()
        self._step = step
        return [] if self._loader is None else self._loader.seek(step, cursor, streams)

    def close(self) -> None:
        """End the worker processes at once; nothing comes after it. Waits for no other rank: it may have failed."""
        if self._posted:
            self._channel.abandon()
        self._stop = self._step
        if self._loader is not None:
            self._loader.close()

    def _post(self) -> None:
        self._posted = True
        if self._loader is None:
            self._channel.post()
            return
        try:
            self._data = self._loader.load()
        except Exception as error:  # noqa: BLE001  # raised by ``_finish``, on every rank
            self._error = error
            kind = next((name for name, its in _KINDS.items() if isinstance(error, its)), "RuntimeError")
            self._channel.post(dump((kind, str(error))))
            return
        began = time.perf_counter()
        step, batch, microbatches, _ = self._data
        self._channel.post(dump((step, batch, to_arrays(tuple(microbatches)))))
        self._sending += time.perf_counter() - began

    def _finish(self) -> StepData:
        """The data of the frame that was posted. Raises the error of the source instead, if it had one."""
        began = time.perf_counter()
        content = self._channel.finish()
        self._posted = False
        if self._error is not None:
            self._raise(self._error)
        if self._data is not None:
            data, self._data = self._data, None
            self._sending += time.perf_counter() - began
            return data
        match load(content):
            case (str(kind), str(text)):
                self._raise(_KINDS[kind](text))
            case (step, batch, arrays):
                return StepData(step, batch, list(to_tensors(arrays)), LoadStats())
        raise AssertionError("a frame of another kind")

    def _raise(self, error: Exception) -> NoReturn:
        self._awaited = False
        self.close()
        raise error

    def _drop(self) -> None:
        """Finish the frame that the receivers have posted, and drop it."""
        if self._awaited:
            if not self._posted:
                self._channel.post()
            self._channel.finish()
        self._awaited = self._posted = False
        self._data = self._error = None
