"""``mmmoe-data reshard`` and ``mix``: samples of shards become other shards, their members byte for byte.

Another size or order of shards, a subset, several sources in one, or a blend by weights. Nothing is decoded.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from data_prep.quality.filters import Filters
from data_prep.rows.inputs import Input
from data_prep.rows.refs import Range
from data_prep.rows.row import SPLITS, Found, Row, split_called
from data_prep.rows.seen import values_wanted
from data_prep.shards.shard import Choice, Report, run
from data_prep.shards.writing import ShardOptions
from data_prep.verify import split_specs
from mmmoe_pretrain.data.sources.listing import without_ranges
from mmmoe_pretrain.data.sources.members import META
from mmmoe_pretrain.data.sources.source import Indexed, open_indexed
from mmmoe_pretrain.data.storage.files import Files
from mmmoe_pretrain.limits import FIELD_ALIASES
from mmmoe_pretrain.progress import track
from mmmoe_pretrain.untrusted import brief, parse_json

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Part:
    """Samples of a source that go to ``split``. ``wanted``: bool [n]; None: all."""

    source: Indexed
    split: str
    wanted: np.ndarray | None = None

    @property
    def numbers(self) -> np.ndarray:
        """The wanted samples, ascending."""
        return np.arange(len(self.source)) if self.wanted is None else np.flatnonzero(self.wanted)


@dataclass(frozen=True, slots=True)
class Subset:
    """Which samples: those with ``filters`` (field=value of their JSON), with a key of ``keys``, and of these the
    ``samples`` with the smallest hashes of their keys; None: all."""

    filters: Sequence[str] = ()
    keys: frozenset[str] | None = None
    samples: int | None = None


def copied(
    samples_per_shard: int, shard_mb: float, workers: int, overwrite: bool, filters: Filters | None = None
) -> ShardOptions:
    """Options by which samples are copied as they are; one that cannot be read ends the command."""
    size, filters = int(shard_mb * 10**6), filters or Filters()
    return ShardOptions(
        samples_per_shard, size, workers=workers, max_bad_fraction=0, overwrite=overwrite, filters=filters
    )


def open_parts(specs: Sequence[str], split: str = "train") -> list[Part]:
    """A part for each split of each source; ``split``: of what is in no folder of a split's name."""
    files, found = Files(), []
    for spec in specs:
        for each in split_specs(spec):
            found.append(Part(open_indexed(each, files), split_named(each, split)))
    for note in without_ranges((url for part in found for url in part.source.urls), files):
        log.warning("%s", note)
    return found


def split_named(spec: str, other: str = "train") -> str:
    """The split that the folder ``spec`` is named after, or ``other``."""
    name = split_called(Path(spec.rstrip("/")).name)
    return name if name in SPLITS else other


def reshard(
    parts: Sequence[Part], out: Path, options: ShardOptions, order: str = "input", number_keys: bool = False
) -> Report:
    """Write the wanted samples. ``number_keys``: the keys of part n begin with n, from 0 on."""
    name = ", ".join(dict.fromkeys(part.source.spec for part in parts))
    given = Input(name, Path(), _rows(parts, number_keys), order, "; give --number-keys")
    return run(given, out, Choice(order=order), options)


def _rows(parts: Sequence[Part], number_keys: bool) -> Iterator[Found]:
    for number, part in enumerate(parts):
        start = f"{number}-" if number_keys else ""
        for i in part.numbers.tolist():
            url, places = part.source.places(i)
            key = part.source.key(i)
            members = {name: Range(url, f"{key}.{name}", *place) for name, place in places.items()}
            yield Found(
                f"sample {i} of {part.source.spec}", Row(start + key, split=part.split, members=members, copied=True)
            )


def choose(parts: Sequence[Part], subset: Subset) -> None:
    """Restrict the parts to a subset. Raises ValueError where nothing is left."""
    values = values_wanted(subset.filters)
    for part in parts if values or subset.keys is not None else ():
        keep = np.zeros(len(part.source), dtype=bool)
        for i in track(part.numbers.tolist(), "choosing", len(part.numbers), "samples"):
            keep[i] = (subset.keys is None or part.source.key(i) in subset.keys) and _matches(part.source, i, values)
        part.wanted = keep
    if subset.keys is not None:
        _note_missing(parts, subset.keys)
    if subset.samples is not None:
        _smallest(parts, subset.samples)
    if not any(len(part.numbers) for part in parts):
        raise ValueError("no sample is left; loosen --filter, --keys or --samples")


def _note_missing(parts: Sequence[Part], keys: frozenset[str]) -> None:
    """Name keys that no sample has; a sample that --filter left out has none here."""
    missing = keys.difference(part.source.key(i) for part in parts for i in part.numbers.tolist())
    if missing:
        log.warning("of %d keys, %d are of no sample (of those that --filter takes), such as %s", len(keys),
                    len(missing), brief(min(missing)))  # fmt: skip


def _matches(source: Indexed, i: int, values: dict[str, set[str]]) -> bool:
    if not values:
        return True
    raw = source.read(i, only=(META,)).members.get(META)
    fields = parse_json(raw, f"the JSON of {source.key(i)}") if raw else {}
    alias = {other: name for name, other in FIELD_ALIASES.items()}

    def value(name: str) -> str:
        found = fields.get(name, fields.get(FIELD_ALIASES.get(name, ""), fields.get(alias.get(name, ""))))
        return "" if found is None else str(found)

    return isinstance(fields, dict) and all(value(name) in allowed for name, allowed in values.items())


def hashes(part: Part) -> np.ndarray:
    """uint64 [n]: of the keys of the wanted samples."""
    return np.fromiter(
        (xxhash.xxh3_64_intdigest(part.source.key(i).encode()) for i in part.numbers.tolist()),
        np.uint64,
        len(part.numbers),
    )


def _smallest(parts: Sequence[Part], count: int) -> None:
    """Keep the ``count`` samples with the smallest hashes, over all parts; of equal keys those of the first parts."""
    found = [hashes(part) for part in parts]
    every = np.concatenate(found)
    if count >= len(every):
        return
    chosen = np.zeros(len(every), dtype=bool)
    chosen[np.argsort(every, kind="stable")[:count]] = True
    for part, own in zip(parts, np.split(chosen, np.cumsum([len(each) for each in found])[:-1]), strict=True):
        keep = np.zeros(len(part.source), dtype=bool)
        keep[part.numbers[own]] = True
        part.wanted = keep


def mix(given: Sequence[str], samples: int | None) -> list[Part]:
    """The parts of ``source=weight``, each with its share of ``samples`` (None: as many as there are, none twice)."""
    parts: list[Part] = []
    weights: list[float] = []
    for item in given:
        spec, _, weight = item.rpartition("=")
        try:
            weights.append(float(weight))
        except ValueError:
            weights.append(0.0)
        if not spec or not 0 < weights[-1] < math.inf:
            raise ValueError(f"{item} is not SOURCE=WEIGHT with a weight above 0")
        found = open_parts([spec])
        if len(found) > 1:
            inside = ", ".join(part.source.spec for part in found)
            raise ValueError(f"{spec} holds {len(found)} splits; name one of {inside}")
        parts += found
    shares = np.asarray(weights) / sum(weights)
    most = int(min(len(part.source) / share for part, share in zip(parts, shares.tolist(), strict=True)))
    if samples is not None and samples > most:
        raise ValueError(
            f"--samples {samples} exceeds {most}, the most that these shares give without repeating a sample; lower "
            f"it, or blend in training, where data.train has weights and epochs"
        )
    total = most if samples is None else samples
    for part, share in zip(parts, shares.tolist(), strict=True):
        _smallest([part], min(len(part.source), round(total * share)))
    return parts


def read_keys(path: Path) -> frozenset[str]:
    """A key a line, or JSON lines with a ``key``."""
    found = set()
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8; convert it with iconv, or name a text file of keys") from None
    for number, line in enumerate(lines, 1):
        if not line.startswith("{"):
            found.add(line.strip())
            continue
        values = parse_json(line.encode(), f"{path} line {number}")
        if "key" not in values:
            raise ValueError(f"{path} line {number} has no key; each line is a key, or an object with a key")
        found.add(str(values["key"]))
    return frozenset(found - {""})
