"""Files: exact bytes from anywhere, one clear error for everything else."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mmmoe_pretrain.data.storage import local
from mmmoe_pretrain.data.storage.files import Files, MissingError, StorageError

CONTENT = bytes(range(256)) * 40


def test_a_local_file_is_read_by_range_by_stream_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(CONTENT)
    (tmp_path / "folder").mkdir()
    for url in (str(path), f"file://{path}"):
        files = Files()
        assert files.read(url, 300, 500) == CONTENT[300:800]
        assert files.read(url, len(CONTENT), 0) == b""
        assert files.stream(url, 77).read() == CONTENT[77:]
        assert files.read_all(url, len(CONTENT)) == CONTENT
        assert files.stat(url).size == len(CONTENT)
    assert Files().list(str(tmp_path)) == ["a.tar", "folder/"]


def test_many_files_take_few_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "MAX_OPEN", 3)

    def descriptors() -> int:
        opened = (os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd"))
        return sum(path.startswith(str(tmp_path)) for path in opened)

    files = Files()
    for i in range(6):
        (tmp_path / f"{i}").write_bytes(b"%d" % i)
    for i in (0, 1, 2, 3, 4, 5, 0, 2):
        assert files.read(str(tmp_path / f"{i}"), 0, 1) == b"%d" % i
        assert 0 < descriptors() <= 3
    files.close()
    assert descriptors() == 0


def test_threads_share_few_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "MAX_OPEN", 1)
    files = Files()
    for i in range(5):
        (tmp_path / f"{i}").write_bytes(b"%d" % i * 100)

    def read(seed: int) -> bool:
        order = [(seed + 3 * k) % 5 for k in range(300)]
        return all(files.read(str(tmp_path / f"{i}"), 7, 50) == b"%d" % i * 50 for i in order)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(4)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "cannot read .*missing: it does not exist; copy it there"),
        ("a/below", "cannot read .*below: a file is where a folder must be"),
        ("folder", "cannot read .*folder: it is a folder, not a file"),
        ("fifo", "cannot read .*fifo: it is not a plain file"),
        ("a", r"cannot read bytes 0 to 4 of .*a, which has 3: it is truncated"),
        ("loop", "cannot read .*loop: its symbolic links form a loop"),
    ],
)
def test_what_is_no_whole_file_is_one_clear_line(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(StorageError, match=message) as caught:
        Files().read(str(tmp_path / name), 0, 4)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, MissingError) == (name in ("missing", "a/below"))


def test_a_file_that_changes_during_a_run_is_never_read_as_the_old_one(tmp_path: Path) -> None:
    path, files = tmp_path / "a", Files()
    path.write_bytes(b"0123456789")
    assert files.read(str(path), 0, 2) == b"01"
    os.truncate(path, 5)
    with pytest.raises(StorageError, match="a was changed while it was read: it has 5 bytes now, and had 10"):
        files.read(str(path), 4, 4)
    path.write_bytes(b"abcdefghij")  # in place: the descriptor stays open
    os.utime(path, ns=(1, 1))
    with pytest.raises(StorageError, match=r"a was changed while it was read: its time or ETag is another"):
        files.read(str(path), 4, 4)
