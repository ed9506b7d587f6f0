"""Bytes -> arrays for one sample; a sample that cannot be used becomes a BadSample value, here and nowhere else.
Defines the fields of a sample's JSON, the order of a document's parts, and the random numbers of a sample (a pure
function of seed, position and modality).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import xxhash

from mmmoe_pretrain.batch import META_FIELDS, Item, Sample, SampleMeta
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.sources.members import CLASS, META, RawSample, names
from mmmoe_pretrain.limits import MAX_META_BYTES, has_lone_surrogate, use_aliases
from mmmoe_pretrain.modalities import BadSampleError, Modalities, format_of
from mmmoe_pretrain.untrusted import brief, parse_json

MAX_TAG = 256  # letters of a string of a sample's JSON that is kept as a tag
MAX_PARTS = 4096  # of a document
PARTS = "parts"  # of a document: the field of its JSON


@dataclass(frozen=True)
class BadSample:
    """A sample that was read and cannot be used."""

    key: str
    reason: str
    shard: str = ""

    def __str__(self) -> str:
        return f"{self.key}{f' of {self.shard}' if self.shard else ''}: {self.reason}"


@dataclass(frozen=True)
class Draws:
    """The random numbers of one sample in training, by purpose."""

    seed: int
    position: int  # of the sample in the run's global order
    step: int = 0  # the optimizer step that reads it

    def generator(self, purpose: str) -> np.random.Generator:
        """A generator that no other purpose uses. It is made when it is first asked: most purposes draw nothing."""
        return cast(np.random.Generator, _Lazy(self, purpose))

    def make(self, purpose: str) -> np.random.Generator:
        """The generator itself."""
        words = (self.seed & (1 << 64) - 1, self.position, xxhash.xxh3_64_intdigest(purpose.encode()))
        return np.random.default_rng(words)


class _Lazy:
    def __init__(self, draws: Draws, purpose: str) -> None:
        self._draws, self._purpose = draws, purpose

    def __getattr__(self, name: str) -> Any:
        if "_made" not in self.__dict__:
            self._made = self._draws.make(self._purpose)
        return getattr(self._made, name)


def decode(
    raw: RawSample, modalities: Modalities, draws: Draws | None = None, prompt: str = "{}", most: int | None = None
) -> Sample | BadSample:
    """The sample of ``raw``; with ``draws`` as in training: augmented, and sometimes with its class in ``prompt`` as
    a text. ``most``: tokens of a document."""
    try:
        sample = _decode(raw, modalities, draws, prompt)
        return sample if most is None or not sample.document else _cut(sample, most, modalities)
    except BadSampleError as error:
        return BadSample(raw.key, str(error), raw.shard)


def _decode(raw: RawSample, modalities: Modalities, draws: Draws | None, prompt: str) -> Sample:
    row = read_row(raw)
    meta = _meta(raw, row)
    if PARTS in row or draws is None:
        items = list(_items(_parts(raw, row, modalities), modalities, draws, numbered=PARTS in row))
    else:
        content = contents(raw, row, modalities)
        if meta.label:
            content, meta = _label_as_text(content, meta, modalities, draws, prompt)
        items = _items_kept(meta.key, content, modalities, draws)
    if not items:
        members = (*raw.members, *raw.unread)
        raise BadSampleError(f"no {' or '.join(modalities)} in it (members: {names(members) or 'none'})")
    return Sample(meta, tuple(items), document=PARTS in row)


def _items(
    parts: Sequence[tuple[str, bytes, bool]], modalities: Modalities, draws: Draws | None, numbered: bool = False
) -> Iterator[Item]:
    """Of those that are not empty. ``numbered``: each has random numbers of its own."""
    for number, (name, data, loss) in enumerate(parts):
        purpose = f"{modalities.streams[name]}/{number}" if numbered else modalities.streams[name]
        value = modalities[name].decode(data, None if draws is None else draws.generator(purpose))
        if value is not None:
            yield Item(name, value, modalities[name].raw(data), loss)


def _items_kept(key: str, content: dict[str, bytes], modalities: Modalities, draws: Draws) -> list[Item]:
    """Of the modalities that the sample keeps; where these are empty, such as a blank text, of those that it would
    keep without them."""
    while content:
        kept = modalities_kept(key, tuple(content), modalities, draws)
        if items := list(_items([(name, content[name], True) for name in kept], modalities, draws)):
            return items
        content = {name: data for name, data in content.items() if name not in kept}
    return []


def _parts(raw: RawSample, row: dict[str, Any], modalities: Modalities) -> list[tuple[str, bytes, bool]]:
    """The modality and the bytes of each item, and whether its tokens can be targets."""
    if PARTS not in row:
        return [(name, data, True) for name, data in contents(raw, row, modalities).items()]
    return [
        (part.name, raw.members[part.member] if part.string is None else part.string.encode(), part.loss)
        for part in document(row, raw.members, modalities)
    ]


def bytes_of_item(raw: RawSample, modalities: Modalities, number: int) -> bytes:
    """The bytes of item ``number`` of the sample that ``decode`` makes of ``raw`` without ``draws``."""
    parts = _parts(raw, read_row(raw), modalities)
    found = (data for name, data, _ in parts if modalities[name].decode(data) is not None)
    return next(itertools.islice(found, number, None))


def _cut(document: Sample, most: int, modalities: Modalities) -> Sample:
    """Its first items, as many as have ``most`` tokens or fewer together; the others count as cut."""
    lengths = [modalities[item.modality].num_tokens(item.value) for item in document.items]
    fitting = sum(total <= most for total in itertools.accumulate(lengths))
    for item in document.items[fitting:]:
        modalities[item.modality].cut += 1
    return dataclasses.replace(document, items=document.items[:fitting])


def contents(raw: RawSample, row: dict[str, Any], modalities: Modalities) -> dict[str, bytes]:
    """The bytes of a sample by modality: from its member, or from a field of its JSON ``row``."""
    chosen = modalities.members_read((*raw.members, *raw.unread))
    found = {}
    for name in modalities:
        field = modalities.field(name)
        if name in chosen and chosen[name] in raw.members:
            found[name] = raw.members[chosen[name]]
            if not (modalities[name].default_field and not modalities[name].raw(found[name])):
                continue  # the field replaces a blank text
        if field is not None and isinstance(row.get(field), str):
            found[name] = row[field].encode()
    return found


def texts_of(raw: RawSample, modalities: Modalities) -> tuple[str, ...]:
    """The texts of a sample that is no document, in the order of ``modalities`` as ``decode`` has them; none where it
    cannot be read."""
    try:
        content = contents(raw, read_row(raw), modalities)
        return tuple(filter(None, (modalities[name].raw(data) for name, data in content.items())))
    except BadSampleError:
        return ()


def labels_drawn(
    held: set[str], modalities: Modalities, generator: Callable[[str], np.random.Generator]
) -> Iterator[tuple[str, set[str]]]:
    """Of a labelled sample that has something for the modalities ``held``: each modality that gets its class as a
    text, and all that the sample has then. ``generator``: of its random numbers, by purpose."""
    for name, modality in modalities.items():
        share, beside = modality.label_probability, set(modality.label_with)
        if share and beside <= held and generator(f"{modalities.streams[name]}/label").random() < share:
            held = (beside or held) | {name}
            yield name, held


def _label_as_text(
    content: dict[str, bytes], meta: SampleMeta, modalities: Modalities, draws: Draws, prompt: str
) -> tuple[dict[str, bytes], SampleMeta]:
    for name, held in labels_drawn({*content}, modalities, draws.generator):
        content[name] = prompt.format(meta.label).encode()
        content = {m: content[m] for m in modalities if m in held}
        meta = dataclasses.replace(meta, group=f"label {meta.label}")
    return content, meta


def without_withheld(sample: Sample, modalities: Modalities) -> Sample:
    """What training can have of it: all but what ``withheld_share`` takes for good."""
    if sample.document:
        return sample
    held = tuple(dict.fromkeys(item.modality for item in sample.items))
    return sample.only(modalities_kept(sample.meta.key, held, modalities, None))


def modalities_kept(key: str, held: tuple[str, ...], modalities: Modalities, draws: Draws | None) -> tuple[str, ...]:
    """The modalities that the sample ``key`` keeps of those that it has (``withheld_share``, and with ``draws``
    ``dropout_share``). If it would lose all, it keeps the one with the highest draw, and one that is withheld only
    where all are."""
    left, draw_of = [], {}
    for name in held:
        dropped = 0.0 if draws is None else modalities[name].settings.dropout_at(draws.step)
        by_key, withheld = _by_key(key, name, modalities)
        drawn = 1.0
        if draws is not None and dropped:
            drawn = float(draws.generator(f"{modalities.streams[name]}/dropout").random())
        draw_of[name] = (0, by_key) if withheld else (1, drawn)  # what is withheld stays last
        if not withheld and drawn >= dropped:
            left.append(name)
    return tuple(left or sorted(draw_of, key=lambda name: draw_of[name])[-1:])


def _by_key(key: str, name: str, modalities: Modalities) -> tuple[float, bool]:
    """A number from 0 to 1 of a sample and a modality, and whether that is withheld from it (``withheld_share``)."""
    share = modalities[name].settings.withheld_share
    number = xxhash.xxh3_64_intdigest(f"{modalities.streams[name]}/{key}".encode()) / 2**64 if share else 1.0
    return number, number < share


@dataclass(frozen=True)
class DocumentPart:
    """A part of a document: the modality ``name``, and a string or the extension of a member."""

    name: str
    string: str | None
    member: str
    loss: bool


def document(
    row: dict[str, Any], members: Collection[str], modalities: Modalities, any_kind: bool = False
) -> Iterator[DocumentPart]:
    """The parts of the document with the JSON ``row`` and members of these extensions, in order. ``any_kind``: files
    that none of ``modalities`` reads are named by their kind, and any modality name is accepted. Raises
    BadSampleError for an invalid document.
    """
    parts = row[PARTS]
    if not isinstance(parts, list) or not parts or len(parts) > MAX_PARTS:
        raise BadSampleError(f"json.{PARTS} is not a list of 1 to {MAX_PARTS} parts")
    fields = {modalities.field(name) or name: name for name in modalities if modalities[name].predictable}
    for number, part in enumerate(parts):
        where = f"part {number} of json.{PARTS}"
        if not isinstance(part, dict) or not isinstance(part.get("loss", True), bool):
            raise BadSampleError(f"{where} is {brief(part)}, not an object whose loss is true or false")
        loss = part.get("loss", True)
        strings = [key for key in part if key in fields and isinstance(part[key], str)]
        if len(strings) == 1 and part.keys() <= {strings[0], "loss"}:
            yield DocumentPart(fields[strings[0]], part[strings[0]], "", loss)
            continue
        member = str(part.get("member")).lower()
        name = str(part.get("modality") or modalities.read_as(member) or (any_kind and format_of(member)) or "")
        fits = bool(name) if any_kind else name in modalities
        if not part.keys() <= {"member", "modality", "loss"} or member not in members or not fits:
            raise BadSampleError(
                f"{where} is {brief(part)}; it needs {' or '.join(fields) or 'no string'}, or the extension of a "
                f"member of the sample ({names(members) or 'none'}) and, unless its format says so, its modality"
            )
        yield DocumentPart(name, None, member, loss)


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
    row.update({name: str(row[name]) for name in META_FIELDS if type(row.get(name)) is int})
    parts = row[PARTS] if isinstance(row.get(PARTS), list) else []
    in_parts = (value for part in parts if isinstance(part, dict) for value in part.values())
    if any(isinstance(value, str) and has_lone_surrogate(value) for value in (*row.values(), *in_parts)):
        raise BadSampleError("json holds half of a character (a lone surrogate)")
    return row


def text_of_field(value: Any) -> str | None:
    """The text by which samples are told apart: a string as it is, an integer in digits, else none."""
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else None


def class_of(raw: RawSample) -> str:
    """The class in the member ``cls`` of a sample; empty where it has none. BadSampleError if it is no text."""
    data = raw.members.get(CLASS, b"")
    try:
        return data.decode().strip() if len(data) <= MAX_TAG else ""
    except UnicodeDecodeError:
        raise BadSampleError(f"{CLASS} is not a class in UTF-8") from None


def _meta(raw: RawSample, row: dict[str, Any]) -> SampleMeta:
    known = {name: row[name] for name in META_FIELDS if isinstance(row.get(name), str)}
    known["label"] = known.get("label") or class_of(raw)
    tags = {
        name: text
        for name, value in row.items()
        if name not in META_FIELDS and (text := text_of_field(value)) is not None and len(text) <= MAX_TAG
    }
    return SampleMeta(raw.key, shard=raw.shard, tags=tags, **known)


def document_tokens(config: RunConfig, modalities: Modalities) -> int | None:
    """The most that a document keeps. Raises ValueError where one item may take more."""
    most = config.data.max_tokens_per_document
    longest, name = max((modality.max_tokens, name) for name, modality in modalities.items())
    if most is not None and most < longest:
        raise ValueError(
            f"data.max_tokens_per_document {most} leaves no room for the {longest} tokens that one {name} may have; "
            f"raise it to {longest}, or lower the limits of modalities.{name}"
        )
    return most


def keep_slot(item: Sample | BadSample) -> Sample:
    """The sample, or an empty one in the place of a bad one."""
    return item if isinstance(item, Sample) else Sample(SampleMeta(item.key))
