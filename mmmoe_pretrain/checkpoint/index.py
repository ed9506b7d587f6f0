"""index.json and manifest.json: written and read. The reader trusts nothing: every number is checked against the
sizes of the files before anything is allocated by it.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from reprlib import repr as short
from typing import Any

import torch

from mmmoe_pretrain.checkpoint.files import DTYPES, NAMES, FileRecord
from mmmoe_pretrain.checkpoint.names import FILE, INDEX, MANIFEST, META
from mmmoe_pretrain.checkpoint.state import Shape
from mmmoe_pretrain.parallel.placement import Box

FORMAT, VERSION = "mmmoe-checkpoint", 1
# Bytes. A box takes about 60 in the index, a file about 100 in the manifest.
MAX_INDEX, MAX_MANIFEST, MAX_META = 512 << 20, 64 << 20, 64 << 20
MAX_DIMS = 8  # the corners of a box are 2^dims
MAX_ELEMENTS = 1 << 60
HASH = re.compile(r"[0-9a-f]{32}")
KEY = re.compile(r"[!-~]{1,1000}")


@dataclass(frozen=True, slots=True)
class StoredBox:
    """A box of a tensor, from byte ``at`` of ``file``."""

    box: Box
    file: str
    at: int


@dataclass(frozen=True)
class StoredTensor:
    shape: Shape
    dtype: torch.dtype
    boxes: tuple[StoredBox, ...]


Index = dict[str, StoredTensor]


@dataclass(frozen=True)
class Manifest:
    """Sizes and hashes of all other files of a checkpoint."""

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
            "boxes": [(number[b.file], b.at, b.box.offset, b.box.size) for b in tensor.boxes],
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

    Whether the boxes of a tensor make up the whole is for the caller to see (``tiles``).
    """
    reading = _Reading(where, INDEX)
    value = reading.document(data)
    files = reading.list(value.get("files"), "files")
    for name in files:
        if not isinstance(name, str) or not FILE.fullmatch(name) or name not in nbytes:
            raise reading.error(f"a file {short(name)}, which manifest.json does not list")
    index, filled = {}, defaultdict[str, int](int)
    for key, entry in reading.mapping(value.get("tensors"), "tensors").items():
        if not KEY.fullmatch(key):
            raise reading.error(f"a tensor named {short(key)}")
        tensor = _tensor(reading, key, reading.mapping(entry, key), files)
        index[key] = tensor
        for stored in tensor.boxes:
            count, file = math.prod(stored.box.size) * tensor.dtype.itemsize, stored.file
            filled[file] += count
            if stored.at + count > nbytes[file]:
                raise reading.error(f"{count:,} bytes of {key} at {stored.at:,} in {file} of {nbytes[file]:,}")
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
        boxes.append(StoredBox(Box(offset, size), files[number], at))
    return StoredTensor(shape, DTYPES[dtype], tuple(boxes))


def tiles(boxes: Iterable[Box], shape: Shape) -> bool:
    """Whether ``boxes`` cover a tensor of ``shape``, each number of it once, and nothing beyond it.

    A sum of boxes is determined by their corners, counted +1 and -1 in turn (its mixed difference): the
    boxes add up to the whole if and only if all corners but the whole's cancel. Linear in the boxes.
    """
    corners: Counter[Shape] = Counter()
    for box, weight in itertools.chain(((box, 1) for box in boxes), [(Box((0,) * len(shape), shape), -1)]):
        ends = [((start, 1), (start + length, -1)) for start, length in zip(box.offset, box.size, strict=True)]
        for corner in itertools.product(*ends):
            corners[tuple(place for place, _ in corner)] += weight * math.prod(sign for _, sign in corner)
    return not any(corners.values())


def fill(boxes: Iterable[Box], shape: Shape) -> str:
    """How much of a tensor the boxes cover, for messages."""
    held, whole = sum(math.prod(box.size) for box in boxes), math.prod(shape)
    return f"{held} of the {whole} numbers" + (", some twice," if held >= whole else "")


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

    def shape(self, value: object, what: str) -> Shape:
        sizes = tuple(self.number(n, what) for n in self.list(value, what))
        if not _fits(sizes):
            raise self.error(f"{what[:100]} as {short(list(sizes))}, which is too large")
        return sizes
