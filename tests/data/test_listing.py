"""What a path in a config may name."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from mmmoe_pretrain.data.sources.listing import is_absent, list_shards
from mmmoe_pretrain.data.sources.source import open_indexed
from mmmoe_pretrain.data.sources.stream import open_stream
from mmmoe_pretrain.data.storage.files import Files
from mmmoe_pretrain.modalities import default_modalities
from tests.support import write_tar


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Folders ``d`` and ``e`` of shards."""
    for name in ("d/0", "d/1", "d/2", "e/0"):
        write_tar(tmp_path / f"{name}.tar", [(f"{name.replace('/', '')}.txt", b"")])
    return tmp_path


def keys(spec: str) -> list[str]:
    source = open_indexed(spec)
    return [source.key(i) for i in range(len(source))]


def energon(folder: Path, split: object, counts: dict[str, int]) -> None:
    (folder / ".nv-meta").mkdir()
    (folder / ".nv-meta/.info.json").write_text(json.dumps({"shard_counts": counts}))
    (folder / ".nv-meta/split.yaml").write_text(json.dumps(split))  # JSON is YAML
    (folder / ".nv-meta/dataset.py").write_text("raise SystemExit('it was imported')")


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("{}/d", "d0 d1 d2"),
        ("file://{}/d/", "d0 d1 d2"),
        ("{}/d/1.tar", "d1"),
        ("{}/d/{{2..0}}.tar", "d2 d1 d0"),
        ("{}/{{e,d}}/0.tar", "e0 d0"),
        ("{}/e::{}/d/2.tar", "e0 d2"),
        ("{}/list.json", "e0 d1"),
        ("{}/d#held", "d1 d0"),
    ],
)
def test_a_spec_names_shards_in_order(data: Path, spec: str, expected: str) -> None:
    (data / "list.json").write_text(json.dumps({"shardlist": [{"url": "e/0.tar"}, {"url": "d/1.tar"}]}))
    if "#" in spec:
        energon(data / "d", {"split_parts": {"train": ["{0..2}.tar"], "held": ["1.tar", "0.tar"]}},
                {"0.tar": 1, "1.tar": 1, "2.tar": 1})  # fmt: skip
    spec = spec.format(*[data] * spec.count("{}"))
    assert not is_absent(spec)
    assert keys(spec) == expected.split()
    assert keys(spec) == expected.split(), "by its index"


def test_a_list_decides_and_what_it_leaves_out_is_counted(data: Path) -> None:
    (data / "d/shards.json").write_text(json.dumps({"shardlist": [{"url": "2.tar"}, {"url": "0.tar"}]}))
    (data / "d/3.tar.gz").touch()
    assert keys(str(data / "d")) == ["d2", "d0"]
    assert list_shards(str(data / "d"), Files()).left_out == {
        f"*{ending} not named in {data}/d/shards.json": 1 for ending in (".tar", ".tar.gz")
    }


def test_energon_metadata_is_read_as_data_and_its_train_split_by_default(data: Path) -> None:
    split = {"split_parts": {"train": ["{0..2}.tar"], "val": []}, "exclude": ["1.tar"]}
    energon(data / "d", split, {"0.tar": 1, "1.tar": 1, "2.tar": 1})
    assert keys(str(data / "d")) == ["d0", "d2"]
    with pytest.raises(ValueError, match=r"no shards in split 'val'; its splits are train: name one as .*/d#NAME"):
        keys(f"{data}/d#val")
    (data / "d/.nv-meta/split.yaml").write_text(json.dumps({**split, "exclude": ["1.tar/000"]}))
    with pytest.raises(ValueError, match=r"excludes '1\.tar/000', which is no shard"):
        keys(str(data / "d"))


@pytest.mark.parametrize("url", [
    "/x.tar", "../x.tar", "", "file:///etc/passwd", "pipe:cat x.tar", "pipe:cat /x.tar |", "s3://b/x.tar::pipe:x",
    "simplecache::s3://b/x.tar", 3,
])  # fmt: skip
def test_a_list_names_files_below_it_or_urls_and_never_commands(data: Path, url: object) -> None:
    (data / "d/shards.json").write_text(json.dumps({"shardlist": [{"url": url}]}))
    with pytest.raises(ValueError, match=r"shards\.json names .*not a file under .*nor a URL"):
        list_shards(str(data / "d"), Files())


def test_a_list_may_name_urls_and_lie_at_one(data: Path) -> None:
    urls = ["https://host/x.tar?token=secret", "s3://bucket/y.tar"]
    (data / "d/shards.json").write_text(json.dumps({"shardlist": [{"url": url} for url in (*urls, "0.tar")]}))
    shards = list_shards(str(data / "d"), Files()).shards
    assert [shard.url for shard in shards] == [*urls, f"{data}/d/0.tar"]


def test_a_local_file_that_is_absent_is_known_without_opening_it(data: Path) -> None:
    specs = [f"{data}/absent", f"{data}/d::{data}/absent", f"{data}/absent#val", f"{data}/d/{{0..9}}.tar", "s3://b/x"]
    assert list(map(is_absent, [*specs, "pipe:cat absent"])) == [True, True, True, False, False, False]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{}", r"holds no \*\.tar, but folders with shards: d, e, packed; name one, e\.g\. .*/d$"),
        ("{}/absent", "no folder of shards at .*absent.*mmmoe-data shard"),
        ("{}/d/9.tar", r"there is no shard .*9\.tar"),
        (
            "{}/packed",
            r"^2 compressed shards, such as .*/packed/0\.tar\.gz, cannot be read .* unpack by gunzip, or "
            r'train .* path: "pipe:cat .*/packed/0\.tar\.gz::pipe:cat .*/packed/1\.tgz"$',
        ),
        (
            "{}/packed/sub/2.tar.zst",
            r'^compressed shard .*2\.tar\.zst .* by unzstd, .*"pipe:cat .*\.zst \| unzstd -c"$',
        ),
        ("https://host/0.tgz?key=secret", r"^compressed shard https://host/0\.tgz cannot be read"),
        ("{}/d::{}/d/0.tar", r"names shard .*0\.tar more than once"),
        ("{}/d/{{0..1000}}.tar", "names more than 1,000 shards"),
        ("pipe:cat {}/d/0.tar", "^pipe:cat: the output of a command .* for training alone"),
    ],
)
def test_a_spec_that_cannot_be_read_says_why(
    data: Path, spec: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmmoe_pretrain.data.sources.listing.MAX_SHARDS", 1000)
    for name in ("0.tar.gz", "1.tgz", "sub/2.tar.zst"):
        (data / "packed" / name).parent.mkdir(parents=True, exist_ok=True)
        (data / "packed" / name).touch()
    with pytest.raises(ValueError, match=message):
        open_indexed(spec.format(*[data] * spec.count("{}")))


@pytest.mark.parametrize(
    ("names", "patterns"),
    [
        ("00000 00001 00002 00003", ["{00000..00003}"]),
        ("8 9 10 11", ["{8..11}"]),
        ("098 099 100", ["{098..100}"]),
        ("98 99 100", ["{98..100}"]),
        ("a-1 a-2 b-1 c a-4", ["a-{1..2}", "a-4", "b-1", "c"]),
    ],
)
def test_the_command_proposed_for_compressed_shards_reads_all_of_them(
    tmp_path: Path, names: str, patterns: list[str]
) -> None:
    folder = tmp_path / "two words"
    for name in names.split():
        tar = write_tar(tmp_path / "plain.tar", [(f"{name}.txt", b"x")])
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.tar.gz").write_bytes(gzip.compress(tar.read_bytes()))
    with pytest.raises(ValueError) as refused:
        open_indexed(folder)
    spec = str(refused.value).partition('path: "')[2].removesuffix('"')
    assert [part.partition("/two words/")[2].partition(".tar")[0] for part in spec.split("::")] == patterns
    stream = open_stream(spec, Files(), default_modalities())
    assert sorted(stream.read(0, i)[0].key for i in range(len(names.split()))) == sorted(names.split())
    stream.close()
