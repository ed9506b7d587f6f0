from __future__ import annotations

import json

import numpy as np
import pytest
import soundfile
from PIL import Image
from pyarrow import parquet

from mmmoe_pretrain.data.sources.source import open_indexed
from mmmoe_pretrain.data_prep.cli import app
from mmmoe_pretrain.data_prep.quality.filters import RULES, Filtered, Filters, rule_of
from mmmoe_pretrain.data_prep.rows.manifest import write_manifest
from mmmoe_pretrain.data_prep.rows.row import Row
from mmmoe_pretrain.data_prep.shards.building import Building
from mmmoe_pretrain.data_prep.shards.encode import BadSample, Encoder
from mmmoe_pretrain.data_prep.shards.media import MediaOptions
from mmmoe_pretrain.data_prep.shards.shard import shard_rows
from mmmoe_pretrain.data_prep.shards.writing import ShardOptions
from tests.support import write_tar


@pytest.fixture
def root(tmp_path):
    """An image of 40 x 20 pixels, and half a second of a tone."""
    Image.new("RGB", (40, 20), "red").save(tmp_path / "wide.png")
    soundfile.write(tmp_path / "tone.wav", np.sin(np.arange(4000) / 9), 8000)
    return tmp_path


ALL = {"image": "wide.png", "audio": "tone.wav", "text": "A red bar.", "language": "pt_br"}
DOCUMENT = [{"text": "A red bar, "}, {"image": "wide.png"}, {"text": "again."}]  # 17 characters


@pytest.mark.parametrize(
    ("filters", "reason"),
    [
        (Filters(min_size=20, max_size=40, max_aspect=2.0), ""),
        (Filters(min_size=21), "height 20 is below --min-size 21"),
        (Filters(max_size=39), "width 40 is above --max-size 39"),
        (Filters(max_aspect=1.9), "aspect 2 is above --max-aspect 1.9"),
        (Filters(min_seconds=0.5, max_seconds=0.5), ""),
        (Filters(min_seconds=0.6), "0.5 seconds are below --min-seconds 0.6"),
        (Filters(max_seconds=0.4), "0.5 seconds are above --max-seconds 0.4"),
        (Filters(min_characters=10, max_characters=10), ""),
        (Filters(min_characters=11), "10 characters are below --min-characters 11"),
        (Filters(max_characters=9), "10 characters are above --max-characters 9"),
        (Filters(languages=("en", "PT")), ""),
        (Filters(languages=("pt-BR",)), ""),
        (Filters(languages=("en", "p")), "language pt_br is not among --language en,p"),
    ],
)
def test_a_sample_outside_of_a_bound_is_filtered_with_the_option_as_its_rule(root, filters, reason):
    found = Encoder(root, MediaOptions(), filters=filters)(Row("a", **ALL))
    if not reason:
        assert not isinstance(found, BadSample)
        return
    assert (found.reason, found.filtered) == (reason, True)


def test_a_rule_asks_only_samples_that_have_what_it_is_about_and_all_of_a_document(root):
    strict = Encoder(root, MediaOptions(), filters=Filters(min_size=99, min_seconds=99, min_characters=18))
    assert not isinstance(strict(Row("text", text="Eighteen letters !")), BadSample)
    assert rule_of(strict(Row("document", parts=DOCUMENT)).reason) == "--min-characters"
    small = Encoder(root, MediaOptions(), filters=Filters(min_size=21))(Row("document", parts=DOCUMENT))
    assert rule_of(small.reason) == "--min-size"
    assert not isinstance(
        Encoder(root, MediaOptions(), filters=Filters(min_size=20))(Row("d", parts=DOCUMENT)), BadSample
    )
    assert rule_of(strict(Row("image", image="wide.png", text=" ")).reason) == "--min-size"
    nameless = Encoder(root, MediaOptions(), filters=Filters(languages=("en",)))(Row("text", text="Hello."))
    assert nameless.reason == "it names no language of --language en"
    hostile = Encoder(root, MediaOptions(), filters=Filters(languages=("en",)))(
        Row("a", text="x", language="--min-size")
    )
    assert rule_of(hostile.reason) == "--language"


def test_a_jpeg_that_is_too_small_is_not_decoded(root):
    Image.new("RGB", (40, 20), "red").save(root / "wide.jpg")
    (root / "wide.jpg").write_bytes((root / "wide.jpg").read_bytes()[:-30])  # the header is whole, the pixels are not
    filtered = Encoder(root, MediaOptions(), filters=Filters(min_size=21))(Row("a", image="wide.jpg"))
    broken = Encoder(root, MediaOptions(), filters=Filters(min_size=20))(Row("a", image="wide.jpg"))
    assert (filtered.filtered, broken.filtered) == (True, False)


def test_filtered_samples_are_named_in_the_records_with_their_rule_and_are_not_broken(root):
    rows = [Row(f"row-{n}", image="wide.png", text="x" * n) for n in range(1, 7)]
    filters = Filters(min_characters=2, max_characters=4)  # rows 1, 5 and 6 are outside
    report = shard_rows(rows, root, root / "out", ShardOptions(filters=filters, workers=1, max_bad_fraction=0))
    assert report.filtered() == "filtered out 3 samples: 2 by --max-characters, 1 by --min-characters"
    assert report.sums["train"].to_json()["rules"] == {"--max-characters": 2, "--min-characters": 1}
    [records] = (root / "out/train").glob("*.parquet")
    by_key = {record["key"]: record for record in parquet.read_table(records).to_pylist()}
    assert {key: record["status"] for key, record in by_key.items()} == {
        f"row-{n}": "ok" if 2 <= n <= 4 else "filtered" for n in range(1, 7)
    }
    assert rule_of(by_key["row-1"]["reason"]) == "--min-characters"
    assert rule_of(by_key["row-6"]["reason"]) == "--max-characters"
    with pytest.raises(ValueError, match=r"no sample is left: filtered out 6 samples: 6 by --min-size; all are"):
        shard_rows(rows, root, root / "none", ShardOptions(filters=Filters(min_size=99), workers=1))


def passes(filters: Filters, members: dict[str, bytes]) -> bool:
    try:
        filters.check_sample("key", members)
    except Filtered:
        return False
    return True


def test_reshard_filters_by_the_same_rules_and_keeps_what_it_cannot_judge(root):
    image, tone = ((root / name).read_bytes() for name in ("wide.png", "tone.wav"))
    document = json.dumps({"language": "en", "parts": DOCUMENT[::2]}).encode()
    its = {
        "all": {"png": image, "wav": tone, "json": b'{"lang": "en", "caption": "A red bar."}'},
        "long": {"txt": b"x" * 20, "json": b'{"lang": "en-GB"}'},
        "document": {"json": document},
        "other": {"json": b'{"lang": "de", "text": "Ein roter."}'},
        "damaged": {"json": b"{"},
        "broken": {"png": b"x", "json": b'{"lang": "en"}'},
    }
    rules = Filters(min_size=21), Filters(max_seconds=0.4), Filters(max_characters=16), Filters(languages=("en",))
    left_out = [{key for key, members in its.items() if not passes(filters, members)} for filters in rules]
    assert left_out == [{"all"}, {"all"}, {"long", "document"}, {"other", "damaged"}]

    write_tar(root / "in/0.tar", [(f"{key}.{name}", data) for key, of in its.items() for name, data in of.items()])
    arguments = ["reshard", str(root / "in"), "--out", str(root / "out"), "--language", "en", "--workers", "1"]
    app(arguments, standalone_mode=False)
    assert len(open_indexed(root / "out/train")) == 4


def test_bounds_that_exclude_all_are_refused():
    with pytest.raises(ValueError, match="--min-size 64 is above --max-size 32"):
        Filters(min_size=64, max_size=32)


def test_a_run_with_another_filter_does_not_keep_the_shards_of_an_interrupted_one(root, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    rows = [Row("a", text="one"), Row("b", text="three")]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Building, "commit", interrupt)
        shard_rows(rows, root, root / "out", ShardOptions(workers=1))
    report = shard_rows(rows, root, root / "out", ShardOptions(filters=Filters(min_characters=5), workers=1))
    assert (report.kept, report.shards["train"][0]["nsamples"]) == (0, 1)


def test_the_command_has_an_option_for_each_rule(root):
    write_manifest(root / "manifest.jsonl", [Row("a", text="one"), Row("b", text="three", language="en")])
    bounds = [argument for rule in RULES[:-1] for argument in (rule, "1" if "min" in rule else "9")]
    arguments = ["shard", str(root), "--out", str(root / "out"), *bounds, "--language", "de,en", "--workers", "1"]
    app(arguments, standalone_mode=False)
    assert len(open_indexed(root / "out/train")) == 1
