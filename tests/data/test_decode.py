"""A raw sample becomes arrays, or a value that says why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmmoe_pretrain.batch import Sample, SampleMeta
from mmmoe_pretrain.data.decode import BadSample, Draws, bytes_of_item, decode, modalities_kept
from mmmoe_pretrain.data.evaluation import training_samples
from mmmoe_pretrain.data.sources.members import RawSample
from mmmoe_pretrain.data.sources.source import open_indexed
from mmmoe_pretrain.limits import has_text
from mmmoe_pretrain.modalities import Modalities, build_modalities
from tests.support import tiny_config, tiny_values

IMAGE = {"kind": "image", "size": 16}
AUDIO = {"kind": "audio", "max_seconds": 0.4}


def modalities_of(root: Path, **modalities: Any) -> Modalities:
    """Those of the tiny run, with ``modalities`` in the place of some or beside them."""
    values = {**tiny_values(root)["modalities"], **modalities}
    used = {name: value for name, value in values.items() if value}
    config = tiny_config(root, modalities=used, objectives={"reading": {"kind": "next_token"}})
    return build_modalities(config.modalities, config.data.tokenizer)


@pytest.fixture(scope="module")
def modalities(tiny_data: Path) -> Modalities:
    return modalities_of(tiny_data, text={"kind": "text", "max_tokens": 16, "dropout": 0.3})


@pytest.fixture(scope="module")
def raw(tiny_data: Path) -> RawSample:
    return open_indexed(tiny_data / "train").read(5)


def changed(raw: RawSample, **members: bytes) -> RawSample:
    return RawSample(raw.key, {**raw.members, **members})


def good(item: Sample | BadSample) -> Sample:
    assert isinstance(item, Sample), item
    return item


def texts(sample: Sample, modalities: Modalities) -> list[str]:
    """The texts of the ids."""
    return [modalities.tokenizer.decode(item.value) for item in sample.items if item.modality == "text"]


def test_the_class_of_a_cls_member_is_the_label_where_the_json_has_none(
    raw: RawSample, modalities: Modalities
) -> None:
    sample = changed(raw, cls=b"281\n", json=b"{}")
    assert good(decode(sample, modalities)).meta.label == "281"
    assert good(decode(changed(sample, json=b'{"label": "cat"}'), modalities)).meta.label == "cat"
    assert "cls is not a class in UTF-8" in str(decode(changed(sample, cls=b"\xff"), modalities))


def test_a_whole_sample_carries_everything(raw: RawSample, modalities: Modalities) -> None:
    sample = good(decode(raw, modalities))
    assert sample.meta == SampleMeta(
        "thing-005", "g5", "en", "black", "named", shard=raw.shard, tags={"audio_kind": "speech"}
    )
    assert [sample.meta.get(name) for name in ("audio_kind", "label", "colour")] == ["speech", "black", ""]
    image, audio, text = sample.items
    assert not sample.document
    assert (image.modality, image.raw, image.value.shape) == ("image", "", (3, 16, 16))
    assert (audio.modality, audio.raw) == ("audio", "")
    assert audio.value.shape == (64, 32)  # 0.25 s: 26 frames, then a multiple of 8
    assert (text.modality, text.raw, texts(sample, modalities)) == ("text", "black number 5", ["black number 5"])
    assert text.value[[0, -1]].tolist() == [modalities.tokenizer.bos_id, modalities.tokenizer.eos_id]


# A joiner, marks of direction, a byte order mark, a tag, a Hangul filler, a variation selector, an empty Braille cell
# and the mark of what could not be decoded, beside spaces, control characters and zero-width spaces.
BLANK = ("", " \n\t", "\u00a0\u3000\u2028", "\u200b\u200b", "\0\x7f\x85", "\u200c\u200d\u2060", "\u200e\u202a\u2066",
         "\ufeff", "\U000e0041", "\u3164", "\ufe0f", "\u2800", "\ufffd\ufffd")  # fmt: skip
SAYS_SOMETHING = ("a", "1", "\u2764\ufe0f", "می\u200cخواهم", "क्\u200dष", "?", "\u0301", "\U0001faea")


def test_what_cannot_be_seen_is_no_text(raw: RawSample, modalities: Modalities) -> None:
    assert [text for text in BLANK if has_text(text)] == []
    assert [text for text in SAYS_SOMETHING if not has_text(text)] == []
    for text in BLANK:
        sample = good(decode(changed(raw, txt=text.encode()), modalities))
        assert sample.first("text") is None
        alone = decode(RawSample(raw.key, {"txt": text.encode()}), modalities)
        assert isinstance(alone, BadSample) and "no image or audio or text" in alone.reason
    # The tokenizer's own mark of a word, of which no token is left.
    assert good(decode(changed(raw, txt="\u2581".encode()), modalities)).first("text") is None


@pytest.mark.parametrize("extension", ["png", "wav", "txt", "json"])
def test_an_absent_member_is_no_fault(raw: RawSample, modalities: Modalities, extension: str) -> None:
    rest = {name: data for name, data in raw.members.items() if name != extension}
    sample = good(decode(RawSample(raw.key, rest), modalities))
    absent = {"png": "image", "wav": "audio", "txt": "text"}.get(extension)
    assert [item.modality for item in sample.items] == [name for name in modalities if name != absent]


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"png": b"junk"}, "image cannot be decoded"),
        ({"wav": b"junk"}, "audio cannot be decoded"),
        ({"txt": b"\xff\xfe"}, "not UTF-8"),
        ({"json": b"{"}, "json is damaged"),
        ({"json": b"\xff\xfe\xff"}, "json is damaged"),
        ({"json": b"[]"}, "json holds list"),
        (None, "no image or audio or text"),
    ],
)
def test_a_damaged_member_or_no_content_makes_a_bad_sample(
    raw: RawSample, modalities: Modalities, members: dict[str, bytes] | None, reason: str
) -> None:
    item = decode(RawSample(raw.key, {}) if members is None else changed(raw, **members), modalities)
    assert isinstance(item, BadSample)
    assert item.key == "thing-005"
    assert reason in item.reason


@pytest.mark.parametrize(
    ("members", "text"),
    [
        ({"json": b'{"caption": " red  "}'}, "red"),
        ({"json": b'{"text": "blue", "caption": ""}'}, "blue"),
        ({"json": b'{"text": " ", "transcript": "blue"}'}, "blue"),
        ({"json": b'{"text": "blue", "caption": "red"}'}, "blue"),
        ({"txt": b"\xef\xbb\xbfred"}, "red"),
        ({"json": b'\xef\xbb\xbf{"text": "red"}'}, "red"),
        ({"json": b'{"caption": "red"}', "caption.txt": b"green"}, "green"),
        ({"json": b'{"caption": "red"}', "txt": b" \n"}, "red"),
        ({"json": b'{"caption": ["red"]}'}, ""),
    ],
)
def test_a_text_may_be_in_the_json(
    raw: RawSample, modalities: Modalities, members: dict[str, bytes], text: str
) -> None:
    sample = good(decode(RawSample("a", {"left.png": raw.members["png"], **members}), modalities))
    assert [item.raw for item in sample.items] == ["", text] if text else [""]


@pytest.mark.parametrize(
    ("row", "meta"),
    [
        ({"label": True, "language": None, "subset": "x", "unknown": "y", "key": "other", "source": ["z"]},
         SampleMeta("thing-005", subset="x", tags={"unknown": "y", "key": "other"})),
        ({"digit": 3, "flag": True, "share": 0.5, "list": [1]}, SampleMeta("thing-005", tags={"digit": "3"})),
        ({"label": 0, "class": "zero", "lang": "de", "group": 7},
         SampleMeta("thing-005", label="0", language="de", group="7", tags={"class": "zero"})),
    ],
)  # fmt: skip
def test_fields_have_the_names_and_types_of_a_manifest_and_other_values_are_ignored(
    raw: RawSample, modalities: Modalities, row: dict[str, Any], meta: SampleMeta
) -> None:
    assert good(decode(changed(raw, json=json.dumps(row).encode()), modalities)).meta == meta


def values(sample: Sample) -> dict[str, np.ndarray]:
    return {item.modality: item.value for item in sample.items}


def test_resizing_and_log_mel_are_timed_apart_from_decoding(raw: RawSample, modalities: Modalities) -> None:
    before = {name: its.transform_seconds for name, its in modalities.items()}
    decode(raw, modalities)
    taken = {name: its.transform_seconds - before[name] for name, its in modalities.items()}
    assert taken["image"] > 0 and taken["audio"] > 0 and taken["text"] == 0
    assert modalities.transform_seconds == pytest.approx(sum(before.values()) + sum(taken.values()))


def test_perturbation_depends_on_seed_and_position_alone(raw: RawSample, modalities: Modalities) -> None:
    def perturbed(seed: int, position: int) -> dict[str, np.ndarray]:
        return values(good(decode(raw, modalities, Draws(seed, position))))

    first = perturbed(1, 7)
    perturbed(2, 9)
    for name, again in perturbed(1, 7).items():
        np.testing.assert_array_equal(again, first[name])
        assert not np.array_equal(again, values(good(decode(raw, modalities)))[name]), "not perturbed"
    for other in (perturbed(1, 8), perturbed(-2, 7)):
        assert not np.array_equal(first["image"], other["image"])


def test_one_modality_does_not_shift_the_perturbation_of_another(
    raw: RawSample, modalities: Modalities, tiny_data: Path
) -> None:
    expected = values(good(decode(raw, modalities, Draws(0, 3))))
    alone = good(decode(RawSample(raw.key, {"wav": raw.members["wav"]}), modalities, Draws(0, 3)))
    np.testing.assert_array_equal(values(alone)["audio"], expected["audio"])
    # Neither a member that another modality reads, nor another name, nor another place in the config.
    more = modalities_of(
        tiny_data, image=None, audio=None, text=None, depth={**IMAGE, "members": ["depth.png"]},
        words={"kind": "text", "max_tokens": 16, "dropout": 0.3}, sound=AUDIO,
    )  # fmt: skip
    beside = RawSample(raw.key, {**raw.members, "depth.png": raw.members["png"]})
    found = values(good(decode(beside, more, Draws(0, 3))))
    np.testing.assert_array_equal(found["sound"], expected["audio"])
    np.testing.assert_array_equal(found["words"], expected["text"])
    two = modalities_of(tiny_data, right={**IMAGE, "members": ["right.png"]})
    found = values(
        good(decode(RawSample(raw.key, {**raw.members, "right.png": raw.members["png"]}), two, Draws(0, 3)))
    )
    np.testing.assert_array_equal(found["image"], expected["image"])
    assert not np.array_equal(found["right"], found["image"]), "two images of a sample are perturbed alike"


def test_two_modalities_of_a_kind_take_the_files_and_fields_named_after_them(raw: RawSample, tiny_data: Path) -> None:
    png = raw.members["png"]
    named = modalities_of(
        tiny_data, image=None, text=None, left=IMAGE, right=IMAGE, title={"kind": "text"}, body={"kind": "text"}
    )
    row = json.dumps({"title": "red", "body": "blue", "left": "no image at all"}).encode()
    sample = good(decode(RawSample("a", {"right.png": png, "png": png, "json": row}), named))
    assert [(item.modality, item.raw) for item in sample.items] == [("right", ""), ("title", "red"), ("body", "blue")]


def test_a_class_stands_as_a_text_beside_the_modalities_that_it_is_given_with(
    raw: RawSample, tiny_data: Path
) -> None:
    text = {"kind": "text", "max_tokens": 16, "label_probability": 1.0}
    shown = modalities_of(tiny_data, text={**text, "label_with": ["image"]})
    sample = good(decode(raw, shown, Draws(0, 0), "a {}"))
    assert [(item.modality, item.raw) for item in sample.items] == [("image", ""), ("text", "a black")]
    assert sample.meta.group == "label black", "another image of the class would be its negative"
    assert good(decode(raw, shown)).meta.group == "g5", "held-out samples are as they are"
    no_image = RawSample(raw.key, {name: data for name, data in raw.members.items() if name != "png"})
    assert good(decode(no_image, shown, Draws(0, 0))).meta.group == "g5"
    everything = good(decode(raw, modalities_of(tiny_data, text=text), Draws(0, 0)))
    assert [item.modality for item in everything.items] == ["image", "audio", "text"]
    half = modalities_of(tiny_data, text={**text, "label_probability": 0.25})
    drawn = [good(decode(raw, half, Draws(3, place))).meta.group == "label black" for place in range(400)]
    assert 65 < sum(drawn) < 135  # 100, within four standard deviations


def test_a_document_is_its_parts_in_their_order(raw: RawSample, modalities: Modalities) -> None:
    parts = [{"text": "red"}, {"member": "png"}, {"text": " blue ", "loss": False}, {"member": "2.PNG"},
             {"member": "wav", "modality": "audio"}, {"text": " "}, {"member": "png", "loss": True}]  # fmt: skip
    page = changed(
        raw, **{"2.png": raw.members["png"], "json": json.dumps({"parts": parts, "subset": "pages"}).encode()}
    )
    sample = good(decode(page, modalities))
    assert sample.document and sample.meta.subset == "pages"
    assert [item.modality for item in sample.items] == ["text", "image", "text", "image", "audio", "image"]
    assert [item.loss for item in sample.items] == [True, True, False, True, True, True]
    assert texts(sample, modalities) == ["red", "blue"]
    np.testing.assert_array_equal(sample.items[1].value, sample.items[3].value)
    png, wav = raw.members["png"], raw.members["wav"]
    assert [bytes_of_item(page, modalities, i) for i in range(6)] == [b"red", png, b" blue ", png, wav, png]
    drawn = good(decode(page, modalities, Draws(0, 0)))
    assert not np.array_equal(drawn.items[1].value, drawn.items[3].value), "each part is perturbed by itself"


def lose(tiny_data: Path, count: int, step: int = 0, **shares: dict[str, Any]) -> list[frozenset[str]]:
    """The modalities that samples at ``count`` positions keep, of three; ``shares``: settings of theirs."""
    own = {"image": IMAGE, "audio": AUDIO, "text": {"kind": "text", "max_tokens": 16}}
    modalities = modalities_of(tiny_data, **{name: {**own[name], **more} for name, more in shares.items()})
    found = []
    for position in range(count):
        content = tuple(own)
        draws = Draws(0, position, step)
        found.append(frozenset(modalities_kept(f"key-{position}", content, modalities, draws)))
    return found


def test_modalities_are_dropped_by_their_shares_and_one_stays(tiny_data: Path) -> None:
    found = lose(tiny_data, 2000, image={"dropout_share": 0.3}, audio={"dropout_share": 0.6})
    assert all("text" in kept for kept in found)
    with_image, with_audio = (np.mean([name in kept for kept in found]) for name in ("image", "audio"))
    # 4 standard deviations of the mean of 2,000 draws are 0.04; the draws of two modalities are independent.
    assert with_image == pytest.approx(0.7, abs=0.04) and with_audio == pytest.approx(0.4, abs=0.04)
    assert np.mean([{"image", "audio"} <= kept for kept in found]) == pytest.approx(0.28, abs=0.04)
    every = {"dropout_share": 1.0}
    alone = lose(tiny_data, 900, image=every, audio=every, text=every)
    assert all(len(kept) == 1 for kept in alone)
    assert all(alone.count(frozenset({name})) == pytest.approx(300, abs=60) for name in ("image", "audio", "text"))


def test_dropout_follows_its_schedule_and_is_drawn_anew_at_each_position(tiny_data: Path) -> None:
    scheduled = {"dropout_share": [[10, 0.0], [20, 1.0]]}
    found = [lose(tiny_data, 400, step, image=scheduled) for step in (5, 15)]
    lost = [np.mean(["image" not in kept for kept in its]) for its in found]
    assert lost[0] == 0 and lost[1] == pytest.approx(0.5, abs=0.1)


def test_a_withheld_modality_is_so_for_good(tiny_data: Path) -> None:
    found = [lose(tiny_data, 1000, step, image={"withheld_share": 0.6}) for step in (0, 7)]
    assert found[0] == found[1]
    assert np.mean(["image" not in kept for kept in found[0]]) == pytest.approx(0.6, abs=0.06)
    most = lose(tiny_data, 1000, image={"withheld_share": 0.9})
    assert all(kept <= before for kept, before in zip(most, found[0], strict=True)), "more are withheld, and the same"


def test_what_is_withheld_does_not_come_back_where_the_rest_is_dropped(tiny_data: Path) -> None:
    found = lose(
        tiny_data, 500, image={"withheld_share": 0.9}, text={"dropout_share": 1.0}, audio={"dropout_share": 1.0}
    )
    withheld = list(lose(tiny_data, 500, image={"withheld_share": 0.9}))
    assert all("image" in before or "image" not in kept for kept, before in zip(found, withheld, strict=True))


def test_training_samples_that_scores_are_fitted_on_lack_what_is_withheld(tiny_data: Path) -> None:
    """Else linear CCA would be fitted on pairs that training never saw."""
    half = {"audio": {**AUDIO, "withheld_share": 0.5}}
    shown = modalities_of(tiny_data, **half)
    own = {**tiny_values(tiny_data)["modalities"], **half}
    found = [sample for _, sample in training_samples(tiny_config(tiny_data, modalities=own), shown, 48, "reading")]
    for sample in found:
        held = tuple(item.modality for item in sample.items)
        assert held == modalities_kept(sample.meta.key, ("image", "audio", "text"), shown, Draws(0, 0))
    assert 10 < sum(len(sample.items) == 3 for sample in found) < 38


def test_a_sample_whose_other_modalities_are_empty_is_not_bad_where_it_loses_one(
    raw: RawSample, tiny_data: Path
) -> None:
    blank = RawSample("blank", {"png": raw.members["png"], "wav": raw.members["wav"], "txt": b"  "})
    dropped = modalities_of(tiny_data, image={**IMAGE, "dropout_share": 1.0}, audio={**AUDIO, "dropout_share": 1.0})
    kept = [
        [item.modality for item in good(decode(blank, dropped, Draws(0, position))).items] for position in range(40)
    ]
    assert {name for names in kept for name in names} == {"image", "audio"} and all(len(names) == 1 for names in kept)


def test_held_out_samples_and_documents_lose_nothing(raw: RawSample, tiny_data: Path) -> None:
    settings = {"dropout_share": 1.0, "withheld_share": 1.0}
    shown = modalities_of(tiny_data, image={**IMAGE, **settings}, audio={**AUDIO, **settings})
    assert len(good(decode(raw, shown)).items) == 3
    assert [item.modality for item in good(decode(raw, shown, Draws(0, 0))).items] == ["text"]
    row = json.dumps({"parts": [{"member": "png"}, {"text": "It is black."}]}).encode()
    tale = RawSample("tale", {"png": raw.members["png"], "json": row})
    assert len(good(decode(tale, shown, Draws(0, 0))).items) == 2
