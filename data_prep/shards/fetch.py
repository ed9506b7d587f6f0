"""Files at URLs of rows, fetched by threads ahead of the process that decodes them.

One plain GET a file, over connections that are kept. What may pass is tried again, with pauses in which the threads
fetch from other hosts. The user did not write the URLs: only web servers and buckets are read, no variable is filled
in, and no request goes to a private address unless the user allows it.
"""

from __future__ import annotations

import dataclasses
import http.client
import random
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from mmmoe_pretrain import __version__
from mmmoe_pretrain.data.storage.connections import PrivateAddressError
from mmmoe_pretrain.data.storage.files import Files
from mmmoe_pretrain.data.storage.http import MAX_WAIT, PASSING, HttpFiles, TooLargeError
from mmmoe_pretrain.data.storage.retry import TransientError
from mmmoe_pretrain.limits import MAX_MEMBER_BYTES
from mmmoe_pretrain.urls import protocol, redacted

AGENT = "mmmoe-data"
HEADERS = {"User-Agent": f"Mozilla/5.0 (compatible; {AGENT}/{__version__})"}
NO_TRAINING = ("noai", "noimageai", "noindex", "noimageindex")  # of X-Robots-Tag, as img2dataset respects them
WEB, BUCKETS = ("http", "https"), ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf", "oss")
MAX_HELD = 128 << 20  # bytes that are fetched and not taken yet
LARGE = 16 << 20  # bytes; of files that have more, one is fetched at a time
WHOLE = 10  # times the time limit: for all of a body
_TOO_LONG = WHOLE + 3  # times the time limit: a request has ended by then, unless something hangs
_LONGEST_PAUSE, _FIRST_PAUSE = 10.0, 0.5  # seconds before another try
_MOST_REFUSALS = 8  # of a host that asks for pauses, after which its files are not waited for
_MOST_HOSTS = 4096  # that are remembered
_IDLE_SECONDS = 1.0  # after which a thread without work ends
_POLL_SECONDS = 0.1  # for what is due by then


@dataclass(frozen=True, slots=True)
class FetchOptions:
    """How files at URLs are fetched."""

    threads: int = 16  # a process
    per_host: int = 16  # connections to one host, of all processes
    timeout: float = 10.0  # seconds without an answer or a further byte
    retries: int = 2
    ignore_robots: bool = False
    allow_private: bool = False

    def of_one(self, processes: int) -> FetchOptions:
        """The share of one process."""
        return dataclasses.replace(self, per_host=max(1, self.per_host // max(1, processes)))


class FetchError(ValueError):
    """Why a file cannot be had. ``retry``: it may be possible later; ``wait``: seconds that the server asks for;
    ``url``: for a message."""

    def __init__(self, reason: str, retry: bool = False, wait: float | None = None, url: str = "") -> None:
        super().__init__(reason)
        self.reason, self.retry, self.wait, self.url = reason, retry, wait, redacted(url)


@dataclass(slots=True)
class _Host:
    active: int = 0  # requests
    due: float = 0.0  # not before
    refusals: int = 0  # 429 and the like, one after another


@dataclass(slots=True, eq=False)
class _Wanted:
    url: str
    host: str
    rows: int = 0  # that need it
    tries: int = 0
    due: float = 0.0  # the next try, not before
    began: float = 0.0  # its request
    is_large: bool = False
    data: bytes | None = None
    error: FetchError | None = None

    @property
    def is_done(self) -> bool:
        return self.data is not None or self.error is not None


class Fetcher:
    """``want`` URLs, ``get`` their content, ``drop`` each as often as it was wanted. One thread may call it."""

    def __init__(self, options: FetchOptions) -> None:
        self._options, self._files = options, Files()
        self._http = HttpFiles(public_only=not options.allow_private)
        self._lock = threading.Lock()
        self._work, self._done = threading.Condition(self._lock), threading.Condition(self._lock)
        self._wanted: dict[str, _Wanted] = {}
        self._queue: deque[_Wanted] = deque()
        self._active: list[_Wanted] = []
        self._hosts: dict[str, _Host] = {}
        self._threads, self._held, self._awaited = 0, 0, ""

    def want(self, urls: Iterable[str]) -> None:
        """Begin to fetch them, in this order."""
        with self._lock:
            for url in urls:
                if url not in self._wanted:
                    self._wanted[url] = _Wanted(url, _host(url))
                    self._queue.append(self._wanted[url])
                    self._work.notify()
                self._wanted[url].rows += 1
            self._start_threads()

    def get(self, url: str) -> bytes:
        """The content. Raises FetchError."""
        self.want([url])
        try:
            with self._lock:
                item, self._awaited = self._wanted[url], url
                self._work.notify()
                while not item.is_done:
                    self._abandon_hanging()
                    self._start_threads()
                    self._done.wait(_IDLE_SECONDS)
                self._awaited = ""
            if item.error:
                raise FetchError(item.error.reason, item.error.retry, url=url)
            assert item.data is not None
            return item.data
        finally:
            self.drop([url])

    def drop(self, urls: Iterable[str]) -> None:
        with self._lock:
            for url in urls:
                item = self._wanted[url]
                item.rows -= 1
                if not item.rows:
                    del self._wanted[url]
                    self._held -= len(item.data or b"")
                    if not item.is_done and item not in self._active:
                        self._queue.remove(item)
            self._work.notify()

    def _start_threads(self) -> None:
        for _ in range(min(len(self._queue), self._options.threads - self._threads)):
            self._threads += 1
            threading.Thread(target=self._fetch_all, daemon=True).start()

    def _abandon_hanging(self) -> None:
        """Give up requests that exceed all time limits; another thread replaces theirs, which ends if it goes on."""
        seconds = _TOO_LONG * self._options.timeout
        for item in [item for item in self._active if time.monotonic() > item.began + seconds]:
            item.tries = self._options.retries + 1
            self._finish(item, FetchError(f"timed out after {seconds:g} s", retry=True))
            self._threads -= 1

    def _fetch_all(self) -> None:
        """A thread: fetches what is due until there is nothing."""
        while True:
            with self._lock:
                while (item := self._next()) is None:
                    if not self._work.wait(_POLL_SECONDS if self._queue else _IDLE_SECONDS) and not self._queue:
                        self._threads -= 1
                        return
            found = self._try(item)
            with self._lock:
                if item not in self._active:  # abandoned
                    return
                self._finish(item, found)
                self._done.notify_all()

    def _next(self) -> _Wanted | None:
        """The first one that may be fetched now, with its host's counters."""
        now, is_full = time.monotonic(), self._held >= MAX_HELD
        for item in self._queue:
            host = self._hosts.get(item.host) or _Host()
            must_wait = is_full or (item.is_large and any(each.is_large for each in self._active))
            if (must_wait and item.url != self._awaited) or max(item.due, host.due) > now:
                continue
            if host.active < self._options.per_host:
                self._queue.remove(item)
                self._hosts[item.host] = host
                host.active += 1
                item.began, item.tries = now, item.tries + 1
                self._active.append(item)
                return item
        return None

    def _finish(self, item: _Wanted, found: bytes | FetchError | None) -> None:
        """``found``: None where the file is large, and is fetched when no other such is."""
        self._active.remove(item)
        host, now = self._hosts[item.host], time.monotonic()
        host.active -= 1
        if isinstance(found, bytes):
            host.refusals = 0
            item.data = found
            self._held += len(found) if item.rows else 0
        elif found is None:
            item.is_large, item.tries = True, item.tries - 1
            if item.rows:
                self._queue.appendleft(item)
        else:
            if found.wait is not None and host.refusals < _MOST_REFUSALS:
                host.due = max(host.due, now + found.wait)
            host.refusals = 0 if found.wait is None else host.refusals + 1
            if found.retry and item.tries <= self._options.retries and host.refusals <= _MOST_REFUSALS and item.rows:
                longest = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** (item.tries - 1))
                item.due = now + random.SystemRandom().uniform(0, longest)
                self._queue.appendleft(item)
            else:
                item.error = found
        if not host.active and not host.refusals:
            del self._hosts[item.host]
        elif len(self._hosts) > _MOST_HOSTS:
            self._hosts = {name: each for name, each in self._hosts.items() if each.active}

    def _try(self, item: _Wanted) -> bytes | FetchError | None:
        url, seconds = item.url, self._options.timeout
        try:
            if protocol(url) in WEB:
                return self._content(url, MAX_MEMBER_BYTES if item.is_large else LARGE)
            if protocol(url) in BUCKETS:
                return self._files.download(url, MAX_MEMBER_BYTES, seconds)
            return FetchError(f"files of rows are not read by {protocol(url)}; by {', '.join((*WEB, *BUCKETS))}")
        except TransientError as error:
            cause, reason = error.__context__, redacted(error)
            if isinstance(cause, TimeoutError):
                reason = f"timed out after {seconds:g} s"
            if isinstance(cause, socket.gaierror):
                reason = "its host is unknown"
            return FetchError(reason, retry=not isinstance(cause, http.client.InvalidURL))
        except FetchError as error:
            return error.with_traceback(None)  # which holds the content
        except TooLargeError as error:
            return FetchError(str(error)) if item.is_large else None
        except PrivateAddressError as error:
            return FetchError(f"{error}; --allow-private fetches it")
        except (ValueError, OSError, ImportError, http.client.InvalidURL) as error:  # also StorageError
            return FetchError(redacted(error))
        except Exception as error:  # noqa: BLE001 - of a package for a bucket; a thread that ends would wait for ever
            return FetchError(f"{type(error).__name__}: {redacted(error)}", retry=True)

    def _content(self, url: str, most: int) -> bytes:
        seconds = self._options.timeout
        status, headers, data = self._http.download(url, most, seconds, WHOLE * seconds, HEADERS)
        if status in PASSING:
            after = headers.get("Retry-After", "")
            wait = min(MAX_WAIT, float(after)) if after.isdecimal() else 0.0
            raise FetchError(f"http {status}", retry=True, wait=wait if after or status == 429 else None)
        if status != 200:
            raise FetchError(f"http {status}")
        if not self._options.ignore_robots and (directive := forbidden_by(headers)):
            raise FetchError(
                f"its server forbids this use (X-Robots-Tag: {directive}); --ignore-robots-tag fetches it"
            )
        if headers.get("Content-Encoding", "identity") != "identity":
            raise FetchError(f"its server compresses it ({headers['Content-Encoding']!r:.40})")
        return data


def forbidden_by(headers: http.client.HTTPMessage) -> str | None:
    """The directive for all agents or this one that forbids training on the file."""
    for value in headers.get_all("X-Robots-Tag", []):
        agent, colon, rest = value.partition(":")
        if colon and agent.strip().lower() != AGENT:
            continue
        for directive in (rest if colon else value).split(","):
            if directive.strip().lower() in NO_TRAINING:
                return str(directive.strip().lower())
    return None


def _host(url: str) -> str:
    return url.split("/", 3)[2].rpartition("@")[2].lower()
