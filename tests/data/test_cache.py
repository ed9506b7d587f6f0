"""The cache of a node: a block is fetched once, the bound holds, and no failure of the cache is one of the read."""

from __future__ import annotations

import errno
import fcntl
import logging
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmmoe_pretrain.data.storage.cache import BlockCache, CacheSettings
from mmmoe_pretrain.data.storage.files import Files, ReadSettings
from mmmoe_pretrain.data.storage.retry import Retries
from tests.data.servers import HttpServer, http_server

BLOCK = 10_000
CONTENT = random.Random(3).randbytes(20 * BLOCK)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[HttpServer]:
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "a.tar").write_bytes(CONTENT)
    with http_server(tmp_path / "served") as server:
        yield server


def cached(tmp_path: Path, most_bytes: int = 10**6) -> Files:
    return Files(
        ReadSettings(Retries(2, 5, 3, 0.001), cache=CacheSettings(str(tmp_path / "cache"), most_bytes, BLOCK))
    )


def blocks(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and len(path.name) == 32]


def read_everywhere(files: Files, url: str, seed: int) -> None:
    starts = random.Random(seed).sample(range(0, len(CONTENT) - 3000, 1500), 60)
    assert all(files.read(url, start, 3000) == CONTENT[start : start + 3000] for start in starts)


def requested(server: HttpServer) -> list[str]:
    return [wanted for _, wanted in server.requests if wanted != "bytes=0-0"]


def test_processes_of_a_node_fetch_each_block_once(tmp_path: Path, served: HttpServer) -> None:
    served.latency = 0.01
    files, url = cached(tmp_path), f"{served.url}/a.tar"
    workers = [
        multiprocessing.Process(target=read_everywhere, args=(files, url, seed), daemon=True) for seed in (1, 2)
    ]
    for worker in workers:
        worker.start()
    read_everywhere(files, url, 3)
    for worker in workers:
        worker.join(20)
        assert worker.exitcode == 0
    assert len(requested(served)) == len(set(requested(served))) == 20
    read_everywhere(cached(tmp_path), url, 4)  # another run
    assert len(requested(served)) == 20


def test_blocks_that_were_not_used_for_longest_make_room(tmp_path: Path, served: HttpServer) -> None:
    files, url, most = cached(tmp_path, 6 * (BLOCK + 16)), f"{served.url}/a.tar", 6 * (BLOCK + 16)
    for index in (0, 2, 4, 6, 8, 10, 12, 14):
        assert files.read(url, index * BLOCK, 10) == CONTENT[index * BLOCK : index * BLOCK + 10]
        assert sum(path.stat().st_size for path in blocks(tmp_path)) <= most
        for path in blocks(tmp_path):  # an hour passes
            os.utime(path, ns=(0, path.stat().st_mtime_ns - 3600 * 10**9))
        files.read(url, 0, 10)
    before = len(requested(served))
    assert before == 8  # block 0 was always in use
    files.read(url, 14 * BLOCK, 10)
    files.read(url, 2 * BLOCK, 10)
    assert len(requested(served)) == before + 1


@pytest.mark.parametrize("damage", ["a bit", "the end", "all"])
def test_a_damaged_block_is_fetched_again(damage: str, tmp_path: Path, served: HttpServer) -> None:
    url = f"{served.url}/a.tar"
    assert cached(tmp_path).read(url, 100, 50) == CONTENT[100:150]
    (path,) = blocks(tmp_path)
    data = path.read_bytes()
    path.write_bytes(
        {"a bit": data[:120] + bytes([data[120] ^ 1]) + data[121:], "the end": data[:-1], "all": b""}[damage]
    )
    for _ in range(2):
        assert cached(tmp_path).read(url, 100, 50) == CONTENT[100:150]
    assert len(requested(served)) == 2


def test_a_full_disk_is_told_once_and_reading_goes_on(
    tmp_path: Path, served: HttpServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(BlockCache, "_reserve", full)
    files = cached(tmp_path)
    with caplog.at_level(logging.WARNING):
        read_everywhere(files, f"{served.url}/a.tar", 1)
    (line,) = caplog.messages
    assert "No space left on device" in line and "data.cache.size_gb" in line and str(tmp_path / "cache") in line
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.parent.name == "drafts"]


def test_a_folder_that_cannot_be_made_is_told_once(served: HttpServer, caplog: pytest.LogCaptureFixture) -> None:
    files = cached(Path("/proc/none"))  # where mkdir says that there is no such folder
    with caplog.at_level(logging.WARNING):
        assert files.read(f"{served.url}/a.tar", 0, 10) == CONTENT[:10]
    assert ["the cache in /proc/none/cache is not used" in line for line in caplog.messages] == [True]


def test_a_cache_that_is_removed_while_a_block_is_written_is_made_anew(
    tmp_path: Path, served: HttpServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    files, url, reserve = cached(tmp_path), f"{served.url}/a.tar", BlockCache._reserve

    def remove(cache: BlockCache, size: int) -> None:
        reserve(cache, size)
        shutil.rmtree(cache.folder)

    with monkeypatch.context() as patched:
        patched.setattr(BlockCache, "_reserve", remove)
        assert files.read(url, 0, 10) == CONTENT[:10]
    assert not blocks(tmp_path)
    assert files.read(url, 0, 10) == CONTENT[:10]
    assert len(blocks(tmp_path)) == 1
    assert not caplog.messages


def hold(folder: Path, ready: str) -> None:
    descriptors = [os.open(folder / "locks" / f"{i:02x}", os.O_RDWR | os.O_CREAT) for i in range(256)]
    for descriptor in [*descriptors, os.open(folder / "lock", os.O_RDWR | os.O_CREAT)]:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    Path(ready).touch()
    time.sleep(60)


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "stopped"])
def test_a_process_that_ends_or_stops_with_every_lock_blocks_nobody(
    killed: bool, tmp_path: Path, served: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmmoe_pretrain.data.storage.cache.TOTAL_SECONDS", 0.2)
    folder = tmp_path / "cache" / "blocks-v1"
    (folder / "locks").mkdir(parents=True)
    holder = multiprocessing.Process(target=hold, args=(folder, str(tmp_path / "ready")), daemon=True)
    holder.start()
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    try:
        os.kill(holder.pid or 0, signal.SIGKILL if killed else signal.SIGSTOP)
        settings = ReadSettings(Retries(0.5, 2), cache=CacheSettings(str(tmp_path / "cache"), 10**6, BLOCK))
        began = time.monotonic()
        assert Files(settings).read(f"{served.url}/a.tar", 5, 5) == CONTENT[5:10]
        assert time.monotonic() - began < 30  # of the 60 for which the locks are held
        assert len(blocks(tmp_path)) == 1
    finally:
        holder.kill()
        holder.join(5)


def test_a_replaced_file_is_not_read_from_the_blocks_of_the_old_one(tmp_path: Path, served: HttpServer) -> None:
    path, url = served.folder / "a.tar", f"{served.url}/a.tar"
    assert cached(tmp_path).read(url, 0, 5) == CONTENT[:5]
    path.write_bytes(CONTENT[::-1])
    os.utime(path, ns=(1, 1))
    assert cached(tmp_path).read(url, 0, 5) == CONTENT[::-1][:5]
