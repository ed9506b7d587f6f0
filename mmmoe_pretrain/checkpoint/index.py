"""index.json and manifest.json: written as they are read, and read as if an enemy had written them.

Every number is checked against the sizes of the files before anything is allocated by it.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from reprlib import repr as short
from typing import Any

import torch

from mmmoe_pretrain.checkpoint.files import DTYPES, NAMES, FileRecord
from mmmoe_pretrain.checkpoint.names import FILE, INDEX, MANIFEST, META
from mmmoe_pretrain.parallel.placement import Box

FORMAT, VERSION = "mmmoe-checkpoint", 1
# Bytes. A box takes about 60 in the index, a file about 100 in the manifest.
MAX_INDEX, MAX_MANIFEST, MAX_META = 512 << 20, 64 << 20, 64 << 20
MAX_DIMS = 8  # the corners of a box are 2^dims
MAX_ELEMENTS = 1 << 60
HASH = re.compile(r"[0-9a-f]{32}")
KEY = re.compile(r"[!-~]{1,1000}")

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StoredBox:
    """A box of a tensor, from byte ``at`` of ``file``."""

    file: str
    at: int
    offset: Shape
    size: Shape


@dataclass(frozen=True)
class StoredTensor:
    shape: Shape
    dtype: torch.dtype
    boxes: tuple[StoredBox, ...]


Index = dict[str, StoredTensor]


@dataclass(frozen=True)
class Manifest:
    """What makes a folder a complete checkpoint: every other file of it."""

    step: int
    files: dict[str, FileRecord]


def refuse_unreadable(key: str, shape: Shape) -> None:
    """ValueError for a tensor that ``parse_index`` would not take."""
    if not KEY.fullmatch(key):
        raise ValueError(f"{short(key)} names no tensor of a checkpoint: use up to 1,000 ASCII characters, no spaces")
    if not _fits(shape):
        raise ValueError(f"{key} is {short(list(shape))}; a checkpoint takes {MAX_DIMS} dimensions, and 2^60 numbers")


def index_json(index: Index) -> bytes:
    """Raises ValueError where it would be larger than ``parse_index``'s readers take."""
    files = sorted({box.file for tensor in index.values() for box in tensor.boxes})
    number = {file: i for i, file in enumerate(files)}
    tensors = {
        key: {
            "shape": tensor.shape,
            "dtype": NAMES[tensor.dtype],
            "boxes": [(number[box.file], box.at, box.offset, box.size) for box in tensor.boxes],
        }
        for key, tensor in index.items()
    }
    data = json.dumps({"files": files, "tensors": tensors}, separators=(",", ":")).encode()
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
    if value.get("format") != FORMAT or value.get("version") != VERSION:
        raise reading.error(
            f"format {short(value.get('format'))}, version {short(value.get('version'))}; this version of mmmoe "
            f"reads {FORMAT!r}, version {VERSION}"
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
    missing = {INDEX, META} - files.keys()
    if missing:
        raise reading.error(f"no {' and no '.join(sorted(missing))}")
    return Manifest(reading.number(value.get("step"), "step"), files)


def parse_index(data: bytes, nbytes: Mapping[str, int], where: str) -> Index:
    """Raises ValueError for what no save has written, and for boxes outside of the files of ``nbytes``.

    Whether the boxes of a tensor make up the whole is for the caller to see (planner.tiles).
    """
    reading = _Reading(where, INDEX)
    value = reading.document(data)
    files = reading.list(value.get("files"), "files")
    for name in files:
        if not isinstance(name, str) or not FILE.fullmatch(name) or name not in nbytes:
            raise reading.error(f"a file {short(name)}, which manifest.json has not")
    index, filled = {}, defaultdict[str, int](int)
    for key, entry in reading.mapping(value.get("tensors"), "tensors").items():
        if not KEY.fullmatch(key):
            raise reading.error(f"a tensor named {short(key)}")
        tensor = _tensor(reading, key, reading.mapping(entry, key), files)
        index[key] = tensor
        for box in tensor.boxes:
            count = math.prod(box.size) * tensor.dtype.itemsize
            filled[box.file] += count
            if box.at + count > nbytes[box.file]:
                raise reading.error(f"{count:,} bytes of {key} at {box.at:,} in {box.file} of {nbytes[box.file]:,}")
    for file, count in filled.items():  # boxes that share bytes could ask for any amount of memory
        if count > nbytes[file]:
            raise reading.error(f"{count:,} bytes in {file} of {nbytes[file]:,}")
    return index


def parse_json(data: bytes, where: str, name: str) -> dict[str, Any]:
    """A JSON object, or ValueError."""
    return _Reading(where, name).document(data)


def _tensor(reading: _Reading, key: str, entry: dict[str, Any], files: Sequence[str]) -> StoredTensor:
    shape = reading.shape(entry.get("shape"), f"shape of {key}")
    dtype = entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise reading.error(f"dtype of {key} as {short(dtype)}; known are {', '.join(DTYPES)}")
    boxes = []
    for box in reading.list(entry.get("boxes"), f"boxes of {key}"):
        if not isinstance(box, list) or len(box) != 4:
            raise reading.error(f"a box of {key} as {short(box)}")
        number = reading.number(box[0], f"file of {key}")
        if number >= len(files):
            raise reading.error(f"file {number} of {key}; it names {len(files)} files")
        at = reading.number(box[1], f"place of {key}")
        offset, size = (reading.shape(v, f"box of {key}") for v in box[2:])
        inside = len(offset) == len(size) == len(shape)
        if not inside or any(o + n > whole for o, n, whole in zip(offset, size, shape, strict=True)):
            raise reading.error(f"a box {list(size)} at {list(offset)} of {key}, which is {list(shape)}")
        boxes.append(StoredBox(files[number], at, offset, size))
    return StoredTensor(shape, DTYPES[dtype], tuple(boxes))


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
            f"delete that folder to go on from the one before"
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

    def shape(self, value: object, what: str) -> Shape:
        sizes = tuple(self.number(n, what) for n in self.list(value, what))
        if not _fits(sizes):
            raise self.error(f"{what[:100]} as {short(list(sizes))}, which is too large")
        return sizes


def boxes_of(tensor: StoredTensor) -> Iterable[Box]:
    return (Box(box.offset, box.size) for box in tensor.boxes)
