"""Servers of files on 127.0.0.1 that end with the test: HTTP with ranges and faults, and S3 by moto.

    with http_server(folder) as server:
        server.faults = every(10, "error")  # or a function (number of the request, path, range) -> fault or None
        Files().read(f"{server.url}/a.tar", 0, 10)

Faults: "error" (503), "stall" (no answer for ``stall`` seconds), "reset" (the connection is closed), "short" (half of
the body, then closed), "ignore_range" (200 and all), "wrong_range" (another part), "wrong_total" (Content-Range says
another size), "redirect" (302), "denied" (403), "busy" (429), "etag" (another ETag). ``headers``: of all
files.

Forked processes may read from it, since it runs in threads of the process that started it. It answers as S3 does to
GET and HEAD, with the first folder as the bucket, too: ``{"s3": {"endpoint_url": server.url, "anon": True,
"client_kwargs": {"region_name": "us-east-1"}}}``.
"""

from __future__ import annotations

import http.server
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock
from urllib.parse import unquote, urlsplit

Fault = Callable[[int, str, str], str | None]


def never(number: int, path: str, wanted: str) -> str | None:
    return None


def every(n: int, *faults: str) -> Fault:
    """One request in ``n`` fails, with the ``faults`` in turn."""
    return lambda number, path, wanted: faults[number // n % len(faults)] if number % n == n - 1 else None


class HttpServer(http.server.ThreadingHTTPServer):
    """Serves ``folder``. ``requests``: (path, Range) of all, in order."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.latency, self.stall = folder, 0.0, 60.0  # seconds before any answer, and of a stall
        self.faults: Fault = never
        self.headers: dict[str, str] = {}
        self.elsewhere = ""  # to which "redirect" leads; "" is the same file
        self.requests: list[tuple[str, str]] = []
        self.authorizations: list[str] = []
        self.failed: list[str] = []  # the faults that were served
        self.ended = threading.Event()
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def count(self, path: str, wanted: str) -> int:
        with self._lock:
            self.requests.append((path, wanted))
            return len(self.requests) - 1

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is part of the tests."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16
    server: HttpServer

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        target = urlsplit(self.path)
        wanted = self.headers.get("Range", "")
        number = self.server.count(self.path, wanted)
        self.server.authorizations.append(self.headers.get("Authorization", ""))
        time.sleep(self.server.latency)
        fault = self.server.faults(number, target.path, wanted)
        if fault:
            self.server.failed.append(fault)
        path = self.server.folder / unquote(target.path).lstrip("/")
        if fault == "stall":
            self.server.ended.wait(self.server.stall)
            self.close_connection = True
        elif fault == "reset":
            self.close_connection = True
        elif fault == "redirect":
            self._send(302, b"elsewhere", {"Location": self.server.elsewhere or f"{target.path}?redirected"})
        elif fault in ("error", "denied", "busy"):
            self._send({"error": 503, "denied": 403, "busy": 429}[fault], b"no", {})
        elif path.is_dir():
            links = "".join(f'<a href="{p.name}{"/" * p.is_dir()}">{p.name}</a>' for p in path.iterdir())
            self._send(200, f"<html>{links}</html>".encode(), {"Content-Type": "text/html"})
        elif not path.is_file():
            self._send(404, b"", {})
        else:
            self._file(path, wanted, fault)

    def _file(self, path: Path, wanted: str, fault: str | None) -> None:
        status = path.stat()
        size, etag = status.st_size, f'"{status.st_mtime_ns:x}-{status.st_size:x}{"x" * (fault == "etag")}"'
        if self.headers.get("If-Match", etag) != etag:
            self._send(412, b"", {})
            return
        headers = {"ETag": etag, "Accept-Ranges": "bytes", **self.server.headers}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted)
        if not asked or fault == "ignore_range":
            first, last, code = 0, size - 1, 200
        else:
            first, last, code = int(asked[1]), min(int(asked[2] or size), size - 1), 206
            if first >= size:
                self._send(416, b"", {"Content-Range": f"bytes */{size}", **headers})
                return
            first += fault == "wrong_range"
            headers["Content-Range"] = f"bytes {first}-{last}/{size + 7 * (fault == 'wrong_total')}"
        data, headers["Content-Length"] = b"", str(last + 1 - first)
        if self.command == "GET":
            with path.open("rb") as file:
                data = os.pread(file.fileno(), last + 1 - first, first)
        self._send(code, data, headers, cut=fault == "short")

    def _send(self, code: int, body: bytes, headers: dict[str, str], cut: bool = False) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection |= cut

    def log_message(self, *_: object) -> None:
        """Tests print nothing."""


@contextmanager
def http_server(folder: Path) -> Iterator[HttpServer]:
    server = HttpServer(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        server.server_close()
        thread.join(5)


@contextmanager
def s3_server(bucket: str = "bucket") -> Iterator[str]:
    """moto's S3 with an empty bucket; its endpoint. Credentials and region stand in the environment meanwhile."""
    import boto3
    from moto.server import ThreadedMotoServer

    values = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request
    with mock.patch.dict(os.environ, values):
        os.environ.pop("AWS_PROFILE", None)
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        try:
            host, port = server.get_host_and_port()
            boto3.client("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket=bucket)
            yield f"http://{host}:{port}"
        finally:
            server.stop()


def upload(endpoint: str, path: Path, key: str, bucket: str = "bucket") -> None:
    """Put a file into moto's bucket, for everyone to read: curl has no credentials."""
    import boto3

    boto3.client("s3", endpoint_url=endpoint).put_object(
        Bucket=bucket, Key=key, Body=path.read_bytes(), ACL="public-read"
    )
