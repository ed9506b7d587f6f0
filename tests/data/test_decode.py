"""A raw sample becomes arrays, or a value that says why not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from mmmoe_pretrain.batch import Sample, SampleMeta
from mmmoe_pretrain.data.decode import Augment, BadSample, decode
from mmmoe_pretrain.data.shards import RawSample, ShardFolder
from mmmoe_pretrain.limits import has_text
from mmmoe_pretrain.modalities import Codecs, build_codecs
from tests.support import tiny_config

EVERYTHING = Augment(image=True, audio=True, text_dropout=0.3)


@pytest.fixture(scope="module")
def codecs(tiny_data: Path) -> Codecs:
    return build_codecs(tiny_config(tiny_data))


@pytest.fixture(scope="module")
def raw(tiny_data: Path) -> RawSample:
    return ShardFolder(tiny_data / "train").read(5)


def changed(raw: RawSample, **members: bytes) -> RawSample:
    return RawSample(raw.key, {**raw.members, **members})


def good(item: Sample | BadSample) -> Sample:
    assert isinstance(item, Sample), item
    return item


def test_a_whole_sample_carries_everything(raw: RawSample, codecs: Codecs) -> None:
    sample = good(decode(raw, codecs))
    assert sample.meta == SampleMeta(
        "thing-005", "g5", language="en", label="black", subset="named", audio_kind="speech", shard=raw.shard
    )
    assert sample.raw_text == "black number 5"
    assert sample.text is not None and codecs.text.decode(sample.text) == "black number 5"
    assert sample.image is not None and sample.image.shape == (3, 16, 16)
    assert sample.audio is not None and sample.audio.shape == (
        64,
        32,
    )  # 0.25 s: 26 frames, then a multiple of 8


# A joiner, marks of direction, a byte order mark, a tag, a Hangul filler, a variation selector, an empty Braille cell
# and the mark of what could not be decoded, beside spaces, control characters and zero-width spaces.
BLANK = ("", " \n\t", "\u00a0\u3000\u2028", "\u200b\u200b", "\0\x7f\x85", "\u200c\u200d\u2060", "\u200e\u202a\u2066",
         "\ufeff", "\U000e0041", "\u3164", "\ufe0f", "\u2800", "\ufffd\ufffd")  # fmt: skip
SAYS_SOMETHING = ("a", "1", "\u2764\ufe0f", "می\u200cخواهم", "क्\u200dष", "?", "\u0301", "\U0001faea")


def test_what_cannot_be_seen_is_no_text(raw: RawSample, codecs: Codecs) -> None:
    assert [text for text in BLANK if has_text(text)] == []
    assert [text for text in SAYS_SOMETHING if not has_text(text)] == []
    for text in BLANK:
        sample = good(decode(changed(raw, txt=text.encode()), codecs))
        assert (sample.text, sample.raw_text) == (None, "")
        alone = decode(RawSample(raw.key, {"txt": text.encode()}), codecs)
        assert isinstance(alone, BadSample) and "no image, audio or text" in alone.reason
    # The tokenizer's own mark of a word, of which no token is left.
    assert good(decode(changed(raw, txt="\u2581".encode()), codecs)).text is None


@pytest.mark.parametrize("extension", ["png", "wav", "txt", "json"])
def test_an_absent_member_is_no_fault(raw: RawSample, codecs: Codecs, extension: str) -> None:
    rest = {name: data for name, data in raw.members.items() if name != extension}
    sample = good(decode(RawSample(raw.key, rest), codecs))
    present = (sample.image is not None, sample.audio is not None, sample.text is not None)
    assert present == (extension != "png", extension != "wav", extension != "txt")


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"png": b"junk"}, "image cannot be decoded"),
        ({"wav": b"junk"}, "audio cannot be decoded"),
        ({"txt": b"\xff\xfe"}, "not UTF-8"),
        ({"json": b"{"}, "json is damaged"),
        ({"json": b"\xff\xfe\xff"}, "json is damaged"),
        ({"json": b"[]"}, "json holds list"),
    ],
)
def test_a_damaged_member_makes_a_bad_sample(
    raw: RawSample, codecs: Codecs, members: dict[str, bytes], reason: str
) -> None:
    item = decode(changed(raw, **members), codecs)
    assert isinstance(item, BadSample)
    assert item.key == "thing-005"
    assert reason in item.reason


@pytest.mark.parametrize("members", [{}, {"json": b"{}"}, {"txt": b" \n"}])
def test_a_sample_without_content_is_bad(codecs: Codecs, members: dict[str, bytes]) -> None:
    item = decode(RawSample("empty", members), codecs)
    assert isinstance(item, BadSample)
    assert "no image, audio or text" in item.reason


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
def test_a_text_may_stand_in_the_json(raw: RawSample, codecs: Codecs, members: dict[str, bytes], text: str) -> None:
    sample = good(decode(RawSample("a", {"left.png": raw.members["png"], **members}), codecs))
    assert sample.image is not None
    assert sample.raw_text == text
    assert (sample.text is not None) == bool(text)


def test_foreign_json_values_are_passed_over(raw: RawSample, codecs: Codecs) -> None:
    row = {"label": True, "language": None, "subset": "x", "unknown": "y", "key": "other", "source": ["z"]}
    sample = good(decode(changed(raw, json=json.dumps(row).encode()), codecs))
    assert sample.meta == SampleMeta("thing-005", subset="x")


def test_fields_go_by_the_names_and_types_of_a_manifest(raw: RawSample, codecs: Codecs) -> None:
    row = {"label": 0, "class": "zero", "lang": "de", "group": 7}
    sample = good(decode(changed(raw, json=json.dumps(row).encode()), codecs))
    assert sample.meta == SampleMeta("thing-005", label="0", language="de", group="7")


def test_perturbation_depends_on_seed_and_position_alone(raw: RawSample, codecs: Codecs) -> None:
    def perturbed(seed: int, position: int) -> list[np.ndarray]:
        sample = good(decode(raw, codecs, EVERYTHING, seed=seed, position=position))
        return [array for array in dataclasses.astuple(sample) if isinstance(array, np.ndarray)]

    first = perturbed(1, 7)
    perturbed(2, 9)
    for a, b in zip(first, perturbed(1, 7), strict=True):
        np.testing.assert_array_equal(a, b)
    for other in (perturbed(1, 8), perturbed(-2, 7)):
        assert not np.array_equal(first[0], other[0])


def test_one_modality_does_not_shift_the_perturbation_of_another(raw: RawSample, codecs: Codecs) -> None:
    both = good(decode(raw, codecs, EVERYTHING, position=3))
    alone = good(decode(RawSample(raw.key, {"wav": raw.members["wav"]}), codecs, EVERYTHING, position=3))
    assert both.audio is not None and alone.audio is not None
    np.testing.assert_array_equal(both.audio, alone.audio)
