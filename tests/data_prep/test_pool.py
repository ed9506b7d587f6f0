"""Processes that are killed, or whose parent is interrupted, at the worst moment."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from multiprocessing.connection import Connection
from typing import Any

import pytest

from mmmoe_pretrain.data_prep.pool import map_in_order

pytestmark = pytest.mark.timeout(60, method="thread")  # a hang at the end of a pool outlives the other one


def _after_half_of_the_result(then: Callable[[], None]) -> bytes:
    def send(self: Connection, data: memoryview) -> None:
        self._send(len(data).to_bytes(4, "big") + bytes(data[: len(data) // 2]))
        then()

    Connection._send_bytes = send
    return bytes(1000)


def ends(_: int) -> bytes:
    return _after_half_of_the_result(lambda: os._exit(9))


def stops(_: int) -> bytes:
    return _after_half_of_the_result(lambda: time.sleep(600))


def interrupt_in(seconds: float) -> None:
    """SIGINT, which this process gets in another thread than the one that waits."""
    threading.Timer(seconds, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGINT)).start()


def test_a_worker_that_is_killed_while_it_writes_its_result_is_an_error():
    with pytest.raises(ValueError, match=r"a worker process was killed .* fewer --workers"):
        list(map_in_order(ends, range(8), 2))


class TwoArguments(Exception):
    def __init__(self, what: str, where: str) -> None:
        super().__init__(f"{what} in {where}")


def fails(_: int) -> None:
    raise TwoArguments("no pixels", "x.png")


def test_an_exception_that_cannot_be_sent_is_not_taken_for_a_killed_worker():
    with pytest.raises(BrokenProcessPool) as error:
        list(map_in_order(fails, range(8), 2))
    assert "missing 1 required positional argument: 'where'" in str(error.value.__cause__)


def test_a_python_whose_executors_have_another_queue_works(monkeypatch: pytest.MonkeyPatch):
    submit = ProcessPoolExecutor.submit

    def without(self: ProcessPoolExecutor, *args: Any) -> Future[Any]:
        future = submit(self, *args)
        self._result_queue = None  # type: ignore[attr-defined]
        return future

    monkeypatch.setattr(ProcessPoolExecutor, "submit", without)
    assert list(map_in_order(abs, [-1, -2, -3], 2)) == [1, 2, 3]


@pytest.fixture
def interrupts() -> Iterator[None]:
    """As in a terminal; processes of pytest-xdist ignore them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize("work", [stops, time.sleep])
def test_an_interrupt_ends_the_wait_for_a_result(work: Callable[[int], object]):
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt), closing(map_in_order(work, [0, 600, 600], 2)) as results:
        interrupt_in(1.5)
        list(results)
    assert time.monotonic() - start < 30
