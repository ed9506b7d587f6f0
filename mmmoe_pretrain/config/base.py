"""The base of config sections: strict models, paths, and the settings that all modalities or all objectives have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from mmmoe_pretrain.paths import expand


class StrictModel(BaseModel):
    """Frozen, and refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


def _expanded(path: str) -> str:
    try:
        return expand(path)
    except ValueError as error:
        raise PydanticCustomError("path", "{why}", {"why": str(error)}) from None


def _extension(name: str) -> str:
    """As ``members.split_name`` gives those of files."""
    return name.lower().removeprefix(".")


Extension = Annotated[str, AfterValidator(_extension)]
PathText = Annotated[str, AfterValidator(_expanded)]  # of any section: ~ and $VAR are filled in


@dataclass(frozen=True)
class StreamNames:
    """The names behind the numbers of a batch: modality ids and task ids."""

    modalities: tuple[str, ...]
    tasks: tuple[str, ...]


ONE_STREAM = StreamNames(("tokens",), ("task",))  # of a layer that is used by itself
Schedule = tuple[tuple[int, float], ...]  # (step, weight), rising in steps; straight lines between


class ModalitySettings(StrictModel):
    """The settings of every modality. A kind adds its own.

    ``members``: the extensions of the files that are read as this modality, such as ``left.png``. Empty: every file
    in a format of the kind, and where several modalities have the kind, those named after the modality (``left.*``).
    ``field``: the field of a sample's JSON that is read where it has no such file.
    """

    not_of_the_model: ClassVar[tuple[str, ...]] = ()  # settings that a run may change when it resumes

    kind: str
    members: tuple[Extension, ...] = ()
    field: str | None = Field(None, min_length=1)

    def of_the_model(self) -> dict[str, Any]:
        """The settings that define what the model computes."""
        return self.model_dump(mode="json", exclude={"members", "field", *self.not_of_the_model})

    def check_names(self, name: str, modalities: Mapping[str, ModalitySettings]) -> None:
        """Raises ValueError where the settings of the modality ``name`` name another that is not there."""


class ObjectiveSettings(StrictModel):
    """The settings of every objective. ``weight``: of its loss in the total, or a schedule such as
    ``[[0, 0.0], [1000, 0.25]]``."""

    kind: str
    weight: float | Schedule = 1.0

    @model_validator(mode="after")
    def _weights(self) -> Self:
        steps = [step for step, _ in self.schedule]
        rising = all(before < after for before, after in pairwise(steps))
        if not steps or steps[0] < 0 or not rising or any(weight < 0 for _, weight in self.schedule):
            raise ValueError(
                f"weight {self.weight} must be a number from 0 on, or [[step, weight], ...] with rising steps; e.g. "
                f"[[0, 0.0], [1000, 0.25]]"
            )
        return self

    @property
    def schedule(self) -> Schedule:
        return self.weight if isinstance(self.weight, tuple) else ((0, float(self.weight)),)

    @property
    def on(self) -> bool:
        """The objective counts in some step."""
        return any(weight > 0 for _, weight in self.schedule)

    def weight_at(self, step: int) -> float:
        """The weight at an optimizer step (the first is 0)."""
        for (first, low), (last, high) in pairwise(self.schedule):
            if first <= step < last:
                return low + (high - low) * (step - first) / (last - first)
        return self.schedule[0][1] if step < self.schedule[0][0] else self.schedule[-1][1]

    def check_names(
        self, name: str, modalities: Mapping[str, ModalitySettings], representations: Mapping[str, tuple[str, ...]]
    ) -> None:
        """Raises ValueError where the settings of the objective ``name`` name what is not there. ``representations``:
        every one with its modalities, those that are a modality included."""

    def of_every_sample(self) -> ObjectiveSettings:
        """The settings for held-out samples, without random draws."""
        return self

    def batch_problem(self, name: str, global_batch_size: int, num_microbatches: int, data_size: int) -> str | None:
        """Why the objective called ``name`` cannot learn from batches of these sizes, and the remedy; or None."""
        return None
