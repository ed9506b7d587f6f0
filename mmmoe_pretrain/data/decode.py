"""Bytes -> arrays for one sample; what cannot be used becomes a BadSample value.

Owns where the text of a sample stands, the random numbers of a sample (a pure function of seed,
position and modality) and the one place where a bad sample is caught.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from mmmoe_pretrain.batch import MODALITIES, Sample, SampleMeta
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.members import META, members_read, names
from mmmoe_pretrain.data.shards import RawSample
from mmmoe_pretrain.limits import MAX_META_BYTES, MAX_TEXT_BYTES, has_lone_surrogate, has_text, use_aliases
from mmmoe_pretrain.modalities import BadSampleError, Codecs
from mmmoe_pretrain.untrusted import parse_json

PURPOSES = (*MODALITIES, "label")  # of a sample's random numbers
_STRINGS = tuple(f.name for f in fields(SampleMeta) if f.name not in ("key", "shard"))  # fields of a sample's JSON


@dataclass(frozen=True)
class BadSample:
    """A sample that was read and cannot be used."""

    key: str
    reason: str
    shard: str = ""

    def __str__(self) -> str:
        return f"{self.key}{f' of {self.shard}' if self.shard else ''}: {self.reason}"


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
        return BadSample(raw.key, str(error), raw.shard)


def _decode(raw: RawSample, codecs: Codecs, augment: Augment, seed: int, position: int) -> Sample:
    row = read_row(raw)
    content = {modality: raw.members[extension] for modality, extension in members_read(tuple(raw.members)).items()}
    text, meta = raw_text(raw, row), _meta(raw, row)
    if (
        augment.label_text
        and "image" in content
        and meta.label
        and (_generator(seed, position, "label").random() < augment.label_text)
    ):
        content, text = {"image": content["image"]}, augment.prompt.format(meta.label)
        meta = dataclasses.replace(meta, group=f"label {meta.label}")
    rngs = {
        name: _generator(seed, position, name) if wanted else None
        for name, wanted in (
            ("image", augment.image),
            ("audio", augment.audio),
            ("text", augment.text_dropout > 0),
        )
    }
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
        members = (*raw.members, *raw.unread)
        raise BadSampleError(f"no image, audio or text in it (members: {names(members) or 'none'})")
    return sample


def raw_text(raw: RawSample, row: dict[str, Any]) -> str:
    """The text of a sample, by its member or by a field of its JSON ``row``; empty where it has none."""
    extension = members_read(tuple(raw.members)).get("text")
    return (_text(raw.members[extension]) if extension else "") or _not_blank(row.get("text"))


def caption(raw: RawSample) -> str:
    """The text of a sample; empty where it has none or it cannot be read."""
    try:
        return raw_text(raw, read_row(raw))
    except BadSampleError:
        return ""


def _text(data: bytes) -> str:
    if len(data) > MAX_TEXT_BYTES:
        raise BadSampleError(f"text of {len(data)} bytes exceeds the limit of {MAX_TEXT_BYTES}")
    try:
        return _not_blank(data.decode("utf-8-sig"))  # editors of Windows begin files with a byte order mark
    except UnicodeDecodeError as error:
        raise BadSampleError(f"text is not UTF-8: {error}") from error


def _not_blank(text: object) -> str:
    return text.strip() if isinstance(text, str) and has_text(text) else ""


def read_row(raw: RawSample) -> dict[str, Any]:
    """The JSON of a sample, its fields by the names and in the types of a manifest; empty where it has none.

    Raises BadSampleError where it is damaged.
    """
    try:
        row = parse_json(raw.members.get(META, b"{}"), META, MAX_META_BYTES)
    except ValueError as error:
        raise BadSampleError(f"json is damaged: {error}") from error
    if not isinstance(row, dict):
        raise BadSampleError(f"json holds {type(row).__name__}, not an object")
    use_aliases(row)
    row.update({name: str(row[name]) for name in _STRINGS if type(row.get(name)) is int})
    texts = [row[name] for name in (*_STRINGS, "text") if isinstance(row.get(name), str)]
    if any(map(has_lone_surrogate, texts)):
        raise BadSampleError("json holds half of a character (a lone surrogate)")
    return row


def _meta(raw: RawSample, row: dict[str, Any]) -> SampleMeta:
    known = {name: row[name] for name in _STRINGS if isinstance(row.get(name), str)}
    return SampleMeta(raw.key, shard=raw.shard, **known)


def _generator(seed: int, position: int, purpose: str) -> np.random.Generator:
    return np.random.default_rng((seed & (1 << 64) - 1, position, PURPOSES.index(purpose)))
