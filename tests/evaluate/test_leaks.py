"""Held-out rows whose text was trained on take no part, and are counted."""

from pathlib import Path

from mmmoe_pretrain.batch import Sample, SampleMeta
from mmmoe_pretrain.evaluate.leaks import LeakFilter
from tests.support import things, tiny_config, write_shards


def sample(key: str, text: str) -> Sample:
    return Sample(SampleMeta(key), raw_text=text)


def test_texts_are_compared_by_their_words_alone(tmp_path: Path) -> None:
    write_shards(tmp_path / "train", things(4))
    leaks = LeakFilter(tiny_config(tmp_path))
    known = things(4)[2]["name"]
    assert [leaks.clean(s) for s in (sample("a", known.upper() + " ."), sample("b", "unseen"), sample("c", ""))] == [
        False, True, True]  # fmt: skip
    assert leaks.dropped == {SampleMeta("a").identity}
    assert leaks.notes() == ["1 held-out rows are left out: their texts are also trained on"]


def test_training_shards_that_are_gone_are_named(tmp_path: Path) -> None:
    leaks = LeakFilter(tiny_config(tmp_path))
    assert leaks.clean(sample("a", "anything"))
    assert "not compared" in leaks.notes()[0]
