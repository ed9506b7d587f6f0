"""index.json, boxes.bin and manifest.json: written and read. The reader trusts nothing: every number is checked
against the sizes of the files before anything is allocated by it.

index.json has of every logical tensor its shape, type, and the place of its rows in boxes.bin (``boxes.py``), so that
a rank reads the rows of what it holds and no others. In version 1 of the format index.json had the boxes, too.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from reprlib import repr as short
from typing import Any

import numpy as np
import torch

from mmmoe_pretrain.checkpoint.boxes import BLOCK, Blocks, blocks_of, starts, width
from mmmoe_pretrain.checkpoint.files import DTYPES, NAMES, FileRecord
from mmmoe_pretrain.checkpoint.names import BOXES, FILE, INDEX, MANIFEST, META
from mmmoe_pretrain.checkpoint.state import Shape

FORMAT, VERSION, READ = "mmmoe-checkpoint", 2, (1, 2)
# Bytes. In the index a tensor takes about 100, and 64 boxes 25 (in version 1 a box 60); in the manifest a file 100.
MAX_INDEX, MAX_MANIFEST, MAX_META = 512 << 20, 64 << 20, 64 << 20
MAX_DIMS = 8
MAX_ELEMENTS = 1 << 60
HASH = re.compile(r"[0-9a-f]{32}")
KEY = re.compile(r"[!-~]{1,1000}")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A logical tensor, in ``count`` boxes whose rows begin at byte ``at`` of boxes.bin."""

    shape: Shape
    dtype: torch.dtype
    at: int
    count: int
    blocks: Blocks = ()

    def place(self, rows: range) -> tuple[int, int]:
        """The first byte of these rows, and the one after them."""
        size = width(len(self.shape))
        return self.at + rows.start * size, self.at + rows.stop * size


@dataclass(frozen=True)
class Index:
    """``files``: by the numbers that rows have. ``nbytes``: of each, as the manifest says. ``rows``: boxes.bin, where
    that is in memory."""

    tensors: dict[str, StoredTensor]
    files: tuple[str, ...]
    nbytes: tuple[int, ...] = ()
    rows: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Manifest:
    """Sizes and hashes of all other files of a checkpoint."""

    step: int
    files: dict[str, FileRecord]
    version: int = VERSION


def make_index(tensors: Mapping[str, tuple[Shape, torch.dtype, np.ndarray]], files: Sequence[str]) -> Index:
    """The index, and boxes.bin as its ``rows``. ``tensors``: shape, type and rows, in the order of their starts."""
    found, parts, at = {}, [], 0
    for key, (shape, dtype, rows) in tensors.items():
        dims = len(shape)
        blocks = blocks_of(rows[:, 2 : 2 + dims], rows[:, 2 + dims :], shape)
        found[key] = StoredTensor(shape, dtype, at, len(rows), blocks)
        parts.append(rows.astype("<i8", copy=False).tobytes())
        at += len(parts[-1])
    return Index(found, tuple(files), rows=b"".join(parts))


def refuse_unreadable(key: str, shape: Shape) -> None:
    """ValueError for a tensor that ``parse_index`` would not take."""
    if not KEY.fullmatch(key):
        raise ValueError(f"{short(key)} names no tensor of a checkpoint: use up to 1,000 ASCII characters, no spaces")
    if not _fits(shape):
        raise ValueError(f"{key} is {short(list(shape))}; a checkpoint takes {MAX_DIMS} dimensions, and 2^60 numbers")


def index_json(index: Index) -> bytes:
    """Raises ValueError where it would be larger than ``parse_index``'s readers take."""
    tensors = {
        key: {
            "shape": tensor.shape,
            "dtype": NAMES[tensor.dtype],
            "boxes": (tensor.at, tensor.count),
            **({"blocks": tensor.blocks} if tensor.blocks else {}),
        }
        for key, tensor in index.tensors.items()
    }
    data = json.dumps({"files": index.files, "tensors": tensors}, separators=(",", ":")).encode()
    remedy = "the tensors are cut into too many pieces; save from fewer ranks, or with a lower parallel.zero_stage"
    return _bounded(data, INDEX, MAX_INDEX, remedy)


def meta_json(step: int, meta: Mapping[str, Any]) -> bytes:
    """Raises ValueError where it would be larger than its readers take."""
    data = json.dumps({**meta, "step": step}).encode()
    largest = max(meta, key=lambda key: len(json.dumps(meta[key])), default="step") if len(data) > MAX_META else ""
    return _bounded(data, META, MAX_META, f"make {largest!r} smaller, which is the most of it")


def manifest_json(manifest: Manifest) -> bytes:
    """Raises ValueError where it would be larger than ``parse_manifest``'s readers take."""
    files = {f.name: {"bytes": f.nbytes, "xxh3_128": f.digest} for f in manifest.files.values()}
    data = json.dumps({"format": FORMAT, "version": VERSION, "step": manifest.step, "files": files}).encode()
    return _bounded(data, MANIFEST, MAX_MANIFEST, f"{len(files):,} files are too many; save from fewer ranks")


def _bounded(data: bytes, name: str, limit: int, remedy: str) -> bytes:
    if len(data) > limit:
        raise ValueError(
            f"no checkpoint is written: {name} would have {len(data):,} bytes, and readers take {limit:,}; {remedy}"
        )
    return data


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Raises ValueError for what no save has written."""
    reading = _Reading(where, MANIFEST)
    value = reading.document(data)
    version = value.get("version")
    if value.get("format") != FORMAT or type(version) is not int or version not in READ:
        raise reading.error(
            f"format {short(value.get('format'))}, version {short(version)}; this version of mmmoe "
            f"reads {FORMAT!r}, versions {' and '.join(map(str, READ))}"
        )
    files = {}
    for name, entry in reading.mapping(value.get("files"), "files").items():
        if not FILE.fullmatch(name) or name == MANIFEST:
            raise reading.error(f"a file named {short(name)}")
        entry = reading.mapping(entry, name)
        digest = entry.get("xxh3_128")
        if not isinstance(digest, str) or not HASH.fullmatch(digest):
            raise reading.error(f"xxh3_128 of {name} as {short(digest)}")
        files[name] = FileRecord(name, reading.number(entry.get("bytes"), f"bytes of {name}"), digest)
    missing = ({INDEX, META} if version == 1 else {INDEX, BOXES, META}) - files.keys()
    if missing:
        raise reading.error(f"no {' and no '.join(sorted(missing))}")
    return Manifest(reading.number(value.get("step"), "step"), files, version)


def parse_index(data: bytes, manifest: Manifest, where: str) -> Index:
    """Raises ValueError for what no save has written, and for more bytes of tensors than there are of files.

    Rows are checked as they are read (``refuse_bad_rows``); whether the boxes make up what is wanted is for the
    caller to see.
    """
    reading = _Reading(where, INDEX)
    value = reading.document(data)
    files = reading.list(value.get("files"), "files")
    for name in files:
        if not isinstance(name, str) or not FILE.fullmatch(name) or name not in manifest.files:
            raise reading.error(f"a file {short(name)}, which manifest.json does not list")
    held: dict[str, tuple[Shape, torch.dtype, dict[str, Any]]] = {}
    for key, entry in reading.mapping(value.get("tensors"), "tensors").items():
        if not KEY.fullmatch(key):
            raise reading.error(f"a tensor named {short(key)}")
        entry = reading.mapping(entry, key)
        shape, dtype = reading.shape(entry.get("shape"), f"shape of {key}"), entry.get("dtype")
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise reading.error(f"dtype of {key} as {short(dtype)}; known are {', '.join(DTYPES)}")
        held[key] = shape, DTYPES[dtype], entry
    nbytes = tuple(manifest.files[name].nbytes for name in files)
    asked = sum(math.prod(shape) * dtype.itemsize for shape, dtype, _ in held.values())
    if asked > sum(nbytes):  # boxes that share bytes could ask for any amount of memory
        raise reading.error(f"{asked:,} bytes of tensors in files of {sum(nbytes):,}")
    if manifest.version == 1:
        rows = {
            key: (shape, dtype, _rows_of_version_1(reading, key, entry, shape))
            for key, (shape, dtype, entry) in held.items()
        }
        return replace(make_index(rows, files), nbytes=nbytes)
    largest = manifest.files[BOXES].nbytes
    tensors = {key: _tensor(reading, key, *its, largest) for key, its in held.items()}
    return Index(tensors, tuple(files), nbytes)


def refuse_bad_rows(index: Index, key: str, rows: np.ndarray, where: str) -> None:
    """ValueError for rows of a tensor that are not inside of it, or not of bytes that their files have."""
    tensor, name = index.tensors[key], INDEX if index.rows is not None else BOXES
    shape, dims = np.asarray(tensor.shape, dtype=np.int64), len(tensor.shape)
    file, at, offset, size = rows[:, 0], rows[:, 1], rows[:, 2 : 2 + dims], rows[:, 2 + dims :]
    known = (file >= 0) & (file < len(index.files))
    inside = ((offset >= 0) & (size >= 0) & (offset <= shape) & (size <= shape - offset)).all(axis=1)
    room = np.asarray(index.nbytes, dtype=np.int64)[np.where(known, file, 0)] if index.nbytes else np.zeros_like(file)
    numbers = np.where(inside[:, None], size, 0).prod(axis=1)
    fits = (at >= 0) & (at <= room) & (numbers <= (room - at.clip(0)) // tensor.dtype.itemsize)
    bad = np.flatnonzero(~(known & inside & fits))
    if not len(bad):
        return
    row, reading = int(bad[0]), _Reading(where, name)
    if not known[row]:
        raise reading.error(f"file {file[row]} of {key}; it names {len(index.files)} files")
    if not inside[row]:
        raise reading.error(
            f"a box {size[row].tolist()} at {offset[row].tolist()} of {key}, which is {shape.tolist()}"
        )
    count = int(numbers[row]) * tensor.dtype.itemsize
    raise reading.error(
        f"{count:,} bytes of {key} at {at[row]:,} in {index.files[int(file[row])]} of {int(room[row]):,}"
    )


def parse_json(data: bytes, where: str, name: str) -> dict[str, Any]:
    """A JSON object, or ValueError."""
    return _Reading(where, name).document(data)


def _tensor(
    reading: _Reading, key: str, shape: Shape, dtype: torch.dtype, entry: dict[str, Any], nbytes: int
) -> StoredTensor:
    """``nbytes``: of boxes.bin."""
    at, count = reading.pair(entry.get("boxes"), f"boxes of {key}")
    if at + count * width(len(shape)) > nbytes:
        raise reading.error(f"{count:,} boxes of {key} at {at:,} in {BOXES} of {nbytes:,} bytes")
    blocks = [reading.pair(block, f"a block of {key}") for block in reading.list(entry.get("blocks", []), key)]
    if len(blocks) != (-(-count // BLOCK) if count > BLOCK else 0):
        raise reading.error(f"{len(blocks)} blocks of {key}, which has {count:,} boxes")
    return StoredTensor(shape, dtype, at, count, tuple(blocks))


def _rows_of_version_1(reading: _Reading, key: str, entry: dict[str, Any], shape: Shape) -> np.ndarray:
    """In the order of their starts."""
    rows = []
    for box in reading.list(entry.get("boxes"), f"boxes of {key}"):
        if not isinstance(box, list) or len(box) != 4:
            raise reading.error(f"a box of {key} as {short(box)}")
        file, at = reading.number(box[0], f"file of {key}"), reading.number(box[1], f"place of {key}")
        offset, size = (reading.shape(v, f"box of {key}") for v in box[2:])
        if not len(offset) == len(size) == len(shape):
            raise reading.error(f"a box {list(size)} at {list(offset)} of {key}, which is {list(shape)}")
        rows.append((file, at, *offset, *size))
    found = np.asarray(rows, dtype=np.int64).reshape(len(rows), 2 + 2 * len(shape))
    return found[np.argsort(starts(found[:, 2 : 2 + len(shape)], shape), kind="stable")]


def _fits(sizes: Shape) -> bool:
    # also of what a dimension of 0 makes empty: strides are products
    return len(sizes) <= MAX_DIMS and math.prod(max(n, 1) for n in sizes) < MAX_ELEMENTS


class _Reading:
    """Checks of one file; its errors say where they are."""

    def __init__(self, where: str, name: str) -> None:
        self.where, self.name = where, name

    def error(self, found: str) -> ValueError:
        return ValueError(
            f"{self.where} is damaged or of another version: {self.name} has {found}; "
            f"delete that folder to resume from the one before"
        )

    def document(self, data: bytes) -> dict[str, Any]:
        try:
            value = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise self.error(f"no JSON ({str(error)[:100]})") from error
        return self.mapping(value, "its whole")

    def mapping(self, value: object, what: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.error(f"{what[:100]} as {short(value)}, not an object")
        return value

    def list(self, value: object, what: str) -> list[Any]:
        if not isinstance(value, list):
            raise self.error(f"{what[:100]} as {short(value)}, not a list")
        return value

    def number(self, value: object, what: str) -> int:
        if type(value) is not int or not 0 <= value < 1 << 60:
            raise self.error(f"{what[:100]} as {short(value)}, not a whole number")
        return value

    def pair(self, value: object, what: str) -> tuple[int, int]:
        numbers = self.list(value, what)
        if len(numbers) != 2:
            raise self.error(f"{what[:100]} as {short(value)}, not two numbers")
        return self.number(numbers[0], what), self.number(numbers[1], what)

    def shape(self, value: object, what: str) -> Shape:
        sizes = tuple(self.number(n, what) for n in self.list(value, what))
        if not _fits(sizes):
            raise self.error(f"{what[:100]} as {short(list(sizes))}, which is too large")
        return sizes
