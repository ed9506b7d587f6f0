from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import xxhash
from PIL import Image

from data_prep.manifest import read_manifest
from data_prep.shard import BUILDING, ShardOptions, shard_manifest

SMALL = ShardOptions(samples_per_shard=3, image_size=16, audio_rate=4000, workers=1)


def run(manifest: Path, out: Path, options: ShardOptions = SMALL):
    return shard_manifest(read_manifest(manifest), manifest.parent, out, options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_bytes_are_the_same_twice_and_at_any_number_of_workers(make_manifest, tmp_path):
    manifest = make_manifest(8)
    run(manifest, tmp_path / "one")
    run(manifest, tmp_path / "two", ShardOptions(3, 16, 4000, workers=2))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_every_sample_is_written_once_and_no_shard_is_empty(make_manifest, tmp_path):
    run(make_manifest(9), tmp_path / "out")  # 6 train, 3 test
    assert sorted(contents(tmp_path / "out")) == [
        "skipped.jsonl",
        "test/00000.index.json",
        "test/00000.tar",
        "test/shards.json",
        "train/00000.index.json",
        "train/00000.tar",
        "train/00001.index.json",
        "train/00001.tar",
        "train/shards.json",
    ]
    keys = []
    for path in sorted((tmp_path / "out").rglob("*.tar")):
        with tarfile.open(path) as tar:
            names = tar.getnames()
        assert [name.split(".")[1] for name in names[:4]] == ["png", "flac", "txt", "json"]
        keys += [name.split(".")[0] for name in names[::4]]
    assert sorted(keys) == [f"row-{number}" for number in range(9)]


def test_the_index_points_at_the_members(make_manifest, tmp_path):
    run(make_manifest(), tmp_path / "out")
    shard = tmp_path / "out/train/00000.tar"
    data = shard.read_bytes()
    index = json.loads((tmp_path / "out/train/00000.index.json").read_text())
    assert index["version"] == 1
    assert index["bytes"] == len(data)
    assert index["xxh3_128"] == xxhash.xxh3_128_hexdigest(data)
    with tarfile.open(shard) as tar:
        for sample in index["samples"]:
            for suffix, (offset, size) in sample["members"].items():
                assert data[offset : offset + size] == tar.extractfile(f"{sample['key']}.{suffix}").read()
    [entry, *_] = json.loads((tmp_path / "out/train/shards.json").read_text())["shardlist"]
    assert entry == {"url": "00000.tar", "nsamples": 3, "filesize": len(data), "xxh3_128": index["xxh3_128"]}


def test_a_sample_holds_the_row_without_paths_and_text(make_manifest, tmp_path):
    run(make_manifest(1), tmp_path / "out")
    with tarfile.open(tmp_path / "out/train/00000.tar") as tar:
        members = {name.split(".")[1]: tar.extractfile(name).read() for name in tar.getnames()}
        assert {info.mtime for info in tar.getmembers()} == {0}
    fields = json.loads(members["json"])
    assert fields["key"] == "row-0"
    assert fields["group"] == "group-0"
    assert not {"image", "audio", "text"} & fields.keys()
    assert members["txt"].decode() == "A red square."


def test_pictures_shrink_onto_white_and_sounds_become_mono_at_the_rate(make_manifest, tmp_path):
    run(make_manifest(1), tmp_path / "out")
    with tarfile.open(tmp_path / "out/train/00000.tar") as tar:
        image = Image.open(io.BytesIO(tar.extractfile("row-0.png").read()))
        samples, rate = soundfile.read(io.BytesIO(tar.extractfile("row-0.flac").read()))
    assert (image.size, image.mode) == ((16, 8), "RGB")  # 40 x 20, the longest side to 16
    # red at alpha 128/255 on white: 255 * (1 - 128 / 255) = 127
    assert np.abs(np.asarray(image).astype(int) - [255, 127, 127]).max() <= 1
    assert rate == 4000
    assert samples.shape == (400,)  # 800 samples at 8 kHz


def test_without_sizes_the_files_pass_as_they_are(make_manifest, tmp_path):
    manifest = make_manifest(1)
    run(manifest, tmp_path / "out", ShardOptions(workers=1))
    with tarfile.open(tmp_path / "out/train/00000.tar") as tar:
        assert tar.extractfile("row-0.wav").read() == (manifest.parent / "0.wav").read_bytes()
        assert tar.extractfile("row-0.png").read() == (manifest.parent / "square.png").read_bytes()


def test_a_broken_file_is_set_aside_and_named(make_manifest, tmp_path):
    manifest = make_manifest(8)
    (manifest.parent / "3.wav").write_bytes(b"not a sound")
    (manifest.parent / "4.wav").unlink()
    report = run(manifest, tmp_path / "out", ShardOptions(workers=1, max_bad_fraction=0.25))
    lines = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    assert {line["key"] for line in lines} == {bad.key for bad in report.skipped} == {"row-3", "row-4"}
    assert sum(entry["nsamples"] for entries in report.shards.values() for entry in entries) == 6


def test_too_many_broken_files_end_the_command_and_leave_no_shards(make_manifest, tmp_path):
    manifest = make_manifest(8)
    (manifest.parent / "3.wav").write_bytes(b"not a sound")
    with pytest.raises(ValueError, match=r"1 of 8 samples are broken and --max-bad-fraction allows 0: row-3"):
        run(manifest, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [BUILDING]


def test_a_folder_in_use_is_refused_and_kept_until_the_new_shards_are_whole(make_manifest, tmp_path):
    manifest, out = make_manifest(8), tmp_path / "out"
    run(manifest, out)
    before = contents(out)
    with pytest.raises(ValueError, match=r"not empty.*--overwrite"):
        run(manifest, out)
    (manifest.parent / "3.wav").write_bytes(b"not a sound")
    with pytest.raises(ValueError, match="row-3"):
        run(manifest, out, ShardOptions(3, 16, 4000, workers=1, overwrite=True))
    assert {name: data for name, data in contents(out).items() if not name.startswith(BUILDING)} == before
    run(manifest, out, ShardOptions(100, 16, 4000, workers=1, max_bad_fraction=0.5, overwrite=True))
    assert not (out / BUILDING).exists()
    assert not (out / "train/00001.tar").exists()


def test_overwrite_never_removes_files_of_others(make_manifest, tmp_path):
    (tmp_path / "out/train").mkdir(parents=True)
    (tmp_path / "out/train/thesis.doc").write_text("years of work")
    with pytest.raises(ValueError, match=r"thesis\.doc is not of our making"):
        run(make_manifest(), tmp_path / "out", ShardOptions(overwrite=True))
