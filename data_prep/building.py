"""The folder in which shards are written: one writer at a time, and an interrupted run resumes.

``OUT/building.tmp`` holds the splits as far as they are written, and ``finished.jsonl`` with a line for each shard:
its entry of ``shards.json``, its rows and the digest of what they were made from. A later run keeps a shard if all of
that and its bytes are unchanged, so its result is that of an uninterrupted run.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from data_prep import card
from data_prep.manifest import SPLITS
from data_prep.shard_files import BadSample, hash_file
from mmmoe_pretrain.data.sources.indexing import NAME as INDEX
from mmmoe_pretrain.data.sources.listing import LIST

FOLDER = "building.tmp"
_FINISHED = "finished.jsonl"
_WHOLE = "whole"  # exists while the finished shards are moved to OUT
_LOCK = "lock"


@dataclass(slots=True)
class Finished:
    """A written shard, and the rows that were skipped in it."""

    split: str
    entry: dict[str, Any] = field(default_factory=dict)  # of shards.json
    end: int = 0  # it ends before this row of its split
    inputs: str = ""  # the digest of what its rows were made from
    members: list[str] = field(default_factory=list)  # the suffixes in any of its samples
    skipped: list[BadSample] = field(default_factory=list)
    blank_texts: int = 0


class Building:
    """The shards that are written but not yet moved to their folder; ``with`` makes this process the only writer."""

    def __init__(self, out: Path, overwrite: bool) -> None:
        self.out, self.folder = out, out / FOLDER
        self._finished: list[Finished] = []
        if out.exists() and not out.is_dir():
            raise ValueError(f"{out} is a file; --out is a folder")
        present = sorted(path.name for path in out.iterdir() if path.name != FOLDER) if out.exists() else []
        if present and not overwrite and not (self.folder / _WHOLE).exists():
            raise ValueError(
                f"{out} is not empty (it has {', '.join(present[:3])}); choose another --out or pass --overwrite"
            )
        foreign = [path for split in SPLITS for path in _foreign_files(out / split)]
        if foreign:
            raise ValueError(
                f"{foreign[0]} was not written by `mmmoe-data shard`, so --overwrite does not remove its folder; "
                f"choose another --out"
            )

    def __enter__(self) -> Building:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / _LOCK).open("w")  # released with this process; workers do not inherit it
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise ValueError(f"another `mmmoe-data shard` is writing to {self.out}; wait for it or end it") from None
        except OSError:  # a file system without locks
            pass
        self._finished = _read(self.folder / _FINISHED)
        if (self.folder / _WHOLE).exists():  # a run was interrupted while it moved splits to OUT: move them back
            for split in {line.split for line in self._finished}:
                if not (self.folder / split).exists() and (self.out / split).exists():
                    (self.out / split).replace(self.folder / split)
            (self.folder / _WHOLE).unlink()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._lock.close()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ValueError(
                f"no space is left for {self.folder}; free some and repeat the command to resume"
            ) from None

    def begin(self, split: str, rows: int, per_shard: int, inputs: Callable[[int, int], str]) -> list[Finished]:
        """The finished shards of ``split`` that are still valid; all other files of it are removed.

        ``inputs(start, end)`` is the digest of what these rows would be made from now.
        """
        folder, kept, start = self.folder / split, list[Finished](), 0
        folder.mkdir(exist_ok=True)
        for line in (line for line in self._finished if line.split == split):
            path = folder / f"{len(kept):05d}.tar"
            is_last = line.end == rows
            if not start < line.end <= rows or (line.entry["nsamples"] < per_shard and not is_last):
                break
            if not _is_unchanged(path, line) or line.inputs != inputs(start, line.end):
                break
            kept.append(line)
            start = line.end
        names = {f"{number:05d}.tar" for number in range(len(kept))}
        for path in folder.iterdir():
            if path.name not in names:
                path.unlink()
        self._finished = [line for line in self._finished if line.split != split] + kept
        partial = self.folder / f"{_FINISHED}.tmp"
        partial.write_text("".join(map(_line, self._finished)), encoding="utf-8")
        partial.replace(self.folder / _FINISHED)
        return kept

    def add(self, line: Finished) -> None:
        """A shard is written."""
        self._finished.append(line)
        with (self.folder / _FINISHED).open("a", encoding="utf-8") as file:
            file.write(_line(line))

    def commit(self, *files: str) -> None:
        """Move the splits and ``files`` to their folders, replacing earlier ones."""
        (self.folder / _WHOLE).touch()
        for split in SPLITS:
            shutil.rmtree(self.out / split, ignore_errors=True)
        for name in (*SPLITS, *files):
            is_kept = name == card.NAME and (self.out / name).exists() and not card.is_ours(self.out / name)
            if (self.folder / name).exists() and not is_kept:
                (self.folder / name).replace(self.out / name)
        shutil.rmtree(self.folder)


def _line(line: Finished) -> str:
    return json.dumps(dataclasses.asdict(line)) + "\n"


def _read(path: Path) -> list[Finished]:
    """The complete lines."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            shard = Finished(**json.loads(line))
            shard.skipped = [BadSample(*bad) for bad in shard.skipped]
            found.append(shard)
        except (ValueError, TypeError):
            break  # incomplete because its writer was killed, or of another version
    return found


def _is_unchanged(path: Path, line: Finished) -> bool:
    return (
        path.is_file() and path.stat().st_size == line.entry["filesize"] and hash_file(path) == line.entry["xxh3_128"]
    )


def _foreign_files(folder: Path) -> list[Path]:
    def is_ours(path: Path) -> bool:
        suffixes = (".tar", ".index.json", ".tmp", LIST, INDEX)  # .index.json: of earlier versions
        return path.name.endswith(suffixes) or (path.name == card.NAME and card.is_ours(path))

    return [path for path in sorted(folder.glob("*")) if not is_ours(path)]
