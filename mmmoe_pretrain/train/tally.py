"""How many samples a run has read since its start, kept over its restarts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from mmmoe_pretrain.train.control import Notes


@dataclass(frozen=True)
class Tally:
    """Over all data-parallel ranks. Steps that were undone do not count."""

    read: int = 0
    bad: int = 0  # could not be used
    cut_audio: int = 0  # clips longer than modalities.audio.max_seconds
    cut_text: int = 0  # texts longer than modalities.text.max_tokens

    def plus(self, notes: Notes) -> Tally:
        """With those of a step, ``notes`` being the sums over all ranks."""
        return Tally(**{name: count + round(getattr(notes, name)) for name, count in self.to_json().items()})

    def to_json(self) -> dict[str, int]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: object) -> Tally:
        """Raises ValueError for anything but counts of these names."""
        names = {field.name for field in dataclasses.fields(cls)}
        fine = isinstance(value, dict) and value.keys() == names
        if not fine or not all(type(count) is int and count >= 0 for count in value.values()):  # type: ignore[attr-defined]
            raise ValueError(f"samples must be counts of {', '.join(sorted(names))}, not {str(value)[:80]}")
        return cls(**value)  # type: ignore[arg-type]
