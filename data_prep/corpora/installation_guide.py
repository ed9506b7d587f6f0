"""Debian's installation guide for amd64, and its translations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmmoe_pretrain.data_prep.corpora.manuals import Manual, build_manual
from mmmoe_pretrain.data_prep.rows.row import Row

MANUAL = Manual(
    name="installation-guide",
    package="installation-guide-amd64",
    folder="usr/share/doc/installation-guide-amd64",
    version="20230508",
    licence="GPL-2.0-only",
    attribution="Debian GNU/Linux Installation Guide, (c) 2004-2023 the Debian Installer team and other contributors",
)


def build(out: Path, languages: Sequence[str] = ()) -> tuple[list[Row], dict[str, int]]:
    """Fetch the guide into ``out``; the paragraphs in ``languages``, or in all."""
    return build_manual(MANUAL, out, languages)
