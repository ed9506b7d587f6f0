"""The ``README.md`` by which Hugging Face's ``load_dataset`` opens a folder of shards.

Its front matter names the tars (by default the more numerous JSON files would be the data) and the type of every
column (by default they are guessed from the first five samples, which must then have the same members). Below it are
the numbers of the set: sizes, and samples by content, language, licence and source.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import xxhash
import yaml

from mmmoe_pretrain.data_prep.shards.records import COUNTED, Summary

NAME = "README.md"
MOST_SHOWN = 20  # values of a field
_TEXT = "Shards in the format of webdataset, written by `mmmoe-data shard`.\n"
# Extensions that `datasets` decodes (packaged_modules/webdataset), and the types of the columns they become.
_DECODED = {"txt": "string", "text": "string", "transcript": "string", "cls": "int64"}
_NO_COLUMN = ("json", "jsn", "ten", "tb", "mp", "msg", "npy", "npz", "cbor", "pth", "cls2", "index", "inx", "id")
_SPLITS = {"val": "validation"}  # as its users expect it


def write_card(
    folder: Path,
    tars: Mapping[str, str],
    members: Collection[str],
    fields: Mapping[str, str] | None,
    sums: Mapping[str, Summary],
) -> None:
    """``tars``: split -> pattern; ``members``: the suffixes in any sample; ``fields`` of KEY.json -> their types
    (None: not known)."""
    files = [{"split": _SPLITS.get(split, split), "path": pattern} for split, pattern in tars.items()]
    front: dict[str, Any] = {"configs": [{"config_name": "default", "data_files": files}]}
    if fields is not None:
        types = {name: dtype for name in sorted(members) if (dtype := _dtype(name))}
        columns = [*_columns(types), {"name": "json", "struct": _columns(fields)}]
        front["dataset_info"] = {"features": [*columns, *_columns({"__key__": "string", "__url__": "string"})]}
    licences = sorted({name for its in sums.values() for name in its.values["licence"] if name})
    if licences:
        front["license_name"] = ", ".join(licences[:MOST_SHOWN])
    text = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    content = f"---\n{text}---\n{_statistics(sums)}{_TEXT}"
    (folder / NAME).write_text(content + _seal(content), encoding="utf-8")


def _seal(content: str) -> str:
    return f"<!-- {xxhash.xxh3_64_hexdigest(content.encode())} -->\n"


def _statistics(sums: Mapping[str, Summary]) -> str:
    """Tables in Markdown."""
    lines = ["| split | samples | MB | hours of audio | characters of text |", "|---|---|---|---|---|"]
    for split, its in sums.items():
        megabytes, hours = its.totals["bytes"] / 1e6, its.totals["seconds"] / 3600
        lines.append(
            f"| {split} | {its.samples:,} | {megabytes:,.1f} | {hours:,.2f} | {its.totals['text_characters']:,.0f} |"
        )
    whole = Summary()
    for its in sums.values():
        whole += its
    for name in COUNTED:
        counts = [(value, count) for value, count in whole.values[name].most_common() if value]
        if not counts:
            continue
        lines += ["", f"| {name} | samples |", "|---|---|"]
        lines += [f"| {_cell(value)} | {count:,} |" for value, count in counts[:MOST_SHOWN]]
        if len(counts) > MOST_SHOWN:
            lines.append(f"| {len(counts) - MOST_SHOWN:,} more | {sum(n for _, n in counts[MOST_SHOWN:]):,} |")
    return "\n".join(lines) + "\n\n"


def _cell(value: str) -> str:
    """A value in a table: on one line, without markup."""
    text = " ".join(value.split())
    return "".join(f"&#{ord(letter)};" if letter in "|<>&`*_[]\\" else letter for letter in text)[:200]


def _columns(types: Mapping[str, str]) -> list[dict[str, Any]]:
    return [{"name": name, "dtype": dtype} for name, dtype in types.items()]


def is_ours(path: Path) -> bool:
    """Whether the file is unchanged since it was written."""
    content, text, seal = path.read_text(encoding="utf-8", errors="replace").rpartition(_TEXT)
    return seal in ("", _seal(content + text))  # none: of an earlier version


def _dtype(member: str) -> str | None:
    """The type of its column; None: it is none."""
    from mmmoe_pretrain.modalities import format_of

    kind, extension = format_of(member), member.rpartition(".")[2]
    if kind in ("image", "audio"):
        return kind
    return None if extension in _NO_COLUMN else _DECODED.get(extension, "binary")
