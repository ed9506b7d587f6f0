"""Prompts of a task from files and texts of the command line."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmmoe_pretrain.batch import Item, Sample, SampleMeta
from mmmoe_pretrain.generate.tasks import Prompt, Task
from mmmoe_pretrain.kinds import nearest
from mmmoe_pretrain.limits import MAX_MEMBER_BYTES
from mmmoe_pretrain.modalities import BadSampleError, Modalities, Modality
from mmmoe_pretrain.untrusted import read_bytes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Given:
    """``columns``: by modality, a value (a file, or of a modality that reads text the text itself) for each prompt,
    or one for all. ``texts``: beginnings of what is generated, likewise."""

    columns: Mapping[str, Sequence[str]]
    texts: Sequence[str] = ()

    def __len__(self) -> int:
        return max((len(values) for values in (*self.columns.values(), self.texts)), default=0)

    def row(self, number: int) -> dict[str, str]:
        return {name: values[number % len(values)] for name, values in self.columns.items()}

    def text(self, number: int) -> str:
        return self.texts[number % len(self.texts)] if self.texts else ""


def given(
    task: Task, modalities: Modalities, files: Sequence[str], texts: Sequence[str], by_name: Sequence[str]
) -> Given:
    """``files``: read as the modality that their extension is of; ``by_name``: strings NAME=VALUE. Raises ValueError
    where the task takes none such, or where their numbers differ."""
    takes = sorted(set().union(*task.ways)) or [name for name in modalities if name != task.modality.name]
    columns: dict[str, list[str]] = {}
    for file in files:
        columns.setdefault(_modality_of(file, task, takes, modalities), []).append(file)
    if texts and not task.modality.needs_tokenizer:
        columns[_reader(task, takes, modalities)] = list(texts)
        texts = ()
    for pair in by_name:
        name, equals, value = pair.partition("=")
        if not equals or name not in takes:
            raise ValueError(
                f"--item {pair}: it is NAME=VALUE with a modality that task {task.name} takes; "
                f"{nearest(name, takes, 'it takes')}"
            )
        columns.setdefault(name, []).append(value)
    found = Given(columns, texts)
    numbers = {name: len(values) for name, values in {**columns, "--text": texts}.items() if values}
    if any(number not in (1, len(found)) for number in numbers.values()):
        raise ValueError(f"give one value for all prompts, or one for each; there are {numbers}")
    if task.ways != [set()] and set(columns) not in task.ways:
        raise ValueError(
            f"task {task.name} generates {task.modality.name} from {_in_words(task.ways)}, and is given "
            f"{' and '.join(columns) or 'nothing'}; name files by --file or --item NAME=FILE, or shards by --data"
        )
    if not len(found):
        raise ValueError(f"task {task.name} is given nothing to begin with; give --text PROMPT, or shards by --data")
    return found


def prompts_of(task: Task, modalities: Modalities, values: Given) -> list[Prompt]:
    """Raises ValueError where a file cannot be used, or where a text is too long."""
    found = []
    for number in range(len(values)):
        row, text = values.row(number), values.text(number)
        key = next(
            (Path(value).stem for name, value in row.items() if not modalities[name].needs_tokenizer), "prompt"
        )
        items = tuple(Item(name, _value(modalities[name], value)) for name, value in row.items())
        # A task without parts takes all items of a document, in this order.
        sample = Sample(SampleMeta(f"{key}" if len(values) == 1 else f"{number}-{key}"), items, document=True)
        prompt = task.begin(sample, _tokens(task.modality, text) if text else ())
        assert prompt is not None, (task.ways, row)
        found.append(prompt)
    return found


def _tokens(modality: Modality, text: str) -> Sequence[int]:
    before = modality.cut
    value = modality.decode(text.encode())
    if modality.cut > before:
        raise ValueError(
            f"the prompt {text[:40]!r}... is longer than {modality.name} may be with what is generated "
            f"(modalities.{modality.name}.max_tokens); shorten it"
        )
    return [] if value is None else [int(i) for i in value[1:-1]]


def _value(modality: Modality, given: str) -> np.ndarray:
    """The decoded value of a file, or of a modality that reads text of the text ``given``."""
    if modality.needs_tokenizer:
        data = given.encode()
    elif Path(given).is_file():
        data = read_bytes(Path(given), MAX_MEMBER_BYTES)
    else:
        raise ValueError(f"no file {given} to read as {modality.name}; correct its path")
    before = modality.cut
    try:
        value = modality.decode(data)
    except BadSampleError as error:
        raise ValueError(
            f"{given} cannot be read as {modality.name}: {error}; it reads {', '.join(modality.formats)}"
        ) from None
    if value is None:
        raise ValueError(f"{given or 'a text'} is empty, and {modality.name} is needed; give another")
    if modality.cut > before:
        log.warning("%s is longer than modality %s may be; its beginning is used", given, modality.name)
    return value


def _modality_of(file: str, task: Task, takes: Sequence[str], modalities: Modalities) -> str:
    name = modalities.read_as(Path(file).name.partition(".")[2])
    if name in takes:
        return str(name)
    raise ValueError(
        f"{file} is read as {name or 'no modality'}, and task {task.name} generates {task.modality.name} from "
        f"{_in_words(task.ways)}; give --item NAME=FILE, or another file"
    )


def _reader(task: Task, takes: Sequence[str], modalities: Modalities) -> str:
    names = [name for name in takes if modalities[name].needs_tokenizer]
    if len(names) == 1:
        return names[0]
    raise ValueError(
        f"task {task.name} generates {task.modality.name} from {_in_words(task.ways)}, and --text is for one of them "
        f"that reads text; {'give --item NAME=TEXT' if names else 'leave it out'}"
    )


def _in_words(ways: Sequence[set[str]]) -> str:
    return ", or from ".join(" and ".join(sorted(way)) or "what stands before it" for way in ways)
