"""Folders, zips and shards as rows, how a form is detected, and what ``mmmoe-data shard`` makes of them."""

from __future__ import annotations

import io
import json
import os
import tarfile
import urllib.parse
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from mmmoe_pretrain.data.storage.files import Files
from mmmoe_pretrain.data_prep.rows import archives
from mmmoe_pretrain.data_prep.rows.forms import detect
from mmmoe_pretrain.data_prep.rows.inputs import open_input
from mmmoe_pretrain.data_prep.rows.refs import Range, Reader
from mmmoe_pretrain.data_prep.rows.row import Fault, Row
from mmmoe_pretrain.data_prep.shards.shard import ShardOptions, write_shards
from tests.data.servers import http_server


def png(red: int = 255) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2), (red, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


PNG = png()


def make(root: Path, *names: str, **contents: str | bytes) -> Path:
    """Empty files of these names, and ``contents`` by name."""
    for name, content in {**dict.fromkeys(names, b""), **contents}.items():
        path = os.fsdecode(os.fsencode(root) + b"/" + os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
    return root


def rows(place: object, *columns: str, form: str = "") -> list[Row]:
    return [each.row for each in open_input(str(place), columns, form).rows if not isinstance(each, Fault)]


def notes(place: object, *columns: str) -> str:
    given = open_input(str(place), columns)
    list(given.rows)
    return "\n".join(given.notes)


def test_files_of_one_name_in_one_folder_are_one_sample(tmp_path: Path) -> None:
    make(
        tmp_path, "b 1.v2.JPG", "sub/c.wav", "sub/c.npy", "sub/c.png", "sub/d.flac", "sub/e.mp3", "sub/f.png",
        **{"b 1.v2.txt": "\ufefftext of b\r\n", "sub/c.caption": "caption", "sub/c.lab": "lab", "sub/d.lab": "heard",
           "sub/e.json": '{"caption": "in json", "class": 3, "id": 7, "key": "k", "split": "dev", "n": NaN}',
           "sub/f.png.txt": "with its suffix"},
    )  # fmt: skip
    assert rows(tmp_path) == [
        Row("b%201%2Ev2", image="b 1.v2.JPG", text="text of b", split=""),
        Row("sub%2Fc", image="sub/c.png", audio="sub/c.wav", text="caption", split="", members={"npy": "sub/c.npy"}),
        Row("sub%2Fd", audio="sub/d.flac", text="heard", split=""),
        Row("sub%2Fe", audio="sub/e.mp3", text="in json", label="3", split="val",
            extra={"id": 7, "n": None, "original_key": "k"}),
        Row("sub%2Ff", image="sub/f.png", text="with its suffix", split=""),
    ]  # fmt: skip


def test_what_is_in_no_sample_is_counted_and_links_end(tmp_path: Path) -> None:
    make(
        tmp_path,
        "a.png",
        "x/a.png",
        ".DS_Store",
        "._a.png",
        ".git/b.png",
        "Thumbs.db",
        "README.txt",
        "m.pth",
        "n.pth",
    )
    os.symlink("..", tmp_path / "x/back")
    make(tmp_path, "y/z/d.png")
    os.symlink("..", tmp_path / "y/z/back")
    os.symlink(tmp_path / "nowhere", tmp_path / "gone.png")
    make(tmp_path.with_name("elsewhere"), "c.png")
    for name in ("l1", "l2"):
        os.symlink(tmp_path.with_name("elsewhere"), tmp_path / name)
    assert [row.image for row in rows(tmp_path)] == ["a.png", "l1/c.png", "x/a.png", "y/z/d.png"]
    said = notes(tmp_path)
    for what in (
        "1 file without an image or audio of the same name in the same folder left out, such as README.txt",
        "2 files of no format that is read left out: 2 *.pth",
        "hidden or system files: 4",
        "links to folders that are read already: 3",
        "links that lead nowhere, or no plain files: 1",
    ):
        assert what in said


@pytest.mark.parametrize("name", ["a.txt", "a.json"])
def test_texts_that_links_lead_to_outside_of_the_folder_are_refused(name: str, tmp_path: Path) -> None:
    make(tmp_path / "in", "a.png", "b.png", **{"b.txt": "inside"})
    make(tmp_path, **{name: '{"secret": 1}'})
    os.symlink(tmp_path / name, tmp_path / "in" / name)
    os.symlink("b.txt", tmp_path / "in/b.caption")
    first, second = rows(tmp_path / "in")
    assert first.problem.startswith(f"{name} lies outside of the folder of the rows")
    assert (first.text, first.extra, second.text, second.problem) == (None, {}, "inside", "")


def test_images_that_differ_by_their_suffix_are_samples_of_their_own(tmp_path: Path) -> None:
    make(tmp_path, "a.jpg", "a.png", **{"a.txt": "both", "a.png.caption": "png alone"})
    assert rows(tmp_path) == [
        Row("a%2Ejpg", image="a.jpg", text="both", split=""),
        Row("a%2Epng", image="a.png", text="both", split="", members={"caption": "a.png.caption"}),
    ]


@pytest.mark.parametrize(
    "name", [b"caf\xe9.png", "Ünï (2)~.png".encode(), b"100%.%41.png", b"\xff\xfe/\xe2\x98\x83.png", b"a\nb.png"]
)
def test_any_name_becomes_a_key_and_comes_back(tmp_path: Path, name: bytes) -> None:
    make(tmp_path, os.fsdecode(name))
    (row,) = rows(tmp_path)
    assert os.fsencode(str(row.image)) == name
    assert urllib.parse.unquote_to_bytes(row.key) == name.removesuffix(b".png")
    assert set(row.key) <= set("0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_-%")


@pytest.mark.parametrize(
    ("names", "columns", "labels"),
    [
        (["cat/1.png", "dog/1.png"], [], ["cat", "dog"]),
        (["train/cat/1.png", "train/dog/1.png", "valid/dog/2.png"], [], ["cat", "dog", "dog"]),
        (["pos/1.txt", "neg/1.txt"], [], ["neg", "pos"]),
        (["cat/1.png", "dog/1.png", "dog/1.txt"], [], ["", ""]),  # a sidecar
        (["cat/1.png", "dog/1.png", "2.png"], [], ["", "", ""]),
        (["images/1.png", "audio/1.wav"], [], ["", ""]),
        (["photos2/1.png"], [], [""]),
        (["cat/1.png", "dog/1.png"], ["label="], ["", ""]),
        (["pets/cat/1.png", "2.png"], ["label=folder"], ["", "cat"]),
    ],
)
def test_folders_are_classes_where_nothing_else_says_what_is_in_them(
    tmp_path: Path, names: list[str], columns: list[str], labels: list[str]
) -> None:
    make(tmp_path, **dict.fromkeys(names, "x"))
    assert [row.label for row in rows(tmp_path, *columns)] == labels
    assert ("folders are taken as classes" in notes(tmp_path, *columns)) == (any(labels) and not columns)


def test_speech_corpora_are_read_with_their_transcripts(tmp_path: Path) -> None:
    libri = make(tmp_path / "libri", "dev/1/2/1-2-0.flac", **{"dev/1/2/1-2.trans.txt": "1-2-0 HELLO YOU\n1-2-1 NO\n"})
    assert rows(libri) == [Row("dev%2F1%2F2%2F1-2-0", audio="dev/1/2/1-2-0.flac", text="HELLO YOU", split="val")]
    lj = make(tmp_path / "lj", "wavs/a.wav", **{"metadata.csv": 'a|Dr. "X|Doctor "X\nb|c\n'})
    assert [(row.key, row.audio, row.text) for row in rows(lj)] == [
        ("a", "wavs/a.wav", 'Doctor "X'),
        ("b", "wavs/b.wav", "c"),
    ]


def test_a_damaged_sidecar_makes_a_broken_sample(tmp_path: Path) -> None:
    make(tmp_path / "in", **{f"{i}.png": PNG for i in range(5)}, **{
        "0.txt": b"\xff", "1.json": "{", "2.json": "[1]", "3.txt": "x" * (1 << 20) + "x", "4.txt": "fine"
    })  # fmt: skip
    given = open_input(str(tmp_path / "in"))
    report = write_shards(given, tmp_path / "out", ShardOptions(workers=1, max_bad_fraction=1))
    assert report.shards["train"][0]["nsamples"] == 1
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    assert sorted(reason.removeprefix(f"{tmp_path}/in/")[:20] for reason in reasons) == [
        "0.txt is not UTF-8 (", "1.json is not JSON (", "2.json holds list, n", "3.txt has 1048577 by"
    ]  # fmt: skip


def members(out: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(out.glob("*/*.tar")):
        with tarfile.open(path) as tar:
            found |= {name: tar.extractfile(name).read() for name in tar.getnames()}  # type: ignore[union-attr]
    return found


def test_a_field_of_one_sample_does_not_refuse_the_others(tmp_path: Path) -> None:
    texts = {
        "a": r'{"text": "a", "label": "\ud800"}',
        "b": '{"text": "b", "audio_kind": "music"}',
        "c": '{"text": "c"}',
    }
    contents = {f"{name}.json": text for name, text in texts.items()} | {f"{name}.png": PNG for name in texts}
    make(tmp_path / "folder", **contents)
    write_tar(tmp_path / "shards/0.tar", dict(sorted(contents.items())))
    for place in ("folder", "shards"):
        first, second, third = rows(tmp_path / place)
        assert first.problem == "a text holds half of a character (a lone surrogate)" and not first.label
        assert (second.problem, second.text, second.extra) == ("", "b", {"original_audio_kind": "music"})
        assert (third.problem, third.text) == ("", "c")
        options = ShardOptions(workers=1, max_bad_fraction=0.5)
        report = write_shards(open_input(str(tmp_path / place)), tmp_path / f"{place}-out", options)
        assert [bad.key for bad in report.skipped] == ["a"]


def test_a_folder_a_zip_of_it_and_its_shards_give_the_same_samples(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {
        f"train/{c}/{i}.{s}": png(i) if s == "png" else f"{c} {i}"
        for c in "ab"
        for i in (1, 2)
        for s in ("png", "txt")
    }
    make(tmp_path / "in", **files)
    written = {}
    archive = tmp_path / "in.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as into:
        for name in reversed(files):
            into.write(tmp_path / "in" / name, f"top/{name}", zipfile.ZIP_STORED if "1" in name else None)
    table = make(tmp_path / "in", **{"all.csv": "path,text,split\n" + "".join(
        f"{name},{text},train\n" for name, text in ((n, files[n[:-3] + "txt"]) for n in files if n.endswith("png"))
    )}) / "all.csv"  # fmt: skip
    for name, place, columns, form in [
        ("folder", tmp_path / "in", [], "folder"), ("zip", archive, [], ""), ("table", table, [], ""),
        ("shards", tmp_path / "out-folder", [], ""),
    ]:  # fmt: skip
        given = open_input(str(place), columns, form)
        write_shards(given, tmp_path / f"out-{name}", ShardOptions(workers=1, samples_per_shard=3))
        written[name] = members(tmp_path / f"out-{name}")
    assert written["folder"].keys() == {
        f"train%2F{c}%2F{i}.{s}" for c in "ab" for i in "12" for s in ("png", "txt", "json")
    }
    assert written["folder"]["train%2Fb%2F2.txt"] == b"b 2" and written["folder"]["train%2Fb%2F2.png"] == png(2)
    assert all(found == written["folder"] for found in written.values())


def write_zip(path: Path, *names: str, method: int = zipfile.ZIP_STORED, data: bytes = PNG) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name in names:
            archive.writestr(name, data)
    return path


def test_names_in_zips_are_utf_8_or_cp437(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", "u\u00e9.png", "x--.png", "y-.png", "__MACOSX/._y.png", "e/")
    data = path.read_bytes().replace(b"x--", b"x\xc3\xa9").replace(b"y-", b"y\x82")  # UTF-8 unsaid; cp437
    path.write_bytes(data)
    assert [urllib.parse.unquote(row.key) for row in rows(path)] == ["ué", "xé", "yé"]
    (first, *_) = rows(path)
    assert Reader(tmp_path).read(first.image) == PNG  # type: ignore[arg-type]


def test_several_zips_are_folders_of_their_names(tmp_path: Path) -> None:
    for name in ("train", "part1"):
        write_zip(tmp_path / f"{name}.zip", "top/a.png", "top/b.png")
    assert [(row.key, row.split) for row in rows(tmp_path)] == [
        ("part1%2Fa", ""), ("part1%2Fb", ""), ("train%2Fa", "train"), ("train%2Fb", "train")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("names", "method", "old", "new", "complaint"),
    [
        (["../a.png"], 0, b"", b"", "a path that leaves its folder"),
        (["/a.png"], 0, b"", b"", "a path that leaves its folder"),
        (["a.png"], zipfile.ZIP_BZIP2, b"", b"", "packed by bzip2, and stored and deflated files are read"),
        (["a.png"], 0, b"PK\1\2\x14\x03\x14\x00\x00\x00", b"PK\1\2\x14\x03\x14\x00\x01\x00", "is encrypted"),
        (["a.png", "b.png"], 0, b"b.png", b"a.png", "holds 'a.png' twice"),
        (["a.png"], 0, b"PK\3\4", b"PK\7\4", "'a.png' is not where its directory says"),
        (["a.png"], 0, b"PK\5\6", b"PK\7\6", "is no zip archive"),
    ],
)
def test_a_zip_that_cannot_be_trusted_is_refused(
    tmp_path: Path, names: list[str], method: int, old: bytes, new: bytes, complaint: str
) -> None:
    path = write_zip(tmp_path / "a.zip", *names, method=method)
    if old:
        assert old in path.read_bytes()
        path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(ValueError, match=complaint):
        rows(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_file_of_a_zip_whose_bytes_have_changed_is_damaged(tmp_path: Path, method: int) -> None:
    path = write_zip(tmp_path / "a.zip", "a.txt", method=method, data=b"hello")
    packed = zlib.compress(b"hello", wbits=-15) if method else b"hello"
    changed = zlib.compress(b"hellx", wbits=-15) if method else b"hellx"
    path.write_bytes(path.read_bytes().replace(packed, changed))
    (found,) = open_input(path).rows
    assert "a.txt in a.zip is damaged: its bytes have not the checksum" in found.row.problem


def test_files_of_a_zip_are_bounded_in_number_size_and_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_zip(tmp_path / "a.zip", "a.png", "b.png", method=zipfile.ZIP_DEFLATED, data=b"x" * 300)
    data = path.read_bytes()
    second = data.index(b"PK\3\4", 4)
    at = data.rindex(b"PK\1\2") + 42  # the place of b.png in the directory
    overlapping = data[:at] + (0).to_bytes(4, "little") + data[at + 4 :]
    for changed, most, complaint in [
        (data, (1, 10**6), "holds 2 files, and at most 1 are read"),
        (data, (9, 100), "'a.png' of 300 bytes, and at most 100 are read"),
        (overlapping, (9, 10**6), "inside of another file"),
    ]:
        assert int.from_bytes(data[at : at + 4], "little") == second
        path.write_bytes(changed)
        monkeypatch.setattr(archives, "MAX_FILES", most[0])
        monkeypatch.setattr(archives, "MAX_MEMBER_BYTES", most[1])
        with pytest.raises(ValueError, match=complaint):
            rows(path)


def write_tar(path: Path, contents: Mapping[str, bytes | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in contents.items():
            data = content if isinstance(content, bytes) else content.encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_samples_of_other_tools_keep_their_keys_fields_and_files(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {
        "a/ü 1.png": PNG, "a/ü 1.txt": " text\n", "a/ü 1.cls": "3\n", "k%20.png": PNG, "k%20.seg.png": PNG,
        "k%20.json": '{"caption": "cap", "text": 7, "label": [1], "split": "x", "score": 2.5}', "k%20.pth": "?",
        "bad.json": "{", "bad.png": PNG,
    })  # fmt: skip
    found = rows(tmp_path)
    assert [(row.key, row.text, row.label, sorted(row.members), row.extra) for row in found] == [
        ("a%2F%C3%BC%201", " text", "3", [], {}),
        ("k%20", "cap", "", ["pth", "seg.png"],
         {"original_text": 7, "original_label": [1], "original_split": "x", "score": 2.5}),
        ("bad", None, "", [], {}),
    ]  # fmt: skip
    assert found[2].problem.startswith("json is not JSON")
    assert Reader(tmp_path).read(found[1].members["pth"]) == b"?" and open_input(str(tmp_path)).order == "input"
    assert [row.key for row in rows(tmp_path / "0.tar", "key=")] == ["0%2Fa%2F%C3%BC%201", "0%2Fk%20", "0%2Fbad"]


def test_output_of_img2dataset_and_folders_of_energon_are_shards(tmp_path: Path) -> None:
    fields = '{"caption": "cap", "url": "http://x/1.jpg", "key": "000000000", "status": "success", "width": 2}'
    write_tar(tmp_path / "i/00000.tar", {"000000000.png": PNG, "000000000.txt": "cap", "000000000.json": fields})
    make(tmp_path / "i", "00000_stats.json")
    told = {"status": ["success", "failed_to_download", "failed_to_download", "failed_to_resize"],
            "error_message": [None, "HTTP Error 404", "HTTP Error 404", "image decoding error"]}  # fmt: skip
    parquet.write_table(pyarrow.table(told), tmp_path / "i/00000.parquet")
    (row,) = rows(tmp_path / "i")
    failed = "failed_to_download 2, failed_to_resize 1; most often: HTTP Error 404"
    assert notes(tmp_path / "i").endswith(f": 3 rows of img2dataset without a sample ({failed})")
    assert (row.key, row.text, row.split, row.extra["url"]) == ("000000000", "cap", "", "http://x/1.jpg")
    for name in ("s0", "s1"):
        write_tar(tmp_path / f"e/{name}.tar", {f"{name}.png": PNG})
    split = "split_parts: {train: [s0.tar], val: [s1.tar], test: []}\n"
    info = '{"shard_counts": {"s0.tar": 1, "s1.tar": 1}}'
    make(tmp_path / "e/.nv-meta", **{".info.json": info, "split.yaml": split})
    assert [(row.key, row.split) for row in rows(tmp_path / "e")] == [("s0", "train"), ("s1", "val")]
    assert [row.key for row in rows(f"{tmp_path}/e#val")] == ["s1"]
    for name in ("train", "dev"):
        write_tar(tmp_path / f"w/{name}/{name}.tar", {f"{name}.png": PNG})
    both = [("dev", "val"), ("train", "train")]
    assert [(row.key, row.split) for row in rows(tmp_path / "w")] == both
    assert [(row.key, row.split) for row in rows(f"{tmp_path}/w/dev/dev.tar::{tmp_path}/w/train/train.tar")] == both


def test_documents_survive_from_shards_to_shards(tmp_path: Path) -> None:
    parts = [{"text": "T"}, {"member": "1.png", "loss": False}, {"text": "U"}]
    write_tar(tmp_path / "in/0.tar", {
        "d.1.png": PNG, "d.json": json.dumps({"parts": parts, "label": "x"}), "d.left.png": PNG,
        "e.json": json.dumps({"parts": [{"member": "2.png"}]}),
    })  # fmt: skip
    given = open_input(str(tmp_path / "in"))
    write_shards(given, tmp_path / "out", ShardOptions(workers=1, max_bad_fraction=1))
    found = members(tmp_path / "out")
    assert found.keys() == {"d.1.png", "d.json"} and found["d.1.png"] == PNG
    fields = json.loads(found["d.json"])
    assert (fields["parts"], fields["label"]) == (parts, "x")
    assert "part 0 of parts: '2.png' is none of its files (none)" in (tmp_path / "out/skipped.jsonl").read_text()
    assert "1 file left out: of documents that name them in none of their parts" in given.notes[0]


@pytest.mark.parametrize(
    ("files", "form"),
    [
        (["manifest.jsonl", "a.png", "0.tar"], "manifest"),
        (["a.png", "LICENSE.txt", "b/c.wav"], "folder"),
        (["0.tar", "0.parquet", "0_stats.json"], "shards"),
        (["train/0.tar", "skipped.jsonl", "README.md"], "shards"),
        (["a.csv", "b.csv"], "table"),
        (["a.zip", "b.zip"], "zip"),
        (["data/train-0.parquet"], "huggingface"),
        (["train/metadata.parquet", "train/a.png"], "huggingface"),
        (["dataset_dict.json", "train/data.arrow"], "huggingface"),
        (["a.csv", "img/a.png"], r"holds a.csv and images or audio, .* \(\S+/a.csv\),.* by --form table or folder"),
        (["0.tar", "a.png"], "by --form shards or folder"),
        (["a.zip", "a.wav"], "by --form zip or folder"),
    ],
)  # fmt: skip
def test_the_form_of_a_folder_is_detected_or_asked_for(tmp_path: Path, files: list[str], form: str) -> None:
    make(tmp_path, *files)
    if "--form" not in form:
        assert detect(str(tmp_path), Files()) == form
        return
    with pytest.raises(ValueError, match=form):
        detect(str(tmp_path), Files())


def test_what_is_no_input_is_refused_with_the_remedy(tmp_path: Path) -> None:
    make(tmp_path, "a.png", "b.xyz", "none/.keep", "t.csv", "c.tar.gz", **{"k.jsonl": '{"key": "a", "text": "x"}'})
    for place, columns, form, complaint in [
        ("a.png", [], "", "a.png is one image file; name its folder, or a table that lists it"),
        ("b.xyz", [], "", "is of no form that is read; name a folder"),
        ("absent", [], "", "there is nothing at .*absent"),
        ("none", [], "", r"holds no image, audio or text \(no files\)"),
        ("c.tar.gz", [], "", "unpack by gunzip"),
        ("a.png", [], "list", "there is no form list; the forms are manifest, table"),
        ("a.png", ["image=x"], "folder", "has no columns but the label"),
        ("k.jsonl", ["image=x"], "", "names its fields itself, without --column"),
    ]:
        with pytest.raises(ValueError, match=complaint):
            rows(tmp_path / place, *columns, form=form)
    with pytest.raises(ValueError, match=r"several forms \(table, zip\)"):
        rows(f"{write_zip(tmp_path / 'z.zip', 'a.png')}::{tmp_path}/t.csv")
    assert rows(tmp_path / "k.jsonl") == [Row("a", text="x", split="")]


def test_tables_zips_and_shards_at_urls_are_read_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hidden")
    make(tmp_path / "d", **{"a.csv": "image,text\nx/1.png,one\n", "x/1.png": PNG})
    parquet.write_table(pyarrow.table({"image": [PNG], "text": ["two"]}), tmp_path / "d/b.parquet")
    write_zip(tmp_path / "d/c.zip", "3.png", method=zipfile.ZIP_DEFLATED)
    write_tar(tmp_path / "d/0.tar", {"4.png": PNG, "4.txt": "four"})
    with http_server(tmp_path) as server:
        found = [rows(f"{server.url}/d/{name}")[0] for name in ("a.csv", "b.parquet", "c.zip", "0.tar")]
        assert [row.text for row in found] == ["one", "two", None, "four"]
        reader = Reader(Path())
        assert [reader.read(row.image) for row in found if row.image] == [PNG] * 4
        with pytest.raises(ValueError, match="SECRET"):
            reader.read(f"{server.url}/$SECRET.png")  # others wrote it: no variable is filled in
        assert not any("hidden" in path for path, _ in server.requests)
        assert isinstance(found[2].image, Range) and found[0].image == f"{server.url}/d/x/1.png"
