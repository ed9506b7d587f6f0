"""The ``README.md`` by which Hugging Face's ``load_dataset`` opens a folder of shards as it is.

Its front matter names the tars (otherwise the more numerous JSON files are taken for the data) and the type of
every column (otherwise they are taken from the first five samples, which must then have the same members).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from data_prep.manifest import Row, sample_fields

NAME = "README.md"
_TEXT = "Shards in the format of webdataset, written by `mmmoe-data shard`.\n"
_SPLITS = {"val": "validation"}  # as its users expect it
_TYPES = {bool: "bool", int: "int64", float: "float64", str: "string"}


def write_card(folder: Path, tars: Mapping[str, str], members: Collection[str], fields: Mapping[str, str]) -> None:
    """``tars``: split -> pattern; ``members``: the suffixes in any sample; ``fields`` of KEY.json -> their types."""
    files = [
        f"  - split: {_SPLITS.get(split, split)}\n    path: {json.dumps(pattern)}\n"
        for split, pattern in tars.items()
    ]
    columns = [f"  - name: {name}\n    dtype: {_dtype(name)}\n" for name in sorted(members) if name != "json"]
    columns += ["  - name: json\n    struct:\n"]
    columns += [f"    - name: {json.dumps(name)}\n      dtype: {dtype}\n" for name, dtype in fields.items()]
    columns += [f"  - name: {name}\n    dtype: string\n" for name in ("__key__", "__url__")]
    front = ("configs:\n- config_name: default\n  data_files:\n", *files, "dataset_info:\n  features:\n", *columns)
    (folder / NAME).write_text(f"---\n{''.join(front)}---\n{_TEXT}", encoding="utf-8")


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
    single = {name: float if types == {int, float} else types.pop() for name, types in found.items() if _agree(types)}
    extra = {name: _TYPES[kind] for name, kind in single.items() if kind in _TYPES}
    return {**dict.fromkeys(sample_fields(Row("")), "string"), **extra}


def _agree(types: set[type]) -> bool:
    return len(types) == 1 or types == {int, float}


def _dtype(member: str) -> str:
    from mmmoe_pretrain.modalities import format_of

    kind = format_of(member)
    return kind if kind in ("image", "audio") else "string"  # types of `datasets` of the same names
