"""The base of config sections: strict models, paths, and the settings that all modalities or all objectives have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from mmmoe_pretrain.config.schedule import Schedule, Weight, check_schedule, schedule_of, value_at
from mmmoe_pretrain.kinds import REPRESENTATIONS, check_name, nearest
from mmmoe_pretrain.paths import expand
from mmmoe_pretrain.untrusted import brief
from mmmoe_pretrain.urls import command_has_secret, has_secret, is_url, redacted, redacted_command, shown


class StrictModel(BaseModel):
    """Frozen, and refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, values: Any) -> Any:
        known = list(cls.model_fields)
        wrong: list[InitErrorDetails] = []
        for key in values if isinstance(values, dict) else ():
            if key not in known:
                problem = PydanticCustomError("unknown_key", "{hint}", {"hint": nearest(key, known, "known keys:")})
                wrong.append({"type": problem, "loc": (key,), "input": values[key]})
        if wrong:
            raise ValidationError.from_exception_data(cls.__name__, wrong)
        return values


# Sections whose entries do not know where they are, so that their own messages do not say it.
UNPLACED = (("modalities",), ("representations",), ("objectives",))
NO_NAMES: Mapping[str, str] = MappingProxyType({})


def explain(
    error: ValidationError, where: tuple[str | int, ...] = (), other_names: Mapping[str, str] = NO_NAMES
) -> list[str]:
    """A message for each of pydantic's errors about the section at ``where``: the key, the value and the remedy.
    ``other_names``: what an unknown key is called here, by the last part of the key."""
    items = error.errors(include_url=False)

    def has_wrong_entries(item: Any) -> bool:
        depth = len(item["loc"])
        return any(len(other["loc"]) > depth and other["loc"][:depth] == item["loc"] for other in items)

    causes = [item for item in items if item["type"] != "too_short" or not has_wrong_entries(item)]
    return [_message(item, (*where, *item["loc"]), bool(where), other_names) for item in causes]


def _message(item: Any, location: tuple[str | int, ...], placed: bool, other_names: Mapping[str, str]) -> str:
    name = ".".join(str(part) for part in location if part != "[key]")
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "unknown_key":
        here = (
            None if location[:1] in UNPLACED else other_names.get(str(location[-1]))
        )  # kinds have keys of their own
        return f"unknown key {name!r}; {f'did you mean {here}?' if here else message}"
    if item["type"] == "missing":
        return f"{name}: required, and missing"
    if item["type"] == "value_error":
        return f"{name}: {message}" if placed or location[:1] in UNPLACED else message
    if item["type"] == "model_type":
        message = "Input should be a mapping of settings, e.g. {}"
    null = item["type"] == "string_type" and item["input"] is None
    hint = "; YAML reads ~ alone as null, so write $HOME" if null else ""
    value = shown(item["input"]) if isinstance(item["input"], str) else item["input"]
    got = "" if "storage_options" in location else f" (got {shown(brief(value))}{hint})"
    return f"{name}: {message}{got}"


def _expanded(path: str) -> str:
    try:
        full = expand(path)
    except ValueError as error:
        raise PydanticCustomError("path", "{why}", {"why": redacted(error)}) from None
    if has_secret(full):
        why = f"{redacted(full)} holds a secret, which would be saved with the run; set it in the environment instead"
        raise PydanticCustomError("path", "{why}", {"why": why})
    return full


def _source(path: str) -> str:
    """A path is filled in; of a URL, which may be signed, variables are filled in where it is read, and of a command
    (``pipe:``) by its shell."""
    if "pipe:" in path and command_has_secret(path):
        why = (
            f"{redacted_command(path)} holds a secret, which would be saved with the run; set an environment "
            f"variable to it and write $NAME in the command"
        )
        raise PydanticCustomError("path", "{why}", {"why": why})
    if has_secret(path):
        why = (
            f"{redacted(path)} holds a secret, which would be saved with the run; set an environment variable to the "
            f"URL and write its name instead: ${{SHARDS_URL}}"
        )
        raise PydanticCustomError("path", "{why}", {"why": why})
    if path.startswith("pipe:") or "::pipe:" in path:
        return path
    try:
        return "::".join(part if is_url(part) or is_url(expand(part)) else expand(part) for part in path.split("::"))
    except ValueError as error:
        raise PydanticCustomError("path", "{why}", {"why": redacted(error)}) from None


def _extension(name: str) -> str:
    """As ``members.split_name`` gives those of files."""
    return name.lower().removeprefix(".")


def _mounted(path: str) -> str:
    """Logs and locks need a file system; for a URL, a folder s3: would be made here."""
    if is_url(path):
        why = "it must be a folder that is mounted; for checkpoints behind a URL set checkpoint.folder"
        raise PydanticCustomError("folder", "{why}", {"why": why})
    return path


def listed(values: Any) -> Any:
    """A text alone is a list of it."""
    return [values] if isinstance(values, str) else values


Extension = Annotated[str, AfterValidator(_extension)]
SourceText = Annotated[str, AfterValidator(_source)]  # a path or URL of shards
PathText = Annotated[str, AfterValidator(_expanded)]  # of any section: ~ and $VAR are filled in
FolderText = Annotated[PathText, AfterValidator(_mounted)]
Names = Annotated[tuple[str, ...], BeforeValidator(listed)]


@dataclass(frozen=True)
class StreamNames:
    """The names behind the numbers of a batch: modality ids, task ids, and ids of combinations of modalities, where
    a loss of routing asks for them."""

    modalities: tuple[str, ...]
    tasks: tuple[str, ...]
    combinations: tuple[tuple[str, ...], ...] = ()


ONE_STREAM = StreamNames(("tokens",), ("task",))  # of a layer that is used by itself


def sides_of(pair: str) -> tuple[str, str]:
    """The names that ``pair`` joins."""
    first, _, second = pair.partition("-")
    return first, second


def check_pair(pair: str, names: Iterable[str], where: str) -> None:
    """Raises ValueError where ``pair`` is not two of ``names``."""
    known = list(names)
    first, second = sides_of(pair)
    if first == second or first not in known or second not in known:
        raise ValueError(f"{where} {pair!r} is not two of {', '.join(known)} joined by -; e.g. {'-'.join(known[:2])}")


def check_missing(
    target: str, others: Sequence[str], representations: Mapping[str, tuple[str, ...]], places: tuple[str, str]
) -> None:
    """Raises ValueError unless ``target`` is a representation that may be missing where the ``others`` are there:
    it has a modality that none of them has. ``places``: the settings that name them."""
    for place, names in zip(places, ((target,), others), strict=True):
        if unknown := [name for name in names if name not in representations]:
            known = nearest(unknown[0], representations, "there are")
            raise ValueError(f"{place} {unknown[0]}: there is no such representation; {known}")
    if len(set(others)) < len(others):
        raise ValueError(f"{places[1]} {list(others)} names a representation twice; name each once")
    if set(representations[target]) <= {part for other in others for part in representations[other]}:
        raise ValueError(
            f"{places[0]} {target} has no modality beside those of {', '.join(others)} ({places[1]}), so it is never "
            f"missing where they are there; name a target with another modality, or leave some of them out"
        )


class FileSettings(StrictModel):
    """Settings that may name a file, of which a run keeps a copy."""

    # The setting that names it; the setting ``fingerprint`` is that file's.
    file_setting: ClassVar[str] = ""

    @property
    def file(self) -> str:
        """The path that ``file_setting`` has; empty without."""
        return str(getattr(self, self.file_setting)) if self.file_setting else ""

    def with_file(self) -> Self:
        """The settings with the fingerprint of its file. Raises ValueError where that cannot be read, or is not the
        one that the run started with."""
        return self


NOT_OF_THE_MODEL = ("members", "field", "dropout_share", "withheld_share")  # of a modality's settings


class ModalitySettings(FileSettings):
    """The settings of every modality. A kind adds its own.

    ``members``: the extensions of the files that are read as this modality, such as ``left.png``; of those that a
    sample has, the first one is read. Empty: every file
    in a format of the kind, and where several modalities have the kind, those named after the modality (``left.*``).
    ``field``: the field of a sample's JSON that is read where it has no such file.

    In training a sample loses the modality with probability ``dropout_share``, drawn anew each time (a number, or a
    schedule such as ``[[0, 0.0], [1000, 0.5]]``), and with probability ``withheld_share``, drawn by its key and so
    for good, to measure what missing modalities cost. One modality always stays, and documents keep all.
    """

    not_of_the_model: ClassVar[tuple[str, ...]] = ()  # settings that a run may change when it resumes

    kind: str
    members: tuple[Extension, ...] = ()
    field: str | None = Field(None, min_length=1)
    dropout_share: Weight = 0.0
    withheld_share: float = Field(0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _shares(self) -> Self:
        schedule = schedule_of(self.dropout_share)
        check_schedule(schedule, "dropout_share")
        if any(share > 1 for _, share in schedule):
            raise ValueError(f"dropout_share {self.dropout_share} is a share of the samples, at most 1; e.g. 0.3")
        return self

    @property
    def vocabulary(self) -> int:
        """Ids of its own, which a table and a head of its own have; 0: discrete tokens are ids of the tokenizer."""
        return 0

    @property
    def may_be_lost(self) -> bool:
        """Some training samples lose the modality."""
        return self.withheld_share > 0 or any(share > 0 for _, share in schedule_of(self.dropout_share))

    def dropout_at(self, step: int) -> float:
        """``dropout_share`` at an optimizer step (the first is 0)."""
        return value_at(schedule_of(self.dropout_share), step)

    def of_the_model(self) -> dict[str, Any]:
        """The settings that define what the model computes."""
        return self.model_dump(mode="json", exclude={*NOT_OF_THE_MODEL, *self.not_of_the_model})

    def check_names(self, name: str, modalities: Mapping[str, ModalitySettings]) -> None:
        """Raises ValueError where the settings of the modality ``name`` name another that is not there."""


@dataclass(frozen=True)
class StepSizes:
    """Sizes of a step that an objective may need: its samples, their microbatches on ``data_size`` data-parallel
    ranks, and the numbers in a representation."""

    global_batch_size: int
    num_microbatches: int
    data_size: int
    embedding_size: int

    @property
    def legal_microbatches(self) -> list[int]:
        """Every ``num_microbatches`` that these samples and ranks can have."""
        share = self.global_batch_size // self.data_size or 1
        return [n for n in range(1, share + 1) if share % n == 0]


MAX_BANK_PARTS = 6  # of a representation with ``missing: bank``


class RepresentationSettings(StrictModel):
    """The settings of every representation: one vector of a sample, made of the first items of the modalities
    ``parts``. A kind adds its own, and says what it makes of an absent part.

    ``missing``: whether a sample that lacks some of the parts has such a vector, too (``allow``), or none (``skip``).
    With ``bank`` it has one, and in place of each absent part a learned vector (``models/fusion/bank.py``).
    """

    joined: ClassVar[bool] = False  # the parts are one segment and attend to each other; else each is a segment alone
    reads_tokens: ClassVar[bool] = False  # and not only the mean of each segment

    kind: str
    parts: tuple[str, ...]
    missing: Literal["skip", "allow", "bank"] = "skip"

    @model_validator(mode="after")
    def _has_places_for_a_bank(self) -> Self:
        if self.missing == "bank" and self.joined:
            raise ValueError(
                f"missing: bank puts learned vectors in the place of absent parts behind the trunk, and kind "
                f"{self.kind} joins its parts before it; use missing: allow, or a kind whose parts are segments of "
                f"their own, such as late"
            )
        if self.missing == "bank" and len(self.parts) > MAX_BANK_PARTS:
            raise ValueError(
                f"missing: bank has a vector for each part and each combination of the others, "
                f"{len(self.parts) * (2 ** (len(self.parts) - 1) - 1):,} for {len(self.parts)} parts; use at most "
                f"{MAX_BANK_PARTS} parts, or missing: allow"
            )
        return self

    @property
    def changes(self) -> tuple[str, ...]:
        """Transforms of its modality's kind by which its values are views of the sample's."""
        return ()

    @property
    def modulated(self) -> bool:
        """The gradients of its parts are balanced by how far each is (``models/fusion/modulation.py``)."""
        return False

    def of_the_model(self) -> dict[str, Any]:
        """The settings that define the tensors of the model and what it computes."""
        return self.model_dump(mode="json")

    def check_parts(self, name: str, modalities: Iterable[str]) -> None:
        """Raises ValueError where a representation called ``name`` cannot be of these parts."""
        least, how_many = (1, "one modality") if self.joined else (2, "two modalities")
        if name in modalities or len(self.parts) < least or len(set(self.parts)) < len(self.parts):
            raise ValueError(
                f"representations.{name} {list(self.parts)}: every modality is a representation under its own name; "
                f"choose another name, and name {how_many} or more, each once"
            )

    def check_tokens(self, name: str, modalities: Mapping[str, Any]) -> None:
        """Raises ValueError where a representation called ``name`` cannot be of tokens as these modalities have."""


def representation_settings(values: Any) -> Any:
    """The settings of a representation. A list of modalities alone is early fusion of them."""
    return REPRESENTATIONS.settings(
        {"kind": "early", "parts": values} if isinstance(values, list | tuple) else values
    )


# Of the language head by which an objective predicts tokens: those with one name share one; None is one of them.
Head = Annotated[str | None, BeforeValidator(lambda name: None if name is None else check_name(name))]


class ObjectiveSettings(FileSettings):
    """The settings of every objective. ``weight``: of its loss in the total, or a schedule such as
    ``[[0, 0.0], [1000, 0.25]]``."""

    kind: str
    weight: Weight = 1.0

    @model_validator(mode="after")
    def _weights(self) -> Self:
        check_schedule(self.schedule, "weight")
        return self

    @property
    def schedule(self) -> Schedule:
        return schedule_of(self.weight)

    @property
    def on(self) -> bool:
        """The objective counts in some step."""
        return any(weight > 0 for _, weight in self.schedule)

    @property
    def taught(self) -> bool:
        """It reads outputs of the model with the average of its weights (``optimizer.average``)."""
        return False

    @property
    def below_zero(self) -> bool:
        """A loss of it can be negative, as that of a density can."""
        return False

    @property
    def scored(self) -> tuple[str, ...]:
        """The representations of which it measures how far each part is."""
        return ()

    def weight_at(self, step: int) -> float:
        """The weight at an optimizer step (the first is 0)."""
        return value_at(self.schedule, step)

    def idle_at(self, step: int) -> bool:
        """The objective has no weight at an optimizer step: its segments are not packed, and its own parameters keep
        their values."""
        return self.weight_at(step) == 0

    def changes_until(self, last: int) -> bool:
        """Whether the weight is not the same in all optimizer steps up to ``last`` (the first is 0)."""
        at = (0, last, *(step for step, _ in self.schedule if step < last))
        return len({self.weight_at(step) for step in at}) > 1

    def check_names(
        self, name: str, modalities: Mapping[str, ModalitySettings], representations: Mapping[str, tuple[str, ...]]
    ) -> None:
        """Raises ValueError where the settings of the objective ``name`` name what is not there. ``representations``:
        every one with its modalities, those that are a modality included."""

    def of_every_sample(self) -> ObjectiveSettings:
        """The settings for held-out samples, without random draws."""
        return self

    def batch_problem(self, name: str, sizes: StepSizes) -> str | None:
        """Why the objective called ``name`` cannot learn from steps of these sizes, and the remedy; or None."""
        return None
