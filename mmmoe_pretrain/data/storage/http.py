"""Files of http(s) servers by ranged GETs, over connections that are kept and that a fork does not share.

Python's own client: it starts no thread, so forked workers can use it, and every answer is checked here (range,
length, ETag), since servers, proxies and signed URLs differ. HEAD is not used: a signed URL allows GET alone.
"""

from __future__ import annotations

import base64
import functools
import html
import http.client
import io
import re
import socket
import ssl
import string
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple, cast
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from mmmoe_pretrain.data.storage.connections import PrivateAddressError, TimedResponse, connect_public
from mmmoe_pretrain.data.storage.retry import TransientError, UnreachableError
from mmmoe_pretrain.data.storage.stores import UNKNOWN, Stat, changed, check_same, in_data_worker
from mmmoe_pretrain.urls import MissingError, StorageError, redacted

CHUNK = 1 << 18
MAX_SKIPPED = 64 << 20  # bytes that are read in vain where a server ignores the range
MAX_PAGE = 16 << 20
MAX_WAIT = 60.0  # seconds that a server's Retry-After may ask for
REDIRECTS = 5
MOST_HOSTS = 64  # to which connections are kept
MOST_ANSWERED = 10_000  # that are remembered
AS_IT_IS = "/%:@!$&'()*+,;=~"  # in a path
REDIRECTED, PASSING = {301, 302, 303, 307, 308}, {408, 425, 429, 500, 502, 503, 504, 507, 509, 520, 522, 524}
_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)")
_LINK = re.compile(r"""href\s*=\s*["']([^"'?#]+)["']""", re.IGNORECASE)
# What a broken connection or a garbled answer raises; a bad certificate is no such thing.
BROKEN = (http.client.HTTPException, OSError)
REFUSED = (ConnectionRefusedError, socket.gaierror)  # by a wrong port or host, or while a server is down

Address = tuple[str, str]  # protocol and host:port


class TooLargeError(StorageError):
    """A file of more bytes than the caller takes."""


class Answered(NamedTuple):
    """``data``: empty unless the status is 200."""

    status: int
    headers: http.client.HTTPMessage
    data: bytes


class HttpFiles:
    """A store (``stores.Store``) of http(s) URLs."""

    def __init__(self, options: Mapping[str, Any] | None = None, public_only: bool = False) -> None:
        """``options``: ``headers`` of every request; ``public_only``: no request is sent to a private address."""
        self.public_only = public_only
        self.headers: Mapping[str, str] = (options or {}).get("headers", {})
        self.answered: set[Address] = set()
        self._idle: dict[Address, list[http.client.HTTPConnection]] = defaultdict(list)

    @functools.cached_property
    def _tls(self) -> ssl.SSLContext:
        return ssl.create_default_context()  # takes 50 ms

    def stat(self, url: str, seconds: float) -> Stat:
        with _Answer(self, url, {"Range": "bytes=0-0"}, seconds) as answer:
            if answer.status == 416:  # no first byte
                return Stat(0, answer.version)
            answer.check(url)
            if answer.status == 206:
                answer.read(1)
                return Stat(answer.total(url), answer.version)
            length = answer.header("Content-Length")
            return Stat(int(length) if length.isdecimal() else UNKNOWN, answer.version, ranges=False)

    def get(self, url: str, start: int, size: int, expected: Stat, seconds: float) -> bytes:
        headers = {"Range": f"bytes={start}-{start + size - 1}"}
        if expected.version.startswith('"'):  # a strong ETag
            headers["If-Match"] = expected.version
        with _Answer(self, url, headers, seconds) as answer:
            if answer.status == 412:
                raise changed(url, expected, Stat(UNKNOWN, "another"))
            if answer.status == 416:
                raise changed(url, expected, Stat(answer.total(url)))
            answer.check(url)
            whole = answer.status == 200
            length = answer.header("Content-Length")
            found = Stat(
                (int(length) if length.isdecimal() else UNKNOWN) if whole else answer.total(url), answer.version
            )
            check_same(url, expected, found)
            if not whole:
                answer.check_range(start, size)
                return answer.read(size)
            if start + size > MAX_SKIPPED:
                raise StorageError(
                    f"cannot read bytes {start:,} to {start + size:,} of {redacted(url)}: its server ignores ranges; "
                    f'read it as a stream (path: "pipe:curl -sSf URL"), or copy it to a disk or a bucket'
                )
            return answer.read(start + size)[start:]

    def list(self, url: str, seconds: float) -> list[str]:
        """The names that a server's index page links to."""
        folder = url if url.endswith("/") or "?" in url else f"{url}/"
        with _Answer(self, folder, {}, seconds) as answer:
            answer.check(url)
            if "html" not in answer.header("Content-Type"):
                raise StorageError(
                    f"cannot list {redacted(url)}: its server shows no index of the folder; name the files, e.g. "
                    f"data-{{000000..000099}}.tar, or put a shards.json there"
                )
            page = answer.read(MAX_PAGE, exactly=False).decode(errors="replace")
        links = {unquote(html.unescape(link)).removeprefix("./") for link in _LINK.findall(page)}
        return sorted(name for name in links - {"", "..", "../"} if "/" not in name[:-1] and ":" not in name)

    def chunks(self, url: str, offset: int, seconds: float) -> Iterator[bytes]:
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        with _Answer(self, url, headers, seconds) as answer:
            if answer.status == 416 and answer.total(url) == offset:
                return
            answer.check(url)
            skipped = offset if answer.status == 200 else 0
            if answer.status == 206:
                answer.check_range(offset, 1, at_least=True)
            while data := answer.chunk(time.monotonic() + seconds, CHUNK):
                if len(data) > skipped:
                    yield data[skipped:]
                skipped = max(0, skipped - len(data))

    def download(self, url: str, most: int, seconds: float, whole: float, headers: Mapping[str, str]) -> Answered:
        """One GET, whatever the status of the answer. ``seconds``: without a byte; ``whole``: for the body."""
        with _Answer(self, url, headers, seconds) as answer:
            length, end = answer.header("Content-Length"), time.monotonic() + whole
            if answer.status != 200:
                if length.isdecimal() and int(length) <= CHUNK:
                    answer.read(CHUNK, exactly=False)  # to its end, so that the connection is kept
                return Answered(answer.status, answer.headers, b"")
            body = io.BytesIO()  # whose value is no copy
            while data := answer.chunk(min(end, time.monotonic() + seconds), CHUNK):
                body.write(data)
                if max(body.tell(), int(length) if length.isdecimal() else 0) > most:
                    raise TooLargeError(f"{redacted(url)} has more than {most:,} bytes, and at most so many are read")
            return Answered(answer.status, answer.headers, body.getvalue())

    def close(self) -> None:
        for connections in self._idle.values():
            while connections:
                connections.pop().close()

    def connect(self, parts: SplitResult, seconds: float) -> tuple[http.client.HTTPConnection, bool]:
        """A connection, and whether it was used before: the server may have closed it meanwhile."""
        with suppress(IndexError):  # none is idle
            connection = self._idle.get((parts.scheme, parts.netloc), []).pop()
            connection.timeout = seconds
            if connection.sock:
                connection.sock.settimeout(seconds)
                return connection, True
        proxy = _proxy(parts)
        host, port = (proxy or parts).hostname or "", (proxy or parts).port
        if parts.scheme == "https":
            connection = http.client.HTTPSConnection(host, port, timeout=seconds, context=self._tls)
            if proxy:
                connection.set_tunnel(parts.hostname or "", parts.port or 443, headers=_login(proxy))
        else:
            connection = http.client.HTTPConnection(host, port, timeout=seconds)
        if self.public_only and not proxy:
            connection._create_connection = connect_public  # type: ignore[attr-defined]
        return connection, False

    def may_be_wrong(self, parts: SplitResult) -> bool:
        """Whether nobody has reached the server of a URL: this process has not, and its run has not started."""
        return (parts.scheme, parts.netloc) not in self.answered and not in_data_worker()

    def give_back(self, parts: SplitResult, connection: http.client.HTTPConnection) -> None:
        self._idle[(parts.scheme, parts.netloc)].append(connection)
        while len(self._idle) > MOST_HOSTS:
            oldest = self._idle.pop(next(iter([*self._idle])), [])  # a copy: other threads add hosts
            while oldest:
                oldest.pop().close()


class _Answer:
    """The answer to a GET after redirects. Its connection is kept if the body was read to its end, else closed."""

    def __init__(self, files: HttpFiles, url: str, headers: Mapping[str, str], seconds: float) -> None:
        self._files, self._deadline = files, time.monotonic() + seconds
        first = _host(url)
        for _ in range(REDIRECTS + 1):
            self._parts = urlsplit(url)
            own = {**files.headers, **_login(self._parts, "Authorization")} if _host(url) == first else {}
            self._connection, self._response = self._send({**headers, **own})
            self.status = self._response.status
            location = self.header("Location")
            if self.status not in REDIRECTED or not location:
                break
            self._connection.close()
            url = urljoin(url, location)
            if urlsplit(url).scheme not in ("http", "https"):
                raise StorageError(
                    f"cannot read {redacted(url)}: it is redirected to another protocol; correct the URL"
                )
        else:
            raise StorageError(f"cannot read {redacted(url)}: more than {REDIRECTS} redirects; correct the URL")
        self.version = self.header("ETag") or self.header("Last-Modified")

    def __enter__(self) -> _Answer:
        return self

    def __exit__(self, *_: object) -> None:
        if self._response.isclosed() and not self._response.will_close:  # read to its end
            self._files.give_back(self._parts, self._connection)
        else:
            self._connection.close()

    @property
    def headers(self) -> http.client.HTTPMessage:
        return self._response.headers

    def header(self, name: str) -> str:
        return self._response.getheader(name) or ""

    def check(self, url: str) -> None:
        """Raise the error of a status that is none of success."""
        status = f"the server answers {self.status} {self._response.reason}"
        if self.status in PASSING:
            after = self.header("Retry-After")
            raise TransientError(status, min(MAX_WAIT, float(after)) if after.isdecimal() else 0.0)
        if self.status in (404, 410):
            raise MissingError(f"cannot read {redacted(url)}: it does not exist ({status}); correct the URL")
        if self.status in (401, 403, 407):
            raise StorageError(
                f"cannot read {redacted(url)}: no permission ({status}); check the credentials, and whether a signed "
                f"URL has expired"
            )
        if self.status not in (200, 206):
            raise StorageError(f"cannot read {redacted(url)}: {status}; check the URL and the server")
        if self.header("Content-Encoding") not in ("", "identity"):
            raise StorageError(
                f"cannot read {redacted(url)}: its server compresses it ({self.header('Content-Encoding')}), so that "
                f"ranges mean other bytes; switch that off for this folder"
            )

    def total(self, url: str) -> int:
        """Bytes of the whole file by Content-Range."""
        found = _RANGE.match(self.header("Content-Range"))
        if not found:
            raise TransientError(f"the server answers {self.status} without a Content-Range")
        return UNKNOWN if found[3] == "*" else int(found[3])

    def check_range(self, start: int, size: int, at_least: bool = False) -> None:
        found = _RANGE.match(self.header("Content-Range"))
        if (
            not found
            or not found[1]
            or int(found[1]) != start
            or (not at_least and int(found[2]) != start + size - 1)
        ):
            asked = f"{start}-{start + size - 1}"
            raise TransientError(f"the server answers {self.header('Content-Range')!r} when asked for bytes {asked}")

    def read(self, size: int, exactly: bool = True) -> bytes:
        """The first ``size`` bytes of the body."""
        length = self.header("Content-Length")
        if exactly and length.isdecimal() and int(length) < size:
            raise TransientError(f"a short body: {length} bytes of {size}")
        parts, done = [], 0
        while done < size and (more := self.chunk(self._deadline, size - done)):
            parts.append(more)
            done += len(more)
        if exactly and done < size:
            raise TransientError(f"a short body: {done} bytes of {size}")
        if exactly and length == str(size):
            self._response.read(0 if self._response.isclosed() else 1)  # notices the end, so that it is kept
        return b"".join(parts)

    def chunk(self, deadline: float, most: int) -> bytes:
        """Some bytes of the body, empty at its end."""
        if deadline <= time.monotonic():
            raise TransientError("the body did not arrive in time")
        self._response.end_by(deadline)
        try:
            data = self._response.read1(min(most, CHUNK))
        except BROKEN as error:
            raise TransientError(f"the connection broke ({_name(error)})") from None
        if not data and self._response.length:
            raise TransientError(f"a short body: {self._response.length} bytes are missing")
        if not data and not self._response.isclosed():
            self._response.read(1)  # notices the end, as read1 does from Python 3.12 on, so that it is kept
        return data

    def _send(self, headers: dict[str, str]) -> tuple[http.client.HTTPConnection, TimedResponse]:
        parts = self._parts
        target = quote(parts.path or "/", safe=AS_IT_IS) + (
            f"?{quote(parts.query, safe=string.punctuation)}" if parts.query else ""
        )
        while True:
            seconds = max(0.001, self._deadline - time.monotonic())
            connection, used = self._files.connect(parts, seconds)
            if parts.scheme == "http" and (proxy := _proxy(parts)):
                target = parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment="").geturl()
                headers = {**headers, **_login(proxy)}
            connection.response_class = functools.partial(TimedResponse, deadline=self._deadline)  # type: ignore[assignment]
            try:
                connection.request("GET", target, headers={"User-Agent": "mmmoe", **headers})
                response = cast(TimedResponse, connection.getresponse())
                if len(self._files.answered) < MOST_ANSWERED:
                    self._files.answered.add((parts.scheme, parts.netloc))
                return connection, response
            except PrivateAddressError:
                connection.close()
                raise
            except ssl.SSLCertVerificationError as error:
                raise StorageError(
                    f"cannot read {redacted(parts.geturl())}: {error.verify_message}; set SSL_CERT_FILE to the "
                    f"certificates of your site"
                ) from None
            except BROKEN as error:
                connection.close()
                if isinstance(error, REFUSED) and self._files.may_be_wrong(parts):
                    raise UnreachableError(f"no connection ({_name(error)})") from None
                if not used or isinstance(error, TimeoutError):
                    raise TransientError(f"no answer ({_name(error)})") from None


def _name(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _host(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc.rpartition("@")[2]


def _proxy(parts: SplitResult) -> SplitResult | None:
    """The proxy that the environment names for a URL."""
    proxy = None if proxy_bypass(parts.hostname or "") else getproxies().get(parts.scheme)
    return urlsplit(proxy if "://" in proxy else f"http://{proxy}") if proxy else None


def _login(parts: SplitResult, header: str = "Proxy-Authorization") -> dict[str, str]:
    if not parts.username:
        return {}
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return {header: f"Basic {base64.b64encode(pair.encode()).decode()}"}
