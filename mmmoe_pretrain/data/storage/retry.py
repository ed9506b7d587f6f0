"""Retries of one read: exponential backoff with full jitter, bounded in number and in time.

Full jitter as in AWS Architecture Blog, "Exponential Backoff and Jitter" (2015): a thousand ranks whose bucket failed
at the same moment do not ask again at the same moment.
"""

from __future__ import annotations

import logging
import queue
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from mmmoe_pretrain.urls import UnavailableError, redacted

logger = logging.getLogger(__name__)
T = TypeVar("T")
LAST_SHARE = 0.05  # of the time: with less left, nothing is tried again
REPORTED = 3  # attempts that fail before it is logged


class TransientError(Exception):
    """A request failed in a way that may pass: timeout, reset, 429, 5xx, short body. ``wait``: seconds that the
    server asks for."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class UnreachableError(TransientError):
    """No connection to a server that has not answered this process before: its host or port may be wrong."""


@dataclass(frozen=True)
class Retries:
    """The limits of one read."""

    request_seconds: float = 20.0  # of a request without an answer
    read_seconds: float = 90.0  # of a read with all its requests and pauses
    count: int = 100  # further requests after the first
    first_pause: float = 0.1
    longest_pause: float = 10.0
    first_attempts: int = 5  # to connect to a server that has not answered before

    def run(self, call: Callable[[float], T], doing: str) -> T:
        """``call(seconds)`` until it returns; it may take so many seconds. ``doing``: e.g. ``read s3://b/a.tar``.

        Raises UnavailableError where the limits are reached, with the last cause.
        """
        began, attempt = time.monotonic(), 0
        while True:
            left = self.read_seconds - (time.monotonic() - began)
            try:
                return call(max(0.001, min(self.request_seconds, left)))
            except TransientError as error:
                attempt += 1
                pause = max(error.wait, self.pause(attempt))
                elapsed = time.monotonic() - began
                left = self.read_seconds - elapsed
                never_answered = isinstance(error, UnreachableError) and attempt >= self.first_attempts
                if never_answered or attempt > self.count or left < LAST_SHARE * self.read_seconds:
                    remedy = (
                        "the service and the network; raise data.read_timeout and data.read_retries for long outages"
                    )
                    if never_answered:
                        remedy = "its host and port, and that the server runs"
                    raise UnavailableError(
                        f"cannot {redacted(doing)}: {redacted(error)} ({attempt} requests in {elapsed:.0f} s). Check "
                        f"{remedy}"
                    ) from None
                if attempt == REPORTED:
                    logger.warning("cannot %s yet: %s; trying again", redacted(doing), redacted(error))
                time.sleep(min(pause, left / 2))  # the time is used to its end

    def pause(self, failed: int) -> float:
        """Seconds to wait after so many attempts."""
        longest = min(self.longest_pause, self.first_pause * 2 ** (failed - 1))
        return random.SystemRandom().uniform(0, longest)  # forks share random's state


class Later(Generic[T]):
    """The result of a call in a daemon thread: one that never returns holds nobody up."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._done: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()
        threading.Thread(target=self._work, args=(call,), daemon=True).start()

    def _work(self, call: Callable[[], T]) -> None:
        try:
            self._done.put((call(), None))
        except BaseException as error:  # noqa: BLE001 - raised where the result is awaited
            self._done.put((None, error))

    def result(self, seconds: float) -> T:
        try:
            value, error = self._done.get(timeout=seconds)
        except queue.Empty:
            raise TransientError(f"no answer in {seconds:.3g} s") from None
        if error is not None:
            raise error
        return value  # type: ignore[return-value]
