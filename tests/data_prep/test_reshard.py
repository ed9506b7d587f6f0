"""Shards made of shards: the same bytes in other shards, subsets and blends."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from mmmoe_pretrain.data_prep.reshard import Subset, choose, mix, open_parts, read_keys, reshard, run
from mmmoe_pretrain.data_prep.rows.manifest import read_manifest
from mmmoe_pretrain.data_prep.shards.shard import shard_rows
from mmmoe_pretrain.data_prep.shards.writing import ShardOptions
from mmmoe_pretrain.data_prep.verify import Seen, verify_folder
from tests.support import write_tar

ONE = ShardOptions(workers=1)


def files(folder: Path) -> dict[str, bytes]:
    """The files of all tars in it, in their order."""
    found: dict[str, bytes] = {}
    for path in sorted(folder.rglob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                assert member.name not in found
                found[member.name] = tar.extractfile(member).read()
    return found


@pytest.fixture
def shards(make_manifest: Callable[..., Path], tmp_path: Path) -> Path:
    manifest = make_manifest(9)
    shard_rows(read_manifest(manifest), manifest.parent, tmp_path / "data", ONE)
    return tmp_path / "data"


def test_samples_keep_their_bytes_and_splits_in_shards_of_another_size(shards: Path, tmp_path: Path) -> None:
    report = reshard(open_parts([str(shards)]), tmp_path / "out", ShardOptions(samples_per_shard=2))
    assert {split: [entry["nsamples"] for entry in its] for split, its in report.shards.items()} == {
        "train": [2, 2, 2],
        "test": [2, 1],
    }
    for split in ("train", "test"):
        assert files(tmp_path / "out" / split) == files(shards / split)
    assert not list(verify_folder(tmp_path / "out", Seen()))


@pytest.mark.parametrize("limits", [{"samples_per_shard": 2}, {"shard_bytes": 10_000}])
@pytest.mark.parametrize("order", ["input", "shuffled"])
def test_a_dry_run_tells_what_would_be_written(shards: Path, tmp_path: Path, limits, order, capsys) -> None:
    long = [(f"{key}.txt", b"text") for key in ("\u65e5", "a" * 200, "b" * 97)]
    write_tar(tmp_path / "val/0.tar", long)
    options, parts = ShardOptions(workers=1, **limits), open_parts([str(shards), str(tmp_path / "val")])
    run(parts, tmp_path / "out", options, order, False, dry_run=True, as_json=True)
    assert not (tmp_path / "out").exists()
    said = json.loads(capsys.readouterr().out)["splits"]
    report = reshard(parts, tmp_path / "out", options, order)
    assert said == {
        split: {
            "samples": sum(entry["nsamples"] for entry in its),
            "shards": len(its),
            "bytes": sum(entry["filesize"] for entry in its),
        }
        for split, its in report.shards.items()
    }
    with pytest.raises(ValueError, match="holds complete shards"):
        run(parts, tmp_path / "out", options, order, False, dry_run=True, as_json=True)


@pytest.mark.parametrize(
    ("filters", "keys"),
    [(("text=red",), "bc"), (("caption=red",), "abc"), (("label=1",), "d"), (("class=1",), "d"), (("x=",), "abcde")],
)
def test_filters_know_the_names_that_the_loader_knows(tmp_path: Path, filters, keys, caplog) -> None:
    texts = {"a": "blue", "b": "red", "c": " "}
    rows = {key: {"caption": "red", "text": text} for key, text in texts.items()} | {"d": {"class": 1}, "e": {}}
    write_tar(tmp_path / "0.tar", [(f"{key}.json", json.dumps(row).encode()) for key, row in rows.items()])
    write_tar(tmp_path / "1.tar", [("f.json", b"{"), ("g.json", b"[]")])
    parts = open_parts([str(tmp_path)])
    choose(parts, Subset(filters))
    assert "left out 2 samples whose JSON --filter cannot read: f of " in caplog.text
    assert "".join(parts[0].source.key(i) for i in parts[0].numbers.tolist()) == keys


def test_a_subset_is_chosen_by_fields_keys_and_number(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text('row-1\n{"key": "row-3"}\n\nrow-2\n')

    def keys(**subset) -> set[str]:
        parts = open_parts([str(shards)])
        choose(parts, Subset(**subset))
        return {part.source.key(i) for part in parts for i in part.numbers.tolist()}

    assert keys(filters=("subset=odd",)) == {"row-0", "row-2", "row-4", "row-6", "row-8"}  # as the fixture names them
    assert keys(keys=read_keys(tmp_path / "keys")) == {"row-1", "row-2", "row-3"}
    few, more = keys(samples=3), keys(samples=5)
    assert len(few) == 3 and len(more) == 5 and few < more
    with pytest.raises(ValueError, match="no sample is left"):
        keys(filters=("subset=none",))
    with pytest.raises(ValueError, match="is not field=value"):
        keys(filters=("odd",))


def test_keys_that_cannot_be_read_or_are_of_no_sample_are_told(shards: Path, tmp_path: Path, caplog) -> None:
    path = tmp_path / "keys"
    path.write_bytes(b"\xef\xbb\xbfrow-1\nelse\n")
    parts = open_parts([str(shards)])
    choose(parts, Subset(keys=read_keys(path)))
    assert sum(len(part.numbers) for part in parts) == 1
    assert "of 2 keys, 1 are of no sample" in caplog.text and "'else'" in caplog.text
    for data, message in ((b'{"id": 1}', "line 1 has no key"), (b"\xff", "is not UTF-8"), (b"a\n{", "keys line 2")):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            read_keys(path)


def test_a_number_of_samples_is_exact_where_sources_share_keys(shards: Path) -> None:
    for count in (1, 3, 4):
        parts = open_parts([str(shards), str(shards)])
        choose(parts, Subset(samples=count))
        assert sum(len(part.numbers) for part in parts) == count


def test_foreign_shards_are_copied_with_all_their_files(tmp_path: Path, caplog) -> None:
    (tmp_path / "a").mkdir()
    members = {"x/1.jpg": b"no image", "x/1._t.txt": b"one", "x/1.depth.bin": b"\0", "x/2.json": b'{"a": 1}'}
    write_tar(tmp_path / "a/0.tar", [*members.items(), ("x/2", b"?"), ("README", b"?")])
    with pytest.raises(ValueError, match="--split foo is not one of train, val, test"):
        open_parts([str(tmp_path / "a")], "foo")
    reshard(open_parts([str(tmp_path / "a")], "valid"), tmp_path / "out", ONE)
    assert files(tmp_path / "out/val") == members
    assert "2 files without a suffix left out" in caplog.text


def test_a_label_that_is_no_text_does_not_end_the_copy(tmp_path: Path) -> None:
    members = {"1.txt": b"one", "1.json": rb'{"label": "\ud800", "language": "en"}'}
    write_tar(tmp_path / "a/0.tar", list(members.items()))
    reshard(open_parts([str(tmp_path / "a")]), tmp_path / "out", ONE)
    assert files(tmp_path / "out/train") == members


def test_a_blend_has_the_shares_of_its_weights_and_no_sample_twice(tmp_path: Path) -> None:
    for name, count in (("a", 60), ("b", 100)):
        (tmp_path / name).mkdir()
        rows = {f"{i}.txt": f"{name}{i}".encode() for i in range(count)}
        write_tar(tmp_path / name / "0.tar", rows.items())
    given = [f"{tmp_path}/a=3", f"{tmp_path}/b=1"]
    with pytest.raises(
        ValueError,
        match=r"holds \d+ samples with the key of another: '\d+' in sample .*; and \d+ more\. .* --number-keys$",
    ):
        reshard(mix(given, None), tmp_path / "out", ONE)
    reshard(mix(given, None), tmp_path / "out", ONE, "shuffled", number_keys=True)
    found = files(tmp_path / "out")
    assert [sum(data.startswith(name) for data in found.values()) for name in (b"a", b"b")] == [60, 20]
    assert list(found) != sorted(found) and len(set(found.values())) == 80
    with pytest.raises(ValueError, match="--samples 81 exceeds 80"):
        mix(given, 81)
    for wrong in (f"{tmp_path}/a", f"{tmp_path}/a=0", "=1"):
        with pytest.raises(ValueError, match="is not SOURCE=WEIGHT"):
            mix([wrong], None)


def test_a_memory_of_old_samples_is_bounded_and_the_same_each_time(tmp_path: Path) -> None:
    """Of docs/lifelong.md: some samples of each stage, or one memory of a fixed size that new ones enter."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "0.tar", {f"{name}{i}.txt": b"text" for i in range(20)}.items())

    def memory(out: str, samples: int, *sources: str, order: str = "input") -> set[str]:
        reshard(mix([f"{tmp_path / each}=1" for each in sources], samples), tmp_path / out, ONE, order)
        return {*files(tmp_path / out)}

    first, again, less = (
        memory("first", 8, "one"),
        memory("again", 8, "one", order="shuffled"),
        memory("less", 4, "one"),
    )
    assert len(first) == 8 and first == again and less < first
    both = memory("both", 8, "first", "two")
    assert len(both) == 8 and both & first == less  # those with the smallest hashes stay
