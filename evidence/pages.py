"""The pages of docs/ that are made of records, and the look-up of their studies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from evidence import methods_page, page
from evidence.methods import METHODS
from evidence.studies import STUDIES
from evidence.study import Method, Study
from mmmoe_pretrain.kinds import nearest


@dataclass(frozen=True)
class Page:
    """``write``: as ``page.write``."""

    title: str
    studies: tuple[Study, ...]
    write: Callable[..., Path]
    head: str

    @property
    def names(self) -> list[str]:
        """Of its studies and methods."""
        methods = (method.name for study in self.studies for method in methods_of(study))
        return list(dict.fromkeys([*(study.name for study in self.studies), *methods]))

    def of(self, names: Sequence[str]) -> Page:
        """With these studies alone; the name of a method: it and the reference, in every study that has it."""
        known = self.names
        for name in names:
            if name not in known:
                others = [page for page, its in PAGES.items() if name in its.names]
                hint = f"it is of --page {others[0]}" if others else nearest(name, known, "there are")
                raise ValueError(f"there is no study {name!r}; {hint}")
        return replace(self, studies=tuple(filter(None, (_part(study, names) for study in self.studies))))


def _part(study: Study, names: Sequence[str]) -> Study | None:
    chosen = {method.name for method in methods_of(study)} & set(names)
    if study.name in names:
        return study
    kept = tuple(each for each in study.variants if each.name in chosen | {study.reference})
    return replace(study, variants=kept) if chosen else None


def methods_of(study: Study) -> list[Method]:
    return [variant for variant in study.variants if isinstance(variant, Method)]


PAGES = {
    "evidence": Page("Evidence", STUDIES, page.write, page.HEAD),
    "methods": Page("Methods", METHODS, methods_page.write, methods_page.HEAD),
}
