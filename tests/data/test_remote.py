"""Files from servers that fail: the bytes of the local file or one clear error, within the time limit."""

from __future__ import annotations

import os
import random
import re
import socket
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import fsspec
import pytest

from mmmoe_pretrain.data.sources.source import open_indexed
from mmmoe_pretrain.data.storage.blocks import NEAR
from mmmoe_pretrain.data.storage.files import CacheSettings, Files, MissingError, ReadSettings, StorageError
from mmmoe_pretrain.data.storage.retry import Retries
from mmmoe_pretrain.data.workers.worker import close_sockets
from mmmoe_pretrain.urls import UnavailableError
from tests.data.servers import HttpServer, every, http_server, never, s3_server, upload
from tests.support import in_forks

CONTENT = random.Random(7).randbytes(700_001)
QUICK = Retries(request_seconds=0.4, read_seconds=5.0, first_pause=0.001)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpServer]:
    folder = tmp_path_factory.mktemp("served")
    (folder / "a.tar").write_bytes(CONTENT)
    (folder / "empty.tar").touch()
    (folder / "bucket").mkdir()
    (folder / "bucket" / "a.tar").write_bytes(CONTENT)  # as S3's
    with http_server(folder) as server:
        yield server


@pytest.fixture(autouse=True)
def _no_fault(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "served" in request.fixturenames:
        request.getfixturevalue("served").faults = never


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    path = tmp_path_factory.mktemp("bucket") / "a.tar"
    path.write_bytes(CONTENT)
    with s3_server() as endpoint:
        upload(endpoint, path, "train/a.tar")
        yield endpoint


def settings_of(kind: str, tmp_path: Path, endpoint: str = "") -> ReadSettings:
    cache = CacheSettings(str(tmp_path / "cache"), 10**7, 64 << 10) if "cache" in kind else None
    return ReadSettings(Retries(request_seconds=5.0), {"s3": {"endpoint_url": endpoint}}, cache)


def assert_exact(files: Files, url: str, seed: int, reads: int = 40) -> None:
    draws = random.Random(seed)
    for _ in range(reads):
        start = draws.randrange(len(CONTENT))
        size = draws.randrange(1, min(30_000, len(CONTENT) - start) + 1)
        assert files.read(url, start, size) == CONTENT[start : start + size]
    for start in range(0, len(CONTENT), 50_000):  # in order
        assert files.read(url, start, min(50_000, len(CONTENT) - start)) == CONTENT[start : start + 50_000]
    assert files.stream(url, 123_456).read() == CONTENT[123_456:]


@pytest.mark.parametrize("kind", ["http", "http cache", "s3", "s3 cache", "memory"])
def test_rank_and_forked_workers_read_the_bytes_of_the_file(
    kind: str, tmp_path: Path, served: HttpServer, bucket: str
) -> None:
    files = Files(settings_of(kind, tmp_path, bucket))
    fsspec.filesystem("memory").pipe_file("/train/a.tar", CONTENT)
    folder = {"http": served.url, "s3": "s3://bucket/train", "memory": "memory://train"}[kind.split(maxsplit=1)[0]]
    assert_exact(files, f"{folder}/a.tar", seed=3)
    assert in_forks(*(partial(assert_exact, files, f"{folder}/a.tar", seed) for seed in range(3))) == [0, 0, 0]
    assert "a.tar" in files.list(folder)
    assert files.read_all(f"{folder}/a.tar", len(CONTENT)) == CONTENT
    with pytest.raises(MissingError, match=f"cannot read {re.escape(folder)}/b.tar: it does not exist"):
        files.stat(f"{folder}/b.tar")


def test_a_worker_that_closed_the_sockets_of_its_rank_closes_no_file_of_its_own(served: HttpServer) -> None:
    files, url = Files(ReadSettings(QUICK)), f"{served.url}/a.tar"

    def work() -> None:
        close_sockets(own=-1)
        own = [os.open("/dev/null", os.O_RDONLY) for _ in range(20)]  # some get the numbers of the sockets
        assert files.read(url, 3, 5) == CONTENT[3:8]
        assert {os.readlink(f"/proc/self/fd/{descriptor}") for descriptor in own} == {"/dev/null"}

    assert files.read(url, 3, 5) == CONTENT[3:8]
    assert in_forks(work) == [0]


FAULTS = ("error", "reset", "short", "stall")


def read_through_faults(files: Files, url: str) -> None:
    expected = files.stat(url)
    for start in range(0, 700_000, 35_000):
        assert files.fetch(url, start, 1000, expected) == CONTENT[start : start + 1000]


@pytest.mark.parametrize("fault", [*FAULTS, "ignore_range", "wrong_range", "wrong_total", "etag", "redirect"])
def test_a_server_that_fails_one_request_in_ten_delays_reads_only(fault: str, served: HttpServer) -> None:
    served.failed.clear()
    served.faults = every(10, fault)
    read_through_faults(Files(ReadSettings(QUICK)), f"{served.url}/a.tar")
    assert served.failed.count(fault) >= 2


@pytest.mark.parametrize("fault", ["wrong_total", "etag", "ignore_range"])
def test_a_wrong_first_answer_about_a_file_does_not_count(fault: str, served: HttpServer) -> None:
    first = len(served.requests)
    served.faults = lambda number, path, wanted: fault if number == first else None
    for read in (
        lambda files, url: files.read(url, 700_000, 1),
        lambda files, url: files.stream(url, 700_000).read(),
    ):
        first = len(served.requests)
        assert read(Files(ReadSettings(QUICK)), f"{served.url}/a.tar") == CONTENT[700_000:]


def test_a_bucket_that_fails_one_request_in_ten_delays_reads_only(served: HttpServer) -> None:
    options = {"endpoint_url": served.url, "anon": True, "client_kwargs": {"region_name": "us-east-1"}}
    files = Files(ReadSettings(Retries(1.0, 20.0, first_pause=0.001), {"s3": options}))
    served.failed.clear()
    served.faults = every(10, *FAULTS)
    read_through_faults(files, "s3://bucket/a.tar")  # s3fs
    assert {*served.failed} == {*FAULTS}
    assert in_forks(partial(read_through_faults, files, "s3://bucket/a.tar")) == [0]  # obstore


@pytest.mark.parametrize(
    ("fault", "retries", "message"),
    [
        ("error", Retries(1, 5, 3, 0.001), r"cannot read .*/a\.tar: the server answers 503 .*\(4 requests in \d s\)"),
        ("stall", Retries(0.2, 0.7, 9, 0.001), r"cannot read .*/a\.tar: no answer \(TimeoutError.* in \d s\)"),
        ("denied", QUICK, r"cannot read .*/a\.tar: no permission \(the server answers 403"),
        ("wrong_total", Retries(1, 5, 3, 0.001), r"a\.tar was changed .* it has 700,008 bytes now, and had 700,001"),
        ("etag", Retries(1, 5, 3, 0.001), r"a\.tar was changed .*: its time or ETag is another"),
    ],
)
def test_a_server_that_keeps_failing_is_one_clear_line_in_time(
    fault: str, retries: Retries, message: str, served: HttpServer
) -> None:
    files = Files(ReadSettings(retries))
    files.stat(f"{served.url}/a.tar")
    files.expect(f"{served.url}/a.tar", files.stat(f"{served.url}/a.tar"))
    served.faults, began = every(1, fault), time.monotonic()
    with pytest.raises(StorageError, match=message) as caught:
        files.read(f"{served.url}/a.tar", 5, 5)
    assert time.monotonic() - began < retries.read_seconds + 3
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError("no\nway"), r"no permission \(PermissionError: no way\)"),
        (ValueError("bad\noption"), "ValueError: bad option; install the package of memory://"),
        (ConnectionError("gone\naway"), r"ConnectionError: gone away \(1 requests"),
    ],
)
def test_an_error_of_a_client_library_is_one_line(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.info", Mock(side_effect=error))
    with pytest.raises(StorageError, match=message) as caught:
        Files(ReadSettings(Retries(1, 1, 0))).stat("memory://a.tar")
    assert "\n" not in str(caught.value)


def test_an_outage_that_ends_before_the_limit_of_a_read_is_waited_for(served: HttpServer) -> None:
    """Refused requests take no time, so that the pauses alone must reach the limit."""
    files, url = Files(ReadSettings(Retries(1.0, 0.5, first_pause=0.1, longest_pause=0.1))), f"{served.url}/a.tar"
    files.stat(url)
    first = len(served.requests)
    served.faults = lambda number, path, wanted: "error" if number < first + 4 else None
    assert files.read(url, 5, 5) == CONTENT[5:10]
    served.faults, began = every(1, "error"), time.monotonic()
    with pytest.raises(UnavailableError):  # a launcher starts the run again
        files.read(url, 600_000, 5)
    assert time.monotonic() - began > 0.95 * 0.5


def test_a_wrong_port_or_host_is_said_soon_and_an_outage_of_a_running_job_is_waited_for(served: HttpServer) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # nobody listens
        port, settings = free.getsockname()[1], ReadSettings(Retries(1.0, 1.0, first_pause=0.01, longest_pause=0.05))
        for url in (f"http://127.0.0.1:{port}/{{0..9}}.tar", f"http://127.0.0.1:{port}/d", "http://no.invalid/0.tar"):
            with pytest.raises(UnavailableError, match=r"no connection .* \(5 requests .*Check its host and port"):
                open_indexed(url, Files(settings))

        def reads(files: Files, url: str) -> None:
            with pytest.raises(UnavailableError, match=r"data\.read_timeout"):
                files.read(url, 5, 5)

        assert in_forks(partial(reads, Files(settings), f"http://127.0.0.1:{port}/a.tar")) == [0], "in a data worker"
    with http_server(served.folder) as server:
        files, url = Files(settings), f"{server.url}/a.tar"
        assert files.read(url, 600_000, 5) == CONTENT[600_000:600_005]
        server.faults = every(1, "reset")  # of the kept connection, too
    reads(files, url)


def test_a_wrong_endpoint_of_s3_is_said_after_the_attempts_of_its_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        options = {"endpoint_url": f"http://127.0.0.1:{free.getsockname()[1]}", "anon": True,
                   "config_kwargs": {"retries": {"total_max_attempts": 1}}}  # fmt: skip
        with pytest.raises(
            UnavailableError, match=r"EndpointConnectionError.* check the host and port of endpoint_url"
        ):
            Files(ReadSettings(Retries(5.0, 9.0), {"s3": options})).stat("s3://bucket/a.tar")


def test_a_server_without_ranges_is_read_as_a_stream_through_its_faults(served: HttpServer) -> None:
    served.faults = lambda number, path, wanted: "ignore_range" if number % 3 else "short"
    files = Files(ReadSettings(QUICK))
    assert files.stream(f"{served.url}/a.tar", 1000).read() == CONTENT[1000:]
    assert files.read_all(f"{served.url}/a.tar", len(CONTENT)) == CONTENT


def test_an_empty_file_and_an_absent_index_page_are_named(served: HttpServer) -> None:
    files = Files(ReadSettings(QUICK))
    assert files.stat(f"{served.url}/empty.tar").size == 0
    assert files.list(served.url) == ["a.tar", "bucket/", "empty.tar"]
    with pytest.raises(StorageError, match=r"0 to 1 of .*which has 0: it is truncated"):
        files.read(f"{served.url}/empty.tar", 0, 1)
    with pytest.raises(StorageError, match=r"cannot list .*a\.tar.*: it does not exist|shows no index"):
        files.list(f"{served.url}/a.tar")


def test_what_a_url_grants_is_filled_in_and_never_shown(served: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARD", served.url.replace("//", "//me:hunter2@") + "/a.tar?X-Amz-Signature=abcd1234&part=1")
    files = Files(ReadSettings(Retries(1, 1, 0)))
    assert files.read("${SHARD}", 3, 5) == CONTENT[3:8]
    assert "abcd1234" in served.requests[-1][0]
    monkeypatch.setenv("TOKEN", "hunter3")
    options = {"http": {"headers": {"Authorization": "Bearer ${TOKEN}"}}}
    assert Files(ReadSettings(QUICK, options)).read(f"{served.url}/a.tar", 3, 5) == CONTENT[3:8]
    assert served.authorizations[-2:] == ["Bearer hunter3"] * 2
    served.faults = every(1, "error")
    for url in ("${SHARD}", os.environ["SHARD"]):
        with pytest.raises(StorageError) as caught:
            Files(ReadSettings(Retries(1, 1, 0))).read(url, 3, 5)
        assert "hunter2" not in str(caught.value) and "abcd1234" not in str(caught.value)


def test_neighbours_cost_few_requests(served: HttpServer) -> None:
    draws, url = random.Random(0), f"{served.url}/a.tar"
    places = draws.sample(range(0, 690_000, 10_000), 60)  # of one block, in any order
    for order in (places, sorted(places)):
        files, before = Files(ReadSettings(QUICK)), len(served.requests)
        assert all(files.read(url, at, 9000) == CONTENT[at : at + 9000] for at in order)
        assert len(served.requests) - before <= 12
    assert len(CONTENT) < NEAR
