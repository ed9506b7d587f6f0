"""The Debian Administrator's Handbook: prose on the same subjects in many languages, some translated in part."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmmoe_pretrain.data_prep.corpora.manuals import Manual, build_manual
from mmmoe_pretrain.data_prep.rows.row import Row

MANUAL = Manual(
    name="debian-handbook",
    package="debian-handbook",
    folder="usr/share/doc/debian-handbook/html",
    version="11.20220922",
    licence="GPL-2.0-or-later OR CC-BY-SA-3.0",
    attribution="The Debian Administrator's Handbook, (c) Raphaël Hertzog, Roland Mas, Freexian SARL, translators",
)


def build(out: Path, languages: Sequence[str] = ()) -> tuple[list[Row], dict[str, int]]:
    """Fetch the handbook into ``out``; the paragraphs in ``languages``, or in all."""
    return build_manual(MANUAL, out, languages)
