"""Files at URLs of rows, from a server on this machine."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from data_prep.quality.filters import Filters
from data_prep.rows.inputs import open_input
from data_prep.rows.manifest import write_manifest
from data_prep.rows.row import Found, Row
from data_prep.rows.spool import Spool
from data_prep.shards import fetch
from data_prep.shards.encode import BadSample, EncodedSample, Encoder, Task, encode_at
from data_prep.shards.fetch import Fetcher, FetchError, FetchOptions, forbidden_by
from data_prep.shards.media import MediaOptions
from data_prep.shards.shard import Choice, write_shards
from data_prep.shards.writing import ShardOptions
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


def test_private_addresses_are_refused_before_a_request_is_sent(server: HttpServer) -> None:
    for host in ("127.0.0.1", "localhost"):
        with pytest.raises(FetchError, match=r"private address 127\.0\.0\.1; --allow-private"):
            Fetcher(FetchOptions()).get(server.url.replace("127.0.0.1", host) + "/7")
    assert not server.requests


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


def test_a_server_that_sends_headers_for_ever_takes_no_thread_for_ever(server: HttpServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as trap:
        ended = threading.Event()

        def drip() -> None:
            connection, _ = trap.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 200 OK\r\nA: ")
                while not ended.wait(0.02):
                    connection.sendall(b"a")

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        fetcher = Fetcher(FetchOptions(allow_private=True, threads=1, timeout=0.05))
        try:
            with pytest.raises(FetchError, match=r"timed out after 0\.65 s") as found:
                fetcher.get(f"http://127.0.0.1:{trap.getsockname()[1]}/a.png")
            assert found.value.retry
            assert fetcher.get(f"{server.url}/7") == b"7"
        finally:
            ended.set()
            thread.join(5)


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
    write_shards(open_input(tmp_path / "in"), tmp_path / "out", options)
    skipped = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    assert [(line["reason"], line["retry"]) for line in skipped] == [("http 503", True)]
    server.faults = lambda number, path, wanted: None
    report = write_shards(open_input(tmp_path / "in"), tmp_path / "out", options, Choice(retry=True))
    assert report.sums["train"].samples == 2
    assert not (tmp_path / "out/skipped.jsonl").read_text()
