from __future__ import annotations

import json
import urllib.parse
from pathlib import Path

import pytest

from mmmoe_pretrain.data_prep.rows.manifest import read_manifest, write_manifest
from mmmoe_pretrain.data_prep.rows.row import Row
from mmmoe_pretrain.data_prep.rows.seen import Seen


def test_rows_survive_a_round_trip(tmp_path):
    rows = [Row("a-1", text="Größe", language="de"), Row("b_2", image="x/y.png", split="test", group="g")]
    write_manifest(tmp_path / "manifest.jsonl", rows)
    assert read_manifest(tmp_path) == rows


def read(folder: Path, *rows: object) -> list[Row]:
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_manifest(folder)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"text": "x", "colour": "red"}, r"it has no key \(its fields: text, colour\)"),
        ({"key": "", "text": "x"}, "key has 0 bytes"),
        ({"key": "ü" * 100, "text": "x"}, "key has 600 bytes with the rest as %XX, and may have 1 to 512"),
        ({"key": "a", "text": "x", "split": "holdout"}, "'holdout' is not one of train, val, test"),
        ({"key": "a", "text": 3}, "text must be a string or null, and is 3"),
        ({"key": "a", "image": 3, "label": True}, "image must be .* is 3; label must be .* is True"),
        ({"key": "a", "text": "x", "score": float("nan")}, "NaN"),
        ({"key": "a", "image": "a\0.png"}, "holds a NUL"),
        ([1], "it is list, not an object"),
    ],
)
def test_a_row_outside_the_format_is_refused_with_its_line(tmp_path, values, complaint):
    with pytest.raises(ValueError, match=complaint) as caught:
        read(tmp_path, {"key": "good", "text": "x"}, values)
    assert str(caught.value).startswith(f"{tmp_path}/manifest.jsonl line 2") and "\n" not in str(caught.value)


def test_all_problems_are_reported_at_once(tmp_path):
    good = [{"key": f"good-{i}", "text": "x"} for i in range(3)]
    with pytest.raises(ValueError) as caught:
        read(tmp_path, good[0], {"key": "a", "text": 3}, good[1], {"text": "y"}, good[0], {**good[2], "split": "x"})
    title, *message = str(caught.value).split("\n  ")
    assert title == f"{tmp_path}/manifest.jsonl has 4 problems:"
    assert [line.split(":")[0] for line in message] == [
        "line 2",
        "line 4",
        "line 5, key 'good-0'",
        "line 6, key 'good-2'",
    ]
    assert "line 1" in message[2] and "key 'a': text must be" in message[0]
    with pytest.raises(ValueError) as caught:
        read(tmp_path, *({"key": "a", "text": i} for i in range(57)))
    message = str(caught.value).split("\n  ")
    assert "57 problems" in message[0] and "line 20" in message[20] and message[21:] == ["... and 37 more"]


def taken(rows: list[Row], *filters: str) -> list[str]:
    seen = Seen(Path(), filters)
    kept = [row.key for row in rows if seen.takes(row)]
    seen.check()
    return kept


def test_names_and_values_of_other_tools_are_understood_and_the_rest_travels(tmp_path):
    rows = read(
        tmp_path,
        {"key": 7, "caption": "a", "license": "MIT", "class": 0, "lang": "de", "split": "validation", "score": [1.5]},
        {"id": "b", "text": "b", "caption": "c", "label": None, "split": "Training"},
        {"__key__": "c", "text": " ", "transcript": "d", "split": None},
        {"key": "d", "text": "", "caption": "e", "id": 3},
        {"key": 0, "id": "f", "text": "f", "label": 0, "class": "zero"},
    )
    assert rows == [
        Row("7", text="a", licence="MIT", label="0", language="de", split="val", extra={"score": [1.5]}),
        Row("b", text="b", extra={"caption": "c"}),
        Row("c", text="d"),
        Row("d", text="e", extra={"id": 3}),
        Row("0", text="f", label="0", extra={"id": "f", "class": "zero"}),
    ]
    assert taken(rows, "license=MIT") == ["7"]
    assert taken(rows, "id=3") == ["d"]


# Percent-encoding (RFC 3986) of the UTF-8 bytes, of dots too: a member is named KEY.png.
@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("row_1-a", "row_1-a"),
        ("IMG_0001.JPG", "IMG_0001%2EJPG"),
        ("cats/0001 (2).jpg", "cats%2F0001%20%282%29%2Ejpg"),
        ("100%", "100%25"),
        ("a%2Eb", "a%252Eb"),
        ("ü~", "%C3%BC%7E"),
    ],
)
def test_names_of_files_become_keys_and_come_back(tmp_path, name, key):
    rows = read(tmp_path, {"key": name, "text": "x"}, {"key": "other", "text": "x"})
    assert rows[0].key == key and urllib.parse.unquote(key) == name
    write_manifest(tmp_path / "again/manifest.jsonl", rows)
    assert read_manifest(tmp_path / "again") == rows


def test_a_byte_order_mark_and_an_overlong_line_disturb_no_other(tmp_path):
    path = tmp_path / "manifest.jsonl"
    good = json.dumps({"key": "a", "text": "x"}).encode()
    path.write_bytes(b"\xef\xbb\xbf" + good)
    assert read_manifest(path) == [Row("a", text="x")]
    path.write_bytes(good + b"\n" + b"x" * (5 << 19) + b"\n\n" + good)
    with pytest.raises(ValueError) as caught:
        read_manifest(path)
    message = str(caught.value).split("\n  ")[1:]
    assert [line[:6] for line in message] == ["line 2", "line 4"], message  # 2.5 MiB, then the key of line 1


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([Row("a", text="x"), Row("a", text="y")], "'a' occurs twice"),
        ([Row("a.b", text="x")], r"'a\.b' must consist"),
        ([Row("a", text=" ")], "has no image, audio or text"),
    ],
)
def test_what_could_not_be_read_again_is_not_written(tmp_path, rows, complaint):
    with pytest.raises(ValueError, match=complaint):
        write_manifest(tmp_path / "manifest.jsonl", rows)


def test_filters_of_one_field_are_alternatives_and_of_two_fields_conditions():
    rows = [
        Row("a", text="x", subset="named", language="en"),
        Row("b", text="x", subset="spoken", language="en"),
        Row("c", text="x", subset="spoken", language="fr"),
        Row("d", text="x", subset="other", language="en"),
    ]
    assert taken(rows, "subset=named", "subset=spoken", "language=en") == ["a", "b"]
    with pytest.raises(ValueError, match="colour=red"):
        taken(rows, "colour=red")
