"""Tables as rows: text files, Parquet, Arrow, and the folders of Hugging Face's datasets."""

from __future__ import annotations

import datetime
import decimal
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from mmmoe_pretrain.data_prep.rows import columnar
from mmmoe_pretrain.data_prep.rows.inputs import Input, open_input
from mmmoe_pretrain.data_prep.rows.refs import Cell, Reader
from mmmoe_pretrain.data_prep.rows.row import Fault, Row

PNG, JPEG = b"\x89PNG\r\n\x1a\n one", b"\xff\xd8\xff two"  # by their first bytes


def read(place: Path, *columns: str, form: str = "") -> tuple[Input, list[Row]]:
    given = open_input(str(place), columns, form)
    found = list(given.rows)
    assert not [each for each in found if isinstance(each, Fault)]
    return given, [each.row for each in found]


def faults(place: Path, *columns: str) -> list[str]:
    return [": ".join(each) for each in open_input(str(place), columns).rows if isinstance(each, Fault)]


def table(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'image,text,n\nx/1.jpg,"say ""a"",\nthen b",5\nx/2.png,Ü,\n'),
        ("a.csv", '\ufeffImage;Caption;n\r\nx/1.jpg;"say ""a"",\nthen b";5\r\n\r\nx/2.png;Ü;\r\n'),
        ("a.csv", '\r\n \r\nimage,text,n\r\nx/1.jpg,"say ""a"",\nthen b",5\r\nx/2.png,Ü,\r\n'),
        ("a.csv", 'IMG Path\tTEXT\tn\nx/1.jpg\t"say ""a"",\nthen b"\t5\nx/2.png\tÜ\t\n'),
        ("a.txt", 'image|caption|n\nx/1.jpg|"say ""a"",\nthen b"|5\nx/2.png|Ü|\n'),
        ("a.jsonl", '{"image_path": "x/1.jpg", "sentence": "say \\"a\\",\\nthen b", "n": "5"}\n'
                    '{"image_path": "x/2.png", "sentence": "Ü", "n": ""}\n'),
        ("a.json", '[{"image": "x/1.jpg", "text": "say \\"a\\",\\nthen b", "n": "5"},'
                   '{"image": "x/2.png", "text": "Ü", "n": ""}]'),
    ],
)  # fmt: skip
def test_tables_in_text_files_hold_the_same_rows(tmp_path: Path, name: str, content: str) -> None:
    path = table(tmp_path, name, content)
    table(tmp_path, f"{name}.gz", gzip.compress(path.read_bytes()))
    given, rows = read(path)
    assert (
        rows
        == read(tmp_path / f"{name}.gz")[1]
        == [
            Row("x%2F1", image="x/1.jpg", text='say "a",\nthen b', split="", extra={"n": "5"}),
            Row("x%2F2", image="x/2.png", text="Ü", split="", extra={"n": ""}),
        ]
    )
    assert given.root == tmp_path and given.order == "shuffled"
    assert [note for note in given.notes if "image from " in note and "text from " in note] == given.notes


def test_quotes_in_a_tsv_belong_to_its_text_unless_they_enclose_a_field(tmp_path: Path) -> None:
    path = table(tmp_path, "clips.tsv", 'path\tsentence\na.mp3\t"So" it is\nb.mp3\t"one ""word"""\n"c.mp3\tx\n')
    rows = read(path)[1]
    assert [row.text for row in rows] == ['"So" it is', 'one "word"', "x"]
    assert [row.audio for row in rows] == ["a.mp3", "b.mp3", '"c.mp3']


@pytest.mark.parametrize(
    ("header", "fields"),
    [
        ("URL,TEXT,hash", {"file": "URL", "text": "TEXT"}),  # LAION
        ("url,image_path,caption", {"image": "image_path", "text": "caption"}),
        ("audio_filepath,duration,text", {"audio": "audio_filepath", "text": "text"}),  # NeMo
        (
            "client_id,path,sentence,locale",
            {"file": "path", "text": "sentence", "language": "locale"},
        ),  # Common Voice
        ("uid,text,caption,license", {"text": "text", "key": "uid", "licence": "license"}),
        ("file_name,Class Name,split", {"file": "file_name", "label": "Class Name", "split": "split"}),
    ],
)
def test_columns_are_known_by_the_names_that_people_use(tmp_path: Path, header: str, fields: dict[str, str]) -> None:
    given, rows = read(table(tmp_path, "a.csv", header + "\n"))
    taken = given.notes[0].partition(": ")[2].partition("; ")[0].split(", ")
    assert rows == [] and set(taken) == {f"{field} from {column}" for field, column in fields.items()}


def test_columns_are_chosen_declined_and_joined(tmp_path: Path) -> None:
    path = table(tmp_path, "a.csv", "id,source,name,text,pic\n7,web,x/1,no,u.png\n8,web,../2,no,\n")
    rows = read(path, "image=PIC", "text=", "source=", "audio=wavs/{name}.wav")[1]
    other = {"original_source": "web", "original_text": "no"}
    assert rows == [
        Row("7", image="u.png", audio="wavs/x/1.wav", split="", extra={"name": "x/1", **other}),
        Row("8", audio="wavs/../2.wav", split="", extra={"name": "../2", **other}),
    ]
    path = table(tmp_path, "b.csv", "image,caption\na.jpg,one\na.jpg,two\n")  # several texts of an image
    assert [(row.key, row.group, row.text) for row in read(path, "key=")[1]] == [
        ("000000001", "a%2Ejpg", "one"),
        ("000000002", "a%2Ejpg", "two"),
    ]
    for columns, complaint in [
        (["image=x"], r"--column image=x: .*a.csv has no column x, but id, source, name, text, pic"),
        (["image={x}.png"], "has no column x"),
        (["colour=pic"], "--column colour=pic is not FIELD=COLUMN with a field of key, image"),
        (["text=name", "caption=pic"], "--column names text twice"),
    ]:
        with pytest.raises(ValueError, match=complaint):
            read(tmp_path / "a.csv", *columns)


def test_a_row_without_an_id_has_the_key_of_its_path_or_its_number(tmp_path: Path) -> None:
    content = "url\nhttps://user:word@host/a.jpg?token=t\nb c/d.v1.wav\nhttps://host/image?id=3\n"
    assert read(table(tmp_path, "urls.txt", content))[1] == [
        Row("000000001", image="https://user:word@host/a.jpg?token=t", split="",
            extra={"url": "https://***@host/a.jpg?token=***"}),
        Row("b%20c%2Fd%2Ev1", audio="b c/d.v1.wav", split=""),
        Row("000000003", image="https://host/image?id=3", split="", extra={"url": "https://host/image?id=3"}),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.csv", "a,b\n1,2\n", r"a.csv has the columns a, b, and none .* --column image=NAME"),
        ("a.csv", "text,text\n", "several columns named 'text'"),
        ("a.csv", "", "a.csv is empty"),
        ("a.csv", 'text,"a"b\n', "line 1 is not CSV"),
        ("a.csv", "text\ncaf\xe9\n".encode("latin-1"), r"line 2 is not UTF-8 \(byte 0xe9\); .*iconv -f WINDOWS-1252"),
        ("a.tsv", "text\n".encode("utf-16"), "is UTF-16 .* iconv -f UTF-16 -t UTF-8 a.tsv"),
        ("a.csv", "text\n" + "x" * (1 << 20) + "\n", "line 2 has more than 1,048,576 bytes"),
        ("a.json", '{"images": []}', "holds an object with 'images', not a list of rows"),
        ("a.parquet", b"PAR1", "is no Parquet file that can be read"),
        ("a.gz", b"\x1f\x8b", "is of no form that is read"),
        ("a.csv.gz", gzip.compress(b"text\nx\n", mtime=0)[:-4], "a.csv.gz is damaged"),
        ("a.jsonl.gz", b"{}", "a.jsonl.gz is damaged: Not a gzipped file"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused(tmp_path: Path, name: str, content: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as caught:
        read(table(tmp_path, name, content))
    assert "\n" not in str(caught.value)


def test_all_problems_of_a_table_are_told_with_their_lines(tmp_path: Path) -> None:
    content = '\nfile,text,split\na.jpg,x,train\na.jpg,x\na.xyz,x,\n"b".jpg,x,\nc.jpg,x,holdout\nd.txt,x,\n"e.jpg,x\n'
    assert [line[:60] for line in faults(table(tmp_path, "a.csv", content))] == [
        "line 4: it has 2 fields, and the table has 3 columns",
        "line 5: 'a.xyz' is of no format that is read; --column image",
        "line 6: it is not CSV (',' expected after '\"'); double the q",
        "line 7: split 'holdout' is not one of train, val, test; --co",
        "line 8: 'd.txt' is a text, which belongs into a column of te",
        "line 9: it is not CSV (unexpected end of data); double the q",
    ]
    path = table(tmp_path, "scores.jsonl", '{"text": "x", "class": 0.5, "caption": "y"}')
    assert read(path, "label=", "text=caption")[1][0].extra == {"original_class": 0.5, "original_text": "x"}
    content = '{"text": 3}\n{"text": "x", "id": 1.5}\n[1]\n{"text": "x", "label": [1]}\n{"image": ["a.jpg"]}\n'
    assert [line[:40] for line in faults(table(tmp_path, "a.jsonl", content))] == [
        "line 1: text must be a string or null, a",
        "line 2: key must be a string or an integ",
        "line 3: it is list, not an object",
        "line 4: label must be a string or null, ",
        "line 5: image must be a path or URL, and",
    ]


def write_parquet(path: Path, features: dict[str, Any] | None = None, **columns: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    held = pyarrow.table(columns)
    if features:
        held = held.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    parquet.write_table(held, path, row_group_size=2)


FEATURES = {"picture": {"_type": "Image"}, "kind": {"_type": "ClassLabel", "names": ["cat", "dog"]}}


def test_bytes_in_parquet_stay_in_their_cells_until_they_are_read(tmp_path: Path) -> None:
    write_parquet(
        tmp_path / "data/a.parquet", FEATURES,
        picture=[{"bytes": PNG, "path": None}, {"bytes": JPEG, "path": "b.jpg"}, None],
        label=[0, 1, 1], caption=["A", "B", "C"], mask=[PNG, PNG, None], raw=[b"?", b"?", None],
    )  # fmt: skip
    given, rows = read(tmp_path / "data/a.parquet")
    name = "a.parquet"
    assert [row.image for row in rows] == [
        Cell(name, "row 1", "picture", 0, 0),
        Cell(name, "b.jpg", "picture", 0, 1),
        None,
    ]
    assert [row.members for row in rows] == [
        {"mask.png": Cell(name, "row 1", "mask", 0, 0)},
        {"mask.png": Cell(name, "row 2", "mask", 0, 1)},
        {},
    ]
    assert [(row.key, row.text, row.extra) for row in rows] == [
        (f"00000000{n}", t, {}) for n, t in enumerate("ABC", 1)
    ]
    assert (
        given.order == "input" and "1 column with bytes that are no image or audio left out: raw" in given.notes[-1]
    )
    reader = Reader(given.root)
    assert [reader.read(row.image) for row in rows[:2]] == [PNG, JPEG]
    with pytest.raises(ValueError, match=r"row 3 in a\.parquet holds no bytes in column picture"):
        reader.read(Cell(name, "row 3", "picture", 1, 0))


def test_columns_of_bytes_with_similar_names_are_not_taken_for_each_other(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, **{"image.bytes": [JPEG, JPEG], "image": [PNG, None], "text": ["a", "b"]})
    assert [(row.image, *row.members.values()) for row in read(path)[1]] == [
        (Cell("a.parquet", "row 1", "image", 0, 0), Cell("a.parquet", "row 1", "image.bytes", 0, 0)),
        (None, Cell("a.parquet", "row 2", "image.bytes", 0, 1)),
    ]
    write_parquet(path, image=[PNG], **{"\u6df1\u5ea6": [PNG], "\u9ad8\u5ea6": [JPEG], "\u6de1": [PNG]})
    fault = next(each for each in open_input(str(path)).rows if isinstance(each, Fault))
    assert "the files of two columns would be KEY.-.png; rename column '\u6de1'" in fault.reason
    twice = pyarrow.Table.from_arrays([pyarrow.array([PNG]), pyarrow.array([JPEG])], names=["image", "image"])
    parquet.write_table(twice, path)
    with pytest.raises(ValueError, match=r"a\.parquet has several columns named 'image'; rename them"):
        read(path)


def test_types_of_parquet_become_plain_json(tmp_path: Path) -> None:
    write_parquet(
        tmp_path / "a.parquet", FEATURES, kind=[1], text=["x"], day=[datetime.date(2020, 1, 2)],
        price=[decimal.Decimal("1.50")], score=[float("nan")], nested=[{"a": [1, None], "b": datetime.time(3)}],
        image=[{"bytes": None, "path": "i/1.png"}],
    )  # fmt: skip
    assert read(tmp_path / "a.parquet", "label=kind")[1] == [
        Row("i%2F1", image="i/1.png", text="x", label="dog", split="",
            extra={"day": "2020-01-02", "price": "1.50", "score": None, "nested": {"a": [1, None], "b": "03:00:00"}}),
    ]  # fmt: skip


def test_the_splits_of_a_dataset_folder_are_those_of_its_names_or_its_card(tmp_path: Path) -> None:
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001", "extra-00000-of-00001"):
        write_parquet(tmp_path / f"data/{name}.parquet", text=[name[:7]])
    found = [(row.text, row.split, row.subset) for row in read(tmp_path)[1]]
    assert found == [("extra-0", "", "extra"), *[("train-0", "train", "")] * 2, ("validat", "val", "")]
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: small\n  data_files:\n  - split: test\n    path: data/extra-*\n"
        "- config_name: whole\n  data_files: data/train*\n---\n# Card\n"
    )
    with pytest.raises(ValueError, match=r"has the configs small, whole; name one, e.g. .*#small"):
        read(tmp_path)
    assert [(row.text, row.split) for row in read(Path(f"{tmp_path}#small"))[1]] == [("extra-0", "test")]
    (tmp_path / "README.md").write_text("---\nconfigs:\n- data_files: ../*.parquet\n---\n")
    with pytest.raises(ValueError, match=r"'\.\./\*\.parquet', which is no file in its folder"):
        read(tmp_path)


def test_an_imagefolder_is_read_by_its_metadata(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        (tmp_path / split).mkdir()
        table(tmp_path / split, "metadata.csv", "file_name,mask_file_name,text\na.jpg,m/a.png,hello\n")
        (tmp_path / split / "a.jpg").write_bytes(JPEG)
        (tmp_path / split / "b.jpg").write_bytes(JPEG)
    given, rows = read(tmp_path)
    assert given.notes[-1] == f"{tmp_path}: 2 files with an image or audio that no row of its metadata names"
    assert rows == [
        Row(f"{name}%2Fa", image=f"{name}/a.jpg", text="hello", split=split, extra={"mask_file_name": "m/a.png"})
        for name, split in (("train", "train"), ("validation", "val"))
    ]


def test_a_dataset_that_save_to_disk_wrote_is_read(tmp_path: Path) -> None:
    held = pyarrow.table({"image": [{"bytes": PNG, "path": None}, {"bytes": JPEG, "path": None}], "text": ["a", "b"]})
    folder = tmp_path / "train"
    folder.mkdir()
    with pyarrow.ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), held.schema) as stream:
        stream.write_table(held, max_chunksize=1)
    state: dict[str, Any] = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
    (folder / "state.json").write_text(json.dumps(state))
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    given, rows = read(tmp_path)
    reader = Reader(given.root)
    assert [(row.text, row.split, reader.read(row.image)) for row in rows if row.image] == [
        ("a", "train", PNG), ("b", "train", JPEG)
    ]  # fmt: skip
    (folder / "state.json").write_text(json.dumps({**state, "_indices_data_files": [{"filename": "i.arrow"}]}))
    with pytest.raises(ValueError, match="flatten_indices"):
        read(tmp_path)


def test_few_bytes_that_hold_many_rows_are_read_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columnar, "BATCH_BYTES", 8 << 20)
    monkeypatch.setattr(columnar, "KEPT_BYTES", 8 << 20)
    numbers = pyarrow.array([0] * 200, pyarrow.int32())
    texts, images = (
        pyarrow.DictionaryArray.from_arrays(numbers, pyarrow.array([value]))
        for value in ("x" * 900_000, PNG + bytes(900_000))
    )
    held = pyarrow.table({"text": texts, "image": images})
    parquet.write_table(held, tmp_path / "a.parquet", store_schema=False)
    assert (tmp_path / "a.parquet").stat().st_size < 200_000
    rows, reader, pool = 0, Reader(tmp_path), pyarrow.system_memory_pool()
    most = max(64 << 20, pool.max_memory())  # of 2 x 180 MB
    for found in open_input(tmp_path / "a.parquet").rows:
        assert not isinstance(found, Fault)
        assert found.row.image is not None
        assert len(reader.read(found.row.image)) == len(PNG) + 900_000
        assert found.row.text == "x" * 900_000
        rows += 1
    assert rows == 200
    assert pool.max_memory() <= most


ZEROS, PAGES = (
    [np.zeros(10_000_000, np.uint8)],
    "a row, or the pages in which it lies, takes more than 16 MiB of memory",
)


@pytest.mark.parametrize(
    ("held", "row_bytes", "reason"),
    [
        (["x" * 40_000_000], 16 << 20, f"{PAGES}; write smaller pages"),
        (ZEROS, 16 << 20, f"{PAGES}; write smaller pages"),
        (ZEROS, 1 << 30, "the fields of a row take more than 8 MiB of memory; leave them out"),
    ],
    ids=["text", "list", "list as objects"],
)
def test_a_row_that_takes_too_much_memory_is_an_error(
    held: list[Any], row_bytes: int, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in (("BATCH_BYTES", 8 << 20), ("OBJECT_BYTES", 8 << 20), ("ROW_BYTES", row_bytes)):
        monkeypatch.setattr(columnar, name, size)
    parquet.write_table(pyarrow.table({"text": ["a"], "field": held}), tmp_path / "a.parquet", compression="zstd")
    assert faults(tmp_path / "a.parquet") == [f"row group 0: it cannot be read ({reason})"]


def test_a_compressed_arrow_stream_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columnar, "OWN_BYTES", 1 << 20)
    batch = pyarrow.record_batch({"text": ["x" * 2_000_000]})
    options = pyarrow.ipc.IpcWriteOptions(compression="zstd")
    with pyarrow.ipc.new_stream(str(tmp_path / "a.arrow"), batch.schema, options=options) as stream:
        stream.write(batch)
    with pytest.raises(ValueError, match=r"a\.arrow is compressed; save it anew"):
        columnar.open_arrow(str(tmp_path / "a.arrow"))
