"""``mmmoe-data reshard`` and ``mix``: samples of shards become other shards, their members byte for byte.

Another size or order of shards, a subset, several sources in one, or a blend by weights. Nothing is decoded.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from mmmoe_pretrain.data.sources.members import META
from mmmoe_pretrain.data.sources.source import Indexed
from mmmoe_pretrain.data.storage.files import Files
from mmmoe_pretrain.data_prep.console import answer
from mmmoe_pretrain.data_prep.quality.filters import Filters
from mmmoe_pretrain.data_prep.rows.inputs import Input
from mmmoe_pretrain.data_prep.rows.refs import Range
from mmmoe_pretrain.data_prep.rows.row import SPLITS, Faults, Found, Row, split_called
from mmmoe_pretrain.data_prep.rows.seen import values_wanted
from mmmoe_pretrain.data_prep.rows.spool import Spool, read_found
from mmmoe_pretrain.data_prep.shards import shard
from mmmoe_pretrain.data_prep.shards.building import Building
from mmmoe_pretrain.data_prep.shards.shard import Choice, Report
from mmmoe_pretrain.data_prep.shards.shard_files import members_in_tar, tar_size
from mmmoe_pretrain.data_prep.shards.writing import ShardOptions
from mmmoe_pretrain.data_prep.verify import open_splits, split_named
from mmmoe_pretrain.limits import FIELD_ALIASES, use_aliases
from mmmoe_pretrain.progress import counted, track
from mmmoe_pretrain.untrusted import brief, parse_json
from mmmoe_pretrain.urls import redacted

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
    if split_called(split) not in SPLITS:
        raise ValueError(f"--split {split} is not one of {', '.join(SPLITS)}")
    sources = open_splits(specs, Files())
    return [Part(source, split_named(source.spec, split_called(split))) for source in sources]


def run(
    parts: Sequence[Part], out: Path, options: ShardOptions, order: str, number_keys: bool, dry_run: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """The commands: write the wanted samples, or say what would be written."""
    if not dry_run:
        shard.show(reshard(parts, out, options, order, number_keys), out, as_json)
        return
    Building(out, options.overwrite)  # refuses what cannot be written
    found = plan(parts, options, order, number_keys)
    unread = "; filters by size, length and language were not applied" * (options.filters != Filters())
    lines = [
        f"{split}: {counted(each['samples'], 'sample')}, {counted(each['shards'], 'shard')}, {each['bytes']:,} bytes"
        for split, each in found.items()
    ]
    answer(as_json, {"splits": found, "written": False}, f"nothing was written{unread}; {out} would get:", *lines)


def plan(parts: Sequence[Part], options: ShardOptions, order: str, number_keys: bool) -> dict[str, dict[str, int]]:
    """Samples, shards and their bytes by split. Filters that need files are not applied."""
    found: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as folder, Spool(Path(folder) / shard.ROWS) as spool:
        shard.fill(spool, _input(parts, order, number_keys), Choice(), None)
        for split in (split for split in SPLITS if spool.counts[split]):
            rows = read_found(spool.path, spool.offsets(split, order))
            found[split] = _cut((_tar_bytes(row) for _, row in rows), options)
    return found


def _tar_bytes(row: Row) -> int:
    return members_in_tar(row.key, {name: ref.size for name, ref in row.members.items() if isinstance(ref, Range)})


def _cut(sizes: Iterable[int], options: ShardOptions) -> dict[str, int]:
    """What samples that take ``sizes`` in a tar become."""
    samples = shards = total = held = size = 0
    for each in sizes:
        if not shards or held == options.samples_per_shard or size + each > options.shard_bytes:
            total += tar_size(size) if shards else 0
            shards, held, size = shards + 1, 0, 0
        samples, held, size = samples + 1, held + 1, size + each
    return {"samples": samples, "shards": shards, "bytes": total + tar_size(size)}


def reshard(
    parts: Sequence[Part], out: Path, options: ShardOptions, order: str = "input", number_keys: bool = False
) -> Report:
    """Write the wanted samples. ``number_keys``: the keys of part n begin with n, from 0 on."""
    return shard.run(_input(parts, order, number_keys), out, Choice(order=order), options)


def _input(parts: Sequence[Part], order: str, number_keys: bool) -> Input:
    name, notes = ", ".join(dict.fromkeys(redacted(part.source.spec) for part in parts)), list[str]()
    return Input(name, Path(), _rows(parts, number_keys, notes), order, "; give --number-keys", notes)


def _rows(parts: Sequence[Part], number_keys: bool, notes: list[str]) -> Iterator[Found]:
    left_out = 0  # files without a suffix, which no sample can have in the shards that are written
    for number, part in enumerate(parts):
        start = f"{number}-" if number_keys else ""
        for i in part.numbers.tolist():
            url, places = part.source.places(i)
            key, where = part.source.key(i), f"sample {i} of {redacted(part.source.spec)}"
            members = {name: Range(url, f"{key}.{name}", *place) for name, place in places.items() if name}
            left_out += "" in places
            if members:
                yield Found(where, Row(start + key, split=part.split, members=members, copied=True))
    if left_out:
        notes.append(f"{counted(left_out, 'file')} without a suffix left out, which no modality reads")


def choose(parts: Sequence[Part], subset: Subset) -> None:
    """Restrict the parts to a subset. Raises ValueError where nothing is left."""
    values, damaged = values_wanted(subset.filters), Faults()
    for part in parts if values or subset.keys is not None else ():
        keep = np.zeros(len(part.source), dtype=bool)
        for i in track(part.numbers.tolist(), "choosing", len(part.numbers), "samples"):
            if subset.keys is None or part.source.key(i) in subset.keys:
                keep[i] = _matches(part.source, i, values, damaged)
        part.wanted = keep
    if damaged.count:
        log.warning("left out %s whose JSON --filter cannot read: %s", counted(damaged.count, "sample"),
                    "; ".join(damaged.shown[:3]))  # fmt: skip
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


def _matches(source: Indexed, i: int, values: dict[str, set[str]], damaged: Faults) -> bool:
    if not values:
        return True
    raw = source.read(i, only=(META,))
    try:
        fields = parse_json(raw.members.get(META) or b"{}", "its json")
    except ValueError as error:
        damaged.add(f"{raw.key} of {raw.shard}", str(error))
        return False
    if not isinstance(fields, dict):
        damaged.add(f"{raw.key} of {raw.shard}", "its json is no object")
        return False
    use_aliases(fields)
    found = {name: fields.get(name, fields.get(FIELD_ALIASES.get(name, name))) for name in values}
    return all(("" if found[name] is None else str(found[name])) in allowed for name, allowed in values.items())


def _smallest(parts: Sequence[Part], count: int) -> None:
    """Keep the ``count`` samples with the smallest hashes, over all parts; of equal keys those of the first parts."""
    keys = (part.source.key(i) for part in parts for i in part.numbers.tolist())
    sizes = [len(part.numbers) for part in parts]
    every = np.fromiter((xxhash.xxh3_64_intdigest(key.encode()) for key in keys), np.uint64, sum(sizes))
    if count >= len(every):
        return
    chosen = np.zeros(len(every), dtype=bool)
    chosen[np.argsort(every, kind="stable")[:count]] = True
    for part, own in zip(parts, np.split(chosen, np.cumsum(sizes)[:-1]), strict=True):
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
