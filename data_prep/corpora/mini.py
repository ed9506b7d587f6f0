"""The corpus that ships with the repository: no network, seconds to unpack.

It is one tar in the source tree, made by ``data_prep/corpora/build_mini.py``; its LICENCES.md says what is in it.
"""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from pathlib import Path

from mmmoe_pretrain.data_prep.corpora.packages import unpack_tar
from mmmoe_pretrain.data_prep.rows.manifest import read_manifest
from mmmoe_pretrain.data_prep.rows.row import Row

ARCHIVE = Path(__file__).resolve().parents[2] / "tests" / "assets" / "mini" / "mini.tar"


def build(out: Path, languages: Sequence[str] = ()) -> tuple[list[Row], dict[str, int]]:
    """Unpack into ``out``; ``languages`` (none: all) keeps the rows of these."""
    if not ARCHIVE.is_file():
        raise ValueError(
            "the mini corpus is in the source tree (tests/assets/mini/mini.tar), and this installation "
            "has none; clone the repository and run the command there"
        )
    out.mkdir(parents=True, exist_ok=True)
    with tarfile.open(ARCHIVE, "r:") as tar:
        unpack_tar(tar, out)
    rows = [row for row in read_manifest(out) if not languages or row.language in languages]
    if not rows:
        raise ValueError(f"mini has no row in language {', '.join(languages)}; it has en, es, fr, it, ru")
    return rows, {}
