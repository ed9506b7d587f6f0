"""What the rows of an input hold: which are taken by ``--filter``, the types of their fields, and what a user should
know about them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from mmmoe_pretrain.data_prep.rows.refs import Ref, shown
from mmmoe_pretrain.data_prep.rows.row import FIELDS, Row, is_outside, sample_fields
from mmmoe_pretrain.limits import FIELD_ALIASES
from mmmoe_pretrain.modalities import format_of
from mmmoe_pretrain.progress import counted

TYPES = {bool: "bool", int: "int64", float: "float64", str: "string"}  # Python's -> those of a dataset card


def values_wanted(filters: Sequence[str]) -> dict[str, set[str]]:
    """Of each field the values that ``--filter`` takes."""
    found: dict[str, set[str]] = {}
    for item in filters:
        name, separator, value = item.partition("=")
        if not separator:
            raise ValueError(f"--filter {item!r} is not field=value")
        found.setdefault(name, set()).add(value)
    return found


class Seen:
    """Sees every row once. ``filters``: field=value; values of one field are alternatives."""

    def __init__(self, root: Path, filters: Sequence[str] = ()) -> None:
        self._root, self._filters = root, filters
        self._wanted = values_wanted(filters)
        self._types: dict[str, set[type]] = {}
        self._outside: list[Ref] = []
        self._count_outside = 0
        self._copied = False
        self._unread: Counter[tuple[str, str]] = Counter()  # (field, image or audio) -> rows

    def takes(self, row: Row) -> bool:
        """Note the row, and say whether it is wanted."""
        self._copied |= row.copied
        for name, value in row.extra.items():
            self._types.setdefault(name, set())
            if value is not None:
                self._types[name].add(type(value))
        for name, values in self._wanted.items():
            name = name if name in FIELDS or name in row.extra else FIELD_ALIASES.get(name, name)
            value = getattr(row, name) if name in FIELDS else row.extra.get(name)
            if ("" if value is None else str(value)) not in values:
                return False
        for ref in row.files:
            if is_outside(ref, self._root):
                self._count_outside += 1
                self._outside = self._outside or [ref]
        if row.parts is None:
            self._unread.update(self._unread_files(row))
        return True

    def check(self) -> None:
        """Raise ValueError where a filter names a field that no row has."""
        known = {*FIELDS, *self._types}
        for item in self._filters:
            name = item.partition("=")[0]
            if name not in known and FIELD_ALIASES.get(name) not in known:
                raise ValueError(f"filter {item!r} is not field=value with a field of {', '.join(sorted(known))}")

    def notes(self) -> Iterator[str]:
        if self._outside:
            count = counted(self._count_outside, "file")
            yield f"{count} outside of {self._root}, the folder of the rows, such as {shown(self._outside[0])}"
        for (name, kind), rows in self._unread.items():
            yield f"field {name} names files in {counted(rows, 'row')} and is ignored; rename it to {kind}"

    def types(self) -> dict[str, str] | None:
        """The types of the fields of KEY.json that have one type (number, string or boolean) in all rows; None where
        samples are copied with their JSON."""
        if self._copied:
            return None
        fields = dict.fromkeys(sample_fields(Row("")), "string")
        for name, types in self._types.items():
            types = {float} if types == {int, float} else types
            if len(types) == 1 and types <= TYPES.keys():
                fields[name] = TYPES[next(iter(types))]
        return fields

    def _unread_files(self, row: Row) -> Iterator[tuple[str, str]]:
        """Fields of other names that seem to name the file that the row lacks."""
        for name, value in row.extra.items():
            kind = format_of(Path(value).suffix[1:].lower()) if isinstance(value, str) else None
            if kind in ("image", "audio") and kind not in row.modalities and "://" not in value:
                yield name, str(kind)
