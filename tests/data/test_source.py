"""Samples are read by number from shards as people make them, and a damaged shard is refused by name."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mmmoe_pretrain.batch import Sample, SampleMeta
from mmmoe_pretrain.data.decode import class_of
from mmmoe_pretrain.data.pack import _group_ids
from mmmoe_pretrain.data.sources.members import split_name
from mmmoe_pretrain.data.sources.rows import read_rows
from mmmoe_pretrain.data.sources.source import Indexed, open_indexed
from mmmoe_pretrain.modalities import build_modalities, default_modalities
from tests.support import tiny_config, tiny_values, write_tar

TWO = [("a.png", b"PNG"), ("a.txt", b"red"), ("b.flac", b"F" * 700), ("b.json", b"{}"), ("b.cls", b"7")]


def test_samples_are_read_by_number(tmp_path: Path) -> None:
    write_tar(tmp_path / "00000.tar", TWO)
    write_tar(tmp_path / "00001.tar", [("c.txt", b"")])
    for _ in ("by the headers", "by the index"):
        source = open_indexed(tmp_path)
        assert [source.key(i) for i in range(len(source))] == ["a", "b", "c"]
        assert source.shard_sizes.tolist() == [2, 1]
        assert source.read(2).members == {"txt": b""}
        assert source.read(0).members == {"png": b"PNG", "txt": b"red"}
        assert source.read(1).members == {"flac": b"F" * 700, "json": b"{}", "cls": b"7"}
        assert source.sizes_of(np.asarray([2, 1, 0, 1]), "audio").tolist() == [0, 700, 0, 700]
        assert source.sizes_of(np.asarray([2, 1, 0]), "text").tolist() == [0, 0, 3]


def test_folders_long_names_and_other_alphabets_are_part_of_the_key(tmp_path: Path) -> None:
    long = "ein-größerer-fisch-" + "x" * 150  # needs a PAX header
    write_tar(tmp_path / "x.tar", [("./one/a.PNG", b"1"), ("two/a.png", b"2"), (f"{long}.txt", b"fish")])
    folder = open_indexed(tmp_path)
    assert [folder.key(i) for i in range(3)] == ["one/a", "two/a", long]
    assert [folder.read(i).members for i in (0, 2)] == [{"png": b"1"}, {"txt": b"fish"}]


def test_foreign_tars_load_as_people_make_them(tmp_path: Path) -> None:
    names = ["._pile.v2", "__MACOSX/pile.v2/._a.JPEG", ".DS_Store", "pile.v2/._a.JPEG"]  # what macOS leaves
    members = [("pile.v2/a.JPEG", b"J"), ("pile.v2/a.caption.txt", b"red"), ("pile.v2/a.CLS", b"7\n")]
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT):
        with tarfile.open(tmp_path / "x.tar", "w", format=format) as tar:
            for name, content in [("./", b""), ("./pile.v2/", b""), *((name, b"junk") for name in names), *members]:
                info = tarfile.TarInfo(f"./{name}" if format == tarfile.GNU_FORMAT else name)
                info.size, info.type = len(content), tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
                info.mtime = 1.5  # pax needs a record for it
                tar.addfile(info, io.BytesIO(content))
        (tmp_path / "shards.index").unlink(missing_ok=True)
        [raw] = list(map(open_indexed(tmp_path).read, range(1)))
        assert (raw.key, raw.members) == ("pile.v2/a", {"jpeg": b"J", "caption.txt": b"red", "cls": b"7\n"})
        assert class_of(raw) == "7"


def test_only_the_alphabet_decides_and_is_refused_with_the_setting(tmp_path: Path) -> None:
    def opened(members: tuple[str, ...] = ()) -> Indexed:
        settings = tiny_values(tmp_path)["modalities"]
        settings["image"]["members"] = members
        config = tiny_config(tmp_path, modalities=settings)
        return open_indexed(tmp_path / "s", modalities=build_modalities(config.modalities, decoding=False))

    pair = [("a.png", b""), ("a.seg.png", b""), ("b.left.png", b"L"), ("b.right.png", b"R")]
    write_tar(tmp_path / "s/x.tar", pair)
    with pytest.raises(
        ValueError, match=r"'b' of .*x\.tar has left\.png, right\.png, .*modalities\.image\.members: \["
    ):
        opened()
    assert opened(("right.png",)).read(1).members == {"right.png": b"R"}
    assert opened(("png", "right.png", "left.png")).read(1).members == {"right.png": b"R"}, "the first that is there"
    (tmp_path / "s/shards.index").unlink()
    parts = b'{"parts": [{"member": "1.png"}, {"member": "0.png"}]}'  # a document names what is read
    write_tar(tmp_path / "s/x.tar", [("b.0.png", b"0"), ("b.1.png", b"1"), ("b.json", parts)])
    assert opened().read(0).members.keys() == {"0.png", "1.png", "json"}


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
    folder = open_indexed(tmp_path)
    assert folder.contents == {("right.png", "left.png", "cls"): 2, ("txt",): 1}
    assert folder.with_contents(("right.png", "left.png", "cls")).tolist() == [0, 1]
    raw = folder.read(1)
    assert (raw.members, raw.unread) == ({"left.png": b"left.png", "cls": b"cls"}, ("right.png",))


@pytest.mark.parametrize("names", [
    ["v1.0000.jpg", "v1.0000.txt", "v1.0001.jpg", "v1.0001.txt"], [f"photo.{letter}.jpg" for letter in "abcdefghi"],
])  # fmt: skip
def test_a_key_with_dots_is_named_with_the_remedy(tmp_path: Path, names: list[str]) -> None:
    write_tar(tmp_path / "x.tar", [("good.jpg", b""), *((name, b"") for name in names)])
    key = names[0].partition(".")[0]
    with pytest.raises(ValueError, match=rf"x\.tar .*the key '{key}', .*{names[0][len(key) + 1 :]}, .*without dots"):
        open_indexed(tmp_path)
    write_tar(tmp_path / "x.tar", [(name.replace(".", "_", 1), b"") for name in names])
    assert len(open_indexed(tmp_path)) == len({name.rpartition(".")[0] for name in names})


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "holds no sample"),
        (["a.txt", "b.txt", "a.png"], "holds key 'a' twice"),
        (["a.txt", "a.txt"], "holds key 'a' twice"),
        (["cat.0.jpg", "dog.0.jpg", "cat.1.jpg"],
         r"holds key 'cat' twice.*first dot of a name: write cat_1\.jpg for cat\.1\.jpg"),
    ],
)  # fmt: skip
def test_a_shard_without_samples_or_with_wrong_names_is_refused(
    tmp_path: Path, names: list[str], message: str
) -> None:
    write_tar(tmp_path / "x.tar", [(name, b"") for name in names])
    with pytest.raises(ValueError, match=rf"x\.tar .*{message}"):
        open_indexed(tmp_path)


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
    assert len(read_rows(str(path))[1]) == 3
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"x\.tar .*{message}"):
        open_indexed(tmp_path)


def test_equal_keys_in_two_shards_are_two_samples(tmp_path: Path) -> None:
    for shard in ("x", "y"):
        write_tar(tmp_path / f"{shard}.tar", [("same.txt", shard.encode())])
    folder = open_indexed(tmp_path)
    raws = [folder.read(i) for i in range(2)]
    assert [(raw.key, raw.members["txt"]) for raw in raws] == [("same", b"x"), ("same", b"y")]
    metas = [SampleMeta(raw.key, shard=raw.shard) for raw in (*raws, raws[0])]
    first, second, again = _group_ids([Sample(meta) for meta in metas]).tolist()
    assert first == again != second, "they are each other's negatives"
