"""The index of a source: made once, completed when shards come, made again when it is damaged."""

from __future__ import annotations

import errno
import multiprocessing
import os
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from mmmoe_pretrain.data.sources import indexing
from mmmoe_pretrain.data.sources.index import DamagedIndex, Index, Rows, Writer
from mmmoe_pretrain.data.sources.listing import without_ranges
from mmmoe_pretrain.data.sources.source import NoShards, open_indexed
from mmmoe_pretrain.data.storage.files import CacheSettings, Files, ReadSettings
from tests.data.servers import every, http_server
from tests.support import write_tar


def write(folder: Path, *names: str) -> list[Path]:
    return [
        write_tar(
            folder / f"{name}.tar", [(f"{name}{i}.{ext}", b"x" * i) for i in range(3) for ext in ("png", "txt")]
        )
        for name in names
    ]


def keys(source: object) -> list[str]:
    return [source.read(i).key for i in range(len(source))]


@pytest.fixture
def walked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the shards whose headers are read."""
    found: list[str] = []

    def read_rows(url: str, settings: object = None, inner=indexing.read_rows) -> object:
        found.append(Path(url).stem)
        return inner(url, settings)

    monkeypatch.setattr(indexing, "read_rows", read_rows)
    return found


def test_only_new_and_replaced_shards_are_read_again(tmp_path: Path, walked: list[str]) -> None:
    write(tmp_path, "b", "d")
    assert keys(open_indexed(tmp_path)) == keys(open_indexed(tmp_path)) == ["b0", "b1", "b2", "d0", "d1", "d2"]
    assert walked == ["b", "d"]
    write(tmp_path, "a", "c")
    assert keys(open_indexed(tmp_path))[::3] == ["a0", "b0", "c0", "d0"]
    assert walked == ["b", "d", "a", "c"]
    (tmp_path / "b.tar").unlink()
    assert keys(open_indexed(tmp_path))[::3] == ["a0", "c0", "d0"]
    os.utime(tmp_path / "c.tar", (1, 1))  # of the same size, so perhaps another
    assert len(open_indexed(tmp_path)) == 9
    assert walked == ["b", "d", "a", "c", "c"]


def test_a_shard_of_another_size_is_an_error_that_names_the_index(tmp_path: Path) -> None:
    path = write(tmp_path, "x")[0]
    open_indexed(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"x\.tar has 10239 bytes, but its index says 10240: .* or remove .*\.index"):
        open_indexed(tmp_path)
    (tmp_path / "shards.json").write_text('{"shardlist": [{"url": "x.tar", "filesize": 99}]}')
    with pytest.raises(ValueError, match=r"x\.tar has 10239 bytes, but shards\.json says 99"):
        open_indexed(tmp_path)


@pytest.mark.parametrize("at", [0, 9, 60, 100, 120, 250, -20, -60, -100])
@pytest.mark.parametrize("change", ["flip", "cut"])
def test_a_damaged_index_is_made_again_with_a_note(
    tmp_path: Path, at: int, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, "x", "y")
    before = keys(open_indexed(tmp_path))
    path = tmp_path / "shards.index"
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data if change == "flip" else data[:at])
    assert keys(open_indexed(tmp_path)) == before
    assert "shards.index" in caplog.text and "it is made again" in caplog.text
    Index(path).check()


def rows(**changes: object) -> Rows:
    """Two samples of two members in a shard of 4,096 bytes."""
    values = {
        "keys": b"ab", "key_end": np.asarray([1, 2]), "kinds": (("png", "txt"),), "kind": np.asarray([0, 0]),
        "offset": np.asarray([512, 1536, 2560, 3584]), "size": np.asarray([9, 9, 9, 9]), **changes,
    }  # fmt: skip
    return Rows(**values)


@pytest.mark.parametrize("changes", [
    {"offset": np.asarray([512, 1536, 2560, 4090])}, {"size": np.asarray([9, 9, 9, 5000])},
    {"key_end": np.asarray([1, 30])}, {"key_end": np.asarray([2, 1])}, {"key_end": np.asarray([0, 2])},
    {"offset": np.asarray([512, 1536, 2560])},
])  # fmt: skip
def test_an_index_written_to_deceive_is_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    """Its digests are right, and its rows would read outside of the shard or of the file."""
    for name, made in (("good", rows()), ("bad", rows(**changes))):
        with Writer(tmp_path / name) as writer:
            writer.add("x.tar", "", 4096, made)
    Index(tmp_path / "good").check()
    with pytest.raises(DamagedIndex, match=r"bad has .*; remove it"):
        Index(tmp_path / "bad").check()


def test_many_shards_keep_little_of_the_index_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmmoe_pretrain.data.sources.index.RESIDENT_BYTES", 300)
    with Writer(tmp_path / "i") as writer:
        for shard in range(8):
            writer.add(f"{shard}", "", 4096, rows(keys=b"ab" if shard % 2 else b"cd"))
    index = Index(tmp_path / "i")
    for _ in range(2):
        assert [index.key(i) for i in range(16)] == ["c", "d", "a", "b"] * 4
        assert index._resident <= 300 and len(index._blocks) < 4
    assert index.places(5) == (2, 0, [(2560, 9), (3584, 9)])
    assert [part.tolist() for part in index.with_kind(0, 4)] == [[0], [4], [8], [14]]


def test_an_open_index_stays_readable_while_a_new_one_takes_its_place(tmp_path: Path) -> None:
    write(tmp_path, "b")
    before = open_indexed(tmp_path)
    changed = before.index_path.stat().st_mtime_ns
    open_indexed(tmp_path, ask="all")
    assert before.index_path.stat().st_mtime_ns == changed, "an equal one is not written again"
    write(tmp_path, "a")
    assert len(open_indexed(tmp_path)) == 6
    assert keys(before) == ["b0", "b1", "b2"]


def _open(folder: str, queue: multiprocessing.Queue) -> None:
    queue.put(keys(open_indexed(folder)))


def test_one_process_indexes_while_the_others_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "x")
    context = multiprocessing.get_context("fork")
    queue, counted = context.Queue(), context.Value("i", 0)

    def slow(url: str, settings: object = None, inner=indexing.read_rows) -> object:
        counted.value += 1
        time.sleep(0.3)
        return inner(url, settings)

    monkeypatch.setattr(indexing, "read_rows", slow)
    processes = [context.Process(target=_open, args=(str(tmp_path), queue)) for _ in range(3)]
    for process in processes:
        process.start()
    assert [queue.get(timeout=30) for _ in processes] == [["x0", "x1", "x2"]] * 3
    for process in processes:
        process.join(30)
    assert counted.value == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shards.index", "x.tar"]


def test_a_process_that_stands_still_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexing, "STALL_SECONDS", 0.1)
    write(tmp_path, "x")
    with (
        indexing.alone(tmp_path / "shards.index", "indexes it"),
        pytest.raises(ValueError, match=r"another process indexes .* has finished no shard .*; end it"),
    ):
        open_indexed(tmp_path)


def test_a_lock_that_its_holder_removes_at_that_moment_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, fstat, calls = tmp_path / ".i.lock", os.fstat, []

    def removed_meanwhile(descriptor: int) -> os.stat_result:
        if not calls:
            path.unlink()
        calls.append(descriptor)
        return fstat(descriptor)

    monkeypatch.setattr(os, "fstat", removed_meanwhile)
    with indexing.alone(tmp_path / "i", "indexes it"):
        assert len(calls) == 2


@pytest.mark.parametrize("locks", [True, False])
def test_drafts_of_killed_processes_are_removed_where_nobody_else_can_be_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: bool
) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    if not locks:
        monkeypatch.setattr("fcntl.flock", no_locks)
    write(tmp_path, "x")
    drafts = [tmp_path / "shards.index.other-machine-7.tmp", tmp_path / "shards.index.here-8.tmp"]
    others = [tmp_path / "other.index.here-8.tmp", tmp_path / "shards.index-1a2b.field.npz"]
    for path in drafts + others:
        path.write_bytes(b"half")
    open_indexed(tmp_path)
    assert [path.exists() for path in drafts + others] == [not locks, not locks, True, True]


def test_the_disk_is_asked_about_many_shards_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, *"abcdefgh")
    open_indexed(tmp_path)
    together, stat = threading.Barrier(8, timeout=10), Files.stat

    def waiting(files: Files, url: str) -> object:
        together.wait()
        return stat(files, url)

    monkeypatch.setattr(Files, "stat", waiting)
    assert len(open_indexed(tmp_path)) == 24


def test_a_user_without_a_home_has_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MMMOE_CACHE", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert indexing.cache_folder() == Path(tempfile.gettempdir()) / f"mmmoe-{os.getuid()}"


def test_remote_shards_are_indexed_once_and_their_versions_hold(tmp_path: Path) -> None:
    path = write(tmp_path / "d", "x", "y")[0]
    with http_server(tmp_path) as server:
        url = server.url.replace("//", "//user:sesame@") + "/d"
        for requests in (True, False):
            server.requests.clear()
            source = open_indexed(url, Files())
            assert any(".tar" in path for path, _ in server.requests) == requests
        assert [source.read(i).members for i in range(6)] == [
            open_indexed(tmp_path / "d").read(i).members for i in range(6)
        ]
        assert "sesame" not in f"{source.read(0).shard} {source.index_path}"
        assert b"sesame" not in source.index_path.read_bytes()
        os.utime(path, (1, 1))
        with pytest.raises(
            ValueError, match=r"x\.tar was changed while it was read: its time or ETag is another"
        ) as error:
            open_indexed(url, Files()).read(0)
        assert "sesame" not in str(error.value)
        write(tmp_path / "d", "z")
        server.requests.clear()
        assert len(open_indexed(url, Files())) == 9
        assert {path for path, _ in server.requests} == {"/d/", "/d/z.tar"}, "only the new shard is read"
        assert open_indexed(url, Files(), ask="all").read(0).key == "x0", "as mmmoe-data index does"
        assert open_indexed(url, Files()).read(0).key == "x0"
        with pytest.raises(NoShards, match="absent"):
            open_indexed(f"{server.url}/absent.tar", Files())


def test_an_index_that_was_uploaded_with_its_shards_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "d", "x", "y")[0]
    local = open_indexed(tmp_path / "d")
    with http_server(tmp_path) as server:
        for number in range(2):  # two machines
            monkeypatch.setenv("MMMOE_CACHE", str(tmp_path / f"cache{number}"))
            server.requests.clear()
            source = open_indexed(f"{server.url}/d", Files())
            assert not any(".tar" in path for path, _ in server.requests)
            assert [source.read(i).members for i in range(6)] == [local.read(i).members for i in range(6)]
        path.write_bytes(path.read_bytes() + bytes(512))
        with pytest.raises(ValueError, match=r"x\.tar has 10752 bytes, but its index says 10240"):
            open_indexed(f"{server.url}/d", Files()).read(0)


def test_a_server_without_ranges_is_indexed_in_order_and_its_cost_is_said_once(tmp_path: Path) -> None:
    write(tmp_path / "d", "x", "y")
    with http_server(tmp_path) as server:
        shards = [f"{server.url}/d/{name}.tar" for name in "xy"]
        assert without_ranges(shards, Files()) == []
        server.faults = every(1, "ignore_range")
        server.requests.clear()
        source = open_indexed("::".join(shards), Files())
        bodies = [wanted for _, wanted in server.requests if wanted != "bytes=0-0"]
        assert bodies == ["", ""], "all headers of a shard in one answer"
        assert keys(source) == ["x0", "x1", "x2", "y0", "y1", "y2"]
        [note] = without_ranges(shards, Files())
        assert note.startswith(f"{server.url} does not answer range requests: each sample that is read transfers ")
        assert "data.cache" in note and "pipe:curl" in note
        cached = Files(ReadSettings(cache=CacheSettings(str(tmp_path / "cache"), 10**7, 1 << 20)))
        assert without_ranges(shards, cached) == []
        source = open_indexed("::".join(shards), cached)
        server.requests.clear()
        assert keys(source) == keys(source) == ["x0", "x1", "x2", "y0", "y1", "y2"]
        assert len(server.requests) == 2, "the cache is a remedy: a shard is transferred once"


def test_shards_in_a_folder_that_cannot_be_written_are_indexed_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, walked: list[str]
) -> None:
    write(tmp_path / "data", "x")
    monkeypatch.setenv("MMMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(indexing, "_can_write", lambda folder: folder != tmp_path / "data")
    for _ in range(2):
        assert keys(open_indexed(tmp_path / "data")) == ["x0", "x1", "x2"]
    assert walked == ["x"]
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["x.tar"]


def test_an_old_index_beside_shards_that_cannot_be_written_is_passed_over_without_a_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMMOE_CACHE", str(tmp_path / "cache"))
    (shard,) = write(tmp_path / "data", "a")
    open_indexed(tmp_path / "data")
    os.utime(shard)  # as by a copy of the folder
    monkeypatch.setattr(indexing, "_can_write", lambda folder: folder != tmp_path / "data")
    looked_at = open_indexed(tmp_path / "data")
    opened = open_indexed(tmp_path / "data", listing=looked_at.listing, ask="none")
    assert opened.index_path == looked_at.index_path != tmp_path / "data" / indexing.NAME
    assert opened.read(0).key == looked_at.key(0)


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Writer) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Writer, "_finish", full)
    write(tmp_path, "x")
    with pytest.raises(ValueError, match=r"shards\.index cannot be written: No space left .* set MMMOE_CACHE"):
        open_indexed(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]
