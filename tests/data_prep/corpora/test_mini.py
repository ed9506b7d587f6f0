"""The corpus in the repository: whole, small, and split without leaks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from mmmoe_pretrain.data_prep.corpora import mini
from mmmoe_pretrain.data_prep.rows.manifest import read_manifest, write_manifest
from mmmoe_pretrain.data_prep.shards.encode import Encoder
from mmmoe_pretrain.data_prep.shards.media import MediaOptions


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    out = tmp_path_factory.mktemp("mini")
    rows, _ = mini.build(out)
    return out, rows


def test_every_file_of_every_row_decodes(corpus):
    out, rows = corpus
    for path in {row.image for row in rows if row.image}:
        assert Encoder(out, MediaOptions()).media("image", path).suffix == "png"
    for path in {row.audio for row in rows if row.audio}:
        assert Encoder(out, MediaOptions()).media("audio", path).suffix == "flac"


def test_it_has_every_modality_in_five_languages_and_says_what_is_constructed(corpus):
    _, rows = corpus
    counts = Counter(row.subset for row in rows)
    assert counts.keys() == {"noto", "prompts", "constructed"}
    assert 200 <= counts["constructed"] <= 300
    triples = [row for row in rows if row.subset == "constructed"]
    assert {row.language for row in triples} == {"en", "es", "fr", "it", "ru"}
    assert all(row.modalities == ("image", "audio", "text") for row in triples)
    assert {row.split for row in triples} == {"train", "val", "test"}
    assert all(row.source and row.licence and row.attribution for row in rows)


def test_no_text_picture_or_sound_is_in_two_splits(corpus):
    out, rows = corpus
    splits: dict[object, set[str]] = {}
    for row in rows:
        splits.setdefault(("group", row.group), set()).add(row.split)
        splits.setdefault((row.language, row.text.casefold()), set()).add(row.split)
        for path in (row.image, row.audio):
            if path:
                splits.setdefault((out / path).read_bytes(), set()).add(row.split)
    assert [key for key, found in splits.items() if len(found) > 1] == []


def test_the_unpacked_manifest_is_what_the_command_writes(corpus):
    out, rows = corpus
    before = (out / "manifest.jsonl").read_bytes()
    write_manifest(out / "manifest.jsonl", read_manifest(out))
    assert (out / "manifest.jsonl").read_bytes() == before
    assert read_manifest(out) == rows


def test_an_installation_without_the_source_tree_says_so(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(mini, "ARCHIVE", tmp_path / "mini.tar")
    with pytest.raises(ValueError, match="clone the repository"):
        mini.build(tmp_path)
