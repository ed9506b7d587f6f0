"""The modalities: one file a kind (the table is ``kinds.MODALITIES``), and those of a run by name.

Owns which file of a sample is read as which modality.
"""

from __future__ import annotations

import functools
import logging
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from mmmoe_pretrain import kinds
from mmmoe_pretrain.modalities.base import BadSampleError, Modality, ModalitySettings
from mmmoe_pretrain.modalities.tokenizer import Tokenizer, copy_tokenizer

__all__ = [
    "BadSampleError", "Modalities", "Modality", "ModalitySettings", "Tokenizer", "build_modalities", "copy_tokenizer",
    "default_modalities", "format_of", "reads",
]  # fmt: skip

log = logging.getLogger(__name__)


class Modalities(dict[str, Modality]):
    """The modalities of a run by name, in the config's order, which defines their ids in a batch."""

    def __init__(self, by_name: Mapping[str, Modality], tokenizer: Tokenizer | None = None) -> None:
        super().__init__(by_name)
        self._tokenizer = tokenizer
        self._read: dict[tuple[str, ...], Mapping[str, str]] = {}
        self.streams = kinds.stream_keys({name: modality.settings.kind for name, modality in self.items()})

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises ValueError where no modality reads text."""
        if self._tokenizer is None:
            raise ValueError(f"no modality reads text ({', '.join(self)}), and this needs one; add one to modalities")
        return self._tokenizer

    @property
    def vocab_size(self) -> int:
        """The tokenizer's vocabulary size; 0 without one."""
        return 0 if self._tokenizer is None else self._tokenizer.vocab_size

    @property
    def fingerprint(self) -> str:
        """The tokenizer's fingerprint; empty without one."""
        return "" if self._tokenizer is None else self._tokenizer.fingerprint

    @property
    def cut(self) -> dict[str, int]:
        """Values that were too long so far, by name."""
        return {name: modality.cut for name, modality in self.items()}

    @property
    def transform_seconds(self) -> float:
        """Of all values so far."""
        return sum(modality.transform_seconds for modality in self.values())

    @property
    def decoders(self) -> dict[str, str]:
        """The packages that decode files, with their versions, by modality."""
        return {name: modality.decoder for name, modality in self.items() if modality.decoder}

    @property
    def predictable(self) -> tuple[str, ...]:
        """The modalities whose tokens can be predicted."""
        return tuple(name for name, modality in self.items() if modality.predictable)

    def field(self, name: str) -> str | None:
        """The field of a sample's JSON that is read as modality ``name`` where it has no file for it."""
        modality = self[name]
        if modality.settings.field or not modality.default_field:
            return modality.settings.field
        kinds_of_run = [other.settings.kind for other in self.values()]
        return modality.default_field if kinds_of_run.count(modality.settings.kind) == 1 else name

    def read_as(self, extension: str) -> str | None:
        """The modality that a member with this extension (``png``, ``left.png``) is read as, or None."""
        claimed = next((name for name, modality in self.items() if extension in modality.settings.members), None)
        if claimed is not None:
            return claimed
        before, _, ending = extension.rpartition(".")
        open_to_all = [
            name for name, modality in self.items() if ending in modality.formats and not modality.settings.members
        ]
        named = [name for name in open_to_all if name == before.rpartition(".")[2]]
        fitting = named or (open_to_all if len(open_to_all) == 1 else [])
        return fitting[0] if fitting else None

    def can_read(self, extension: str) -> bool:
        """Whether some modality's kind reads files of this format."""
        ending = extension.rpartition(".")[2]
        return any(ending in its.formats or extension in its.settings.members for its in self.values())

    def members_read(self, extensions: tuple[str, ...]) -> Mapping[str, str]:
        """Modality -> the extension that is read for it, of a sample that has these ``extensions``: of several the
        first in its ``members``, then the one with the fewest dots, then the one in its kind's preferred format, then
        the first by name."""
        if extensions not in self._read:  # of a few kinds of samples
            by_name: dict[str, list[str]] = defaultdict(list)
            for extension in extensions:
                if (name := self.read_as(extension)) is not None:
                    by_name[name].append(extension)
            self._read[extensions] = {
                name: min(by_name[name], key=functools.partial(self._preference, name))
                for name in self
                if name in by_name
            }
        return self._read[extensions]

    def tied(self, extensions: tuple[str, ...]) -> tuple[str, tuple[str, ...]] | None:
        """A modality, and those of ``extensions`` that it could be read from equally well, so that only the alphabet
        decides; None where there is none."""
        for name, chosen in self.members_read(extensions).items():
            best = self._preference(name, chosen)[:3]
            tied = [e for e in extensions if self.read_as(e) == name and self._preference(name, e)[:3] == best]
            if len(tied) > 1:
                return name, tuple(sorted(tied))
        return None

    def _preference(self, name: str, extension: str) -> tuple[int, int, int, str]:
        formats, members = self[name].formats, self[name].settings.members
        ending = extension.rpartition(".")[2]
        place = members.index(extension) if extension in members else len(members)
        return place, extension.count("."), formats.index(ending) if ending in formats else len(formats), extension


def build_modalities(
    settings: Mapping[str, ModalitySettings],
    tokenizer: str | Path | None = None,
    *,
    fingerprint: str | None = None,
    decoding: bool = True,
) -> Modalities:
    """The modalities of a run; with a ``fingerprint`` the tokenizer must be that one. Without ``decoding`` no file is
    read: sizes, costs and embedders need none."""
    classes = {name: kinds.MODALITIES.load(value.kind) for name, value in settings.items()}
    readers = [name for name, kind in classes.items() if kind.needs_tokenizer]
    loaded = None
    if decoding and readers:
        if tokenizer is None:
            raise ValueError(f"modalities.{readers[0]} reads text, and data.tokenizer names no tokenizer; give one")
        loaded = Tokenizer(tokenizer, expected_fingerprint=fingerprint or None)
    built = {name: kind(name, settings[name], loaded) for name, kind in classes.items()}
    return Modalities(built, loaded)


@functools.cache
def default_modalities() -> Modalities:
    """One of each built-in kind that needs no settings, named after it: for tools that read shards without a run."""
    settings = {}
    for kind in kinds.MODALITIES.builtin:
        model = kinds.MODALITIES.load(kind).Settings
        if not any(field.is_required() for name, field in model.model_fields.items() if name != "kind"):
            settings[kind] = model(kind=kind)
    return build_modalities(settings, decoding=False)


def format_of(extension: str) -> str | None:
    """The kind that reads files whose extension ends in this format; None where none does. Kinds of other packages
    are loaded only for formats that no built-in kind reads."""
    ending = extension.rpartition(".")[2]
    return next((kind for kind in kinds.MODALITIES.names if ending in reads(kind).formats), None)


@functools.cache
def reads(kind: str) -> kinds.Reads:
    """What a kind reads; nothing if it cannot be loaded, since a run may not use it at all."""
    if kind in kinds.READS:
        return kinds.READS[kind]
    try:
        loaded = kinds.MODALITIES.load(kind)
        return kinds.Reads(tuple(loaded.formats), loaded.default_field)
    except (ValueError, AttributeError) as error:
        log.warning("the formats of modality kind %s are not known: %s", kind, error)
        return kinds.Reads()
