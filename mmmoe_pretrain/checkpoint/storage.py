"""Files under a root: a local folder, or any URL that fsspec knows (s3://, gs://, memory://, ...).

Paths are ``FOLDER/FILE`` below the root. A local folder is written as a draft, synced to the disk and
renamed. Object stores cannot rename: there a folder is written under its final name, and whoever reads it
must look for the file that was written last.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mmmoe_pretrain.checkpoint.names import DRAFT, GONE, MANIFEST, OLD
from mmmoe_pretrain.urls import StorageError, is_url, local_path, redacted

BLOCK = 16 << 20  # bytes read at once
BUFFERED = 1 << 20  # bytes; small tensors are written together
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of renameat2(2)

ReadInto = Callable[[int, memoryview], None]  # fill the buffer from a place in the file


class LocalStorage:
    gap = 64 << 10  # bytes; gaps up to this size are read, too, instead of reading twice

    def __init__(self, root: str) -> None:
        self.root = root

    def draft(self, name: str) -> str:
        """Where the folder ``name`` is written before ``publish``."""
        return name + DRAFT

    def make_folder(self, folder: str) -> None:
        with self._explained("make the folder", folder):
            self._at(folder).mkdir(parents=True, exist_ok=True)

    def write(self, path: str, chunks: Iterable[Any]) -> int:
        """Write a file from buffers, durably; the bytes written."""
        written = 0
        with self._explained("write", path), self._at(path).open("wb", buffering=BUFFERED) as file:
            for chunk in chunks:
                written += file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        return written

    def replace(self, path: str, data: bytes) -> None:
        """Write a small file atomically."""
        self.write(path + DRAFT, [data])
        with self._explained("write", path):
            os.replace(self._at(path + DRAFT), self._at(path))
            _sync_folder(self._at(path).parent)

    def read(self, path: str, limit: int) -> bytes | None:
        """A file of at most ``limit`` bytes, whole; None where there is none. ValueError where it is larger."""
        with self._explained("read", path):
            if not self._at(path).is_file():  # a pipe, say, would never end
                return None
            with self._at(path).open("rb") as file:
                data = file.read(limit + 1)
        return _bounded(data, limit, self._at(path))

    @contextmanager
    def reader(self, path: str) -> Iterator[ReadInto]:
        """Reads ranges. ValueError where the file ends before the range."""
        with self._explained("read", path), self._at(path).open("rb", buffering=0) as file:

            def read_into(start: int, buffer: memoryview) -> None:
                done = 0
                while done < len(buffer):
                    count = os.preadv(file.fileno(), [buffer[done:]], start + done)
                    if count == 0:
                        raise ValueError(_ends_early(self._at(path), start + done))
                    done += count

            yield read_into

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes by name of the files of a folder; empty where there is none."""
        with self._explained("list", folder):
            try:
                with os.scandir(self._at(folder)) as entries:
                    return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
            except (FileNotFoundError, NotADirectoryError):
                return {}

    def folders(self) -> list[str]:
        """Names of the folders under the root."""
        with self._explained("list", "."):
            try:
                with os.scandir(self.root) as entries:
                    return sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
            except (FileNotFoundError, NotADirectoryError):
                return []

    def publish(self, name: str) -> None:
        """Make a finished draft the folder ``name``, in place of an older one."""
        draft, final = self._at(self.draft(name)), self._at(name)
        with self._explained("rename the draft of", name):
            _sync_folder(draft)
            if final.exists():
                self._replace(name)
            else:
                os.replace(draft, final)
            _sync_folder(Path(self.root))
        for old in (draft, self._at(name + OLD)):
            shutil.rmtree(old, ignore_errors=True)

    def _replace(self, name: str) -> None:
        draft, final = self._at(self.draft(name)), self._at(name)
        if _swap(draft, final):
            return
        self._rename(name, name + OLD)
        try:
            os.replace(draft, final)
        except OSError:
            os.rename(self._at(name + OLD), final)
            raise

    def put_back(self, name: str) -> None:
        """Where ``publish`` was killed between taking the older folder ``name`` away and its end: undo it."""
        with self._explained("rename", name + OLD):
            if not self._at(name).exists():
                os.rename(self._at(name + OLD), self._at(name))
                _sync_folder(Path(self.root))

    def remove_folder(self, name: str) -> None:
        """Remove a folder, if it exists, such that a partial one never looks complete."""
        with self._explained("delete", name), suppress(FileNotFoundError, NotADirectoryError):
            if name.endswith(DRAFT):
                shutil.rmtree(self._at(name))
            else:
                self._rename(name, name + GONE)
                shutil.rmtree(self._at(name + GONE))

    def _rename(self, name: str, aside: str) -> None:
        shutil.rmtree(self._at(aside), ignore_errors=True)
        os.rename(self._at(name), self._at(aside))
        _sync_folder(Path(self.root))

    def _at(self, path: str) -> Path:
        return Path(self.root) / path

    @contextmanager
    def _explained(self, doing: str, path: str) -> Iterator[None]:
        try:
            yield
        except StorageError:
            raise
        except OSError as error:
            raise StorageError(f"cannot {doing} {self._at(path)}: {self._remedy(error)}") from error

    def _remedy(self, error: OSError) -> str:
        match error.errno:
            case errno.ENOSPC | errno.EDQUOT:
                return (
                    f"the disk is full ({_free_bytes(Path(self.root)):,} bytes free); make room, lower "
                    f"checkpoint.keep_last, or set checkpoint.folder to another disk"
                )
            case errno.EROFS:
                return "the file system is read-only; mount it writable, or set checkpoint.folder to another place"
            case errno.EACCES | errno.EPERM:
                return "no permission; change the folder's owner or mode, or set checkpoint.folder"
            case errno.ENOTDIR | errno.EEXIST:
                return "a file is where a folder must be; remove it, or set checkpoint.folder to another place"
            case errno.ENOENT:
                return (
                    "it does not exist; the folder must be shared by all nodes, and no other program may delete in it"
                )
            case _:
                return f"{error.strerror or error}; check the disk, or set checkpoint.folder to another"


class UrlStorage:
    """The same methods."""

    gap = 1 << 20

    def __init__(self, root: str) -> None:
        import fsspec  # here: local runs need not import it

        self.root = root.rstrip("/") or root
        try:
            self._files, self._base = fsspec.url_to_fs(self.root)
        except ImportError as error:
            raise ValueError(
                f"{redacted(root)} cannot be opened: {error}; install that package on every node"
            ) from error
        except ValueError as error:
            known = ", ".join(sorted(fsspec.available_protocols()))
            raise ValueError(f"{redacted(root)} cannot be opened: {error}; fsspec knows {known}") from error

    def draft(self, name: str) -> str:
        return name

    def make_folder(self, folder: str) -> None:
        with self._explained("make the folder", folder):
            self._files.makedirs(self._at(folder), exist_ok=True)

    def write(self, path: str, chunks: Iterable[Any]) -> int:
        written = 0
        with self._explained("write", path), self._files.open(self._at(path), "wb") as file:
            for chunk in chunks:
                file.write(chunk)
                written += len(chunk)
        return written

    def replace(self, path: str, data: bytes) -> None:
        with self._explained("write", path):
            self._files.pipe_file(self._at(path), data)

    def read(self, path: str, limit: int) -> bytes | None:
        with self._explained("read", path):
            try:
                data = self._files.cat_file(self._at(path), start=0, end=limit + 1)
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                return None
        return _bounded(data, limit, redacted(f"{self.root}/{path}"))

    @contextmanager
    def reader(self, path: str) -> Iterator[ReadInto]:
        def read_into(start: int, buffer: memoryview) -> None:
            for done in range(0, len(buffer), BLOCK):
                part = buffer[done : done + BLOCK]
                with self._explained("read", path):
                    data = self._files.cat_file(self._at(path), start=start + done, end=start + done + len(part))
                if len(data) != len(part):
                    raise ValueError(_ends_early(redacted(f"{self.root}/{path}"), start + done + len(data)))
                part[:] = data

        yield read_into

    def sizes(self, folder: str) -> dict[str, int]:
        found = self._list(folder)
        return {_last(entry["name"]): int(entry["size"]) for entry in found if entry["type"] == "file"}

    def folders(self) -> list[str]:
        return sorted(_last(entry["name"]) for entry in self._list("") if entry["type"] == "directory")

    def publish(self, name: str) -> None:
        """Nothing to do: the manifest, written last, commits."""

    def put_back(self, name: str) -> None:
        """Nothing to do: no folder was moved."""

    def remove_folder(self, name: str) -> None:
        with self._explained("delete", name):
            for remove in (
                lambda: self._files.rm_file(self._at(f"{name}/{MANIFEST}")),
                lambda: self._files.rm(self._at(name), recursive=True),
            ):
                with suppress(FileNotFoundError):
                    remove()
            self._files.invalidate_cache()

    def _list(self, folder: str) -> list[dict[str, Any]]:
        with self._explained("list", folder):
            self._files.invalidate_cache()  # what other machines wrote
            try:
                return self._files.ls(self._at(folder), detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return []

    def _at(self, path: str) -> str:
        return f"{self._base}/{path}" if path else self._base

    @contextmanager
    def _explained(self, doing: str, path: str) -> Iterator[None]:
        try:
            yield
        except (AssertionError, StorageError):
            raise
        except Exception as error:  # each client library has its own errors
            raise StorageError(
                f"cannot {doing} {redacted(f'{self.root}/{path}: {type(error).__name__}: {error}')}; check the "
                f"credentials, the network and the service, or set checkpoint.folder to another place"
            ) from error


Storage = LocalStorage | UrlStorage


def open_storage(root: str | Path) -> Storage:
    """ValueError for a URL of a kind that is not known or whose package is not installed."""
    text = local_path(os.fspath(root))
    return UrlStorage(text) if is_url(text) else LocalStorage(text)


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def _bounded(data: bytes, limit: int, where: object) -> bytes:
    if len(data) > limit:
        raise ValueError(f"{where} is damaged: it is larger than {limit:,} bytes, more than any checkpoint has there")
    return data


def _ends_early(where: object, at: int) -> str:
    return (
        f"{where} is damaged: it ends at byte {at:,}, before what index.json says; delete that folder to resume from "
        f"the one before"
    )


def _swap(one: Path, other: Path) -> bool:
    """Exchange two folders in one step, so that after a kill one of them is in place. False where the system cannot
    (it is Linux's alone, and few network file systems have it)."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError):
        return False
    return rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _free_bytes(folder: Path) -> int:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free
