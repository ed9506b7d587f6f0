"""``manifest.jsonl`` (docs/data_format.md): a row a line. Reading, writing and filtering."""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from mmmoe_pretrain.data_prep.rows.row import Fault, Faults, Found, Row, faults, row_fields, row_of, row_problem
from mmmoe_pretrain.limits import MAX_META_BYTES
from mmmoe_pretrain.progress import Progress
from mmmoe_pretrain.untrusted import brief, parse_json


def write_manifest(path: Path, rows: Sequence[Row]) -> None:
    """Write all rows, to a temporary file that is renamed at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    seen: set[str] = set()
    with partial.open("w", encoding="utf-8") as file:
        for row in rows:
            problem = "occurs twice; keys are unique over a manifest" if row.key in seen else row_problem(row)
            if problem:
                raise ValueError(f"{path}, key {row.key!r} {problem}")
            seen.add(row.key)
            file.write(json.dumps(row_fields(row), ensure_ascii=False) + "\n")
    partial.replace(path)


def read_manifest(path: Path) -> list[Row]:
    """The rows of a manifest file, or of the ``manifest.jsonl`` of a folder; or one ValueError with all problems."""
    path = manifest_path(path)
    rows: list[Row] = []
    problems = Faults()
    line_of: dict[str, str] = {}
    for found in manifest_rows(path):
        if isinstance(found, Fault):
            problems.add(*found)
            continue
        line, row = found
        where = f"{line}, key {brief(urllib.parse.unquote(row.key))}"
        for problem in faults(row):
            problems.add(where, problem)
        if line_of.setdefault(row.key, line) != line:
            problems.add(where, f"it is in {line_of[row.key]}, too, and keys are unique over a dataset")
        rows.append(row)
    problems.refuse(str(path))
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def manifest_rows(path: Path, split: str = "train") -> Iterator[Found | Fault]:
    """The rows of a manifest file with their lines; ``split``: of those that name none."""
    size = path.stat().st_size
    with Progress(f"reading {path.name}", size, "MB", scale=10**6) as progress, path.open("rb") as file:
        for number, line in lines(file):
            progress.advance(len(line))
            try:
                values = parse_json(line, "it", MAX_META_BYTES)
                if not isinstance(values, dict):
                    raise ValueError(f"it is {type(values).__name__}, not an object")
                yield Found(f"line {number}", row_of(values, split))
            except ValueError as error:
                yield Fault(f"line {number}", str(error))


def manifest_path(path: Path) -> Path:
    path = path / "manifest.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"no manifest at {path}; `mmmoe-data corpus mini --out DIR` makes one")
    return path


def lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, by number; of a line that is too long, only its beginning."""
    number = 0
    while line := file.readline(MAX_META_BYTES + 1):
        number += 1
        rest = line
        while len(rest) > MAX_META_BYTES and not rest.endswith(b"\n"):
            rest = file.readline(MAX_META_BYTES + 1)
        if line.strip():
            yield number, line
