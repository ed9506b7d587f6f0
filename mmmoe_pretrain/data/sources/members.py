"""Which sample a file of a shard belongs to.

The key follows webdataset: the path up to the first dot of its last component; what follows that dot is the
extension (``set.v1/a.left.png``: key ``set.v1/a``, extension ``left.png``). What a file is read as depends on the
modalities of the run (``modalities.Modalities.members_read``). What is not read is counted by ``survey.py``.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from mmmoe_pretrain.modalities import Modalities, format_of

META = "json"  # the extension of a sample's JSON
CLASS = "cls"  # of its class, which is the label where the JSON has none
MAX_VIEWS = 8  # files of one format in a sample; more of them are samples whose keys hold dots


@dataclass(frozen=True)
class RawSample:
    """One sample as bytes, by the extension of each member that is read."""

    key: str
    members: dict[str, bytes]
    shard: str = ""
    unread: tuple[str, ...] = ()  # extensions of the other members


def is_leftover(name: str) -> bool:
    """Whether an operating system left a file, which is of no sample: ``.DS_Store``, ``._a.png``, ``__MACOSX/a``."""
    return name.rpartition("/")[2].startswith(".") or name.startswith("__MACOSX/") or "/__MACOSX/" in name


def split_name(name: str) -> tuple[str, str]:
    """The key and the extension, in lower case, of a file in a shard."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


@functools.lru_cache(maxsize=4096)
def dotted_key(extensions: tuple[str, ...]) -> tuple[str, ...]:
    """Those of ``extensions`` that show that a dot belongs to the key, as in ``v1.0000.jpg`` and ``v1.0001.jpg``:
    several numbers, or very many names, before the same format. Empty where none do."""
    before: dict[str, list[str]] = defaultdict(list)
    for extension in extensions:
        ending = extension.rpartition(".")[2]
        if ending == META or format_of(extension):
            before[ending].append(extension)
    for found in before.values():
        numbers = [extension for extension in found if extension.rpartition(".")[0].rpartition(".")[2].isdigit()]
        if META not in extensions and (len(numbers) > 1 or len(found) > MAX_VIEWS):
            return tuple(found)
    return ()


def members_to_read(extensions: tuple[str, ...], modalities: Modalities) -> frozenset[str]:
    """Those of a sample's ``extensions`` that are read. Where there is a JSON, which may name them as the parts of a
    document, all files in a format of some modality are."""
    chosen = {*modalities.members_read(extensions).values(), META, CLASS}
    if META in extensions:
        chosen |= {e for e in extensions if modalities.can_read(e)}
    return frozenset(chosen)


def names(extensions: Iterable[str], most: int = 8) -> str:
    """For a message: ``left.png, right.png``."""
    listed = list(extensions)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(extension or "no extension" for extension in listed[:most]) + more
