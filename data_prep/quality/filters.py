"""Filters of ``shard``: which samples are wanted, by facts that are known before anything is encoded.

A rule applies to samples that have what it asks about: an image without a clip passes ``--min-seconds``. Of a
document, every image and clip must pass, and the characters are those of all its texts together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmmoe_pretrain.limits import has_text

if TYPE_CHECKING:
    from mmmoe_pretrain.data_prep.rows.row import Row


RULES = (
    "--min-size", "--max-size", "--max-aspect", "--min-seconds", "--max-seconds", "--min-characters",
    "--max-characters", "--language",
)  # fmt: skip


class Filtered(Exception):
    """A sample that a rule leaves out: the reason, which names the option. No ValueError: the file is not broken."""


def rule_of(reason: str) -> str:
    """The option that ``reason`` names."""
    return max(RULES, key=reason.rfind)


@dataclass(frozen=True, slots=True)
class Filters:
    """The bounds, which are inclusive; None: no bound."""

    min_size: int | None = None  # pixels of the shorter side
    max_size: int | None = None  # pixels of the longer side
    max_aspect: float | None = None  # longer side / shorter side
    min_seconds: float | None = None
    max_seconds: float | None = None
    min_characters: int | None = None
    max_characters: int | None = None
    languages: tuple[str, ...] = ()  # ``en`` takes ``en-GB``, too; () takes every language

    def __post_init__(self) -> None:
        for name in ("size", "seconds", "characters"):
            low, high = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if low is not None and high is not None and low > high:
                raise ValueError(f"--min-{name} {low:g} is above --max-{name} {high:g}; no sample would pass")

    def of_files(self) -> list[str]:
        """The options that are given and need the files of a row, for a dry run."""
        names = ("min_size", "max_size", "max_aspect", "min_seconds", "max_seconds")
        return [f"--{name.replace('_', '-')}" for name in names if getattr(self, name) is not None]

    def check_row(self, row: Row) -> None:
        """Raise Filtered by what the row itself says."""
        self._check_texts(row.language, row.texts)

    def _check_texts(self, language: str, texts: Iterable[str]) -> None:
        if self.languages and not any(_speaks(language, wanted) for wanted in self.languages):
            what = f"language {language[:80]} is not among" if language else "it names no language of"
            raise Filtered(f"{what} --language {','.join(self.languages)}")
        texts = [text for text in texts if has_text(text)]
        if texts:
            self._check("characters", "{:,} characters are", sum(map(len, texts)))

    def check_sample(self, key: str, members: Mapping[str, bytes]) -> None:
        """Raise Filtered by the members of a sample that is copied as it is; what is damaged passes."""
        if self == Filters():
            return
        from mmmoe_pretrain.data_prep.shards.audio import audio_seconds
        from mmmoe_pretrain.modalities import format_of
        from mmmoe_pretrain.modalities.image_file import IMAGE_ERRORS, header_size

        self._check_texts(*_texts_of(key, members))
        for name, data in members.items():
            facts: dict[str, float] = {}
            with contextlib.suppress(*IMAGE_ERRORS):
                if format_of(name) == "image":
                    facts = dict(zip(("width", "height"), header_size(data), strict=True))
                elif format_of(name) == "audio":
                    facts = {"seconds": audio_seconds(data)}
            self.check_media(facts)

    def check_media(self, facts: Mapping[str, Any]) -> None:
        """Raise Filtered by the facts of an image or a clip (``shards/media.py``)."""
        if "width" in facts:
            short, long = sorted((facts["width"], facts["height"]))
            name = {facts["height"]: "height", facts["width"]: "width"}
            self._check("size", f"{name[short]} {{}} is", short, "min")
            self._check("size", f"{name[long]} {{}} is", long, "max")
            if self.max_aspect is not None and long > self.max_aspect * short:
                raise Filtered(f"aspect {long / short:.3g} is above --max-aspect {self.max_aspect:g}")
        if "seconds" in facts:
            self._check("seconds", "{:.3g} seconds are", facts["seconds"])

    def _check(self, name: str, what: str, value: float, *bounds: str) -> None:
        for bound in bounds or ("min", "max"):
            limit = getattr(self, f"{bound}_{name}")
            if limit is not None and (value < limit if bound == "min" else value > limit):
                side = "below" if bound == "min" else "above"
                raise Filtered(f"{what.format(value)} {side} --{bound}-{name} {limit:g}")


def languages(given: str | None) -> tuple[str, ...]:
    """``en,de`` as names."""
    return tuple(name for item in (given or "").split(",") if (name := item.strip()))


def _texts_of(key: str, members: Mapping[str, bytes]) -> tuple[str, list[str]]:
    """The language and the texts of a sample of a shard; none where it is damaged."""
    from mmmoe_pretrain.data.decode import PARTS, BadSampleError, contents, document, read_row
    from mmmoe_pretrain.data.sources.members import RawSample
    from mmmoe_pretrain.modalities import default_modalities

    raw, modalities = RawSample(key, dict(members)), default_modalities()
    try:
        row = read_row(raw)
        language = row["language"] if isinstance(row.get("language"), str) else ""
        if PARTS in row:
            parts = document(row, raw.members, modalities, any_kind=True)
            return language, [part.string for part in parts if part.string is not None]
        text = contents(raw, row, modalities).get("text", b"")
        return language, [modalities["text"].raw(text)]
    except BadSampleError:
        return "", []


def _speaks(language: str, wanted: str) -> bool:
    """Whether ``language`` is ``wanted`` or a variety of it: ``pt_br`` is ``pt`` and ``pt-BR``."""
    tag, wanted = (name.lower().replace("_", "-") for name in (language, wanted))
    return tag == wanted or tag.startswith(f"{wanted}-")
