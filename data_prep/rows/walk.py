"""The files of a folder, folder by folder in the order of their names, in memory for the names of one folder.

Links are followed; a folder that several links lead to, or that a link leads back to, is read once by them. Hidden
files and those that operating systems leave (``.DS_Store``, ``Thumbs.db``) are ignored and counted.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from mmmoe_pretrain.data.sources.members import is_leftover
from mmmoe_pretrain.data_prep.rows.refs import Ref

Folder = tuple[str, dict[str, Ref]]  # its path below the root ("" is the root), and its files by name
MAX_DEPTH = 64
LEFTOVERS = ("thumbs.db", "ehthumbs.db", "desktop.ini")


def is_ignored(name: str) -> bool:
    """Whether a file or folder of this name holds no data."""
    return is_leftover(name) or name.lower() in LEFTOVERS or name == "__MACOSX"


def walk(root: Path, ignored: Counter[str]) -> Iterator[Folder]:
    """Every folder that holds files, with paths below ``root``. ``ignored`` counts what is left out, by its kind."""
    here = os.stat(root)
    linked = {(here.st_dev, here.st_ino)}  # folders that links lead to
    waiting = [""]
    while waiting:
        path = waiting.pop()
        files: dict[str, Ref] = {}
        inner = []
        for name, is_folder, is_link in _entries(root, path, ignored):
            place = f"{path}/{name}" if path else name
            if not is_folder:
                files[name] = place
                continue
            if is_link:
                status = os.stat(root / place)
                if (status.st_dev, status.st_ino) in linked or _is_above(root, path, status):
                    ignored["links to folders that are read already"] += 1
                    continue
                linked.add((status.st_dev, status.st_ino))
            if place.count("/") >= MAX_DEPTH:
                raise ValueError(f"{root / place} lies more than {MAX_DEPTH} folders deep; name an inner folder")
            inner.append(place)
        waiting += reversed(inner)
        if files:
            yield path, files


def _entries(root: Path, path: str, ignored: Counter[str]) -> list[tuple[str, bool, bool]]:
    """Name, whether it is a folder, whether it is a link; sorted."""
    found = []
    try:
        with os.scandir(root / path) as entries:
            for entry in entries:
                if is_ignored(entry.name):
                    ignored["hidden or system files"] += 1
                elif entry.is_dir():
                    found.append((entry.name, True, entry.is_symlink()))
                elif entry.is_file():
                    found.append((entry.name, False, False))
                else:
                    ignored["links that lead nowhere, or no plain files"] += 1
    except OSError as error:
        raise ValueError(f"{root / path} cannot be listed: {error.strerror}; change its owner or mode") from None
    return sorted(found, key=lambda entry: os.fsencode(entry[0]))


def _is_above(root: Path, path: str, status: os.stat_result) -> bool:
    """Whether the folder ``path`` lies in the one with this status."""
    parts = path.split("/") if path else []
    return any(os.path.samestat(os.stat(root.joinpath(*parts[:n])), status) for n in range(len(parts) + 1))
