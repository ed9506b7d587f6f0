from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from pyarrow import parquet

from mmmoe_pretrain.data.sources.source import open_indexed
from mmmoe_pretrain.data_prep.cli import app
from mmmoe_pretrain.data_prep.quality import samples
from mmmoe_pretrain.data_prep.quality.dedup import Options, dedup, summary
from mmmoe_pretrain.data_prep.quality.fingerprints import look_of
from mmmoe_pretrain.data_prep.quality.report import kept, read_hashes, write_hashes, write_report
from mmmoe_pretrain.data_prep.quality.samples import Settings, read_by
from mmmoe_pretrain.data_prep.rows.row import Row
from mmmoe_pretrain.data_prep.shards.shard import shard_rows
from mmmoe_pretrain.data_prep.shards.writing import ShardOptions
from tests.support import write_tar

NEAR = Settings(near=True)


def photo(seed: int, side: int = 128) -> Image.Image:
    """Soft blobs of colours that only this seed has."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def write(folder: Path, **content: dict[str, bytes]) -> Path:
    """A tar of these samples: key -> extension -> content."""
    members = [(f"{key}.{name}", data) for key, its in content.items() for name, data in its.items()]
    write_tar(folder / "0.tar", members)
    return folder


def dropped(*specs: Path, settings: Settings = NEAR, against: tuple[Path, ...] = ()) -> dict[str, tuple[str, str]]:
    """Key -> kind and key of what it repeats."""
    found = dedup(list(map(str, specs)), Options(tuple(map(str, against)), settings, workers=1))
    rows = (found.row(number) for number in found.dropped.tolist())
    return {row["key"]: (row["kind"], row["of_key"]) for row in rows}


EDITS = {
    "half": lambda image: encoded(image.resize((64, 64), Image.Resampling.BICUBIC)),
    "jpeg": lambda image: encoded(image, "JPEG", quality=50),
    "webp": lambda image: encoded(image, "WEBP", quality=80),
    "dark": lambda image: encoded(ImageEnhance.Brightness(image).enhance(0.9)),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_image_is_a_near_duplicate(tmp_path, edit):
    its = {f"p{n}": {"png": encoded(photo(n))} for n in range(4)}
    found = dropped(write(tmp_path, **its, copy={"png": EDITS[edit](photo(2))}))
    assert found == {"copy": ("near", "p2")}


def test_look_alikes_and_flat_images_are_no_duplicates(tmp_path):
    grey = np.asarray(photo(0).convert("L"), np.int16)
    flat = [np.full((64, 64, 3), level, np.uint8) for level in (10, 200)]
    tints = [np.stack([grey + red, grey, grey - red], 2).clip(0, 255).astype(np.uint8) for red in (60, 0, -60)]
    images = [*tints, np.asarray(photo(0).transpose(Image.Transpose.FLIP_LEFT_RIGHT)), *flat]
    assert look_of(encoded(Image.fromarray(flat[0]))) is None
    looks = [look_of(encoded(Image.fromarray(image))) for image in tints]
    assert max((looks[0].phash ^ look.phash).bit_count() for look in looks) <= 4  # colours alone tell these
    its = {f"i{n}": {"png": encoded(Image.fromarray(image))} for n, image in enumerate(images)}
    assert dropped(write(tmp_path, **its, again=its["i4"])) == {"again": ("exact", "i4")}


OTHER = "a small red hen looks over the lazy dog while the sun warms all of the old stone bridge"
CAPTION = "the quick brown fox jumps over the lazy dog while the rain falls on the old stone bridge"


def test_texts_that_differ_in_case_are_exact_and_in_a_word_near_duplicates(tmp_path):
    texts = {
        "a": CAPTION, "b": f"  {CAPTION.upper()}!", "c": CAPTION.replace("stone", "stones"),
        "d": OTHER, "e": "the fox",
        "f": "die Brücke", "g": " ", "h": "赤い四角", "i": "赤い四角。",
    }  # fmt: skip
    folder = write(tmp_path, **{key: {"txt": text.encode()} for key, text in texts.items()})
    found = dedup([str(folder)], Options(settings=NEAR, workers=1))
    rows = {row["key"]: row for row in map(found.row, found.dropped.tolist())}
    assert {key: (row["kind"], row["of_key"]) for key, row in rows.items()} == {
        "b": ("exact", "a"), "c": ("near", "a"), "i": ("exact", "h"),
    }  # fmt: skip
    assert rows["c"]["distance"] == pytest.approx(6 / 90, abs=0.08)  # 84 runs; the other has 1 more and 5 new
    assert "samples without any of --by: 1" in "\n".join(summary(found))
    assert dropped(folder, settings=Settings()) == {"b": ("exact", "a"), "i": ("exact", "h")}


def test_what_is_compared_is_the_first_of_by_that_a_sample_has(tmp_path):
    red, blue, tone = encoded(photo(1)), encoded(photo(2)), b"RIFF of one"
    folder = write(
        tmp_path, a={"png": red, "wav": tone, "txt": b"red"}, b={"png": red, "txt": b"rouge"},
        c={"png": red, "txt": b"Red."}, d={"png": blue, "wav": tone, "txt": b"red"}, e={"txt": b"red"},
        f={"wav": tone, "json": b'{"caption": "blue"}'}, g={"wav": tone}, h={"json": b'{"text": "red"}'},
    )  # fmt: skip
    found = {by: {*dropped(folder, settings=Settings(read_by(by)))} for by in (
        "image,audio,text", "image+text", "text", "audio+text,image", "text+image,text",
    )}  # fmt: skip
    assert found == {
        "image,audio,text": {"b", "c", "g", "h"},  # f has no image, so it is compared with g
        "image+text": {"c"},
        "text": {"c", "d", "e", "h"},
        "audio+text,image": {"d", "c"},  # a and d have both; b and c have an image
        "text+image,text": {"c", "h"},
    }
    for wrong in ("", "image,", "image+image", "video", "text,text"):
        with pytest.raises(ValueError, match="is no list of image, audio, text"):
            read_by(wrong)


def test_near_duplicates_by_several_media_are_near_in_all_of_them(tmp_path):
    first, second = photo(1), photo(2)
    folder = write(
        tmp_path, a={"png": encoded(first), "txt": CAPTION.encode()}, b={"png": encoded(first), "txt": b"another"},
        c={"jpg": EDITS["jpeg"](first), "txt": CAPTION.replace("stone", "stones").encode()},
        d={"png": encoded(second), "txt": CAPTION.encode()},
    )  # fmt: skip
    assert dropped(folder, settings=Settings(read_by("image+text"), near=True)) == {"c": ("near", "a")}


def test_test_is_kept_over_val_over_train_and_held_out_samples_over_all(tmp_path):
    image, text = encoded(photo(1)), {"txt": b"one text"}
    write(tmp_path / "train", a={"png": image}, b=text, c={"txt": b"mine"}, d={"txt": b"mine"}, h={"txt": b"held"})
    write(tmp_path / "validation", e={"png": image}, f=text)
    write(tmp_path / "test", g={"jpg": EDITS["jpeg"](photo(1))})
    held = write(tmp_path / "held", x={"txt": b"Held!"}, y={"txt": b"held"})
    assert dropped(tmp_path / "train") == {"d": ("exact", "c")}
    found = dedup([str(tmp_path)], Options((str(held),), NEAR, workers=1))
    rows = {row["key"]: (row["kind"], row["of_key"]) for row in map(found.row, found.dropped.tolist())}
    assert rows == {
        "a": ("near", "g"), "e": ("near", "g"), "b": ("exact", "f"), "d": ("exact", "c"), "h": ("exact", "x"),
    }  # fmt: skip
    assert [tuple(line.split(", such as ")) for line in summary(found)] == [
        ("8 samples compared by image, audio, text: 3 exact and 2 near duplicates, 3 samples remain",),
        ("held out: 1 exact and 0 near duplicates in train of samples in --against",
         "h of train/0.tar, which repeats x of held/0.tar"),
        ("leak: 0 exact and 1 near duplicates in train of samples in test",
         "a of train/0.tar, which repeats g of test/0.tar"),
        ("within train: 1 exact and 0 near",),
        ("leak: 1 exact and 0 near duplicates in train of samples in val",
         "b of train/0.tar, which repeats f of validation/0.tar"),
        ("leak: 0 exact and 1 near duplicates in val of samples in test",
         "e of validation/0.tar, which repeats g of test/0.tar"),
    ]  # fmt: skip
    in_json = json.dumps({"split": "test", "text": "one text"}).encode()
    assert dropped(write(tmp_path / "mixed", a=text, b={"json": in_json})) == {"a": ("exact", "b")}


def test_documents_are_compared_as_a_whole_and_damaged_samples_stay(tmp_path):
    def document(*texts: str) -> dict[str, bytes]:
        parts = [{"text": texts[0]}, {"member": "0.png"}, *({"text": text} for text in texts[1:])]
        return {"0.png": encoded(photo(1)), "json": json.dumps({"parts": parts}).encode()}

    its = {
        "a": document("one", "two"), "b": document("One.", "two"), "c": document("one two"), "d": {"png": b"broken"},
        "e": {"png": b"broken", "json": b"{"}, "f": {"png": b"broken"},
    }  # fmt: skip
    found = dedup([str(write(tmp_path, **its))], Options(settings=NEAR, workers=1))
    assert {found.place(n)[2] for n in found.dropped.tolist()} == {"b", "f"}
    assert {"damaged samples: 1", "images that cannot be decoded: 2"} <= {*summary(found)}


def test_a_report_leaves_a_mask_and_hashes_a_list_to_compare_with(tmp_path, monkeypatch):
    train = write(tmp_path / "train", a={"txt": b"one"}, b={"txt": b"two"}, c={"txt": b"One"}, d={"txt": b"three"})
    (tmp_path / "elsewhere").mkdir()
    write_tar(tmp_path / "train/1.tar", [("a.txt", b"four"), ("b.txt", b"two")])
    found = dedup([str(train)], Options(workers=1))
    report, hashes = tmp_path / "report.parquet", tmp_path / "hashes.parquet"
    write_report(report, found)
    write_hashes(hashes, found)
    wanted = [True, True, False, True, True, False]
    monkeypatch.chdir(tmp_path)
    assert kept(open_indexed("train"), report).tolist() == kept(open_indexed(train), report).tolist() == wanted
    with pytest.raises(ValueError, match=r"is no report of shards in .*/elsewhere"):
        kept(open_indexed(write(tmp_path / "elsewhere", a={"txt": b"one"})), report)
    write_tar(tmp_path / "train/1.tar", [("a.txt", b"four"), ("c.txt", b"two")])
    with pytest.raises(ValueError, match=r"names 'b' as sample 1 of .*, which is another one now"):
        kept(open_indexed(train), report)

    listed = hashes.with_suffix(".txt")
    listed.write_text("\n".join(parquet.read_table(hashes)["xxh3_128"].to_pylist()[:2]) + "\n")  # of one and two
    assert {*dropped(train, against=(listed,))} == {"a", "b", "c"}
    assert {*dropped(train, against=(hashes,))} == {"a", "b", "c", "d"}
    listed.write_text("\n\nabc\n")
    with pytest.raises(ValueError, match="hash 3: 'abc' is no xxh3_128"):
        read_hashes(listed)
    with pytest.raises(ValueError, match="has no column xxh3_128"):
        read_hashes(report)
    hashes.write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="is no Parquet file"):
        read_hashes(hashes)


def test_shards_that_are_named_twice_are_refused_or_held_out(tmp_path):
    train = write(tmp_path / "train", a={"txt": b"one"})
    write(tmp_path / "test", b={"txt": b"one"})
    assert dropped(tmp_path, against=(tmp_path / "test",)) == {"a": ("exact", "b")}
    (tmp_path / "link").symlink_to(tmp_path / "test")
    assert dropped(tmp_path / "train", tmp_path / "test", against=(tmp_path / "link",)) == {"a": ("exact", "b")}
    (tmp_path / "link").unlink()
    with pytest.raises(ValueError, match="named twice"):
        dropped(tmp_path, tmp_path / "test" / ".." / "train/0.tar")
    with pytest.raises(ValueError, match="--against holds all of these shards"):
        dropped(train, against=(train,))


def test_the_command_writes_the_same_whatever_a_task_holds_and_its_report_in_a_dry_run(tmp_path, monkeypatch, capsys):
    write(tmp_path / "in", **{f"s{n}": {"txt": f"number {n % 90}".encode()} for n in range(100)})
    arguments = ["dedup", str(tmp_path / "in"), "--near", "--workers", "1"]
    contents = set()
    for number in (7, 64):
        monkeypatch.setattr(samples, "_AT_ONCE", number)
        files = [tmp_path / f"{name}{number}.parquet" for name in ("report", "hashes")]
        app([*arguments, "--report", str(files[0]), "--hashes", str(files[1])], standalone_mode=False)
        contents.add(tuple(file.read_bytes() for file in files))
    assert len(contents) == 1
    assert parquet.read_table(files[0])["kind"].to_pylist().count("exact") == 10
    app([*arguments, "--report", str(tmp_path / "dry.parquet"), "--dry-run"], standalone_mode=False)
    assert (tmp_path / "dry.parquet").read_bytes() == files[0].read_bytes()
    said = capsys.readouterr().out
    assert "100 samples compared by image, audio, text: 10 exact" in said
    assert "no shards were written; --out FOLDER" in said
    with pytest.raises(ValueError, match="name a Parquet file"):
        app([*arguments, "--report", str(tmp_path / "report.csv")], standalone_mode=False)
    with pytest.raises(ValueError, match="give --near, too"):
        app(["dedup", str(tmp_path / "in"), "--image-distance", "2"], standalone_mode=False)


def test_out_has_what_remains_and_quarantine_what_is_dropped_byte_for_byte(tmp_path, capsys):
    its = {key: {"png": encoded(photo(n)), "txt": b"x"} for key, n in (("a", 1), ("b", 2), ("c", 1))}
    write(tmp_path / "in/train", **its)
    write(tmp_path / "in/test", d={"txt": b"text"}, e={"jpg": EDITS["jpeg"](photo(2))})
    folders = {name: tmp_path / name for name in ("quarantine", "out")}
    arguments = ["dedup", str(tmp_path / "in"), "--near", "--workers", "1"]
    options = [word for name, folder in folders.items() for word in (f"--{name}", str(folder))]
    app([*arguments, *options, "--dry-run"], standalone_mode=False)
    assert not any(folder.exists() for folder in folders.values())
    assert f"would write {tmp_path}/quarantine: 2 samples" in capsys.readouterr().out
    app([*arguments, *options], standalone_mode=False)
    found = {
        f"{name}/{split.name}": {source.key(i): source.read(i).members for i in range(len(source))}
        for name, folder in folders.items()
        for split in sorted(folder.iterdir())
        if split.is_dir() and (source := open_indexed(split))
    }
    assert {split: {*members} for split, members in found.items()} == {
        "out/train": {"a"}, "out/test": {"d", "e"}, "quarantine/train": {"b", "c"},
    }  # fmt: skip
    assert found["out/train"]["a"] == its["a"]
    assert found["quarantine/train"]["b"] == its["b"]
    capsys.readouterr()
    app([*arguments, *options, "--json", "--overwrite"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out) == {
        "samples": 5, "by": ["image", "audio", "text"], "exact": 1, "near": 1, "remain": 3,
        "between": [
            {"split": "train", "of": "test", "exact": 0, "near": 1},
            {"split": "train", "of": "train", "exact": 1, "near": 0},
        ],
        "not_compared": {}, "written": [str(folder) for folder in folders.values()],
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"quarantine holds complete shards; .* pass --overwrite"):
        app([*arguments, *options], standalone_mode=False)
    assert not capsys.readouterr().out  # at once, before anything is read


def test_shards_are_replaced_once_the_dropped_samples_are_written(tmp_path):
    shard_rows([Row("a", text="one"), Row("b", text="One!")], tmp_path, tmp_path / "in", ShardOptions(workers=1))
    arguments = ["dedup", str(tmp_path / "in"), "--out", str(tmp_path / "in"), "--overwrite", "--workers", "1"]
    with pytest.raises(ValueError, match="name two folders"):
        app([*arguments, "--quarantine", str(tmp_path / "x/../in")], standalone_mode=False)
    app([*arguments, "--quarantine", str(tmp_path / "out")], standalone_mode=False)
    found = {name: open_indexed(tmp_path / name / "train") for name in ("in", "out")}
    assert sorted(source.key(0) for source in found.values()) == ["a", "b"]
    assert [len(source) for source in found.values()] == [1, 1]
