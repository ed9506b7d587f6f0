"""Zip archives as folders of files, which are read in place: nothing is unpacked to disk.

Names and sizes are those of the archive's directory, and are bounded before anything is read. Formats: PKWARE's
APPNOTE 6.3.10; Python's zipfile reads the directory.
"""

from __future__ import annotations

import struct
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO

from mmmoe_pretrain.data.sources.listing import is_remote
from mmmoe_pretrain.data.storage.files import Files
from mmmoe_pretrain.data_prep.rows.columnar import RandomFile
from mmmoe_pretrain.data_prep.rows.refs import Range, Ref
from mmmoe_pretrain.data_prep.rows.row import SPLITS, split_called
from mmmoe_pretrain.data_prep.rows.walk import Folder, is_ignored
from mmmoe_pretrain.limits import MAX_MEMBER_BYTES
from mmmoe_pretrain.untrusted import brief
from mmmoe_pretrain.urls import local_path, redacted

MAX_FILES = 500_000  # of one archive, whose directory is in memory while it is read: 0.9 KB a file
_LOCAL = struct.Struct("<4s22xHH")  # header of a file: magic, ..., length of its name and of its extra field
_ENCRYPTED, _UTF8 = 0x1, 0x800
_METHODS = {9: "deflate64", 12: "bzip2", 14: "lzma", 93: "zstd", 95: "xz", 98: "ppmd", 99: "AES encryption"}


def zip_folders(path: str, name: str, prefix: str, files: Files, ignored: Counter[str]) -> Iterator[Folder]:
    """The folders of the archive at a path or URL, whose refs call it ``name``, below ``prefix``. A folder that holds
    everything else is left out of the paths."""
    held: dict[str, dict[str, Ref]] = defaultdict(dict)
    where = redacted(path)
    with _opened(path, files) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                infos = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, EOFError) as error:
            raise ValueError(f"{where} is no zip archive that can be read ({error})") from None
        if len(infos) > MAX_FILES:
            raise ValueError(f"{where} holds {len(infos):,} files, and at most {MAX_FILES:,} are read; split it")
        end = 0
        for info in sorted(infos, key=lambda info: info.header_offset):
            inner = _name(info)
            if info.filename.endswith("/"):  # is_dir fails on an empty name
                continue
            _check(info, inner, where)
            if any(map(is_ignored, inner.split("/"))):
                ignored["hidden or system files"] += 1
                continue
            start = _start(file, info, inner, where)
            if info.header_offset < end:
                raise ValueError(f"{where} holds {brief(inner)} inside of another file; don't use it")
            end = start + info.compress_size
            packed = None if info.compress_type == zipfile.ZIP_STORED else info.compress_size
            folder, _, base = inner.rpartition("/")
            if base in held[folder]:
                raise ValueError(f"{where} holds {brief(inner)} twice; make it again")
            held[folder][base] = Range(name, inner, start, info.file_size, packed, info.CRC)
    common = _common(list(held))
    for folder in sorted(held, key=lambda each: each.split("/")):
        below = folder[len(common) :].strip("/")
        found = dict(sorted(held[folder].items()))
        yield "/".join(filter(None, (prefix, below))), found


@contextmanager
def _opened(path: str, files: Files) -> Iterator[IO[bytes]]:
    if is_remote(path):
        import io

        with io.BufferedReader(RandomFile(path, files), 1 << 16) as remote:
            yield remote
    else:
        files.stat(path)  # a folder or a pipe is refused here
        with open(local_path(path), "rb") as file:
            yield file


def _name(info: zipfile.ZipInfo) -> str:
    """The name of a file; programs that write UTF-8 without saying so are understood."""
    name = info.filename
    if not info.flag_bits & _UTF8:
        with suppress(UnicodeError):
            name = name.encode("cp437").decode("utf-8")
    if info.create_system == 0:  # of Windows
        name = name.replace("\\", "/")
    return name.removeprefix("./")


def _check(info: zipfile.ZipInfo, name: str, where: str) -> None:
    if name.startswith("/") or ".." in name.split("/") or "\0" in name or ":" in name.split("/", maxsplit=1)[0][1:2]:
        raise ValueError(f"{where} holds {brief(name)}, a path that leaves its folder; don't use it")
    if info.flag_bits & _ENCRYPTED:
        raise ValueError(f"{where} is encrypted ({brief(name)}); unpack it, and name the folder")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        method = _METHODS.get(info.compress_type, f"method {info.compress_type}")
        raise ValueError(
            f"{where} holds {brief(name)} packed by {method}, and stored and deflated files are read; unpack it, and "
            f"name the folder"
        )
    if max(info.file_size, info.compress_size) > MAX_MEMBER_BYTES:
        raise ValueError(
            f"{where} holds {brief(name)} of {info.file_size:,} bytes, and at most {MAX_MEMBER_BYTES:,} are read; "
            f"leave it out"
        )


def _start(file: IO[bytes], info: zipfile.ZipInfo, name: str, where: str) -> int:
    """Where the bytes of a file begin."""
    file.seek(max(0, info.header_offset))  # it is negative where bytes are missing before the archive
    header = file.read(_LOCAL.size) if info.header_offset >= 0 else b""
    if len(header) < _LOCAL.size or header[:4] != b"PK\3\4":
        raise ValueError(f"{where} is damaged: {brief(name)} is not where its directory says; make it again")
    _, name_size, extra_size = _LOCAL.unpack(header)
    return info.header_offset + _LOCAL.size + int(name_size) + int(extra_size)


def _common(folders: list[str]) -> str:
    """The folder in which everything lies, where there is one and it is no split."""
    first = {folder.partition("/")[0] for folder in folders}
    common = first.pop() if len(first) == 1 else ""
    return "" if split_called(common) in SPLITS else common
