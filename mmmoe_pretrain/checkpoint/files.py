"""Tensors in files that any safetensors reader reads: written as a stream, read by place.

A file is 8 bytes with the length n of the header, n bytes of JSON (dtype, shape and place by key), and the
numbers without gaps (https://github.com/huggingface/safetensors). Wide dtypes come first, so that each
tensor is aligned.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor

from mmmoe_pretrain.checkpoint.storage import BLOCK, ReadInto, Storage
from mmmoe_pretrain.parallel.placement import Box

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes; other readers accept no more


@dataclass(frozen=True)
class FileRecord:
    """A file as it was written."""

    name: str
    nbytes: int
    digest: str  # xxh3_128, hexadecimal


@dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def header_of(entries: Sequence[Entry]) -> tuple[bytes, list[int]]:
    """The first bytes of a file with ``entries`` in this order, and where in the file each begins."""
    begins, done = [], 0
    table = {}
    for entry in entries:
        begins.append(done)
        done += entry.nbytes
        table[entry.key] = {
            "dtype": NAMES[entry.dtype], "shape": entry.shape, "data_offsets": (begins[-1], done),
        }  # fmt: skip
    assert len(table) == len(entries), "two tensors of one key"
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise ValueError(f"{len(entries):,} pieces of tensors are too many for one file; save from more ranks")
    head = struct.pack("<Q", len(text)) + text
    return head, [len(head) + begin for begin in begins]


def write_tensors(
    storage: Storage, folder: str, name: str, entries: Sequence[Entry], tensors: Sequence[Tensor]
) -> FileRecord:
    """One file with ``tensors``, as ``entries`` describe them; each whole, or in several parts that follow each
    other in it. Contiguous host memory is not copied."""
    head, _ = header_of(entries)
    return write_hashed(storage, folder, name, _chunks(head, entries, tensors))


def write_hashed(storage: Storage, folder: str, name: str, chunks: Iterable[bytes | memoryview]) -> FileRecord:
    """A file from buffers, hashed as it is written."""
    digest = xxhash.xxh3_128()

    def hashed() -> Iterator[bytes | memoryview]:
        for chunk in chunks:
            for start in range(0, len(chunk), BLOCK):
                block = chunk[start : start + BLOCK]
                digest.update(block)
                yield block

    nbytes = storage.write(f"{folder}/{name}", hashed())
    return FileRecord(name, nbytes, digest.hexdigest())


def digest_of(storage: Storage, path: str, nbytes: int) -> str:
    """xxh3_128 of a file's first ``nbytes``, read now."""
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(min(BLOCK, nbytes)))
    with storage.reader(path) as read_into:
        for start in range(0, nbytes, BLOCK):
            block = buffer[: min(BLOCK, nbytes - start)]
            read_into(start, block)
            digest.update(block)
    return digest.hexdigest()


def read_ranges(storage: Storage, path: str, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
    """The bytes of each range (begin, end) of a file. Neighbours less than ``storage.gap`` apart are read at once."""
    found = [memoryview(b"")] * len(ranges)
    if all(begin >= end for begin, end in ranges):
        return found
    run: list[int] = []  # numbers of ranges that are read together
    with storage.reader(path) as read_into:

        def read() -> None:
            begin, end = ranges[run[0]][0], max(ranges[n][1] for n in run)
            data = memoryview(bytearray(end - begin))
            read_into(begin, data)
            for n in run:
                found[n] = data[ranges[n][0] - begin : ranges[n][1] - begin]

        reach = 0
        for n in sorted((n for n, (begin, end) in enumerate(ranges) if begin < end), key=ranges.__getitem__):
            if run and ranges[n][0] - reach > storage.gap:
                read()
                run.clear()
            run.append(n)
            reach = max(reach, ranges[n][1])
        if run:
            read()
    return found


def read_box(read_into: ReadInto, at: int, stored: tuple[int, ...], wanted: Box, gap: int, target: Tensor) -> None:
    """Fill ``target`` with the numbers ``wanted`` of a box of size ``stored`` that begins at byte ``at``.

    ``target`` has the box's dtype. Runs of numbers shorter than ``gap`` bytes are read in blocks with the bytes
    between them; longer ones separately.
    """
    strides = [math.prod(stored[dim + 1 :]) for dim in range(len(stored))]
    place = at + sum(o * s for o, s in zip(wanted.offset, strides, strict=True)) * target.dtype.itemsize
    _fill(read_into, place, strides, gap, target)


def _fill(read_into: ReadInto, at: int, strides: list[int], gap: int, target: Tensor) -> None:
    if target.numel() == 0:
        return
    width, size = target.dtype.itemsize, tuple(target.shape)
    span = (1 + sum((n - 1) * s for n, s in zip(size, strides, strict=True))) * width
    unbroken = span == target.numel() * width
    if unbroken and target.is_contiguous() and target.device.type == "cpu":
        read_into(at, memory(target))
    elif span <= BLOCK and (unbroken or _run(size, strides) * width < gap):
        buffer = bytearray(span)
        read_into(at, memoryview(buffer))
        target.copy_(torch.frombuffer(buffer, dtype=target.dtype).as_strided(size, strides))
    else:
        dim = next(d for d, n in enumerate(size) if n > 1)
        half = size[dim] // 2
        _fill(read_into, at, strides, gap, target.narrow(dim, 0, half))
        _fill(read_into, at + half * strides[dim] * width, strides, gap, target.narrow(dim, half, size[dim] - half))


def _run(size: tuple[int, ...], strides: list[int]) -> int:
    """The number of contiguous numbers of a box of ``size``."""
    run = 1
    for n, stride in zip(reversed(size), reversed(strides), strict=True):
        if n > 1 and stride != run:
            break
        run *= n
    return run


def _chunks(head: bytes, entries: Sequence[Entry], tensors: Sequence[Tensor]) -> Iterator[bytes | memoryview]:
    yield head
    parts = (tensor for tensor in tensors if tensor.numel())
    for entry in entries:
        done = 0
        while done < entry.nbytes:
            part = next(parts)
            done += part.nbytes
            assert part.dtype == entry.dtype and done <= entry.nbytes, (entry, part.shape)
            yield memory(part.detach().cpu().contiguous())
    assert next(parts, None) is None, "more tensors than entries"


def memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor of the host, not copied."""
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))  # contiguous ones of size 1 may have any stride
    return flat.view(torch.uint8).numpy().data
