"""Ways to damage bytes and plain values. Every function is pure: the generator decides, nothing else.

Bytes are damaged blindly, and by format: a header's size with its checksum made right again gets further
into a decoder than a flipped bit does.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from random import Random
from typing import Any

EXTREMES = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF,
            0x7FFFFFFFFFFFFFFF, 0x8000000000000000, 0xFFFFFFFFFFFFFFFF)  # fmt: skip
HEADER = 96  # bytes at the start, where most sizes stand
Mutator = Callable[[Random, bytes, bytes], bytes]


def place(rng: Random, data: bytes) -> int:
    """An offset, every second time in the header."""
    return rng.randrange(max(1, min(HEADER, len(data)) if rng.random() < 0.5 else len(data)))


def flip_bits(rng: Random, data: bytes, other: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(rng.randint(1, 8) if out else 0):
        out[place(rng, data)] ^= 1 << rng.randrange(8)
    return bytes(out)


def byte_run(rng: Random, data: bytes, other: bytes) -> bytes:
    start, length = place(rng, data), rng.randint(1, 64)
    fill = rng.choice((b"\0", b"\xff", rng.randbytes(1))) * length
    return data[:start] + fill + data[start + length :]


def noise(rng: Random, data: bytes, other: bytes) -> bytes:
    start, length = place(rng, data), rng.randint(1, 32)
    return data[:start] + rng.randbytes(length) + data[start + length :]


def number(rng: Random, data: bytes, other: bytes) -> bytes:
    """A size, a count or an offset that is absurd."""
    width, order = rng.choice((1, 2, 4, 8)), rng.choice(("little", "big"))
    start = place(rng, data)
    value = (rng.choice(EXTREMES) & (1 << 8 * width) - 1).to_bytes(width, order)  # type: ignore[arg-type]
    return data[:start] + value + data[start + width :]


def truncate(rng: Random, data: bytes, other: bytes) -> bytes:
    return data[: rng.randrange(max(1, len(data)))]


def extend(rng: Random, data: bytes, other: bytes) -> bytes:
    return data + rng.choice((rng.randbytes(rng.randint(1, 700)), data, b"\0" * rng.randint(1, 2048)))


def insert(rng: Random, data: bytes, other: bytes) -> bytes:
    start = place(rng, data)
    return data[:start] + rng.choice((b"\0", b"\xff\xfe", b"\xed\xa0\x80", rng.randbytes(4))) + data[start:]


def delete(rng: Random, data: bytes, other: bytes) -> bytes:
    start = place(rng, data)
    return data[:start] + data[start + rng.randint(1, 64) :]


def splice(rng: Random, data: bytes, other: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]


def repeat(rng: Random, data: bytes, other: bytes) -> bytes:
    start = place(rng, data)
    part = data[start : start + rng.randint(1, 256)]
    return data[:start] + part * rng.randint(2, 40) + data[start:]


BLIND: tuple[Mutator, ...] = (
    flip_bits, byte_run, noise, number, truncate, extend, insert, delete, splice, repeat,
)  # fmt: skip


def png_header(rng: Random, data: bytes, other: bytes) -> bytes:
    """Another size or kind of pixels, with the right checksum."""
    if data[:4] != b"\x89PNG" or len(data) < 33:
        return data
    fields = list(struct.unpack(">IIBBBBB", data[16:29]))
    which = rng.randrange(len(fields))
    fields[which] = rng.choice(EXTREMES) & 0xFFFFFFFF if which < 2 else rng.choice((0, 1, 2, 3, 4, 6, 8, 16, 255))
    if rng.random() < 0.3:
        fields[0], fields[1] = rng.choice(((1, 64_000_000), (8000, 8000), (20_000, 20_000), (64_000_000, 1)))
    return png_checksums(data[:16] + struct.pack(">IIBBBBB", *fields) + data[29:])


def png_checksums(data: bytes) -> bytes:
    """Every chunk's checksum as it should be."""
    out, at = bytearray(data), 8
    while data[:4] == b"\x89PNG" and at + 12 <= len(out):
        length = int.from_bytes(out[at : at + 4], "big")
        if at + 12 + length > len(out):
            break
        out[at + 8 + length : at + 12 + length] = zlib.crc32(out[at + 4 : at + 8 + length]).to_bytes(4, "big")
        at += 12 + length
    return bytes(out)


def jpeg_size(rng: Random, data: bytes, other: bytes) -> bytes:
    """Another size in the frame header of a JPEG."""
    found = [at for marker in (b"\xff\xc0", b"\xff\xc2") if (at := data.find(marker)) > 0]
    if not found:
        return data
    height, width = (rng.choice((0, 1, 7999, 8000, 65535)) for _ in range(2))
    return data[: found[0] + 5] + struct.pack(">HH", height, width) + data[found[0] + 9 :]


def wav_fields(rng: Random, data: bytes, other: bytes) -> bytes:
    """Another format, number of channels, rate or block size in a WAV."""
    at = data.find(b"fmt ")
    if at < 0 or data[:4] != b"RIFF":
        return data
    offset, width = rng.choice(((8, 2), (10, 2), (12, 4), (16, 4), (20, 2), (22, 2)))
    value = rng.choice(EXTREMES) & (1 << 8 * width) - 1
    return data[: at + offset] + value.to_bytes(width, "little") + data[at + offset + width :]


def flac_streaminfo(rng: Random, data: bytes, other: bytes) -> bytes:
    """Another rate, number of channels, width or length of a FLAC."""
    if data[:4] != b"fLaC" or len(data) < 42:
        return data
    rate, channels, bits = rng.choice((0, 1, 16_000, 655_350)), rng.randrange(8), rng.choice((3, 15, 23, 31))
    total = rng.choice((0, 1, 100, 16_000 * 600, (1 << 36) - 1))
    packed = rate << 44 | channels << 41 | bits << 36 | total
    return data[:18] + packed.to_bytes(8, "big") + data[26:]


def ogg_checksums(data: bytes) -> bytes:
    """Every page's checksum as it should be, so that what was changed inside is looked at."""
    out, at = bytearray(data), 0
    while data[:4] == b"OggS" and (at := data.find(b"OggS", at)) >= 0 and at + 27 <= len(data):
        segments = data[at + 26]
        end = at + 27 + segments + sum(data[at + 27 : at + 27 + segments])
        out[at + 22 : at + 26] = bytes(4)
        out[at + 22 : at + 26] = _ogg_crc(bytes(out[at:end])).to_bytes(4, "little")
        at = end
    return bytes(out)


def _ogg_table() -> list[int]:
    table = []
    for byte in range(256):
        value = byte << 24
        for _ in range(8):
            value = (value << 1 ^ (0x04C11DB7 if value & 0x80000000 else 0)) & 0xFFFFFFFF
        table.append(value)
    return table


_OGG = tuple(_ogg_table())


def _ogg_crc(page: bytes) -> int:
    value = 0
    for byte in page:
        value = (value << 8 & 0xFFFFFFFF) ^ _OGG[value >> 24 ^ byte]
    return value


def tar_field(rng: Random, data: bytes, other: bytes) -> bytes:
    """Another name, size, kind or prefix in one header of a tar, with the right checksum."""
    headers = [at for at in range(0, len(data) - 511, 512) if data[at + 257 : at + 262] == b"ustar"]
    if not headers:
        return data
    out, at = bytearray(data), rng.choice(headers)
    kind = rng.randrange(4)
    if kind == 0:
        out[at + 124 : at + 136] = rng.choice(TAR_SIZES)
    elif kind == 1:
        out[at + 156 : at + 157] = rng.choice((b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"L", b"K", b"x", b"g", b"S",
                                               b"V", b"D", b"\0", b"X"))  # fmt: skip
    elif kind == 2:
        out[at : at + 100] = rng.choice(TAR_NAMES).ljust(100, b"\0")[:100]
    else:
        out[at + 345 : at + 500] = rng.choice(TAR_NAMES).ljust(155, b"\0")[:155]
    return tar_checksums(bytes(out))


TAR_SIZES = (b"00000000000\0", b"77777777777\0", b"-0000001000\0", b"00000000001\0", b"\x80" + bytes(10) + b"\x01",
             b"\xff" * 12, b"\xff" * 10 + b"\xfc\x00", b"\x80\0\0\0\x7f" + b"\xff" * 7, b"            ",
             b"99999999999\0")  # fmt: skip
TAR_NAMES = (b"/etc/passwd", b"../up.txt", b"a/../../b.txt", b"", b"\xff\xfe.txt", b"a.txt", b".", b"x" * 100,
             b"a\nb.json", b"./..", b"con.TXT")  # fmt: skip


def tar_checksums(data: bytes) -> bytes:
    """Every header's checksum as it should be."""
    out = bytearray(data)
    for at in range(0, len(out) - 511, 512):
        if out[at + 257 : at + 262] == b"ustar":
            out[at + 148 : at + 156] = b"        "
            out[at + 148 : at + 156] = b"%06o\0 " % sum(out[at : at + 512])
    return bytes(out)


BY_FORMAT: dict[bytes, Mutator] = {
    b"\x89PN": png_header, b"\xff\xd8\xff": jpeg_size, b"RIF": wav_fields, b"fLa": flac_streaminfo, b"ust": tar_field,
}  # fmt: skip


def damage(rng: Random, data: bytes, other: bytes) -> bytes:
    """One to three changes, of which some keep the checksums right."""
    special = [mutate for start, mutate in BY_FORMAT.items() if data[:3] == start or data[257:260] == start]
    for _ in range(rng.choice((1, 1, 2, 3))):
        choices = special if special and rng.random() < 0.4 else BLIND
        data = rng.choice(choices)(rng, data, other)
    if rng.random() < 0.6:
        data = tar_checksums(ogg_checksums(png_checksums(data)))
    return data


ODD_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1e308, float("nan"), float("inf"), -float("inf"), 2**63, -(2**63) - 1, 10**30, "", "\0",
    "\ud800", "x" * 5000, "../../x", "/etc/passwd", [], {}, [[]], {"": 0}, "2001-99-99", "é" * 300,
)  # fmt: skip


def change_value(rng: Random, value: Any) -> Any:
    """``value`` with one node of another type, missing, repeated, moved or deeply nested."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        kind = rng.random()
        if kind < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if kind < 0.2:
            return {
                **value,
                rng.choice(("extra", "", "\0", "__class__", key * 3 if isinstance(key, str) else "k")): 1,
            }
        return {**value, key: change_value(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.85:
        at = rng.randrange(len(value))
        if rng.random() < 0.2:
            return value + value if rng.random() < 0.5 else value[:at]
        return [*value[:at], change_value(rng, value[at]), *value[at + 1 :]]
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.3:
        return value + rng.choice((-1, 1, 512, -512, 10**6))
    if rng.random() < 0.1:
        return nested(rng.choice((5, 60)))
    return rng.choice(ODD_VALUES)


def nested(depth: int) -> Any:
    value: Any = 0
    for i in range(depth):
        value = [value] if i % 2 else {"a": value}
    return value


def damage_json(rng: Random, data: bytes, other: bytes) -> bytes:
    """JSON of a changed value, or text that is not JSON."""
    kind = rng.random()
    if kind < 0.6:
        value = json.loads(data)
        for _ in range(rng.randint(1, 3)):
            value = change_value(rng, value)
        return json.dumps(value, ensure_ascii=rng.random() < 0.7).encode("utf-8", "surrogatepass")
    if kind < 0.7:
        depth = rng.choice((500, 2_000, 100_000))
        deep = rng.choice((b"[" * depth, b'{"a":' * depth, b"[" * depth + b"]" * depth))
        return rng.choice((deep, data.replace(b":", b":" + deep, 1), data.replace(b"0", deep, 1)))
    if kind < 0.75:
        return data.replace(b"0", b"9" * rng.choice((30, 5000)), 1)
    return rng.choice(BLIND)(rng, data, other)
