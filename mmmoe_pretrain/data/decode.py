"""Bytes -> arrays for one sample; what cannot be used becomes a BadSample value.

Owns the choice of codec by extension, the random numbers of a sample (a pure function of seed,
position and modality) and the one place where a bad sample is caught.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np

from mmmoe_pretrain.batch import MODALITIES, Sample, SampleMeta
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.shards import RawSample
from mmmoe_pretrain.limits import MAX_META_BYTES, MAX_TEXT_BYTES, has_text
from mmmoe_pretrain.modalities import BadSampleError, Codecs
from mmmoe_pretrain.untrusted import parse_json

EXTENSION_MODALITY: dict[str, str] = {
    "png": "image",
    "jpg": "image",
    "jpeg": "image",
    "webp": "image",
    "flac": "audio",
    "ogg": "audio",
    "wav": "audio",
    "mp3": "audio",
    "txt": "text",
}


PURPOSES = (*MODALITIES, "label")  # of a sample's random numbers


@dataclass(frozen=True)
class BadSample:
    """A sample that was read and cannot be used."""

    key: str
    reason: str


@dataclass(frozen=True)
class Augment:
    """What is perturbed in training; the default perturbs nothing.

    With probability ``label_text`` a labelled picture comes with its class as its text (and without
    sound, which says something else), so that the names of the classes are learned too.
    """

    image: bool = False
    audio: bool = False
    text_dropout: float = 0.0
    label_text: float = 0.0
    prompt: str = "{}"

    @classmethod
    def from_config(cls, config: RunConfig) -> Augment:
        data = config.data
        return cls(data.image_augment, data.audio_augment, data.text_dropout, data.label_text, config.evaluate.prompt)


def decode(
    raw: RawSample, codecs: Codecs, augment: Augment = Augment(), *, seed: int = 0, position: int = 0
) -> Sample | BadSample:
    """The sample of ``raw``, perturbed by a generator of (seed, position)."""
    try:
        return _decode(raw, codecs, augment, seed, position)
    except BadSampleError as error:
        return BadSample(raw.key, str(error))


def _decode(raw: RawSample, codecs: Codecs, augment: Augment, seed: int, position: int) -> Sample:
    content, meta = _by_modality(raw.members), _meta(raw)
    if (
        augment.label_text
        and "image" in content
        and meta.label
        and (_generator(seed, position, "label").random() < augment.label_text)
    ):
        content = {"image": content["image"], "text": augment.prompt.format(meta.label).encode()}
        meta = dataclasses.replace(meta, group=f"label {meta.label}")
    rngs = {
        name: _generator(seed, position, name) if wanted else None
        for name, wanted in (
            ("image", augment.image),
            ("audio", augment.audio),
            ("text", augment.text_dropout > 0),
        )
    }
    text = _text(content["text"]) if "text" in content else ""
    ids = codecs.text.encode(text, rngs["text"], augment.text_dropout) if text else None
    if ids is not None and not len(ids):  # a tokenizer may drop all of an odd text
        text, ids = "", None
    sample = Sample(
        meta=meta,
        image=codecs.image.decode(content["image"], rngs["image"]) if "image" in content else None,
        audio=codecs.audio.decode(content["audio"], rngs["audio"]) if "audio" in content else None,
        text=ids,
        raw_text=text,
    )
    if not any(sample.has(name) for name in MODALITIES):
        raise BadSampleError(f"no image, audio or text in it (members: {', '.join(raw.members) or 'none'})")
    return sample


def _by_modality(members: Mapping[str, bytes]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for extension, data in members.items():
        modality = EXTENSION_MODALITY.get(extension)
        if modality in found:
            raise BadSampleError(f"more than one {modality} member ({', '.join(members)})")
        if modality is not None:
            found[modality] = data
    return found


def _text(data: bytes) -> str:
    if len(data) > MAX_TEXT_BYTES:
        raise BadSampleError(f"text of {len(data)} bytes exceeds the limit of {MAX_TEXT_BYTES}")
    try:
        text = data.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise BadSampleError(f"text is not UTF-8: {error}") from error
    return text if has_text(text) else ""


def _meta(raw: RawSample) -> SampleMeta:
    try:
        row = parse_json(raw.members.get("json", b"{}"), "json", MAX_META_BYTES)
    except ValueError as error:
        raise BadSampleError(f"json is damaged: {error}") from error
    if not isinstance(row, dict):
        raise BadSampleError(f"json holds {type(row).__name__}, not an object")
    names = [field.name for field in fields(SampleMeta) if field.name != "key"]
    known = {name: row[name] for name in names if isinstance(row.get(name), str)}
    if any("\ud800" <= letter <= "\udfff" for value in known.values() for letter in value):
        raise BadSampleError("json holds half of a character (a lone surrogate)")
    return SampleMeta(raw.key, **known)


def _generator(seed: int, position: int, purpose: str) -> np.random.Generator:
    return np.random.default_rng((seed & (1 << 64) - 1, position, PURPOSES.index(purpose)))
