"""Shards as rows: those of ``mmmoe-data``, webdataset, img2dataset and Energon, local or at URLs.

Members stay in their tars as ranges; texts, classes and JSON are read. A key that is in our alphabet stays.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from mmmoe_pretrain.data.sources.listing import ENERGON, LIST, energon_splits, is_remote
from mmmoe_pretrain.data.sources.members import CLASS, META
from mmmoe_pretrain.data.sources.source import Indexed, open_indexed
from mmmoe_pretrain.data.storage.files import Files
from mmmoe_pretrain.data_prep.rows.documents import PARTS, members_named
from mmmoe_pretrain.data_prep.rows.fields import foreign_row, kept_key, sound, with_problem
from mmmoe_pretrain.data_prep.rows.folder import decoded
from mmmoe_pretrain.data_prep.rows.refs import Range, Ref, printable
from mmmoe_pretrain.data_prep.rows.row import SPLITS, Found, Row, sample_key, split_called
from mmmoe_pretrain.limits import FIELD_ALIASES, MAX_MEMBER_BYTES, MAX_META_BYTES, MAX_TEXT_BYTES, has_text
from mmmoe_pretrain.progress import Progress, counted
from mmmoe_pretrain.untrusted import parse_json
from mmmoe_pretrain.urls import local_path, redacted

TEXT_FIELDS = ("text", *(alias for alias, name in FIELD_ALIASES.items() if name == "text"))


def shard_sources(spec: str, files: Files) -> list[tuple[str, str]]:
    """The sources in ``spec``, itself or the splits of a local folder, and the splits of those of Energon; of others
    the folder of each shard tells."""
    folder = Path(local_path(spec))
    if is_remote(spec) or not folder.is_dir():
        return [(spec, _split(spec.rpartition("#")[2]))]
    if (folder / ENERGON).is_dir() and not (folder / LIST).is_file():
        return [(f"{spec}#{name}", _split(name)) for name in energon_splits(str(folder), files)]
    if (folder / LIST).is_file() or any(folder.glob("*.tar")):
        return [(spec, "")]
    return [(str(path), "") for path in sorted(folder.iterdir()) if path.is_dir() and holds_shards(path)]


def holds_shards(folder: Path) -> bool:
    return (folder / LIST).is_file() or (folder / ENERGON).is_dir() or any(folder.glob("*.tar"))


def shard_rows(spec: str, root: Path, given: Mapping[str, str], files: Files, notes: list[str]) -> Iterator[Found]:
    """The rows of all samples; ``--column key=`` puts the name of the shard before each key."""
    if given.keys() - {"key"} or given.get("key"):
        raise ValueError(
            f"{redacted(spec)} are shards, whose fields are named in their JSON; --column key= alone is known here: "
            f"it puts the name of the shard before each key"
        )
    sources = shard_sources(spec, files)
    if not sources:
        raise ValueError(f"{redacted(spec)} holds no shards")
    left_out: Counter[str] = Counter()
    for place, split in sources:
        shards = open_indexed(place, files)
        with Progress(f"reading {redacted(place)}", len(shards), "samples") as progress:
            for i in range(len(shards)):
                yield _found(shards, i, split, root, "key" in given, left_out)
                progress.advance()
        if shards.urls and not is_remote(shards.urls[0]):
            notes += _not_downloaded(place, shards.urls, files)
    for what, count in left_out.items():
        notes.append(f"{redacted(spec)}: {counted(count, 'file')} left out: {what}")


def _not_downloaded(place: str, urls: list[str], files: Files) -> Iterator[str]:
    """A note of the rows that img2dataset tells of in its Parquet files and has no sample of."""
    from mmmoe_pretrain.data_prep.inspect.records import read_records  # pyarrow

    records = read_records(urls, files)
    failed = {status: n for status, n in records.statuses.items() if status.startswith("failed_")} if records else {}
    if records and failed:
        each = ", ".join(f"{printable(status)} {count:,}" for status, count in sorted(failed.items()))
        reasons = "".join(f"; most often: {printable(reason)}" for reason, _ in records.reasons.most_common(1))
        count = counted(sum(failed.values()), "row")
        yield f"{redacted(place)}: {count} of img2dataset without a sample ({each}{reasons})"


def _found(shards: Indexed, i: int, split: str, root: Path, prefixed: bool, left_out: Counter[str]) -> Found:
    url, places = shards.places(i)
    name = shards.key(i)
    place = PurePosixPath(url.partition("?")[0] if is_remote(url) else os.path.abspath(local_path(url)))
    split = split or _split(place.parent.name)
    key = kept_key(name)
    if prefixed:
        key = f"{sample_key(place.stem)}%2F{key}"
    chosen = shards.modalities.members_read(tuple(places))
    path = url if is_remote(url) else _below(local_path(url), root)
    refs: dict[str, Ref] = {
        extension: Range(path, f"{name}.{extension}", offset, size) for extension, (offset, size) in places.items()
    }
    try:
        row = sound(_row(shards, i, key, split, refs, chosen, places, left_out))
    except ValueError as error:
        row = with_problem(Row(key, split=split), str(error))
    return Found(f"{redacted(url)}, key {name}", row)


def _row(
    shards: Indexed, i: int, key: str, split: str, refs: dict[str, Ref], chosen: Mapping[str, str],
    places: Mapping[str, tuple[int, int]], left_out: Counter[str],
) -> Row:  # fmt: skip
    fields = _fields(shards, i, places, chosen.get("text"))
    is_document = isinstance(fields.get(PARTS), list)
    image, audio = (None if is_document else refs.get(chosen.get(kind, "")) for kind in ("image", "audio"))
    row = foreign_row(fields, key, split, image, audio)
    read = {META, CLASS, chosen.get("text")} | ({chosen.get("image"), chosen.get("audio")} - {None})
    members = {extension: ref for extension, ref in refs.items() if extension not in read}
    if is_document:
        named = members_named(row.parts)
        left_out["of documents that name them in none of their parts"] += len(refs.keys() - named - {META})
        members = {extension: ref for extension, ref in refs.items() if extension in named}
    for extension in list(members):
        if not extension or not extension.isprintable() or places[extension][1] > MAX_MEMBER_BYTES:
            left_out[f"without a suffix, or of more than {MAX_MEMBER_BYTES:,} bytes"] += 1
            del members[extension]
    return dataclasses.replace(row, members=members)


def _fields(shards: Indexed, i: int, places: Mapping[str, tuple[int, int]], text: str | None) -> dict[str, Any]:
    """What a sample's JSON, class and text say."""
    wanted = {name: most for name, most in ((META, MAX_META_BYTES), (CLASS, 4096), (text, MAX_TEXT_BYTES))
              if name is not None and name in places}  # fmt: skip
    for name, most in wanted.items():
        if places[name][1] > most:
            raise ValueError(f"its {name} has {places[name][1]:,} bytes, and at most {most:,} are read")
    held = shards.read(i, only=wanted).members
    fields = parse_json(held[META], META, MAX_META_BYTES) if META in held else {}
    if not isinstance(fields, dict):
        raise ValueError(f"its {META} holds {type(fields).__name__}, not an object")
    if isinstance(fields.get(PARTS), list):  # all of its content
        return {f"original_{name}" if name in TEXT_FIELDS else name: value for name, value in fields.items()}
    if CLASS in held and fields.get("label") in (None, "") and fields.get("class") in (None, ""):
        fields["label"] = decoded(held[CLASS], CLASS).strip()
    if text in held and has_text(found := decoded(held[text], str(text))):
        if "text" in fields and fields["text"] != found:
            fields["original_text"] = fields["text"]
        fields["text"] = found
    return fields


def _split(name: str) -> str:
    split = split_called(name)
    return split if split in SPLITS else ""


def _below(path: str, root: Path) -> str:
    """The path below ``root``, so that the rows are the same wherever the folder lies."""
    whole = Path(path).absolute()
    return str(whole.relative_to(root)) if whole.is_relative_to(root) else str(whole)
