"""Which sample a file of a shard belongs to, and which files of a sample are read.

The key follows webdataset: the path up to the first dot of its last component; what follows that dot is the
extension (``set.v1/a.left.png``: key ``set.v1/a``, extension ``left.png``). A file is read by the last part of
its extension. A sample has one file a modality: of several, the extension with the fewest dots is read (``png``
before ``seg.png``), then the one whose format stands first in ``limits.MODALITY_OF``, then the first by name
(``left.png`` before ``right.png``). What is not read is counted by ``survey.py``.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping

from mmmoe_pretrain.limits import MODALITY_OF

META = "json"  # the extension of a sample's JSON
MAX_VIEWS = 8  # files of one format in a sample; more of them are samples whose keys hold dots

_RANK = {extension: place for place, extension in enumerate(MODALITY_OF)}


def split_name(name: str) -> tuple[str, str]:
    """The key and the extension, in lower case, of a file in a shard."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


@functools.lru_cache(maxsize=4096)
def members_read(extensions: tuple[str, ...]) -> Mapping[str, str]:
    """Modality -> the extension that is read for it, of a sample that has these ``extensions``."""
    chosen: dict[str, str] = {}
    for extension in sorted(filter(modality_of, extensions), key=_preference):
        chosen.setdefault(MODALITY_OF[last_part(extension)], extension)
    return chosen


@functools.lru_cache(maxsize=4096)
def dotted_key(extensions: tuple[str, ...]) -> tuple[str, ...]:
    """Those of ``extensions`` that show that a dot belongs to the key, as in ``v1.0000.jpg`` and ``v1.0001.jpg``:
    several numbers, or very many names, before the same format. Empty where none do."""
    before: dict[str, list[str]] = defaultdict(list)
    for extension in extensions:
        if modality_of(extension) or last_part(extension) == META:
            before[last_part(extension)].append(extension)
    for found in before.values():
        numbers = [extension for extension in found if extension.rpartition(".")[0].rpartition(".")[2].isdigit()]
        if len(numbers) > 1 or len(found) > MAX_VIEWS:
            return tuple(found)
    return ()


def modality_of(extension: str) -> str | None:
    """What a file with this extension is read as; None where it is not read."""
    return MODALITY_OF.get(last_part(extension))


def last_part(extension: str) -> str:
    """``png`` of ``left.png``."""
    return extension.rpartition(".")[2]


def names(extensions: Iterable[str], most: int = 8) -> str:
    """For a message: ``left.png, right.png``."""
    listed = list(extensions)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(extension or "no extension" for extension in listed[:most]) + more


def _preference(extension: str) -> tuple[int, int, str]:
    return extension.count("."), _RANK[last_part(extension)], extension
