from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import xxhash
import yaml
from PIL import Image

from mmmoe_pretrain.data_prep.quality.filters import Filters
from mmmoe_pretrain.data_prep.rows.inputs import Input, open_input
from mmmoe_pretrain.data_prep.rows.manifest import read_manifest, write_manifest
from mmmoe_pretrain.data_prep.rows.refs import Reader
from mmmoe_pretrain.data_prep.rows.row import Found, Row
from mmmoe_pretrain.data_prep.shards import building, writing
from mmmoe_pretrain.data_prep.shards.building import FOLDER as BUILDING
from mmmoe_pretrain.data_prep.shards.encode import Encoder
from mmmoe_pretrain.data_prep.shards.media import MediaOptions
from mmmoe_pretrain.data_prep.shards.records import read_records
from mmmoe_pretrain.data_prep.shards.shard import Choice, constants_of, plan, ratios_of, shard_rows, write_shards
from mmmoe_pretrain.data_prep.shards.shard_files import ShardWriter
from mmmoe_pretrain.data_prep.shards.writing import ShardOptions

SMALL = ShardOptions(media=MediaOptions(image_size=16, audio_rate=4000), samples_per_shard=3, workers=1)


def run(manifest: Path, out: Path, options: ShardOptions = SMALL, choice: Choice | None = None):
    return write_shards(open_input(manifest), out, options, choice)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_bytes_are_the_same_twice_and_at_any_number_of_workers(make_manifest, tmp_path):
    manifest = make_manifest(8)
    run(manifest, tmp_path / "one")
    run(manifest, tmp_path / "two", replace(SMALL, workers=2))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def members(shard: Path) -> dict[str, bytes]:
    with tarfile.open(shard) as tar:
        assert {info.mtime for info in tar.getmembers()} == {0}
        return {name: tar.extractfile(name).read() for name in tar.getnames()}


def test_every_sample_is_written_once_and_the_lists_name_every_shard(make_manifest, tmp_path):
    run(make_manifest(9), tmp_path / "out")  # 6 train, 3 test
    shards = ["test/test-000000", "train/train-000000", "train/train-000001"]
    assert contents(tmp_path / "out").keys() == {
        "README.md", "options.json", "skipped.jsonl", *(f"{split}/{name}" for split in ("train", "test")
                                        for name in ("README.md", "shards.json")),
        *(f"{place}.{suffix}" for place in shards for suffix in ("tar", "parquet")),
    }  # fmt: skip
    keys = []
    for place in shards:
        data = (tmp_path / f"out/{place}.tar").read_bytes()
        digest = xxhash.xxh3_128_hexdigest(data)
        found = members(tmp_path / f"out/{place}.tar")
        assert [name.split(".")[1] for name in list(found)[:4]] == ["flac", "json", "png", "txt"]
        keys += [name.split(".")[0] for name in list(found)[::4]]
        listing = json.loads((tmp_path / f"out/{place}.tar").with_name("shards.json").read_text())
        assert (listing["__kind__"], listing["wids_version"]) == ("wids-shard-index-v1", 1)  # what wids asserts
        entry = {"url": f"{place.partition('/')[2]}.tar", "nsamples": 3, "filesize": len(data), "xxh3_128": digest}
        assert listing["shardlist"][int(place[-5:])] == entry
    assert sorted(keys) == [f"row-{number}" for number in range(9)]


def test_a_sample_holds_the_row_a_shrunk_image_on_white_and_mono_audio_at_the_rate(make_manifest, tmp_path):
    run(make_manifest(1), tmp_path / "out")
    found = members(tmp_path / "out/train/train-000000.tar")
    fields = json.loads(found["row-0.json"])
    assert (fields["key"], fields["group"]) == ("row-0", "group-0")
    assert not {"image", "audio", "text"} & fields.keys()
    assert found["row-0.txt"].decode() == "A red square."
    image = Image.open(io.BytesIO(found["row-0.png"]))
    assert (image.size, image.mode) == ((16, 8), "RGB")  # 40 x 20, the longest side to 16
    # red at alpha 128/255 on white: 255 * (1 - 128 / 255) = 127
    assert np.abs(np.asarray(image).astype(int) - [255, 127, 127]).max() <= 1
    samples, rate = soundfile.read(io.BytesIO(found["row-0.flac"]))
    assert (rate, samples.shape) == (4000, (400,))  # 800 samples at 8 kHz


def test_files_pass_unchanged_without_sizes_and_a_broken_one_is_skipped_by_name(make_manifest, tmp_path):
    manifest = make_manifest(8)
    (manifest.parent / "3.wav").write_bytes(b"not audio")
    (manifest.parent / "4.wav").unlink()
    report = run(manifest, tmp_path / "out", ShardOptions(workers=1, max_bad_fraction=0.25))
    lines = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    assert {line["key"] for line in lines} == {bad.key for bad in report.skipped} == {"row-3", "row-4"}
    assert sum(entry["nsamples"] for entries in report.shards.values() for entry in entries) == 6
    found = members(tmp_path / "out/train/train-000000.tar")
    assert found["row-0.wav"] == (manifest.parent / "0.wav").read_bytes()
    assert found["row-0.png"] == (manifest.parent / "square.png").read_bytes()


def test_a_row_without_content_is_skipped_and_a_blank_text_left_out(make_manifest, tmp_path):
    manifest = make_manifest(3)
    rows = [
        *read_manifest(manifest),
        Row("picture", image="square.png", text="\u200b \n"),
        Row("blank", text=" \n"),
        Row("nothing", extra={"img": "square.png"}),
    ]
    report = shard_rows(rows, manifest.parent, tmp_path / "out", ShardOptions(workers=1, max_bad_fraction=0.5))
    assert (
        sorted(bad.key for bad in report.skipped) == ["blank", "nothing"]
        and report.sums["train"].totals["blank_texts"] == 1
    )
    lines = (tmp_path / "out/skipped.jsonl").read_text()
    assert "it has a blank text and no image or audio" in lines and "(its other fields: img)" in lines
    found = sorted(members(tmp_path / "out/train/train-000000.tar"))
    whole = [f"row-{number}.{suffix}" for number in range(2) for suffix in ("json", "png", "txt", "wav")]
    assert found == ["picture.json", "picture.png", *whole]


def test_other_fields_and_files_elsewhere_travel(make_manifest, tmp_path):
    folder = make_manifest(1).parent
    (tmp_path / "manifest.jsonl").write_text(
        json.dumps({"key": "a.b", "image": str(folder / "square.png"), "caption": "c", "score": {"x": [1]}}) + "\n"
    )
    run(tmp_path / "manifest.jsonl", tmp_path / "out", ShardOptions(workers=1))
    found = members(tmp_path / "out/train/train-000000.tar")
    assert [*found] == ["a%2Eb.json", "a%2Eb.png", "a%2Eb.txt"]
    fields = json.loads(found["a%2Eb.json"])
    assert fields["score"] == {"x": [1]} and not {"caption", "image", "text"} & fields.keys()


def test_too_many_broken_files_end_the_command_and_leave_the_shards_of_before(make_manifest, tmp_path):
    manifest, out = make_manifest(8), tmp_path / "out"
    run(manifest, out)
    before = contents(out)
    (out / "done.tmp").mkdir()  # of a run that was killed at its end
    with pytest.raises(ValueError, match=r"holds complete shards.*--overwrite"):
        run(manifest, out)
    assert contents(out) == before and not (out / "done.tmp").exists()
    for number in (3, 5):
        (manifest.parent / f"{number}.wav").write_bytes(b"not audio")
    message = (
        r"2 of 8 samples \(25.00%\) cannot be used, and --max-bad-fraction 0.01 allows 0: row-\d \(\d.wav.*0.25$"
    )
    with pytest.raises(ValueError, match=message) as refused:
        run(manifest, out, replace(SMALL, overwrite=True))
    assert "row-3 (3.wav" in str(refused.value) and "row-5 (5.wav" in str(refused.value)  # both in one run
    lines = (out / BUILDING / "skipped.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["key"] for line in lines) == ["row-3", "row-5"]
    assert {name: data for name, data in contents(out).items() if not name.startswith(BUILDING)} == before
    run(manifest, out, replace(SMALL, samples_per_shard=100, max_bad_fraction=0.5, overwrite=True))
    assert not (out / BUILDING).exists()
    assert not (out / "train/train-000001.tar").exists()


@pytest.mark.parametrize("encoded", [0, 3, 7, 14])
def test_an_interrupted_run_resumes_with_the_same_bytes(make_manifest, tmp_path, monkeypatch, encoded):
    manifest = make_manifest(15)  # 10 train and 5 test: 4 and 2 shards
    (manifest.parent / "3.wav").write_bytes(b"not audio")
    options = replace(SMALL, max_bad_fraction=0.2)
    whole = run(manifest, tmp_path / "whole", options)
    encode, calls = Encoder.__call__, []

    def limited(self, row):
        calls.append(row.key)
        if len(calls) > limit:
            raise KeyboardInterrupt
        return encode(self, row)

    limit = encoded
    monkeypatch.setattr(Encoder, "__call__", limited)
    monkeypatch.setattr(writing, "ROWS_A_TASK", 1)
    with pytest.raises(KeyboardInterrupt):
        run(manifest, tmp_path / "out", options)
    assert (tmp_path / "out").exists() == (encoded >= 7)  # else no shard was finished
    (tmp_path / "out" / BUILDING / "test").mkdir(parents=True, exist_ok=True)
    (tmp_path / "out" / BUILDING / "test/test-000000.tar.tmp").touch()
    limit = 99
    calls.clear()
    report = run(manifest, tmp_path / "out", options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert (report.skipped, report.shards) == (whole.skipped, whole.shards)
    # The second row of train is bad: its shards are of rows 1 to 4, 5 to 7, 8 to 10, those of test of 1 to 3, 4 to 5.
    assert len(calls) == {0: 15, 3: 15, 7: 8, 14: 2}[encoded]


def test_what_has_changed_is_made_again(make_manifest, tmp_path, monkeypatch):
    manifest, out = make_manifest(15), tmp_path / "out"
    commit = building.Building.commit
    monkeypatch.setattr(building.Building, "commit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))

    def ended(options: ShardOptions = SMALL) -> int:
        with pytest.raises(KeyboardInterrupt):
            run(manifest, out, options)
        return (out / BUILDING / "finished.jsonl").read_text().count("\n")

    assert ended() == 6
    shards = out / BUILDING / "train"
    before = {path.name: path.stat().st_mtime_ns for path in shards.glob("*.tar")}
    ended()
    assert {path.name: path.stat().st_mtime_ns for path in shards.glob("*.tar")} == before
    data = bytearray((shards / "train-000002.tar").read_bytes())
    data[700] ^= 1
    (shards / "train-000002.tar").write_bytes(data)  # of 4
    ended()
    after = {path.name: path.stat().st_mtime_ns for path in shards.glob("*.tar")}
    assert [name for name in sorted(after) if after[name] != before[name]] == ["train-000002.tar", "train-000003.tar"]
    Image.new("RGB", (40, 20), "green").save(manifest.parent / "square.png")  # is in all samples
    assert ended() == 6
    assert ended(replace(SMALL, samples_per_shard=5)) == 3
    (manifest.parent / "0.wav").unlink()
    assert ended(replace(SMALL, max_bad_fraction=0.2)) == 5  # 9 of train and 5 of test
    with pytest.raises(ValueError, match=r"1 of 15 samples .* cannot be used"):
        run(manifest, out)  # what was skipped counts, too
    soundfile.write(manifest.parent / "0.wav", np.zeros(800), 8000)
    monkeypatch.setattr(building.Building, "commit", commit)
    run(manifest, out)
    run(manifest, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("mode", ["new", "overwrite", "retry"])
def test_a_run_that_is_interrupted_while_it_moves_shards_resumes(make_manifest, tmp_path, monkeypatch, mode):
    manifest, before, choice = make_manifest(9), tmp_path / "before", Choice(retry=mode == "retry")
    clip = (manifest.parent / "3.wav").read_bytes()
    (manifest.parent / "3.wav").write_bytes(b"not audio")
    options = replace(SMALL, max_bad_fraction=0.5, overwrite=mode == "overwrite")
    if mode != "new":
        run(manifest, before, options)
    (manifest.parent / "3.wav").write_bytes(clip)
    commit, move, moves, whole = building.Building.commit, Path.replace, 99, None

    def replace_or_end(path: Path, target: Path) -> Path:
        nonlocal moves
        moves -= 1
        if moves < 0:
            raise KeyboardInterrupt
        return move(path, target)

    def limited(self, *files):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", replace_or_end)
            commit(self, *files)

    monkeypatch.setattr(building.Building, "commit", limited)
    for allowed in (99, *range(10)):
        out = tmp_path / f"{mode}{allowed}"
        if mode != "new":
            shutil.copytree(before, out)
        moves = allowed
        try:
            run(manifest, out, options, choice)
        except KeyboardInterrupt:
            moves = 99
            run(manifest, out, options, choice)
        whole = whole or contents(out)
        assert contents(out) == whole, allowed


def test_a_split_without_a_good_sample_is_not_written_and_nothing_at_all_is_refused(make_manifest, tmp_path):
    rows = read_manifest(make_manifest(3))  # two of train, one of test
    rows[2] = replace(rows[2], image="absent.png")
    options = replace(SMALL, max_bad_fraction=1.0)
    report = shard_rows(rows, tmp_path / "corpus", tmp_path / "out", options)
    assert [*report.shards] == ["train"] and not (tmp_path / "out/test").exists()
    assert [bad.key for bad in report.skipped] == ["row-2"]
    with pytest.raises(ValueError, match=r"every sample is broken: row-2 \(absent\.png cannot be read"):
        shard_rows(rows[2:], tmp_path / "corpus", tmp_path / "none", options)
    assert [path.name for path in (tmp_path / "none").iterdir()] == [BUILDING]


def test_a_full_disk_is_named_and_the_next_run_resumes(make_manifest, tmp_path, monkeypatch):
    manifest, written = make_manifest(9), []

    def fill(writer):
        if len(written) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(writer.path)
        return close(writer)

    close = ShardWriter.close

    with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"no space .*out.building\.tmp.*to resume"):
        patch.setattr(ShardWriter, "close", fill)
        run(manifest, tmp_path / "out")
    assert run(manifest, tmp_path / "out").kept == 1


def test_a_field_that_names_files_and_is_not_read_is_reported(make_manifest, tmp_path, caplog):
    rows = read_manifest(make_manifest(3))
    extra = {"image_path": "a.JPG", "was": "b.wav", "url": "https://x/c.png", "n": 1}
    rows[0] = replace(rows[0], image=None, extra=extra)
    shard_rows(rows, tmp_path / "corpus", tmp_path / "out", SMALL)
    message = [record.getMessage() for record in caplog.records]
    assert message == ["field image_path names files in 1 row and is ignored; rename it to image"]


def test_two_runs_do_not_write_to_one_folder(make_manifest, tmp_path):
    manifest = make_manifest(3)
    with building.Building(tmp_path / "out", overwrite=False), pytest.raises(ValueError, match="another `mmmoe-data"):
        run(manifest, tmp_path / "out")
    run(manifest, tmp_path / "out")


def test_workers_end_with_a_run_that_is_killed_and_a_new_run_resumes(tmp_path):
    """The killed run's output must end too: what reads it would wait for its workers otherwise."""
    noise = np.random.default_rng(0).integers(0, 255, (500, 500, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "0.png", compress_level=1)
    for number in range(1, 128):
        os.link(tmp_path / "0.png", tmp_path / f"{number}.png")
    write_manifest(tmp_path / "manifest.jsonl", [Row(str(number), image=f"{number}.png") for number in range(128)])
    command = [sys.executable, "-m", "mmmoe_pretrain.data_prep.cli", "shard", str(tmp_path),
               "--out", str(tmp_path / "out"), "--image-size", "16", "--samples-per-shard", "8",
               "--workers", "2"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    finished = tmp_path / "out" / BUILDING / "finished.jsonl"
    while not (finished.exists() and finished.read_text()):
        assert process.poll() is None
        time.sleep(0.002)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) >= 2
    process.kill()
    process.communicate(timeout=10)  # ends with the last holder of stdout
    assert not (tmp_path / "out/train").exists()
    report = run(tmp_path / "manifest.jsonl", tmp_path / "out", ShardOptions(8, media=MediaOptions(16), workers=1))
    assert 1 <= report.kept < 16
    assert sum(entry["nsamples"] for entry in report.shards["train"]) == 128


def test_the_cards_tell_load_dataset_the_tars_and_the_columns(make_manifest, tmp_path):
    """By `datasets` 5.2: ``configs`` and ``dataset_info`` of the front matter stand before any guess."""
    manifest = make_manifest(3)
    extras = [{"score": 1, "note": "a"}, {"score": 0.5, "note": None}, {"boxes": [1, 2], "note": 3, "no: yes": True}]
    rows = [replace(row, extra=extra) for row, extra in zip(read_manifest(manifest), extras, strict=True)]
    rows[2] = replace(rows[2], audio=None)
    shard_rows(rows, manifest.parent, tmp_path / "out", ShardOptions(workers=1))
    _, front, _ = (tmp_path / "out/README.md").read_text().split("---\n")
    found = yaml.safe_load(front)
    assert found["configs"] == [{"config_name": "default", "data_files": [
        {"split": "train", "path": "train/*.tar"}, {"split": "test", "path": "test/*.tar"}]}]  # fmt: skip
    columns = {column.pop("name"): column for column in found["dataset_info"]["features"]}
    fields = {field["name"]: field["dtype"] for field in columns.pop("json")["struct"]}
    strings = "key language audio_kind label group split subset source licence attribution"
    assert fields == {**dict.fromkeys(strings.split(), "string"), "score": "float64", "no: yes": "bool"}
    assert columns == {"png": {"dtype": "image"}, "wav": {"dtype": "audio"}, "txt": {"dtype": "string"},
                       "__key__": {"dtype": "string"}, "__url__": {"dtype": "string"}}  # fmt: skip
    within = yaml.safe_load((tmp_path / "out/train/README.md").read_text().split("---\n")[1])
    assert within["configs"][0]["data_files"] == [{"split": "train", "path": "*.tar"}]
    (tmp_path / "out/README.md").write_text(f"---\n{front}---\nWhat I know of these data.\n")
    shard_rows(rows, manifest.parent, tmp_path / "out", ShardOptions(workers=1, overwrite=True))
    assert "What I know" in (tmp_path / "out/README.md").read_text()


def test_overwrite_never_removes_files_of_others(make_manifest, tmp_path):
    (tmp_path / "out/train").mkdir(parents=True)
    (tmp_path / "out/train/thesis.doc").write_text("years of work")
    with pytest.raises(ValueError, match=r"thesis\.doc was not written by"):
        run(make_manifest(), tmp_path / "out", ShardOptions(overwrite=True))


def test_a_shard_ends_before_it_exceeds_its_bytes(make_manifest, tmp_path):
    manifest = make_manifest(9)
    run(manifest, tmp_path / "one", replace(SMALL, samples_per_shard=100))
    size = (tmp_path / "one/train/train-000000.tar").stat().st_size // 6  # of a sample, headers and end included
    report = run(manifest, tmp_path / "out", replace(SMALL, samples_per_shard=100, shard_bytes=2 * size + 600))
    assert [entry["nsamples"] for entry in report.shards["train"]] == [2, 2, 2]
    assert run(manifest, tmp_path / "each", replace(SMALL, shard_bytes=1)).shards["test"][2]["nsamples"] == 1


def test_rows_without_a_split_are_split_by_group_and_ratio(make_manifest, tmp_path):
    rows = [Row(f"{n}", text="t", group=f"{n // 2}", split="") for n in range(400)]
    rows.append(Row("own", text="t", split="val"))
    given = Input("rows", tmp_path, (Found("row", row) for row in rows))
    choice = Choice(ratios=ratios_of(["train=3", "validation=0", "test=1"]))
    report = write_shards(given, tmp_path / "out", ShardOptions(workers=1), choice)
    counts = {split: report.sums[split].samples for split in report.sums}
    assert counts["val"] == 1 and 70 <= counts["test"] <= 130 and sum(counts.values()) == 401
    groups = [set(field_of(tmp_path / "out" / split, "group")) for split in ("train", "test")]
    assert not groups[0] & groups[1]
    for wrong in ("train", "train=-1", "dev2=1", "train=nan"):
        with pytest.raises(ValueError, match=r"--ratio"):
            ratios_of([wrong])


def test_fields_of_rows_that_name_none_are_set(tmp_path):
    rows = [Row("own", text="t", language="fr"), Row("none", text="u", licence="MIT")]
    given = Input("rows", tmp_path, (Found("row", row) for row in rows))
    choice = Choice(["language=en"], constants=constants_of(["lang=en", "license=CC-BY-4.0"]))
    write_shards(given, tmp_path / "out", ShardOptions(workers=1), choice)
    found = [field_of(tmp_path / "out/train", name) for name in ("key", "language", "licence")]
    assert found == [["none"], ["en"], ["MIT"]]
    for wrong in ("text=x", "language", "language= "):
        with pytest.raises(ValueError, match=f"--set {wrong} is not field=value"):
            constants_of([wrong])


def field_of(folder: Path, name: str) -> list:
    return [value for batch in read_records(folder, [name]) for value in batch[name]]


def test_long_names_and_values_of_strangers_make_no_long_reasons_and_records(tmp_path: Path) -> None:
    long = "x" * 100_000
    rows = [
        Row("fields", text=" ", extra={f"{number}\n{long}": 1 for number in range(99)}),
        Row("language", text="a", language=long),
        Row("label", text="a", label=long, language="en"),
    ]
    options = ShardOptions(workers=1, max_bad_fraction=1.0, filters=Filters(languages=("en",)))
    report = shard_rows(rows, tmp_path, tmp_path / "out", replace(options, filters=Filters()))
    assert len(report.skipped) == 1 and len(report.skipped[0].reason) < 1000 and "\n" not in report.skipped[0].reason
    found = next(read_records(tmp_path / "out/train", ("key", "label", "language")))
    assert {len(value or "") for name in ("label", "language") for value in found[name]} == {0, 2, 1024}
    report = shard_rows(rows[1:], tmp_path, tmp_path / "filtered", options)
    assert report.sums["train"].rules == {"--language": 1}


def test_records_say_what_became_of_each_row_and_the_card_sums_them_up(make_manifest, tmp_path):
    manifest = make_manifest(3)
    rows = [replace(row, licence="CC-BY | 4.0") for row in read_manifest(manifest)]
    rows.append(Row("gone", image="gone.png"))
    shard_rows(rows, manifest.parent, tmp_path / "out", replace(SMALL, max_bad_fraction=0.5))
    folder = tmp_path / "out/train"
    found = dict(zip(field_of(folder, "key"), field_of(folder, "status"), strict=True))
    assert found == {"row-0": "ok", "row-1": "ok", "gone": "broken"}
    assert set(field_of(folder, "seconds")) == {0.1, None} and set(field_of(folder, "width")) == {40, None}
    card = (tmp_path / "out/README.md").read_text()
    assert "| train | 2 |" in card and "| test | 1 |" in card
    assert "| image+audio+text | 3 |" in card and "| CC-BY &#124; 4.0 | 3 |" in card


def test_files_that_take_the_names_of_each_other_are_read_again(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.npy").write_bytes(name.encode() * 8)
        os.utime(tmp_path / f"{name}.npy", (1, 1))
    reader = Reader(tmp_path)
    before = reader.stamp("a.npy")
    assert reader.stamp("a.npy") == before
    (tmp_path / "a.npy").rename(tmp_path / "c.npy")
    (tmp_path / "b.npy").rename(tmp_path / "a.npy")
    assert reader.stamp("a.npy") != before


def test_a_dry_run_counts_rows_and_what_filters_of_texts_leave_out_and_writes_nothing(make_manifest, tmp_path):
    manifest = make_manifest(3)  # texts of 13, 16 and 16 characters
    filters = Filters(min_characters=14, max_size=8, min_seconds=0.01)
    found = plan(
        open_input(manifest), tmp_path / "out", Choice(filters=["language=en"]), ShardOptions(filters=filters)
    )
    assert (found["rows"], found["filtered"], found["unchecked"]) == (
        3,
        {"--min-characters": 1},
        ["--max-size", "--min-seconds"],
    )
    assert found["splits"] == {"train": {"image+audio+text": 1}, "test": {"image+audio+text": 1}}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus"]
    assert (found["missing"], found["first_missing"]) == (0, [])


def test_a_dry_run_tells_missing_files_and_a_folder_that_is_not_empty(make_manifest, tmp_path):
    manifest = make_manifest(3)
    for path in list(manifest.parent.rglob("*.png"))[:1]:
        path.unlink()
    found = plan(open_input(manifest), tmp_path / "out", Choice(), ShardOptions())
    assert found["missing"] == 3, "all rows name it"
    assert len(found["first_missing"]) == 1 and found["first_missing"][0].endswith(".png")
    with pytest.raises(ValueError, match=r"corpus is not empty .*; choose another --out or pass --overwrite"):
        plan(open_input(manifest), manifest.parent, Choice(), ShardOptions())
