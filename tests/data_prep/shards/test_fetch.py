"""Files at URLs of rows, from a server on this machine."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmmoe_pretrain.data.storage import connections
from mmmoe_pretrain.data_prep.quality.filters import Filters
from mmmoe_pretrain.data_prep.rows.inputs import open_input
from mmmoe_pretrain.data_prep.rows.manifest import write_manifest
from mmmoe_pretrain.data_prep.rows.row import Found, Row
from mmmoe_pretrain.data_prep.rows.spool import Spool
from mmmoe_pretrain.data_prep.shards import fetch
from mmmoe_pretrain.data_prep.shards.encode import BadSample, EncodedSample, Encoder, Task, encode_at
from mmmoe_pretrain.data_prep.shards.fetch import Fetcher, FetchError, FetchOptions, forbidden_by
from mmmoe_pretrain.data_prep.shards.media import MediaOptions
from mmmoe_pretrain.data_prep.shards.shard import Choice, write_shards
from mmmoe_pretrain.data_prep.shards.writing import ShardOptions
from tests.data.servers import HttpServer, http_server
from tests.support import image_bytes

JPEG = image_bytes(Image.new("RGB", (4, 4)), "JPEG")
HERE = FetchOptions(allow_private=True, timeout=0.3, retries=2)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HttpServer]:
    monkeypatch.setattr(fetch, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(fetch, "_IDLE_SECONDS", 0.1)
    monkeypatch.setattr(fetch, "_POLL_SECONDS", 0.01)
    for number in range(20):
        (tmp_path / str(number)).write_bytes(b"%d" % number)
    with http_server(tmp_path) as server:
        yield server


def sample(url: str, root: Path, options: FetchOptions = HERE) -> EncodedSample | BadSample:
    return Encoder(root, MediaOptions(), options)(Row(key="a", image=url))


def test_an_image_at_a_url_without_a_suffix_is_named_by_its_content(server: HttpServer, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(JPEG)
    found = sample(f"{server.url}/image?id=3 and é", tmp_path)
    assert isinstance(found, EncodedSample)
    assert found.members["jpg"] == JPEG
    assert [path for path, _ in server.requests] == ["/image?id=3%20and%20%C3%A9"]


@pytest.mark.parametrize(
    ("fault", "reason", "retry", "requests"),
    [
        ("denied", "http 403", False, 1),
        ("error", "http 503", True, 3),
        ("busy", "http 429", True, 3),
        ("stall", "timed out after 0.3 s", True, 3),
        ("short", "a short body: 1 bytes are missing", True, 3),
        ("redirect", "more than 5 redirects", False, 6),
        (None, "http 404", False, 1),
    ],
)
def test_only_what_may_pass_is_tried_again(
    fault: str | None, reason: str, retry: bool, requests: int, server: HttpServer, tmp_path: Path
) -> None:
    server.faults = lambda number, path, wanted: fault
    server.stall = 1.0
    found = sample(f"{server.url}/{'10' if fault else 'none'}", tmp_path)
    assert isinstance(found, BadSample)
    assert reason in found.reason
    assert (found.retry, len(server.requests)) == (retry, requests)


def test_a_download_that_fails_once_succeeds(server: HttpServer) -> None:
    server.faults = lambda number, path, wanted: "error" if number == 0 else None
    assert Fetcher(HERE).get(f"{server.url}/7") == b"7"


@pytest.mark.parametrize(
    ("value", "forbidden"),
    [
        ("noai", "noai"),
        ("noarchive, NoImageAI", "noimageai"),
        ("mmmoe-data: noindex", "noindex"),
        ("otherbot: noai", None),
        ("noarchive", None),
    ],
)
def test_a_server_that_forbids_training_is_respected_unless_the_user_disables_it(
    value: str, forbidden: str | None, server: HttpServer
) -> None:
    server.headers = {"X-Robots-Tag": value}
    if forbidden:
        with pytest.raises(FetchError, match=f"X-Robots-Tag: {forbidden}"):
            Fetcher(HERE).get(f"{server.url}/7")
    fetcher = Fetcher(FetchOptions(allow_private=True, ignore_robots=bool(forbidden)))
    assert fetcher.get(f"{server.url}/7") == b"7"


@pytest.mark.parametrize(
    ("resolved", "tried"),
    [
        (["127.0.0.1"], []),
        (["93.184.216.34", "10.0.0.1"], []),
        (["::ffff:127.0.0.1"], []),
        (["64:ff9b::a00:1"], []),  # 10.0.0.1 by NAT64
        (["169.254.169.254"], []),
        (["224.0.0.1"], []),
        (["93.184.216.34"], ["93.184.216.34"]),
    ],
)
def test_private_addresses_are_refused_before_they_are_connected_to(
    resolved: list[str], tried: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, places = [resolved, ["127.0.0.1"]], []  # the resolver's second answer is never asked for

    def resolve(host: str, port: int, **_: object) -> list[tuple[Any, ...]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in answers.pop(0)]

    def connect(place: tuple[str, int], timeout: float) -> socket.socket:
        places.append(place[0])
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket, "create_connection", connect)
    wanted = r"no connection" if tried else r"rebinds\.test is at the private address .*; --allow-private"
    with pytest.raises(FetchError, match=wanted):
        Fetcher(FetchOptions(retries=0)).get("http://rebinds.test/7")
    assert places == tried


def test_a_redirect_to_a_private_address_is_refused(server: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    port = server.server_address[1]
    monkeypatch.setattr(connections, "is_public", lambda address: address != "127.0.0.2")
    server.faults = lambda number, path, wanted: "redirect"
    server.elsewhere = f"http://127.0.0.2:{port}/7"
    with pytest.raises(FetchError, match=r"127\.0\.0\.2 is at the private address 127\.0\.0\.2"):
        Fetcher(FetchOptions()).get(f"{server.url}/7")
    assert len(server.requests) == 1


def test_urls_of_rows_read_no_variables_and_no_other_protocols(
    server: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "abc")
    with pytest.raises(FetchError, match="404"):
        Fetcher(HERE).get(f"{server.url}/$SECRET?${{SECRET}}")
    assert server.requests == [("/$SECRET?${SECRET}", "")]
    with pytest.raises(FetchError, match="not read by sftp"):
        Fetcher(HERE).get("sftp://host/a.png")


def test_requests_to_one_host_are_limited_and_overlap(server: HttpServer) -> None:
    lock, active, most = threading.Lock(), 0, 0

    def watch(number: int, path: str, wanted: str) -> None:
        nonlocal active, most
        with lock:
            active += 1
            most = max(most, active)
        time.sleep(0.02)
        with lock:
            active -= 1

    server.faults = watch
    fetcher = Fetcher(FetchOptions(allow_private=True, threads=16, per_host=9).of_one(processes=3))
    urls = [f"{server.url}/{number}" for number in range(20)]
    fetcher.want(urls)
    assert [fetcher.get(url) for url in urls] == [b"%d" % number for number in range(20)]
    assert most == 3  # 9 over 3 processes


def test_no_more_is_fetched_ahead_than_memory_is_allowed_for(
    server: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "MAX_HELD", 2)
    fetcher = Fetcher(FetchOptions(allow_private=True, threads=1))
    urls = [f"{server.url}/{number}" for number in range(20)]
    fetcher.want(urls)
    assert fetcher.get(urls[0]) == b"0"
    time.sleep(0.1)
    assert len(server.requests) == 2  # of a byte each
    assert fetcher.get(urls[19]) == b"19"  # what is needed now passes the limit
    for number, url in enumerate(urls):
        assert fetcher.get(url) == b"%d" % number
        fetcher.drop([url])
    assert len(server.requests) == 20


def test_a_connection_is_kept_for_the_files_of_its_host(server: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    connect, places = socket.create_connection, []
    monkeypatch.setattr(socket, "create_connection", lambda *given: (places.append(given[0]), connect(*given))[1])
    fetcher = Fetcher(FetchOptions(allow_private=True, threads=1))
    assert [fetcher.get(f"{server.url}/{number}") for number in range(3)] == [b"0", b"1", b"2"]
    assert places == [server.server_address]


def test_what_a_refused_answer_held_is_not_kept(server: HttpServer) -> None:
    server.headers = {"X-Robots-Tag": "noai"}
    fetcher, url = Fetcher(HERE), f"{server.url}/7"
    fetcher.want([url, url])
    with pytest.raises(FetchError, match="noai"):
        fetcher.get(url)
    error = fetcher._wanted[url].error
    assert error is not None
    assert error.__traceback__ is None  # its frames have the bytes


def test_of_large_files_one_is_fetched_at_a_time(server: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "LARGE", 1)
    monkeypatch.setattr(fetch, "MAX_MEMBER_BYTES", 2)
    (server.folder / "huge").write_bytes(b"abc")
    fetcher, most = Fetcher(FetchOptions(allow_private=True, threads=8)), 0

    def watch(number: int, path: str, wanted: str) -> None:
        nonlocal most
        most = max(most, sum(item.is_large for item in list(fetcher._active)))
        time.sleep(0.01)

    server.faults = watch
    urls = [f"{server.url}/{number}" for number in range(8, 16)]  # "8" and "9" are small
    fetcher.want(urls)
    deadline = time.monotonic() + 10
    while any(not fetcher._wanted[url].is_done for url in urls) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [fetcher.get(url) for url in urls] == [b"%d" % number for number in range(8, 16)]
    assert most == 1
    assert len(server.requests) == 8 + 6
    with pytest.raises(FetchError, match="huge has more than 2 bytes"):
        fetcher.get(f"{server.url}/huge")


@pytest.mark.parametrize(
    ("start", "times"),
    [(b"HTTP/1.1 200 OK\r\nA: ", 1), (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;", 1),
     (b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n", fetch.WHOLE)],
    ids=["header", "size of a chunk", "body"],
)  # fmt: skip
def test_a_server_that_sends_a_byte_now_and_then_is_given_up(start: bytes, times: int, server: HttpServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as trap:

        def drip() -> None:
            connection, _ = trap.accept()
            with connection, suppress(OSError):
                connection.sendall(start)
                while True:
                    time.sleep(0.01)
                    connection.sendall(b"a")

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        fetcher = Fetcher(FetchOptions(allow_private=True, threads=1, timeout=0.05, retries=0))
        began = time.monotonic()
        with pytest.raises(FetchError, match=r"timed out|in time") as found:
            fetcher.get(f"http://127.0.0.1:{trap.getsockname()[1]}/a.png")
        assert found.value.retry
        assert 0.04 < time.monotonic() - began < 0.05 * times + 3
        thread.join(5)  # its connection was closed
        assert not thread.is_alive()
        assert fetcher.get(f"{server.url}/7") == b"7"


def test_files_of_the_next_tasks_are_fetched_while_one_is_encoded(server: HttpServer, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(JPEG)
    with Spool(tmp_path / "rows") as spool:
        for number in range(3):
            spool.add(Found("row", Row(key=str(number), image=f"{server.url}/a.jpg?{number}")))
        spool.close()
        first, *others = spool.offsets("train", "input").tolist()
        outcomes = encode_at(Task([first], others), spool.path, tmp_path, MediaOptions(), HERE, Filters())
        for _ in range(100):
            if len(server.requests) == 3:
                break
            time.sleep(0.02)
        assert len(server.requests) == 3
        outcomes += encode_at(Task(others), spool.path, tmp_path, MediaOptions(), HERE, Filters())
    assert [outcome.record["status"] for outcome in outcomes] == ["ok"] * 3
    assert len(server.requests) == 3


def test_every_robots_tag_of_an_answer_is_read() -> None:
    headers = http.client.HTTPMessage()
    headers["X-Robots-Tag"] = "noarchive"
    headers["X-Robots-Tag"] = "noai"
    assert forbidden_by(headers) == "noai"


def test_downloads_that_failed_are_told_and_fetched_by_a_run_with_retry(server: HttpServer, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(JPEG)
    rows = [Row(key=key, image=f"{server.url}/image?{key}") for key in ("a", "b")]
    write_manifest(tmp_path / "in/manifest.jsonl", rows)
    options = ShardOptions(workers=1, max_bad_fraction=0.5, fetch=HERE)
    server.faults = lambda number, path, wanted: "error" if number > 0 else None  # all but the first request
    first = write_shards(open_input(tmp_path / "in"), tmp_path / "out", options)
    assert (first.sums["train"].passing, first.skipped[0].url.partition("?")[0]) == (1, f"{server.url}/image")
    skipped = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    assert [(line["reason"], line["retry"]) for line in skipped] == [("http 503", True)]
    server.faults = lambda number, path, wanted: None
    report = write_shards(open_input(tmp_path / "in"), tmp_path / "out", options, Choice(retry=True))
    assert (report.sums["train"].samples, report.tried, report.added) == (2, 1, 1)
    assert not (tmp_path / "out/skipped.jsonl").read_text()
