"""The ``README.md`` by which Hugging Face's ``load_dataset`` opens a folder of shards.

Its front matter names the tars (by default the more numerous JSON files would be the data) and the type of every
column (by default they are guessed from the first five samples, which must then have the same members).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from data_prep.manifest import Row, sample_fields

NAME = "README.md"
_TEXT = "Shards in the format of webdataset, written by `mmmoe-data shard`.\n"
_SPLITS = {"val": "validation"}  # as its users expect it
_TYPES = {bool: "bool", int: "int64", float: "float64", str: "string"}


def write_card(folder: Path, tars: Mapping[str, str], members: Collection[str], fields: Mapping[str, str]) -> None:
    """``tars``: split -> pattern; ``members``: the suffixes in any sample; ``fields`` of KEY.json -> their types."""
    files = [{"split": _SPLITS.get(split, split), "path": pattern} for split, pattern in tars.items()]
    types = {name: _dtype(name) for name in sorted(members) if name != "json"}
    columns = [*_columns(types), {"name": "json", "struct": _columns(fields)}]
    columns += _columns({"__key__": "string", "__url__": "string"})
    front = {"configs": [{"config_name": "default", "data_files": files}], "dataset_info": {"features": columns}}
    text = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    (folder / NAME).write_text(f"---\n{text}---\n{_TEXT}", encoding="utf-8")


def _columns(types: Mapping[str, str]) -> list[dict[str, Any]]:
    return [{"name": name, "dtype": dtype} for name, dtype in types.items()]


def is_ours(path: Path) -> bool:
    """Whether the file is unchanged since it was written."""
    return path.read_text(encoding="utf-8", errors="replace").endswith(f"---\n{_TEXT}")


def field_types(rows: Iterable[Row]) -> dict[str, str]:
    """The types of the fields of KEY.json that have one type (number, string or boolean) in all rows."""
    found: dict[str, set[type]] = {}
    for row in rows:
        for name, value in row.extra.items():
            if value is not None:
                found.setdefault(name, set()).add(type(value))
    fields = dict.fromkeys(sample_fields(Row("")), "string")
    for name, types in found.items():
        types = {float} if types == {int, float} else types
        if len(types) == 1 and types <= _TYPES.keys():
            fields[name] = _TYPES[types.pop()]
    return fields


def _dtype(member: str) -> str:
    from mmmoe_pretrain.modalities import format_of

    kind = format_of(member)
    return kind if kind in ("image", "audio") else "string"  # types of `datasets` of the same names
