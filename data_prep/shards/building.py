"""The folder in which shards are written: one writer at a time, and an interrupted run resumes.

``OUT/building.tmp`` holds the splits as far as they are written, and ``finished.jsonl`` with a line for each shard:
its entry of ``shards.json``, its rows and the digest of what they were made from. A later run keeps a shard if all of
that and its bytes are unchanged, so its result is that of an uninterrupted run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from mmmoe_pretrain.data.sources.indexing import NAME as INDEX
from mmmoe_pretrain.data.sources.listing import LIST
from mmmoe_pretrain.data_prep.rows.row import SPLITS
from mmmoe_pretrain.data_prep.shards import card
from mmmoe_pretrain.data_prep.shards.encode import BadSample
from mmmoe_pretrain.data_prep.shards.shard_files import hash_file, shard_name

FOLDER = "building.tmp"
_FINISHED = "finished.jsonl"
_WHOLE = "whole"  # exists while the finished shards are moved to OUT; names what is moved, a line each
_LOCK = "lock"
_OLD = "old-"  # before the name of what OUT had before
_DONE = "done.tmp"  # the folder, once all is in OUT


@dataclass(slots=True)
class Finished:
    """A written shard, or, without ``entry``, rows of which none has a sample."""

    split: str
    entry: dict[str, Any] = field(default_factory=dict)  # of shards.json
    end: int = 0  # it ends before this row of its split
    full: bool = False  # no further sample fits, by the settings
    inputs: str = ""  # the digest of what its rows were made from
    members: list[str] = field(default_factory=list)  # the suffixes in any of its samples
    broken: int = 0  # rows without a sample, those that were filtered aside
    named: list[BadSample] = field(default_factory=list)  # the first of them


def check_out(out: Path, overwrite: bool) -> None:
    """Raise ValueError where shards may not be written to ``out``."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; --out is a folder")
    held = sorted(path.name for path in out.iterdir() if path.name != _DONE) if out.exists() else []
    present = [name for name in held if name != FOLDER]
    if present and not overwrite and not (out / FOLDER / _WHOLE).exists():
        is_complete = any((out / split / LIST).exists() for split in SPLITS) and FOLDER not in held
        what = "holds complete shards" if is_complete else f"is not empty (it has {', '.join(present[:3])})"
        raise ValueError(f"{out} {what}; choose another --out or pass --overwrite")
    foreign = [path for split in SPLITS for path in _foreign_files(out / split)]
    if foreign:
        raise ValueError(
            f"{foreign[0]} was not written by `mmmoe-data shard`, so --overwrite does not remove its folder; "
            f"choose another --out"
        )


class Building:
    """The shards that are written but not yet moved to their folder; ``with`` makes this process the only writer."""

    def __init__(self, out: Path, overwrite: bool) -> None:
        self.out, self.folder = out, out / FOLDER
        self._finished: list[Finished] = []
        shutil.rmtree(out / _DONE, ignore_errors=True)  # of a run that was killed when its shards were complete
        check_out(out, overwrite)

    def __enter__(self) -> Building:
        lock, self._is_new = self.folder / _LOCK, not self.out.exists()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = lock.open("w")  # released with this process; workers do not inherit it
        except OSError as error:
            raise ValueError(f"{self.out} cannot be written ({error.strerror}); choose another --out") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise ValueError(f"another `mmmoe-data shard` is writing to {self.out}; wait for it or end it") from None
        except OSError:  # a file system without locks
            pass
        if not lock.exists() or not os.path.samestat(os.fstat(self._lock.fileno()), lock.stat()):
            self._lock.close()
            raise ValueError(f"another `mmmoe-data shard` has just ended in {self.out}; repeat the command")
        self._finished = _read(self.folder / _FINISHED)
        if (self.folder / _WHOLE).exists():
            self._take_back()
        return self

    def _take_back(self) -> None:
        """A run was interrupted while it moved its results to OUT: what was there before is put back."""
        old = {path.name.removeprefix(_OLD): path for path in self.folder.glob(f"{_OLD}*")}
        moved = (self.folder / _WHOLE).read_text().splitlines()
        for name in {*old, *moved, *(line.split for line in self._finished)}:
            if not (self.folder / name).exists() and (self.out / name).exists():
                (self.out / name).replace(self.folder / name)
            if name in old:
                old[name].replace(self.out / name)
        (self.folder / _WHOLE).unlink()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        if error is not None:
            self._remove_if_useless()
        self._lock.close()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ValueError(
                f"no space is left for {self.folder}; free some and repeat the command to resume"
            ) from None
        if isinstance(error, OSError) and error.errno in (errno.EFBIG, errno.EROFS):
            raise ValueError(
                f"{self.folder} cannot be written ({error.strerror}); mend that and repeat the command to resume"
            ) from None

    def _remove_if_useless(self) -> None:
        """Leave nothing where there is nothing to resume from, or to read."""
        held = [path for path in self.folder.glob("*") if path.is_file() and path.name not in (_LOCK, _FINISHED)]
        if held or any(line.entry for line in self._finished):
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._is_new:
            with contextlib.suppress(OSError):  # it is not empty
                self.out.rmdir()

    def begin(self, split: str, rows: int, first: int, inputs: Callable[[int, int], str]) -> list[Finished]:
        """The finished shards of ``split`` from number ``first`` on that are still valid; those before are taken from
        OUT, and all other files are removed.

        ``inputs(start, end)`` is the digest of what these rows would be made from now.
        """
        folder, kept, start = self.folder / split, list[Finished](), 0
        folder.mkdir(exist_ok=True)
        for line in (line for line in self._finished if line.split == split):
            path = folder / shard_name(split, first + len(kept))
            if not start < line.end <= rows or not (line.full or line.end == rows):
                break
            if not _is_unchanged(path, line) or line.inputs != inputs(start, line.end):
                break
            kept.append(line)
            start = line.end
        names = {shard_name(split, first + number) for number in range(len(kept))}
        for path in folder.iterdir():
            if path.with_suffix(".tar").name not in names:
                path.unlink()
        for path in self._before(split) if first else ():
            if not (folder / path.name).exists():
                _link(path, folder / path.name)
        self._finished = [line for line in self._finished if line.split != split] + kept
        partial = self.folder / f"{_FINISHED}.tmp"
        partial.write_text("".join(map(_line, self._finished)), encoding="utf-8")
        partial.replace(self.folder / _FINISHED)
        return list(kept)

    def _before(self, split: str) -> list[Path]:
        """The shards and records of an earlier command."""
        return [path for suffix in ("tar", "parquet") for path in (self.out / split).glob(f"*.{suffix}")]

    def add(self, line: Finished) -> None:
        """A shard is written."""
        self._finished.append(line)
        with (self.folder / _FINISHED).open("a", encoding="utf-8") as file:
            file.write(_line(line))

    def commit(self, *files: str) -> None:
        """Move the splits and ``files`` to their folders; those of before are removed at the end."""
        card_path = self.out / card.NAME
        kept = {card.NAME} if card_path.exists() and not card.is_ours(card_path) else set()
        names = [name for name in (*SPLITS, *files) if name not in kept]
        (self.folder / _WHOLE).write_text("".join(f"{name}\n" for name in names if (self.folder / name).exists()))
        for name in names:
            if (self.out / name).exists():
                (self.out / name).replace(self.folder / f"{_OLD}{name}")
        for name in names:
            if (self.folder / name).exists():
                (self.folder / name).replace(self.out / name)
        done = self.out / _DONE
        shutil.rmtree(done, ignore_errors=True)
        self.folder.replace(done)  # from here on the shards in OUT are complete
        shutil.rmtree(done, ignore_errors=True)


def _line(line: Finished) -> str:
    return json.dumps(dataclasses.asdict(line)) + "\n"


def _read(path: Path) -> list[Finished]:
    """The complete lines."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            values = json.loads(line)
            named = [BadSample(**bad) for bad in values.pop("named")]
            found.append(Finished(**values, named=named))
        except (ValueError, TypeError, KeyError, AttributeError):
            break  # incomplete because its writer was killed, or of another version
    return found


def _is_unchanged(path: Path, line: Finished) -> bool:
    if not path.with_suffix(".parquet").is_file():
        return False
    if not line.entry:
        return not path.exists()
    return (
        path.is_file() and path.stat().st_size == line.entry["filesize"] and hash_file(path) == line.entry["xxh3_128"]
    )


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


def _foreign_files(folder: Path) -> list[Path]:
    def is_ours(path: Path) -> bool:
        suffixes = (".tar", ".parquet", ".index.json", ".tmp", LIST, INDEX)  # .index.json: of earlier versions
        return path.name.endswith(suffixes) or (path.name == card.NAME and card.is_ours(path))

    return [path for path in sorted(folder.glob("*")) if not is_ours(path)]
