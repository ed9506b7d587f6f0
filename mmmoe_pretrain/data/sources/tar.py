"""The plain files of a tar: name, offset and size, by one pass over its headers.

Python's tarfile trusts the headers (unpatched versions loop forever on a negative size in a pax record, and allocate
memory for a size beyond the file). This reads ustar, GNU and pax headers of plain files and folders, and refuses
everything else: links, devices, sparse files, names that leave the folder, sizes that leave the file. Formats:
POSIX.1-2001 pax, GNU tar 1.35.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from mmmoe_pretrain.data.storage.files import Files
from mmmoe_pretrain.limits import MAX_NAME_BYTES
from mmmoe_pretrain.untrusted import brief
from mmmoe_pretrain.urls import redacted

BLOCK = 512
CHUNK = 1 << 20  # that is passed at a time
MAX_RECORD_BYTES = 64 << 10  # of a header's extension
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}  # by first bytes
MAX_PADDING = 1 << 20  # bytes after the end mark that are searched for another tar
REGULAR, FOLDER = b"0\07", b"5"
OTHERS = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe",
          b"S": "a sparse file"}  # fmt: skip
LONG_NAME, LONG_LINK, EXTENDED, GLOBAL = b"L", b"K", b"x", b"g"


@dataclass(frozen=True)
class Member:
    """A plain file: its bytes are ``size`` from ``offset`` on."""

    name: str
    offset: int
    size: int


@dataclass
class _Next:
    """The values for a header from the records before it."""

    name: str | None = None
    size: int | None = None


def members(url: str, files: Files) -> Iterator[Member]:
    """The plain files of the tar ``url`` in order. Raises ValueError that names it if anything is invalid."""
    stat = files.stat(url)
    if not stat.ranges:
        return walk(reading_on(files.stream(url)), redacted(url), None if stat.size < 0 else stat.size)
    end = stat.size
    return walk(lambda at, size: files.read(url, at, min(size, end - at)) if at < end else b"", redacted(url), end)


def reading_on(stream: BinaryIO) -> Callable[[int, int], bytes]:
    """``read`` for ``walk`` of what can only be read in order; what lies between is passed."""
    here = 0

    def read(at: int, size: int) -> bytes:
        nonlocal here
        while here < at:
            passed = len(stream.read(min(CHUNK, at - here)))
            if not passed:
                return b""
            here += passed
        data = stream.read(size)
        here += len(data)
        return data

    return read


def walk(read: Callable[[int, int], bytes], url: str, end: int | None = None) -> Iterator[Member]:
    """As ``members``, of a tar of ``end`` bytes (None: not known) that errors call ``url``. ``read(at, size)`` gives
    the bytes from ``at`` on, fewer only at the end of the tar; ``at`` never descends, so it may read a stream."""
    at, coming = 0, _Next()
    while True:
        header = read(at, BLOCK)
        if len(header) < BLOCK:
            raise _broken(url, at, "no end mark, so it is truncated,")
        if not any(header):
            if b"ustar" in read(at + BLOCK, MAX_PADDING):
                raise _broken(url, at, "another tar after the end of this one, so they were joined by cat,")
            return
        kind, size = header[156:157], _header_size(header, at, url)
        start = at + BLOCK
        if kind in (LONG_NAME, LONG_LINK, EXTENDED, GLOBAL):
            record = read(start, size) if size <= MAX_RECORD_BYTES else b""
            if len(record) < size:
                raise _broken(url, at, f"a record of {size} bytes")
            _read_record(kind, record, coming, at, url)
        else:
            size = size if coming.size is None else coming.size
            name = _name(header, at, url) if coming.name is None else coming.name
            _check(name, kind, url)
            if end is not None and start + size > end:
                raise ValueError(f"shard {url} ends inside of {name!r}: it is truncated; copy or make it again")
            if kind in REGULAR and not name.endswith("/"):
                yield Member(name.removeprefix("./"), start, size)
            coming = _Next()
        at = start + -(-size // BLOCK) * BLOCK


def _check(name: str, kind: bytes, url: str) -> None:
    if len(name.encode()) > MAX_NAME_BYTES:
        raise ValueError(f"shard {url} holds a name of more than {MAX_NAME_BYTES} bytes; make it again")
    if name.startswith("/") or ".." in name.split("/"):
        raise ValueError(f"shard {url} holds {name!r}, a path that leaves its folder; don't use it")
    if kind not in REGULAR and kind != FOLDER:
        raise ValueError(
            f"shard {url} holds {name!r}, {OTHERS.get(kind, f'of the unknown kind {kind!r}')}; make it again with "
            f"plain files"
        )


def _header_size(header: bytes, at: int, url: str) -> int:
    stored = _number(header[148:156])
    if stored != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        for start, program in COMPRESSED.items():
            if not at and header.startswith(start):
                raise ValueError(f"shard {url} is compressed by {program}, and shards are read in place; unpack it")
        raise _broken(url, at, "the checksum of a header")
    size = _number(header[124:136])
    if size is None or size < 0:
        raise _broken(url, at, "a size")
    return size


def _number(text: bytes) -> int | None:
    """Octal digits, or the base 256 of GNU tar; None for neither."""
    if text[0] in (0x80, 0xFF):
        return int.from_bytes(text[1:], "big", signed=text[0] == 0xFF)
    digits = text.split(b"\0", 1)[0].strip()
    if digits.strip(b"01234567"):
        return None
    return int(digits or b"0", 8)


def _name(header: bytes, at: int, url: str) -> str:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and prefix:  # GNU tar keeps other things there
        name = prefix + b"/" + name
    return _text(name, at, url)


def _read_record(kind: bytes, data: bytes, coming: _Next, at: int, url: str) -> None:
    """A long name, or pax records ``LENGTH KEY=VALUE newline``, into ``coming``."""
    if kind == LONG_NAME:
        coming.name = _text(data.split(b"\0", 1)[0], at, url)
    if kind not in (EXTENDED, GLOBAL):
        return
    while data:
        length, space, _ = data[:20].partition(b" ")
        if not space or not length.isdigit() or not len(length) + 1 < int(length) <= len(data):
            raise _broken(url, at, "a pax record")
        key, _, value = data[len(length) + 1 : int(length)].removesuffix(b"\n").partition(b"=")
        data = data[int(length) :]
        if (key in (b"path", b"size") and kind == GLOBAL) or key.startswith(b"GNU.sparse"):
            raise _broken(
                url, at, f"a pax record {brief(key.decode(errors='replace'))} for all members or sparse ones"
            )
        if key == b"path":
            coming.name = _text(value, at, url)
        elif key == b"size":
            if not value.isdigit() or len(value) > 18:
                raise _broken(url, at, "a size in a pax record")
            coming.size = int(value)


def _text(name: bytes, at: int, url: str) -> str:
    try:
        text = name.decode("utf-8")
    except UnicodeDecodeError:
        raise _broken(url, at, "a name that is not UTF-8") from None
    if not text or "\0" in text:
        raise _broken(url, at, "an empty name or one with a NUL")
    return text


def _broken(url: str, at: int, what: str) -> ValueError:
    return ValueError(f"shard {url} is not a whole tar file ({what} at byte {at}); copy or make it again")
