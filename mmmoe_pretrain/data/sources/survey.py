"""What sources hold, counted from their indices: what is read and what is not. Shared by ``mmmoe train``,
which fails if no objective of its config can use the data, and by ``mmmoe-data``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmmoe_pretrain.data.decode import PARTS, BadSampleError, class_of, contents, document, read_row
from mmmoe_pretrain.data.sources.members import CLASS, META, RawSample, names
from mmmoe_pretrain.data.sources.source import Indexed
from mmmoe_pretrain.data.sources.stream import Stream
from mmmoe_pretrain.limits import has_text
from mmmoe_pretrain.modalities import Modalities, default_modalities
from mmmoe_pretrain.urls import shown

Sizes = tuple[str, dict[str, int]]  # the path of a source, its totals by name
LOOKED_AT = 32  # samples of each kind whose JSON is searched for content
LOOKED_AT_ALL = 4096  # of all kinds, of which a corpus of documents may have very many
SEARCHED = 16_384  # of a source, before a run is refused: seconds, from a bucket minutes


@dataclass
class Survey:
    """Numbers of samples: all, by the modalities of their members, by an extension that is not read; and of shards
    that are not read (``*.tar.gz``)."""

    known: Modalities = field(default_factory=default_modalities)
    samples: int = 0
    modalities: Counter[tuple[str, ...]] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)
    kinds: set[tuple[str, ...]] = field(default_factory=set)  # modalities of members and JSON that samples hold

    def add(
        self, extensions: tuple[str, ...], count: int = 1, in_json: Iterable[str] = (), in_parts: Iterable[str] = ()
    ) -> None:
        """``count`` samples whose members have these ``extensions``. ``in_json``: modalities that their JSON has;
        ``in_parts``: extensions that it names as the parts of a document."""
        chosen = self.known.members_read(extensions)
        read = {META, CLASS, *chosen.values(), *in_parts}
        self.samples += count
        self.modalities[in_order({*chosen, *in_json}, self.known)] += count
        self.unread.update({e: count for e in extensions if e not in read})

    def content(self) -> str:
        """E.g. ``image+text 30, image 2``."""
        return ", ".join(f"{'+'.join(kind) or 'nothing'} {n:,}" for kind, n in self.modalities.most_common())

    def left_out(self) -> str:
        """E.g. ``right.png (32), cls (64)``; empty where all is read."""
        return names(f"{extension or 'no extension'} ({n:,})" for extension, n in self.unread.most_common())


def survey(folders: Sequence[Indexed]) -> Survey:
    """The counts of all samples. The content of the JSONs of a kind of sample is estimated from a few of them."""
    found = Survey(folders[0].modalities) if folders else Survey()
    for folder in folders:
        for extensions, count, most in _spread(folder, LOOKED_AT_ALL, LOOKED_AT):
            held, named = _in_json(folder, extensions, most)
            found.add(extensions, count, held, named)
            found.kinds.add((*folder.modalities.members_read(extensions), *held))
        found.unread.update(folder.shards_left_out)
    return found


def refuse_useless(folders: Sequence[Indexed], found: Survey, needs: Mapping[str, set[str]]) -> list[str]:
    """The entries of ``needs`` (the modalities that an objective requires, by its description in errors) that no
    sample satisfies. Raises ValueError if no sample satisfies any, after searching SEARCHED JSONs of each source."""
    served = _served(needs, found.kinds) or _served(needs, _kinds_with_json(folders))
    if not served:
        asked = "; ".join(f"{name} needs {' and '.join(sorted(wanted))}" for name, wanted in needs.items())
        unread = f"; not read: {found.left_out()}" if found.unread else ""
        raise ValueError(
            f"no sample of data.train serves an objective, so there is nothing to learn (of each source {SEARCHED:,} "
            f"JSONs at most were searched). {asked}. The {found.samples:,} samples hold: {found.content()}{unread}. "
            f"Correct data.train, the extensions of its files (docs/data_format.md) or the config's objectives"
        )
    return sorted(needs.keys() - served)


def _served(needs: Mapping[str, set[str]], kinds: Iterable[tuple[str, ...]]) -> set[str]:
    return {name for name, wanted in needs.items() if any(wanted <= set(kind) for kind in kinds)}


def _spread(folder: Indexed, total: int, each: int) -> Iterator[tuple[tuple[str, ...], int, int]]:
    """The kinds of samples, the number of each, and of how many the JSON is read: ``each``, and at most about
    ``total`` of all kinds, the most frequent ones first."""
    contents = folder.contents
    most = max(1, min(each, total // len(contents)))
    for number, (extensions, count) in enumerate(contents.most_common()):
        yield extensions, count, most if number < total else 0


def _kinds_with_json(folders: Sequence[Indexed]) -> list[tuple[str, ...]]:
    """The modalities of kinds of samples, with those that some JSON has; a label may be used as a text."""
    return [
        (*folder.modalities.members_read(extensions), *_in_json(folder, extensions, most)[0])
        for folder in folders
        for extensions, _, most in _spread(folder, SEARCHED, SEARCHED)
    ]


def _in_json(folder: Indexed, extensions: tuple[str, ...], most: int) -> tuple[set[str], set[str]]:
    """The modalities that the JSONs of samples with these ``extensions`` hold, and the extensions that they name as
    the parts of documents, of at most ``most`` samples."""
    chosen = folder.modalities.members_read(extensions)
    absent = {name for name in folder.modalities if name not in chosen and folder.modalities.field(name)}
    others = {e for e in extensions if e not in chosen.values() and folder.modalities.can_read(e)}
    held, named = set[str](), set[str]()
    by_label = {name for name, modality in folder.modalities.items() if modality.label_probability}
    if META not in extensions:
        return (by_label if CLASS in extensions else held), named
    for i in folder.with_contents(extensions, most).tolist() if most else ():
        if absent <= held and others <= named:
            break
        raw = folder.read(i, only=(META, CLASS))
        try:
            row = read_row(raw)
            any_kind = folder.modalities is default_modalities()  # of a tool, which knows no run's settings
            of_sample, in_parts = held_by(raw, row, folder.modalities, any_kind)
        except BadSampleError:
            continue
        held |= of_sample
        named |= in_parts
        if (row.get("label") or class_of(raw)) and PARTS not in row:
            held |= by_label
    return held, named


def held_by(
    raw: RawSample, row: dict[str, Any], modalities: Modalities, any_kind: bool = False
) -> tuple[set[str], set[str]]:
    """The modalities that a sample with the JSON ``row`` has something for, and the extensions that it names as the
    parts of a document. ``any_kind``: see ``document``. Only members that are texts are read.

    Raises BadSampleError where a text or a document is damaged.
    """
    extensions = (*raw.members, *raw.unread)
    if PARTS in row:
        parts = list(document(row, extensions, modalities, any_kind))
        held = {part.name for part in parts if part.string is None or has_text(part.string)}
        return held, {part.member for part in parts if part.member}
    texts = {name for name, modality in modalities.items() if modality.default_field}
    held = modalities.members_read(extensions).keys() - texts
    return held | {
        name
        for name, data in contents(raw, row, modalities).items()
        if name not in texts or modalities[name].raw(data)
    }, set()


def in_order(held: Iterable[str], modalities: Iterable[str]) -> tuple[str, ...]:
    """In the order of ``modalities``, then by name."""
    first = tuple(name for name in modalities if name in held)
    return (*first, *sorted(set(held).difference(first)))


def sizes_of(paths: Sequence[str], sources: Sequence[Indexed | Stream]) -> list[Sizes]:
    """The totals of each source, saved in checkpoints for the warning of a resumed run whose shards have changed."""
    found: list[Sizes] = []
    for path, source in zip(paths, sources, strict=False):  # a rank that does not read has no sources
        if isinstance(source, Stream):
            totals = {"shards": len(source.shards), "samples a window": source.window}
        else:
            samples, held = int(source.shard_sizes.sum()), int(source.shard_bytes.sum())
            totals = {"shards": len(source.shard_sizes), "samples": samples, "bytes": held}
        found.append((shown(path), totals))
    return found


def read_sizes(value: Any) -> list[Sizes]:
    """What JSON made of ``sizes_of``; empty for anything else."""
    try:
        return [(str(path), {str(name): int(total) for name, total in its.items()}) for path, its in value]
    except (TypeError, ValueError, AttributeError, OverflowError):
        return []


def changes(before: Sequence[Sizes], now: Sequence[Sizes]) -> list[str]:
    """What differs, by source: ``data/web: 240 -> 180 samples``. A source with a new path is that of its number, if
    that one's path is gone; nothing where it is not known what was ``before``."""
    if not before:
        return []
    known, names = dict(before), dict(now)
    pairs = zip(names, known, strict=True) if len(names) == len(known) else ()
    renamed = {path: old for path, old in pairs if path not in known and old not in names}
    found = [f"{path} is missing" for path in known if path not in (names.keys() | renamed.values())]
    for path, totals in names.items():
        old = known.get(renamed.get(path, path))
        if old is None:
            found.append(f"{path} is new")
            continue
        differ = [f"{old.get(name, 0):,} -> {its:,} {name}" for name, its in totals.items() if its != old.get(name)]
        found += [f"{path}: {', '.join(differ)}"] if differ else []
    return found
