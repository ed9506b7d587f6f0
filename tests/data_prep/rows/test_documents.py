"""Documents on their way from a manifest through shards to a run, and those that cannot be used."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from mmmoe_pretrain.batch import Sample
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data import decode as decoding
from mmmoe_pretrain.data.decode import BadSample, decode
from mmmoe_pretrain.data.loader import Loader, StepData
from mmmoe_pretrain.data.sources.source import Indexed, open_indexed
from mmmoe_pretrain.data.sources.survey import survey
from mmmoe_pretrain.data_prep.inspect.measure import measure
from mmmoe_pretrain.data_prep.rows.manifest import read_manifest, write_manifest
from mmmoe_pretrain.data_prep.rows.row import Row, row_problem
from mmmoe_pretrain.data_prep.shards.shard import shard_rows
from mmmoe_pretrain.data_prep.shards.writing import ShardOptions
from mmmoe_pretrain.data_prep.tokenizer import Texts, read_texts
from mmmoe_pretrain.data_prep.verify import Seen, verify_folder
from mmmoe_pretrain.evaluate.perplexity import count_train_targets
from mmmoe_pretrain.evaluate.run import evaluate
from mmmoe_pretrain.modalities import Modalities, build_modalities
from mmmoe_pretrain.train.loop import train
from tests.data.test_decode import modalities_of
from tests.distributed import run_ranks
from tests.support import tiny_config, write_tar
from tests.train.faulty import losses

OPTIONS = ShardOptions(workers=1, max_bad_fraction=1.0)
STORY: list[dict[str, Any]] = [
    {"text": "red number 0"},
    {"image": "red.png"},
    {"text": "blue number 2", "loss": False},
    {"image": "blue.png"},
    {"audio": "tone.wav"},
    {"file": "end.txt"},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("red", "blue"):
        Image.new("RGB", (16, 16), name).save(tmp_path / f"{name}.png")
    soundfile.write(tmp_path / "tone.wav", np.sin(np.arange(4000) / 9), 16_000)
    (tmp_path / "end.txt").write_text("green number 1")
    (tmp_path / "series.csv").write_text("1,2\n3,4\n")
    return tmp_path


def shard(folder: Path, *rows: Row) -> Indexed:
    write_manifest(folder / "manifest.jsonl", rows)
    shard_rows(read_manifest(folder), folder, folder / "out", OPTIONS)
    return open_indexed(folder / "out/train")


def test_a_document_comes_back_in_its_order(folder: Path, tiny_data: Path) -> None:
    modalities = modalities_of(tiny_data)
    shard(folder, Row("a", parts=STORY, label="tale"), Row("t", text="a text alone"))
    with tarfile.open(folder / "out/train/train-000000.tar") as tar:
        names = {name for name in tar.getnames() if name.startswith("a.")}
        written = json.loads(tar.extractfile("a.json").read())  # type: ignore[union-attr]
    assert names == {"a.1.png", "a.3.png", "a.4.wav", "a.5.txt", "a.json"}
    assert (written["label"], written["parts"][2]) == ("tale", {"text": "blue number 2", "loss": False})
    assert [part.get("member") for part in written["parts"]] == [None, "1.png", None, "3.png", "4.wav", "5.txt"]
    shards = open_indexed(folder / "out/train", modalities=modalities)
    samples = {shards.key(i): decode(shards.read(i), modalities) for i in range(len(shards))}
    found, alone = samples["a"], samples["t"]
    assert isinstance(found, Sample) and isinstance(alone, Sample)
    assert found.document and not alone.document
    assert [item.raw or item.modality for item in found.items] == [
        "red number 0", "image", "blue number 2", "image", "audio", "green number 1"
    ]  # fmt: skip
    assert [item.loss for item in found.items] == [True, True, False, True, True, True]
    for item, colour in ((found.items[1], (255, 0, 0)), (found.items[3], (0, 0, 255))):
        np.testing.assert_array_equal(item.value[:, 8, 8], colour)
    assert [item.raw for item in alone.items] == ["a text alone"]
    with (folder / "texts.tmp").open("w+b") as file:
        texts = Texts(file, 100)
        read_texts([str(folder)], "train", texts)
        texts.close()
        assert sorted(texts) == ["a text alone", "blue number 2", "green number 1", "red number 0"]


def test_a_document_may_hold_files_of_any_kind_and_say_which_modality_they_are(folder: Path) -> None:
    """Two modalities read images, so that a file's format alone does not say which."""
    twice = {name: {"kind": "image", "size": 16, "stem_channels": 8} for name in ("near", "far")}
    config = tiny_config(folder, modalities={**twice, "heart": {"kind": "series", "channels": 2}},
                         objectives={"sides": {"kind": "contrastive", "pairs": {"near-far": 1}}})  # fmt: skip
    modalities = build_modalities(config.modalities)
    parts = [{"image": "red.png", "modality": "far"}, {"series": "series.csv"},
             {"file": "blue.png", "modality": "near"}]  # fmt: skip
    shard(folder, Row("a", parts=parts))
    found = decode(open_indexed(folder / "out/train", modalities=modalities).read(0), modalities)
    assert isinstance(found, Sample), found
    assert [item.modality for item in found.items] == ["far", "heart", "near"]
    seen = Seen()
    assert list(verify_folder(folder / "out", seen)) == []
    assert seen.survey.unread == {}


def test_verify_inspect_and_train_count_what_documents_hold(folder: Path, tiny_data: Path) -> None:
    shards = shard(folder, *(Row(f"d{i}", parts=STORY) for i in range(3)), Row("t", text="red"))
    seen = Seen()
    assert list(verify_folder(folder / "out", seen)) == []
    assert (seen.survey.samples, list(seen.notes())) == (4, [])
    assert seen.survey.content() == "image+audio+text 3, text 1"
    for path in (folder, folder / "out"):
        totals, left_out = (measured := measure(path)).totals, measured.left_out
        assert {kind.modalities: (total.rows, round(total.seconds, 2)) for kind, total in totals.items()} == {
            "document of image+audio+text": (3, 0.75), "text": (1, 0.0)
        }  # fmt: skip
        assert not left_out
    trained = survey([shards])
    assert (trained.content(), trained.left_out()) == ("image+audio+text 3, text 1", "")


def config_of_documents(folder: Path, tiny_data: Path, name: str = "stories", **data: Any) -> RunConfig:
    """A run that reads what ``folder`` was sharded into, and predicts every text that has a loss."""
    sources = {"train": [{"path": str(folder / "out/train")}], "tokenizer": str(tiny_data / "tokens.model"),
               "num_workers": 0, **data}  # fmt: skip
    objectives = {"stories": {"kind": "next_token"}}
    train = {"steps": 20, "global_batch_size": 4, "log_every": 1}
    test = {"test": [str(folder / "out/test")]}
    return tiny_config(folder, name=name, data=sources, objectives=objectives, train=train, evaluate=test)


def test_a_run_of_documents_trains_alike_on_one_rank_and_two_and_predicts_held_out_ones(
    folder: Path, tiny_data: Path
) -> None:
    write_manifest(folder / "manifest.jsonl", [Row(f"d{i}", parts=STORY, split="test" if i > 7 else "train")
                                               for i in range(10)])  # fmt: skip
    shard_rows(read_manifest(folder), folder, folder / "out", OPTIONS)
    one, two = (config_of_documents(folder, tiny_data, name) for name in ("one", "two"))
    run_ranks(1, train, one)
    run_ranks(2, train, two)
    np.testing.assert_allclose(losses(two), losses(one), rtol=2e-4, atol=2e-4)
    assert losses(one)[-1, 0] < 0.8 * losses(one)[0, 0]
    result = evaluate(one.run_dir)
    (score,) = [row for row in result.results if row["metric"] == "stories_perplexity"]
    encode = build_modalities(one.modalities, one.data.tokenizer).tokenizer.encode
    predicted = [len(encode(text)) + 1 for text in ("red number 0", "green number 1")]  # and the end mark; not "blue"
    assert score["n"] == 2 * sum(predicted)
    assert score["value"] < score["majority"]


def test_a_document_beyond_its_tokens_loses_its_last_items(folder: Path, tiny_data: Path) -> None:
    """A text has two marks beside its pieces, and an image of 16 pixels 4 tokens."""
    shard(folder, *(Row(f"d{i}", parts=STORY) for i in range(4)))

    def limited(most: int | None) -> tuple[RunConfig, Modalities]:
        config = config_of_documents(folder, tiny_data, max_tokens_per_document=most)
        return config, build_modalities(config.modalities, config.data.tokenizer)

    def first_step(most: int | None) -> StepData:
        return next(Loader(*limited(most)))

    encode = modalities_of(tiny_data).tokenizer.encode
    pieces = [len(encode(text)) for text in ("red number 0", "blue number 2")]
    fits = pieces[0] + 2 + 4 + pieces[1] + 2
    assert first_step(None).stats.cut == first_step(1000).stats.cut == {}
    data = first_step(fits)
    assert data.stats.cut == {"image": 4, "audio": 4, "text": 4}  # one each of four documents
    assert data.microbatches[0].num_valid == 4 * (fits - 2)  # end marks are targets alone
    assert first_step(fits - 1).stats.cut == {"image": 4, "audio": 4, "text": 8}
    counts, _ = count_train_targets(*limited(fits))
    assert counts["stories"].sum() == 4 * (pieces[0] + 1)  # what is trained on: "blue" has no loss
    with pytest.raises(ValueError, match="max_tokens_per_document 17 leaves no room for the 18 tokens that one text"):
        first_step(17)


BAD_ROWS: dict[str, tuple[Any, str]] = {
    "absent": ([{"text": "a"}, {"image": "absent.png"}], "absent.png cannot be read"),
    "damaged": ([{"image": "broken.png"}], "broken.png is not a readable image"),
    "another": ([{"audio": "red.png"}], "part 0 of parts: 'red.png' is image, not audio"),
    "format": ([{"file": "a.doc"}], "part 0 of parts: 'a.doc' is of no format that is read"),
    "number": ([{"text": "a"}, {"text": 7}], "part 1 of parts: text is 7"),
    "two": ([{"text": "a", "image": "red.png"}], "part 0 of parts is"),
    "unknown": ([{"text": "a", "lost": True}], "part 0 of parts is"),
    "loss": ([{"text": "a", "loss": "no"}], "loss is true or false"),
    "object": ({"text": "a"}, "a document is a list of 1 to"),
    "empty": ([], "parts holds 0 parts"),
    "many": ([{"text": "a"}] * 9, "parts holds 9 parts, and a document is a list of 1 to 8"),
    "blank": ([{"text": " "}], "blank texts alone"),
    "half": ([{"text": "\ud83d"}], "text is"),
}


def test_documents_that_cannot_be_sharded_are_skipped_with_their_key(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "MAX_PARTS", 8)
    (folder / "broken.png").write_bytes(b"no image")
    rows = [Row("good", parts=STORY), *(Row(key, parts=parts) for key, (parts, _) in BAD_ROWS.items())]
    report = shard_rows(rows, folder, folder / "out", OPTIONS)
    skipped = {bad.key: bad.reason for bad in report.skipped}
    assert skipped.keys() == BAD_ROWS.keys()
    for key, (_, reason) in BAD_ROWS.items():
        assert reason in skipped[key], key
    lines = [json.loads(line) for line in (folder / "out/skipped.jsonl").read_text().splitlines()]
    assert {line["key"] for line in lines} == BAD_ROWS.keys()
    assert report.shards["train"][0]["nsamples"] == 1


def test_a_manifest_is_read_with_its_documents(folder: Path) -> None:
    row = {"key": "a", "parts": STORY, "label": "tale"}
    (folder / "manifest.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({"key": "b", "parts": 3}))
    first, second = read_manifest(folder)
    assert (first.parts, first.label, first.extra) == (STORY, "tale", {})
    assert (first.modalities, first.files) == (
        ("image", "audio", "text"),
        ("red.png", "blue.png", "tone.wav", "end.txt"),
    )
    assert (second.parts, second.modalities, second.files) == (3, (), ())
    assert "is not a document" in str(row_problem(second))
    (folder / "manifest.jsonl").write_text(json.dumps({**row, "text": "beside"}))
    with pytest.raises(ValueError, match="it has parts, and beside them an image, audio or a text"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        *((parts, "not a list of 1 to 8 parts") for parts in ([], {}, "red", None, [{"text": "red"}] * 9)),
        *(([{"text": "red"}, part], "part 1 of json.parts is") for part in (
            "red", ["red"], {}, {"text": 1}, {"text": "red", "loss": 1}, {"text": "red", "member": "0.txt"},
            {"text": "red", "other": "x"}, {"member": "7.png"}, {"member": 3}, {"member": ["0.txt"]},
            {"member": "json"}, {"member": "0.txt", "modality": ["text"]})),
        ([{"text": "red", "loss": 1}], "loss is true or false"),
        ([{"text": "\ud800"}], "json holds half of a character"),
        ([{"member": "0.txt", "modality": "image"}], "image cannot be decoded"),
        ([{"member": "0.txt", "modality": "video"}], "part 0 of json.parts is"),
        ([{"text": " "}], "no image or audio or text"),
    ],
)  # fmt: skip
def test_documents_from_elsewhere_that_cannot_be_read_are_skipped_with_their_key(
    tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch, parts: Any, reason: str
) -> None:
    monkeypatch.setattr(decoding, "MAX_PARTS", 8)
    write_tar(tmp_path / "0.tar", [("a.0.txt", b"red"), ("a.json", json.dumps({"parts": parts}).encode())])
    modalities = modalities_of(tiny_data)
    found = decode(open_indexed(tmp_path, modalities=modalities).read(0), modalities)
    assert isinstance(found, BadSample)
    assert found.key == "a"
    assert reason in found.reason
    problems = list(verify_folder(tmp_path, Seen()))
    if "'modality'" in str(parts):  # verify decodes nothing, and accepts any name of a modality
        return
    assert len(problems) == 1 and "sample a" in problems[0]
    assert reason in problems[0] or "no image, audio or text" in problems[0]
