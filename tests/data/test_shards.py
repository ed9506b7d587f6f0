"""Shards open by their index or by their headers, and a damaged one is refused by name."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from mmmoe_pretrain.batch import Sample, SampleMeta
from mmmoe_pretrain.data.members import split_name
from mmmoe_pretrain.data.pack import _group_ids
from mmmoe_pretrain.data.shards import OpenShards, ShardFolder, read_index
from mmmoe_pretrain.modalities import default_modalities
from tests.support import write_tar

TWO = [("a.png", b"PNG"), ("a.txt", b"red"), ("b.flac", b"F" * 700), ("b.json", b"{}"), ("b.cls", b"7")]


def sidecar(path: Path, **changes: object) -> None:
    """An index as mmmoe-data writes it, from tarfile's own offsets."""
    samples: dict[str, dict[str, list[int]]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            samples.setdefault(key, {})[extension] = [member.offset_data, member.size]
    index = {
        "version": 1,
        "bytes": path.stat().st_size,
        "samples": [{"key": key, "members": members} for key, members in samples.items()],
        **changes,
    }
    path.with_suffix(".index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("indexed", [True, False])
def test_samples_are_read_by_position(tmp_path: Path, indexed: bool) -> None:
    for name, members in (("00000.tar", TWO), ("00001.tar", [("c.txt", b"")])):
        path = write_tar(tmp_path / name, members)
        if indexed:
            sidecar(path)
    folder = ShardFolder(tmp_path)
    assert [folder.key(i) for i in range(len(folder))] == ["a", "b", "c"]
    assert folder.read(2).members == {"txt": b""}
    assert folder.read(0).members == {"png": b"PNG", "txt": b"red"}
    assert folder.read(1).members == {"flac": b"F" * 700, "json": b"{}"}  # the unknown .cls is ignored


def test_folders_long_names_and_other_alphabets_are_part_of_the_key(tmp_path: Path) -> None:
    long = "ein-größerer-fisch-" + "x" * 150  # needs a PAX header
    write_tar(tmp_path / "x.tar", [("./one/a.PNG", b"1"), ("two/a.png", b"2"), (f"{long}.txt", b"fish")])
    folder = ShardFolder(tmp_path)
    assert [folder.key(i) for i in range(3)] == ["one/a", "two/a", long]
    assert [folder.read(i).members for i in (0, 2)] == [{"png": b"1"}, {"txt": b"fish"}]


def test_the_listing_decides_which_shards_and_in_which_order(tmp_path: Path) -> None:
    for name in "abc":
        write_tar(tmp_path / f"{name}.tar", [(f"{name}.txt", b"")])
    listing = {"shardlist": [{"url": "c.tar"}, {"url": "a.tar"}]}
    (tmp_path / "shards.json").write_text(json.dumps(listing))
    folder = ShardFolder(tmp_path)
    assert [folder.key(i) for i in range(len(folder))] == ["c", "a"]


def test_many_shards_of_many_folders_take_few_descriptors(tmp_path: Path) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    before, files, folders = descriptors(), OpenShards(3), []
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(4):
            write_tar(tmp_path / name / f"{i}.tar", [(f"k{i}.txt", f"{name}{i}".encode())])
        folders.append(ShardFolder(tmp_path / name, files))
    for i in (0, 1, 2, 3, 0, 2):
        for name, folder in zip("ab", folders, strict=True):
            assert folder.read(i).members == {"txt": f"{name}{i}".encode()}
            assert descriptors() - before <= 3
    del folders, folder, files
    assert descriptors() == before


def test_the_pool_leaves_the_process_most_of_its_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    for soft, limit in ((1024, 256), (1 << 20, 256), (256, 64), (-1, 256)):
        monkeypatch.setattr("resource.getrlimit", lambda _, soft=soft: (soft, soft))
        assert OpenShards().limit == limit


@pytest.mark.parametrize(
    ("name", "key", "extension"),
    [
        ("a.png", "a", "png"),
        ("set.v1/a.left.PNG", "set.v1/a", "left.png"),
        ("v1.0000.jpg", "v1", "0000.jpg"),
        ("x/README", "x/README", ""),
    ],
)
def test_a_key_ends_at_the_first_dot_of_the_last_part(name: str, key: str, extension: str) -> None:
    assert split_name(name) == (key, extension)


@pytest.mark.parametrize(
    ("extensions", "read"),
    [
        ("png json cls", {"image": "png"}),
        ("left.png right.png txt", {"image": "left.png", "text": "txt"}),
        ("aseg.png jpg", {"image": "jpg"}),
        ("webp jpg", {"image": "jpg"}),
        ("opus caption.txt", {"audio": "opus", "text": "caption.txt"}),
        ("tif caption", {"image": "tif", "text": "caption"}),
        ("npy png.json", {}),
    ],
)
def test_one_member_a_modality_is_read_by_a_rule(extensions: str, read: dict[str, str]) -> None:
    modalities = default_modalities()
    assert modalities.members_read(tuple(extensions.split())) == read
    assert modalities.members_read(tuple(reversed(extensions.split()))) == read


def test_members_that_are_not_read_are_counted_and_not_fetched(tmp_path: Path) -> None:
    members = [(f"{key}.{name}", name.encode()) for key in "ab" for name in ("right.png", "left.png", "cls")]
    write_tar(tmp_path / "x.tar", [*members, ("c.txt", b"red")])
    folder = ShardFolder(tmp_path)
    assert folder.contents == {("right.png", "left.png", "cls"): 2, ("txt",): 1}
    assert folder.with_contents(("right.png", "left.png", "cls")).tolist() == [0, 1]
    raw = folder.read(1)
    assert (raw.members, raw.unread) == ({"left.png": b"left.png"}, ("right.png", "cls"))


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("names", [
    ["v1.0000.jpg", "v1.0000.txt", "v1.0001.jpg", "v1.0001.txt"], [f"photo.{letter}.jpg" for letter in "abcdefghi"],
])  # fmt: skip
def test_a_key_with_dots_is_named_with_the_remedy(tmp_path: Path, names: list[str], indexed: bool) -> None:
    path = write_tar(tmp_path / "x.tar", [("good.jpg", b""), *((name, b"") for name in names)])
    if indexed:
        sidecar(path)
    key = names[0].partition(".")[0]
    with pytest.raises(ValueError, match=rf"x\.tar .*the key '{key}', .*{names[0][len(key) + 1 :]}, .*without dots"):
        ShardFolder(tmp_path)
    write_tar(tmp_path / "x.tar", [(name.replace(".", "_", 1), b"") for name in names])
    (tmp_path / "x.index.json").unlink(missing_ok=True)
    assert len(ShardFolder(tmp_path)) == len({name.rpartition(".")[0] for name in names})


def test_an_absent_folder_and_one_without_shards_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no folder of shards at .*mmmoe-data shard"):
        ShardFolder(tmp_path / "absent")
    (tmp_path / "00000.tar.gz").touch()
    with pytest.raises(ValueError, match=r"holds no \*\.tar \(but 00000\.tar\.gz\)"):
        ShardFolder(tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "holds no sample"),
        (["a.txt", "b.txt", "a.png"], "holds key 'a' twice"),
        (["a.txt", "a.txt"], "holds key 'a' twice"),
        (["cat.0.jpg", "dog.0.jpg", "cat.1.jpg"],
         r"holds key 'cat' twice.*first dot of a name: write cat_1\.jpg for cat\.1\.jpg"),
        (["/etc/passwd"], "holds '/etc/passwd', a path that leaves its folder"),
        (["../a.txt"], "a path that leaves its folder"),
        (["a/../../b.txt"], "a path that leaves its folder"),
    ],
)  # fmt: skip
def test_a_shard_without_samples_or_with_wrong_names_is_refused(
    tmp_path: Path, names: list[str], message: str
) -> None:
    write_tar(tmp_path / "x.tar", [(name, b"") for name in names])
    with pytest.raises(ValueError, match=rf"x\.tar .*{message}"):
        ShardFolder(tmp_path)


# A member is a header of 512 bytes and its content in blocks of 512: 1024, 2048, 3584, ...
@pytest.mark.parametrize(
    ("change", "message"),
    [
        *((lambda data, size=size: data[:size], "again") for size in (0, 100, 512, 700, 1024, 2048, 2300, 3000)),
        (lambda data: gzip.compress(data + os.urandom(2000)), "is compressed by gzip.*unpack it"),
        (lambda data: bz2.compress(data + os.urandom(2000)), "is compressed by bzip2.*unpack it"),
        (lambda data: lzma.compress(data + os.urandom(2000)), "is compressed by xz.*unpack it"),
        # joined by cat: tarfile, too, ends after the first
        (lambda data: data + data, r"is not a whole tar file \(another tar after the end of this one"),
    ],
)
def test_a_truncated_compressed_or_joined_shard_is_refused(
    tmp_path: Path, change: Callable[[bytes], bytes], message: str
) -> None:
    path = write_tar(tmp_path / "x.tar", [("BZh.txt", b"red"), *TWO])  # begins like bzip2, and is none
    assert len(read_index(path)) == 3
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"x\.tar .*{message}"):
        read_index(path)


def test_the_index_and_the_listing_notice_a_truncated_shard(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", TWO)
    sidecar(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"x\.tar has 10239 bytes, but its index says 10240"):
        ShardFolder(tmp_path)
    (tmp_path / "shards.json").write_text(json.dumps({"shardlist": [{"url": "x.tar", "filesize": 99}]}))
    with pytest.raises(ValueError, match=r"x\.tar has 10239 bytes, but shards\.json says 99"):
        ShardFolder(tmp_path)


def test_a_shard_that_shrinks_during_the_run_ends_it(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", TWO)
    folder = ShardFolder(tmp_path)
    path.write_bytes(path.read_bytes()[:2600])
    with pytest.raises(ValueError, match="changed during the run"):
        folder.read(1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "has version 2, and 1 is read.*remove it"),
        ({"samples": [{"key": "a", "members": {"png": [0, 99999]}}]}, "puts sample 'a' outside of.*remove it"),
        ({"samples": [{"key": "a", "members": {"png": [-5, 2]}}]}, "puts sample 'a' outside of.*remove it"),
        ({"samples": [{"members": {}}]}, "is not a shard index.*remove it"),
        ({"samples": [{"key": "a", "members": {"png": [1]}}]}, "is not a shard index.*remove it"),
        ({"samples": 3}, "is not a shard index.*remove it"),
        ("{", "is not JSON.*remove it"),
        ("[]", "holds list.*remove it"),
        ({"samples": 2 * [{"key": "a", "members": {"png": [512, 3]}}]}, "holds key 'a' twice"),
    ],
)
def test_a_broken_index_is_refused_with_the_remedy(
    tmp_path: Path, changes: dict[str, object] | str, message: str
) -> None:
    path = write_tar(tmp_path / "x.tar", TWO)
    if isinstance(changes, str):
        (tmp_path / "x.index.json").write_text(changes)
    else:
        sidecar(path, **changes)
    with pytest.raises(ValueError, match=rf"x\.index\.json {message}"):
        read_index(path)


def test_equal_keys_in_two_shards_are_two_samples(tmp_path: Path) -> None:
    for shard in ("x", "y"):
        write_tar(tmp_path / f"{shard}.tar", [("same.txt", shard.encode())])
    folder = ShardFolder(tmp_path)
    raws = [folder.read(i) for i in range(2)]
    assert [(raw.key, raw.members["txt"]) for raw in raws] == [("same", b"x"), ("same", b"y")]
    metas = [SampleMeta(raw.key, shard=raw.shard) for raw in (*raws, raws[0])]
    first, second, again = _group_ids([Sample(meta) for meta in metas]).tolist()
    assert first == again != second, "they are each other's negatives"


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        info = tarfile.TarInfo("a.txt")
        info.type, info.linkname = kind, "b.txt"
        tar.addfile(info)
    with pytest.raises(ValueError, match="a link, a device"):
        ShardFolder(tmp_path)


@pytest.mark.parametrize("url", ["http://host/x.tar", "/x.tar", "../x.tar", ""])
def test_a_listing_that_leaves_the_folder_is_refused(tmp_path: Path, url: str) -> None:
    (tmp_path / "shards.json").write_text(json.dumps({"shardlist": [{"url": url}]}))
    with pytest.raises(ValueError, match="not a file under"):
        ShardFolder(tmp_path)
