"""Downloads against a server on this machine that disconnects, ignores ranges, or sends wrong data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import pytest

from mmmoe_pretrain.data_prep.corpora.download import MissingFileError, Remote, download
from tests.data.servers import HttpServer, every, http_server

CONTENT = bytes(range(256)) * 4000


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[HttpServer]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = tmp_path_factory.mktemp("served")
    (folder / "file").write_bytes(CONTENT)
    with http_server(folder) as server:
        yield server


def remote(url: str, content: bytes = CONTENT) -> Remote:
    return Remote(f"{url}/file", "file.bin", "sha256", hashlib.sha256(content).hexdigest(), len(CONTENT))


def test_a_broken_download_resumes_also_in_a_later_run_and_a_complete_file_is_not_fetched_again(tmp_path, server):
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:24_000])
    server.faults = lambda number, *_: "short" if number < 2 else None
    path = download(remote(server.url), tmp_path, backoff_seconds=0)
    assert path.read_bytes() == CONTENT
    assert [file.name for file in tmp_path.iterdir()] == ["file.bin"]
    assert download(remote(server.url), tmp_path) == path
    asked = [wanted for _, wanted in server.requests]
    assert asked == ["bytes=24000-", "bytes=524000-", "bytes=774000-"]  # half of the rest at a time


def test_a_server_without_ranges_starts_the_file_again(tmp_path, server):
    (tmp_path / "file.bin.part").write_bytes(b"x" * 1000)
    server.faults = every(1, "ignore_range")
    assert download(remote(server.url), tmp_path).read_bytes() == CONTENT


def test_a_wrong_hash_is_refused_and_nothing_is_left_to_resume(tmp_path, server):
    with pytest.raises(ValueError, match=r"sha256 is .*, expected"):
        download(remote(server.url, b"something else"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_dead_server_ends_in_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match=r"is the network up\?.*corpus mini"):
        download(remote("http://127.0.0.1:1"), tmp_path, backoff_seconds=0)


def test_a_missing_file_is_requested_once_and_distinguished_from_other_errors(tmp_path, server):
    with pytest.raises(MissingFileError, match=r"file\.bin.*404"):
        download(remote(f"{server.url}/absent"), tmp_path)
    assert server.requests == [("/absent/file", "")]
