"""`shard --retry`: rows that failed before are added, by the options of before, and nothing else changes."""

from __future__ import annotations

import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmmoe_pretrain.data.sources.source import open_indexed
from mmmoe_pretrain.data_prep.cli import app
from mmmoe_pretrain.data_prep.quality.filters import Filters
from mmmoe_pretrain.data_prep.rows.manifest import read_manifest, write_manifest
from mmmoe_pretrain.data_prep.rows.row import Row
from mmmoe_pretrain.data_prep.shards.building import FOLDER, Building
from mmmoe_pretrain.data_prep.shards.encode import BadSample
from mmmoe_pretrain.data_prep.shards.records import Summary, read_records
from mmmoe_pretrain.data_prep.shards.shard import Choice, Report, shard_rows, show
from mmmoe_pretrain.data_prep.shards.writing import Broken, ShardOptions, enough
from tests.data_prep.shards.test_shard import SMALL, contents, run


def test_failed_rows_are_tried_again_alone_and_added(make_manifest, tmp_path):
    manifest, out = make_manifest(9), tmp_path / "out"
    clips = {number: (manifest.parent / f"{number}.wav").read_bytes() for number in (0, 1, 3)}
    for number in clips:
        (manifest.parent / f"{number}.wav").write_bytes(b"not audio")
    options = replace(SMALL, max_bad_fraction=0.5)
    run(manifest, out, options)
    before = contents(out)
    for number in (0, 3):
        (manifest.parent / f"{number}.wav").write_bytes(clips[number])
    report = run(manifest, out, options, Choice(retry=True))
    after = contents(out)
    assert {"train/train-000001.tar"} == {n for n in after.keys() - before.keys() if n.endswith(".tar")}
    assert all(after[name] == data for name, data in before.items() if name.endswith(".tar"))
    assert (report.sums["train"].samples, report.sums["train"].broken) == (5, 1)
    assert [json.loads(line)["key"] for line in (out / "skipped.jsonl").read_text().splitlines()] == ["row-1"]
    assert len(open_indexed(out / "train")) == 5
    (manifest.parent / "1.wav").write_bytes(clips[1])
    assert run(manifest, out, options, Choice(retry=True)).sums["train"].samples == 6
    with pytest.raises(ValueError, match=r"no row of .* is left to be tried again"):
        run(manifest, out, options, Choice(retry=True))
    with pytest.raises(ValueError, match=r"there is no folder .*none"):
        run(manifest, tmp_path / "none", options, Choice(retry=True))


def test_a_row_that_was_tried_again_in_another_split_is_written_once_and_others_stay_named(tmp_path):
    rows = [Row("a", text="a"), Row("x", image="x.png"), Row("v", image="v.png", split="val")]
    lax = replace(SMALL, max_bad_fraction=1)
    write_manifest(tmp_path / "manifest.jsonl", rows)
    run(tmp_path, tmp_path / "out", lax)
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    write_manifest(tmp_path / "manifest.jsonl", [rows[0], replace(rows[1], split="test"), rows[2]])
    run(tmp_path, tmp_path / "out", lax, Choice(filters=("split=test",), retry=True))
    lines = list(map(json.loads, (tmp_path / "out/skipped.jsonl").read_text().splitlines()))
    assert [line["key"] for line in lines] == ["v"]
    run(tmp_path, tmp_path / "out", lax, Choice(retry=True))
    assert [path.name for path in (tmp_path / "out/test").glob("*.tar")] == ["test-000000.tar"]
    (tmp_path / "out/skipped.jsonl").write_text("[1]\n")
    with pytest.raises(ValueError, match=r"skipped.jsonl line 1 is not what was written there"):
        run(tmp_path, tmp_path / "out", lax, Choice(retry=True))


def test_trying_again_never_takes_shards_of_an_interrupted_run(make_manifest, tmp_path):
    manifest, lax = make_manifest(9), replace(SMALL, max_bad_fraction=1)
    rows = read_manifest(manifest)
    write_manifest(manifest, [*rows, Row("z", image="z.png")])
    run(manifest, tmp_path / "out", lax, Choice(order="input"))
    before = contents(tmp_path / "out/train")
    write_manifest(manifest, [*(replace(row, text="new") for row in rows), Row("z", image="z.png")])
    with pytest.raises(ValueError, match="cannot be used"):
        run(manifest, tmp_path / "out", replace(SMALL, max_bad_fraction=0, overwrite=True), Choice(order="input"))
    shutil.copyfile(manifest.parent / "square.png", manifest.parent / "z.png")
    run(manifest, tmp_path / "out", lax, Choice(retry=True))
    after = contents(tmp_path / "out/train")
    assert all(after[name] == data for name, data in before.items() if name.endswith(".tar"))


def shard(*options: str) -> None:
    app(["shard", *options, "--workers", "1", "--max-bad-fraction", "1"], standalone_mode=False)


def test_trying_again_takes_the_options_of_before_and_refuses_others(tmp_path: Path, capsys: Any) -> None:
    square = Image.new("RGB", (40, 20), "red")
    square.save(tmp_path / "good.png")
    names = [f"{number}" for number in range(8)]
    rows = [Row("good", image="good.png", split="train"), *(Row(n, image=f"{n}.png", split="") for n in names)]
    write_manifest(tmp_path / "manifest.jsonl", rows)
    given = str(tmp_path), "--out", str(tmp_path / "out")
    shard(*given, "--image-size", "16", "--min-size", "8", "--ratio", "test=1")
    for name in names:
        square.save(tmp_path / f"{name}.png")
    before = contents(tmp_path / "out")
    message = (
        r"--image-size is 8, and was 16; --crop is given, and was not given; --ratio is train=1, and was test=1 when "
        r".*out was written; --retry takes the options of that run"
    )
    with pytest.raises(ValueError, match=message):
        shard(*given, "--retry", "--image-size", "8", "--min-size", "8", "--ratio", "train=1", "--crop")
    assert contents(tmp_path / "out") == before
    shard(*given, "--retry", "--min-size", "8", "--samples-per-shard", "3", "--timeout", "3")
    found = {}
    for path in (tmp_path / "out").rglob("*.tar"):
        with tarfile.open(path) as tar:
            for name in (name for name in tar.getnames() if name.endswith(".png")):
                found[name[:-4]] = path.parent.name, Image.open(tar.extractfile(name)).size
    assert found == {"good": ("train", (16, 8)), **dict.fromkeys(names, ("test", (16, 8)))}
    (tmp_path / "out/options.json").write_text('{"media": 3}')
    with pytest.raises(ValueError, match=r"options.json is not what was written there.*remove it"):
        shard(*given, "--retry")


def test_records_behind_the_last_shard_stay_when_rows_are_tried_again(tmp_path: Path) -> None:
    rows = [Row(str(number), text="t") for number in range(3)]  # one shard of three, and three rows without a sample
    rows += [Row("x", image="x.png"), Row("y", image="y.png"), Row("z", text="long")]
    write_manifest(tmp_path / "manifest.jsonl", rows)
    out, lax = tmp_path / "out", replace(SMALL, max_bad_fraction=1, filters=Filters(max_characters=3))
    run(tmp_path, out, lax, Choice(order="input"))
    assert not (out / "train/train-000001.tar").exists()
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    for _ in range(2):  # the second time y fails again
        report = run(tmp_path, out, lax, Choice(order="input", retry=True))
    assert [entry["url"] for entry in report.shards["train"]] == ["train-000000.tar", "train-000001.tar"]
    told = [[*zip(b["key"], b["status"], strict=True)] for b in read_records(out / "train", ("key", "status"))]
    good = [(str(number), "ok") for number in range(3)]
    assert told == [good, [("x", "ok"), ("y", "broken"), ("z", "filtered")], [("y", "broken")]]
    sums = report.sums["train"]
    assert (sums.samples, sums.broken, sums.filtered) == (4, 1, 1)


@pytest.mark.parametrize("fault", ["rows", "retry", "folder"])
def test_an_error_before_the_first_shard_leaves_nothing(make_manifest: Any, tmp_path: Path, fault: str) -> None:
    manifest, out = make_manifest(3), tmp_path / "out"
    if fault == "folder":
        out.mkdir()
    if fault == "retry":
        run(manifest, out)
    else:
        manifest.write_text('{"text": "without a key"}\n')
    before = sorted(tmp_path.glob("*/*"))
    with pytest.raises(ValueError, match="no row of .* is left" if fault == "retry" else "it has no key"):
        run(manifest, out, choice=Choice(retry=fault == "retry"))
    assert sorted(tmp_path.glob("*/*")) == before


def test_the_message_of_too_many_tells_a_share_that_is_enough(tmp_path: Path) -> None:
    broken = Broken(1000, 0.01, tmp_path / "skipped.jsonl")
    broken.add(21, [BadSample("a", "http 503", retry=True, url="https://host/a.jpg")])
    message = (
        r"^21 of the first 400 of 1,000 samples \(5.25%\) .* allows 10: a \(https://host/a.jpg: http 503\); and 20 "
        r"more; .*skipped.jsonl; .* --max-bad-fraction 0.053 or more; downloads .* by --retry$"
    )
    with pytest.raises(ValueError, match=message):
        broken.check(400)
    for total in (3, 7, 1000, 12345):
        for count in range(1, min(total, 1000) + 1):
            share = float(f"{enough(count, total):g}")
            assert int(share * total) >= count and share <= min(1, count / total + 0.002)


def test_the_summary_says_what_was_tried_again_and_what_can_be(capsys: pytest.CaptureFixture[str]) -> None:
    show(Report(sums={"train": Summary(broken=3, passing=2)}, tried=5, added=2), Path("out"), as_json=False)
    *_, tried, skipped, passing = capsys.readouterr().out.splitlines()
    assert tried == "tried 5 rows again, of which 2 are samples now"
    assert skipped == "skipped 3 broken samples, named in out/skipped.jsonl"
    assert passing == "2 downloads of these may succeed another time: repeat the command with --retry"


def test_a_command_resumes_that_was_killed_while_it_moved_its_shards_and_once_more(
    tmp_path: Path, monkeypatch
) -> None:
    def write(out: Path) -> None:
        shard_rows([Row("a", text="A")], tmp_path, out, ShardOptions(workers=1))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    out, real = tmp_path / "out", Path.replace
    for is_moved in (True, False):
        with monkeypatch.context() as patch:
            if is_moved:  # all but the end
                patch.setattr(Path, "replace", lambda path, to: killed() if path.name == FOLDER else real(path, to))
            else:
                patch.setattr(Building, "commit", killed)
            with pytest.raises(KeyboardInterrupt):
                write(out)
    write(out)
    write(tmp_path / "whole")
    assert {path.name: path.read_bytes() for path in out.rglob("*") if path.is_file()} == {
        path.name: path.read_bytes() for path in (tmp_path / "whole").rglob("*") if path.is_file()
    }
