"""Downloads against a server on this machine that disconnects, ignores ranges, or sends wrong data."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data_prep.download import MissingFileError, Remote, download

CONTENT = bytes(range(256)) * 4000


@contextmanager
def serving(*, breaks: int = 0, ranges: bool = True, missing: bool = False) -> Iterator[tuple[str, list[str]]]:
    """Serve CONTENT; the first ``breaks`` answers stop halfway. Yields the URL and the requested ranges."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.headers.get("Range", ""))
            start = int(asked[-1].removeprefix("bytes=").removesuffix("-")) if ranges and asked[-1] else 0
            if missing:
                self.send_error(404)
                return
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
            body = CONTENT[start:]
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if len(asked) <= breaks else body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/file", asked
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def remote(url: str, content: bytes = CONTENT, size: int | None = len(CONTENT)) -> Remote:
    return Remote(url, "file.bin", "sha256", hashlib.sha256(content).hexdigest(), size)


def test_a_broken_download_resumes_also_in_a_later_run_and_a_complete_file_is_not_fetched_again(tmp_path: Path):
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:24_000])
    with serving(breaks=2) as (url, asked):
        path = download(remote(url), tmp_path, backoff_seconds=0)
        assert path.read_bytes() == CONTENT
        assert [file.name for file in tmp_path.iterdir()] == ["file.bin"]
        assert download(remote(url), tmp_path) == path
    assert asked == ["bytes=24000-", "bytes=524000-", "bytes=774000-"]  # half of the rest at a time


def test_a_server_without_ranges_starts_the_file_again(tmp_path: Path):
    (tmp_path / "file.bin.part").write_bytes(b"x" * 1000)
    with serving(ranges=False) as (url, _):
        assert download(remote(url), tmp_path).read_bytes() == CONTENT


def test_a_wrong_hash_is_refused_and_nothing_is_left_to_resume(tmp_path: Path):
    with serving() as (url, _), pytest.raises(ValueError, match=r"sha256 is .*, expected"):
        download(remote(url, b"something else"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_dead_server_ends_in_a_clear_error(tmp_path: Path):
    with pytest.raises(ValueError, match=r"is the network up\?.*corpus mini"):
        download(remote("http://127.0.0.1:1/file"), tmp_path, backoff_seconds=0)


def test_a_missing_file_is_requested_once_and_distinguished_from_other_errors(tmp_path: Path):
    with serving(missing=True) as (url, asked), pytest.raises(MissingFileError, match=r"file\.bin.*404"):
        download(remote(url), tmp_path)
    assert asked == [""]
