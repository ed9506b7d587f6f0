"""Held-out rows whose texts were trained on are skipped and counted."""

import dataclasses
from pathlib import Path

import numpy as np

from mmmoe_pretrain.batch import Item, Sample, SampleMeta
from mmmoe_pretrain.evaluate.rows import LeakFilter
from mmmoe_pretrain.modalities import build_modalities
from tests.support import things, tiny_config, write_shards


def sample(key: str, text: str) -> Sample:
    return Sample(SampleMeta(key), (Item("text", np.array([1, 4, 2]), text),) if text else ())


def leaks_of(root: Path) -> LeakFilter:
    config = tiny_config(root)
    return LeakFilter([str(root / "train")], build_modalities(config.modalities, decoding=False))


def test_texts_are_compared_by_their_words_alone(tmp_path: Path) -> None:
    write_shards(tmp_path / "train", things(4))
    leaks = leaks_of(tmp_path)
    known = things(4)[2]["name"]
    assert [leaks.clean(s) for s in (sample("a", known.upper() + " ."), sample("b", "unseen"), sample("c", ""))] == [
        False, True, True]  # fmt: skip
    assert leaks.dropped == {SampleMeta("a").identity}
    document = dataclasses.replace(sample("d", known), document=True)
    assert leaks.clean(document), "it begins with the words of a caption, and is another text"
    assert leaks.notes() == ["1 held-out rows are not scored: their texts are also in the training data"]


def test_a_row_is_seen_where_all_its_texts_together_were_trained_on(tmp_path: Path) -> None:
    """A text modality such as the language may stand before the text, and is equal in most rows."""
    write_shards(tmp_path / "train", [{**row, "language": "de"} for row in things(3)])
    text = {"kind": "text"}
    modalities = {
        "language": {**text, "members": ["lang"], "field": "language"},
        "text": {**text, "members": ["txt"]},
    }
    said = {"said": {"kind": "next_token", "parts": ["language", "text"]}}
    config = tiny_config(tmp_path, modalities=modalities, objectives=said)
    leaks = LeakFilter([str(tmp_path / "train")], build_modalities(config.modalities, decoding=False))

    def row(*texts: str) -> Sample:
        items = zip(("language", "text"), texts, strict=False)
        return Sample(SampleMeta(" ".join(texts)), tuple(Item(name, np.array([1, 2]), its) for name, its in items))

    known = things(3)[1]["name"]
    assert [leaks.clean(s) for s in (row("de", known), row("de", "unseen"), row("fr", known), row("de"))] == [
        False, True, True, True]  # fmt: skip


def test_missing_training_shards_are_named(tmp_path: Path) -> None:
    leaks = leaks_of(tmp_path)
    assert leaks.clean(sample("a", "anything"))
    assert "not compared" in leaks.notes()[0]
