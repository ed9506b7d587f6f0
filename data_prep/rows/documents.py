"""Rows that are documents: texts and files in the order in which they are read.

A part of a row's ``parts`` is ``{"text": STRING}``, ``{KIND: PATH}`` with a kind of modality such as ``image``,
``{"file": PATH}`` of any format that is read, or ``{"member": EXTENSION}`` of the row's ``members``, and may say
``"loss": false`` or ``"modality": NAME``. In a shard the file of part 3 is the member ``3.png``, and ``KEY.json`` has
``{"member": "3.png"}`` in its place (docs/data_format.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmmoe_pretrain.data_prep.rows.refs import Ref
from mmmoe_pretrain.limits import has_lone_surrogate, has_text
from mmmoe_pretrain.untrusted import brief

PARTS = "parts"  # the field of a row, and of the JSON of a sample
FILE, MEMBER = "file", "member"
NONE: Mapping[str, Ref] = {}


@dataclass(frozen=True, slots=True)
class Part:
    """A text in the field ``name``, or a file of the kind ``name``. ``other``: its other keys, as in a
    shard."""

    name: str
    text: str | None
    path: Ref
    other: Mapping[str, Any]


def parts_of(value: Any, members: Mapping[str, Ref] = NONE) -> list[Part]:
    """The parts of a row that has these ``members``. Raises ValueError with the number of the invalid part."""
    from mmmoe_pretrain.data.decode import MAX_PARTS

    if not isinstance(value, list | tuple) or not 1 <= len(value) <= MAX_PARTS:
        count = f"{len(value):,} parts" if isinstance(value, list | tuple) else brief(value)
        raise ValueError(f"{PARTS} holds {count}, and a document is a list of 1 to {MAX_PARTS:,}")
    texts, files = _fields()
    parts = [_part(number, part, texts, files, members) for number, part in enumerate(value)]
    if not any(part.path or has_text(part.text or "") for part in parts):
        raise ValueError(f"{PARTS} holds blank texts alone")
    return parts


def members_named(parts: Any) -> set[str]:
    """The extensions of the members that ``parts`` name, valid or not."""
    found = parts if isinstance(parts, list | tuple) else ()
    return {str(part[MEMBER]).lower() for part in found if isinstance(part, Mapping) and MEMBER in part}


def _fields() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The fields of a part that hold a text, and those that hold the path of a file."""
    from mmmoe_pretrain import kinds
    from mmmoe_pretrain.modalities import reads

    texts = {kind: reads(kind).field for kind in kinds.MODALITIES.names}
    return tuple(filter(None, texts.values())), (*(kind for kind, field in texts.items() if not field), FILE, MEMBER)


def _part(number: int, part: Any, texts: tuple[str, ...], files: tuple[str, ...], members: Mapping[str, Ref]) -> Part:
    from mmmoe_pretrain.modalities import format_of

    where = f"part {number} of {PARTS}"
    content = [name for name in part if name in (*texts, *files)] if isinstance(part, Mapping) else []
    if len(content) != 1 or not part.keys() <= {content[0], "loss", "modality"}:
        raise ValueError(f"{where} is {brief(part)}, not one of {', '.join((*texts, *files))}, with loss or modality")
    name, value = content[0], part[content[0]]
    other = {key: item for key, item in part.items() if key != name}
    if not isinstance(value, str) or has_lone_surrogate(value) or not (value or name in texts):
        raise ValueError(f"{where}: {name} is {brief(value)}, and should be a string")
    if not isinstance(other.get("loss", True), bool) or not isinstance(other.get("modality", ""), str):
        raise ValueError(f"{where} is {brief(part)}; loss is true or false, and modality a name")
    if name in texts:
        return Part(name, value, "", other)
    if name == MEMBER:
        ref, kind = members.get(value.lower()), format_of(value.lower())
        if ref is None or kind is None:
            held = "of no format that is read" if ref else f"none of its files ({', '.join(members) or 'none'})"
            raise ValueError(f"{where}: {brief(value)} is {held}")
        return Part(kind, None, ref, other)
    kind = format_of(Path(value).suffix[1:].lower())
    if kind is None or name not in (kind, FILE):
        raise ValueError(f"{where}: {brief(value)} is {kind or 'of no format that is read'}, not {name}")
    return Part(kind, None, value, other)
