"""Small files of a run that must be the old ones or the new ones, whatever dies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A draft to write, which takes the place of ``path`` behind the ``with``."""
    draft = path.with_name(path.name + ".tmp")
    yield draft
    with draft.open("rb+") as file:
        os.fsync(file.fileno())  # else the new name may come to the disk before what it names
    os.replace(draft, path)
