from __future__ import annotations

import json

import pytest

from data_prep.manifest import Row, filter_rows, read_manifest, write_manifest


def test_rows_survive_a_round_trip(tmp_path):
    rows = [Row("a-1", text="Größe", language="de"), Row("b_2", image="x/y.png", split="test", group="g")]
    write_manifest(tmp_path / "manifest.jsonl", rows)
    assert read_manifest(tmp_path) == rows


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"key": "A.b", "text": "x"}, "key must consist"),
        ({"key": "a"}, "no image, audio or text"),
        ({"key": "a", "text": "x", "split": "dev"}, "'dev' is not one of train, val, test"),
        ({"key": "a", "text": "x", "colour": "red"}, "unknown field colour"),
        ({"key": "a", "image": "../x.png"}, "leaves the manifest's folder"),
        ({"key": "a", "image": "/x.png"}, "leaves the manifest's folder"),
        ({"key": "a", "text": 3}, "text must be a string or null"),
    ],
)
def test_a_row_outside_the_format_is_refused_with_its_line(tmp_path, values, complaint):
    path = tmp_path / "manifest.jsonl"
    path.write_text(json.dumps(values) + "\n")
    with pytest.raises(ValueError, match=complaint) as caught:
        read_manifest(path)
    assert "line 1" in str(caught.value)


def test_a_key_may_occur_only_once(tmp_path):
    with pytest.raises(ValueError, match="'a' occurs twice"):
        write_manifest(tmp_path / "manifest.jsonl", [Row("a", text="x"), Row("a", text="y")])


def test_filters_of_one_field_are_alternatives_and_of_two_fields_conditions():
    rows = [
        Row("a", text="x", subset="named", language="en"),
        Row("b", text="x", subset="spoken", language="en"),
        Row("c", text="x", subset="spoken", language="fr"),
        Row("d", text="x", subset="other", language="en"),
    ]
    kept = filter_rows(rows, ["subset=named", "subset=spoken", "language=en"])
    assert [row.key for row in kept] == ["a", "b"]
    with pytest.raises(ValueError, match="colour=red"):
        filter_rows(rows, ["colour=red"])
