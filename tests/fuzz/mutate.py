"""Ways to damage bytes and plain values. Every function is pure: the generator decides, nothing else.

Bytes are damaged blindly; checksums that are made right again let the damage get further into a decoder.
"""

from __future__ import annotations

import json
import pickle
import re
import zlib
from pathlib import Path
from random import Random
from typing import Any

import yaml

EXTREMES = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF,
            0x7FFFFFFFFFFFFFFF, 0x8000000000000000, 0xFFFFFFFFFFFFFFFF)  # fmt: skip
HEADER = 96  # bytes at the start, where most sizes stand


def place(rng: Random, data: bytes) -> int:
    """An offset, every second time in the header."""
    return rng.randrange(max(1, min(HEADER, len(data)) if rng.random() < 0.5 else len(data)))


def blind(rng: Random, data: bytes, other: bytes) -> bytes:
    """Some bytes replaced, inserted, deleted or repeated; or the data cut, extended or continued by ``other``."""
    start, length = place(rng, data), rng.randint(1, 64)
    before, part, after = data[:start], data[start : start + length], data[start + length :]
    kind = rng.randrange(10)
    if kind == 0:  # flip bits
        part = bytes(byte ^ (1 << rng.randrange(8)) * (rng.random() < 0.1) for byte in part)
    elif kind == 1:
        part = rng.choice((b"\0", b"\xff", rng.randbytes(1))) * length
    elif kind == 2:
        part = rng.randbytes(length)
    elif kind == 3:  # a size, a count or an offset that is absurd
        width, order = rng.choice((1, 2, 4, 8)), rng.choice(("little", "big"))
        value = rng.choice(EXTREMES) & (1 << 8 * width) - 1
        part = value.to_bytes(width, order) + part[width:]  # type: ignore[arg-type]
    elif kind == 4:
        part = rng.choice((b"\0", b"\xff\xfe", b"\xed\xa0\x80", rng.randbytes(4))) + part
    elif kind == 5:
        part = b""
    elif kind == 6:
        part *= rng.randint(2, 40)
    elif kind == 7:
        part = after = b""
    elif kind == 8:
        after += rng.choice((rng.randbytes(rng.randint(1, 700)), data, b"\0" * rng.randint(1, 2048)))
    else:
        after = other[rng.randrange(len(other) + 1) :]
    return before + part + after


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


REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _ogg_crc(page: bytes) -> int:
    """RFC 3533: zlib's polynomial on bits in the other order, without zlib's inversions before and after."""
    reflected = zlib.crc32(page.translate(REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{reflected:032b}"[::-1], 2)


def tar_field(rng: Random, data: bytes) -> bytes:
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


def zip_field(rng: Random, data: bytes) -> bytes:
    """Another flag, method, size, length, offset or name in one entry of the directory of a zip, or in a local header
    (APPNOTE 4.3.7, 4.3.12); or another count or offset at its end (4.3.16)."""
    magic, fields, name = rng.choice(ZIP_RECORDS)
    starts = [match.start() for match in re.finditer(re.escape(magic), data)]
    if not starts:
        return data
    out, at = bytearray(data), rng.choice(starts)
    if name and rng.random() < 0.25:
        length = int.from_bytes(out[at + name[0] : at + name[0] + 2], "little")
        out[at + name[1] : at + name[1] + length] = rng.choice(TAR_NAMES).ljust(length, b"_")[:length]
        return bytes(out)
    offset, width = rng.choice(fields)
    value = rng.choice((*EXTREMES, 8, 9, 12, 14, 93, 99, rng.randrange(2000))) & (1 << 8 * width) - 1
    out[at + offset : at + offset + width] = value.to_bytes(width, "little")
    return bytes(out)


# Magic, (offset, bytes) of its numbers, and offsets of the length and the bytes of its name.
ZIP_RECORDS = (
    (b"PK\x01\x02", ((8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (32, 2), (42, 4)), (28, 46)),
    (b"PK\x03\x04", ((6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2)), (26, 30)),
    (b"PK\x05\x06", ((8, 2), (10, 2), (12, 4), (16, 4), (20, 2)), None),
)  # fmt: skip


def tar_checksums(data: bytes) -> bytes:
    """Every header's checksum as it should be."""
    out = bytearray(data)
    for at in range(0, len(out) - 511, 512):
        if out[at + 257 : at + 262] == b"ustar":
            out[at + 148 : at + 156] = b"        "
            out[at + 148 : at + 156] = b"%06o\0 " % sum(out[at : at + 512])
    return bytes(out)


def damage(rng: Random, data: bytes, other: bytes) -> bytes:
    """One to three changes, of which some keep the checksums right."""
    is_tar, is_zip = data[257:262] == b"ustar", data[:2] == b"PK"
    for _ in range(rng.choice((1, 1, 2, 3))):
        change = tar_field if is_tar else zip_field if is_zip else None
        data = change(rng, data) if change and rng.random() < 0.4 else blind(rng, data, other)
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
            return {**value, rng.choice(("extra", "", "\0", "__class__", str(key) * 3)): 1}
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


def damage_json(rng: Random, data: bytes) -> bytes:
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
    return blind(rng, data, data)


SCALARS = (".nan", ".inf", "-.inf", "2001-99-99", "!!int x", "!!float x", "!!timestamp x", "!!bool x", "!!int ''",
           "!!binary '!'", "!!set {a}", "!!omap [1]", "!!pairs [[1]]", "!!null x", "0x" + "f" * 6000, "9" * 5000,
           "1:99:99", "&a [*a]", "&b {c: *b}", "*nothing", "~", "'\0'", "\"\\ud800\"", "? [1]", "{[1]: 2}", "<<",
           "!unknown x", "!!str [a]", "{<<: 1}", "{<<: [1]}", "=", "%YAML 9.9", "---", "|", "1e999", "''",
           "2001-01-01", "0o9", "1_000", "!!merge x", "!!value x")  # fmt: skip


def aliases(levels: int, width: int) -> str:
    """A billion laughs: ``width`` ** ``levels`` leaves in a few lines."""
    lines = ["- &l0 [x, x]"] + [f"- &l{i} [{', '.join([f'*l{i - 1}'] * width)}]" for i in range(1, levels)]
    return "\n".join(lines)


def merges(levels: int, width: int) -> str:
    """The same by merge keys, which multiply while they are read."""
    lines = ["- &m0 {a: 1, b: 2}"]
    lines += [f"- &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * width)}]}}" for i in range(1, levels)]
    return "\n".join(lines)


def code(marker: Path) -> tuple[str, ...]:
    """Tags that would write ``marker`` where YAML is loaded without care."""
    return (
        f"!!python/object/apply:os.system ['touch {marker}']",
        f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.PosixPath ['{marker}']]",
        f"!!python/object/new:os.system ['touch {marker}']",
        "!!python/name:os.system ''",
        "!!python/module:antigravity ''",
        f"!!python/object/apply:eval [\"open('{marker}', 'w')\"]",
    )


def damage_yaml(rng: Random, text: str, marker: Path) -> str:
    kind = rng.random()
    if kind < 0.35:
        value = yaml.safe_load(text)
        for _ in range(rng.randint(1, 3)):
            value = change_value(rng, value)
        return yaml.safe_dump(value, sort_keys=False, allow_unicode=rng.random() < 0.5)
    if kind < 0.6:
        return _replace_scalar(rng, text, rng.choice(SCALARS))
    if kind < 0.7:
        return _replace_scalar(rng, text, rng.choice(code(marker)))
    if kind < 0.8:
        bomb = rng.choice((aliases(9, 9), merges(9, 9), aliases(3, 3), merges(2, 2), aliases(30, 2)))
        return rng.choice(("x:\n" + bomb + "\n" + text, text + "\ny:\n" + bomb))
    if kind < 0.85:
        depth = rng.choice((100, 3_000, 50_000))
        return _replace_scalar(
            rng, text, rng.choice(("[" * depth, "[" * depth + "]" * depth, "{a: " * depth, "- " * depth))
        )
    if kind < 0.9:
        lines = text.splitlines(keepends=True)
        return "".join([*lines, rng.choice(lines)])  # a key twice
    data = text.encode()
    return blind(rng, data, data).decode("utf-8", "surrogateescape")


def _replace_scalar(rng: Random, text: str, scalar: str) -> str:
    lines = text.splitlines()
    at = rng.randrange(len(lines))
    key, colon, _ = lines[at].partition(": ")
    lines[at] = f"{key}{colon or ''}{scalar}" if rng.random() < 0.9 else scalar
    return "\n".join(lines)


class Payload:
    """A pickle that would write ``marker`` when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def damage_file(rng: Random, path: Path, marker: Path) -> bytes:
    """The content of a file, damaged by its kind; now and then a pickle."""
    whole = path.read_bytes()
    if rng.random() < 0.02:
        return payload(marker)
    if path.name == "latest" and rng.random() < 0.5:
        return rng.choice((b"step_99999999", b"../../x", b"\0", whole * 200_000))
    if path.suffix == ".json":
        return damage_json(rng, whole)
    if path.suffix == ".yaml":
        return damage_yaml(rng, whole.decode(), marker).encode("utf-8", "surrogatepass")
    if path.suffix == ".jsonl" and rng.random() < 0.9:
        lines = whole.splitlines()
        at = rng.randrange(len(lines))
        lines[at] = damage_json(rng, lines[at])
        return b"\n".join(lines) + b"\n" * rng.randrange(2)
    if path.suffix == ".model" and rng.random() < 0.7:  # changed in place, which leaves most of its messages whole
        changed = bytearray(whole)
        for _ in range(rng.choice((1, 3, 30, 3000))):
            changed[rng.randrange(len(whole))] = rng.choice((0, 0xFF, rng.randrange(256)))
        return bytes(changed)
    return damage(rng, whole, whole)


def payload(marker: Path) -> bytes:
    return pickle.dumps(Payload(marker))
