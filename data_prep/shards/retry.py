"""What ``--retry`` continues: the shards that an earlier command wrote, the rows that failed there, and its options.

``options.json`` beside the shards has the options that decide what a sample is; rows that are tried again get
the same.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmmoe_pretrain.data.sources.listing import LIST, read_list
from mmmoe_pretrain.data.sources.source import open_indexed
from mmmoe_pretrain.data.storage.files import Files
from mmmoe_pretrain.data_prep.quality.filters import Filters
from mmmoe_pretrain.data_prep.rows.row import SPLITS
from mmmoe_pretrain.data_prep.shards.media import MediaOptions
from mmmoe_pretrain.data_prep.shards.records import BROKEN, OK, read_records, read_skipped
from mmmoe_pretrain.data_prep.shards.shard_files import write_json
from mmmoe_pretrain.untrusted import read_bytes

log = logging.getLogger(__name__)
SKIPPED, OPTIONS = "skipped.jsonl", "options.json"
_MOST_BYTES = 1 << 20  # of options.json
_OPTION = {
    "languages": "language",
    "ratios": "ratio",
    "columns": "column",
    "constants": "set",
}  # field -> option, where they differ


@dataclass(frozen=True, slots=True)
class Settings:
    """The options that decide what a sample is, and its split."""

    media: MediaOptions = field(default_factory=MediaOptions)
    filters: Filters = field(default_factory=Filters)
    ratios: dict[str, float] = field(default_factory=dict)
    columns: tuple[str, ...] = ()
    constants: dict[str, str] = field(default_factory=dict)

    def by_option(self) -> dict[str, Any]:
        """Their values by the name of the option."""
        values = dataclasses.asdict(self)
        values = {**values.pop("media"), **values.pop("filters"), **values}
        return {_OPTION.get(name, name): value for name, value in values.items()}

    def write(self, folder: Path) -> None:
        write_json(folder / OPTIONS, dataclasses.asdict(self))

    def continued(self, out: Path, given: Collection[str] | None = None) -> Settings:
        """The options of the run that wrote ``out``. Raises ValueError where one that is ``given`` (None: all are)
        differs. Where that run kept none (an earlier version, a copy of shards), these are returned."""
        if not (out / OPTIONS).exists():
            log.warning("%s has no %s, so nothing tells by which options it was written; give the same", out, OPTIONS)
            return self
        first = _read(out / OPTIONS)
        before, now = first.by_option(), self.by_option()
        differ = [name for name in now if (given is None or name in given) and now[name] != before[name]]
        if differ:
            each = "; ".join(f"--{name.replace('_', '-')} is {_shown(now[name])}, and was {_shown(before[name])}"
                             for name in differ)  # fmt: skip
            raise ValueError(
                f"{each} when {out} was written; --retry takes the options of that run, so leave out what differs, "
                f"or write all rows anew, with --overwrite and without --retry"
            )
        return first


def _read(path: Path) -> Settings:
    from pydantic import TypeAdapter

    try:
        return TypeAdapter(Settings).validate_json(read_bytes(path, _MOST_BYTES))
    except ValueError:
        raise ValueError(
            f"{path} is not what was written there, the options of the shards; remove it, and give --retry these "
            f"options again"
        ) from None


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        value = [f"{name}={its:g}" if isinstance(its, float) else f"{name}={its}" for name, its in value.items()]
    if isinstance(value, list | tuple):
        value = ", ".join(value)
    return "not given" if value in (None, "", False) else "given" if value is True else str(value)


def require(out: Path) -> None:
    """Raise ValueError where there is no folder to continue."""
    if not out.is_dir():
        raise ValueError(f"there is no folder {out} with rows to try again; leave out --retry")


class Before:
    """What an earlier command has written: its ``shards`` by split, the suffixes of their ``members``, and the keys
    of the rows that ``failed``. Without ``retry`` there are none, and ``failed`` is None: all rows are written."""

    def __init__(self, out: Path, retry: bool) -> None:
        self.shards: dict[str, list[dict[str, Any]]] = {}
        self.members: set[str] = set()
        self.failed: set[str] | None = None
        self.out = out
        if not retry:
            return
        require(out)
        lists = {split: out / split / LIST for split in SPLITS if (out / split / LIST).exists()}
        if not lists or not (out / SKIPPED).exists():
            raise ValueError(f"{out} holds no shards of mmmoe-data shard with rows to try again; leave out --retry")
        self.shards = {split: read_list(str(path), Files()) for split, path in lists.items()}
        for split in self.shards:
            self.members.update(*open_indexed(out / split).contents)
        self.failed = {line["key"] for line in read_skipped(out / SKIPPED) if line["status"] == BROKEN}

    def records(self, split: str) -> Path | None:
        """The folder of the records of before."""
        return None if self.failed is None else self.out / split

    def skipped(self, records: Iterable[dict[str, Any]], folders: Sequence[Path]) -> Iterator[dict[str, Any]]:
        """The rows without a sample now, of ``records`` in the folders of the splits. With --retry, without those
        that have a sample now in another split, and with those of before that were not tried again."""
        if self.failed is None:
            yield from records
            return
        told: set[str] = set()
        for folder in folders:
            for batch in read_records(folder, ("key", "status")):
                each = zip(batch["key"], batch["status"], strict=True)
                told.update(key for key, status in each if status == OK and key in self.failed)
        for chained in (records, read_skipped(self.out / SKIPPED)):
            for record in chained:
                if record["key"] not in told:
                    told.add(record["key"])
                    yield record
