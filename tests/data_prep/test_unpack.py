"""Both ways to unpack: by the extraction filter, and by hand where Python has none (3.11.2)."""

from __future__ import annotations

import io
import stat
import tarfile
from pathlib import Path

import pytest

from data_prep.unpack import unpack_tar


@pytest.fixture(params=["filter", "by hand"], autouse=True)
def way(request, monkeypatch) -> str:
    if request.param == "by hand":
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    elif not hasattr(tarfile, "data_filter"):
        pytest.skip("this Python has no extraction filters")
    return request.param


def unpack(target: Path, *members: tuple[str, bytes, int, str]) -> None:
    """Pack (name, type, mode, link) and unpack into ``target``."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, kind, mode, link in members:
            info = tarfile.TarInfo(name)
            info.type, info.mode, info.linkname, info.uid = kind, mode, link, 12345
            info.size = 2 if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(b"hi"))
    buffer.seek(0)
    with tarfile.open(fileobj=buffer) as tar:
        unpack_tar(tar, target)


def test_files_and_folders_arrive_and_are_ours(tmp_path: Path):
    unpack(
        tmp_path,
        ("a", tarfile.DIRTYPE, 0o755, ""),
        ("a/b.txt", tarfile.REGTYPE, 0o6666, ""),
        ("a/run", tarfile.REGTYPE, 0o755, ""),
    )
    assert (tmp_path / "a/b.txt").read_bytes() == b"hi"
    assert (tmp_path / "a/b.txt").stat().st_uid == tmp_path.stat().st_uid
    assert stat.S_IMODE((tmp_path / "a/b.txt").stat().st_mode) == 0o644
    assert stat.S_IMODE((tmp_path / "a/run").stat().st_mode) == 0o755


@pytest.mark.parametrize(
    ("name", "kind", "link"),
    [
        ("../evil", tarfile.REGTYPE, ""),
        ("a/../../evil", tarfile.REGTYPE, ""),
        ("evil", tarfile.SYMTYPE, "/etc/passwd"),
        ("evil", tarfile.SYMTYPE, "../outside"),
        ("evil", tarfile.LNKTYPE, "../outside"),
        ("evil", tarfile.CHRTYPE, ""),
        ("evil", tarfile.FIFOTYPE, ""),
    ],
)
def test_a_member_that_reaches_outside_is_refused_by_name(tmp_path: Path, name: str, kind: bytes, link: str):
    target = tmp_path / "in" / "target"
    target.mkdir(parents=True)
    with pytest.raises(ValueError, match="evil"):
        unpack(target, (name, kind, 0o644, link))
    assert not [path for path in tmp_path.rglob("*") if path.name == "evil"]


def test_an_absolute_name_never_leaves_the_folder(tmp_path: Path, way: str):
    target, outside = tmp_path / "target", tmp_path / "outside"
    target.mkdir()
    member = (str(outside), tarfile.REGTYPE, 0o644, "")
    if way == "by hand":
        with pytest.raises(ValueError, match="outside"):
            unpack(target, member)
    else:  # the filter takes off the leading slash
        unpack(target, member)
    assert not outside.exists()
