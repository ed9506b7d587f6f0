"""What a task generates: its prompts, made of samples, and the values that follow them.

A prompt is a sample whose last item is the beginning of a value: its begin mark, and tokens that are given. It is
packed by the task itself, so generation sees what training did.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mmmoe_pretrain.batch import Batch, Item, Sample, send
from mmmoe_pretrain.config.evaluate import GenerateConfig
from mmmoe_pretrain.data.pack import PackSettings, pack
from mmmoe_pretrain.generate.decoding import generate
from mmmoe_pretrain.generate.growing import Ahead, Generated
from mmmoe_pretrain.generate.sequences import Sequences, dropless
from mmmoe_pretrain.modalities import Modality
from mmmoe_pretrain.models.mmmoe import MMMoE
from mmmoe_pretrain.objectives import Objectives

ROWS = 64  # sequences that grow at once, beams counted


@dataclass(frozen=True)
class Prompt:
    """``sample``: without what follows the beginning. ``position``: of the sample, by which a task draws. ``places``:
    tokens of the beginning. ``whole``: the value that the sample has; None where that is unknown."""

    sample: Sample
    position: int
    places: int
    whole: Item | None = None

    @property
    def key(self) -> str:
        return self.sample.meta.key


class Task:
    """The generation of ``modality`` by a task of a model. Raises ValueError where it generates nothing such.
    ``settings``: how a run packs."""

    def __init__(self, name: str, model: MMMoE, settings: PackSettings, how: GenerateConfig) -> None:
        objective, modality = settings.objectives.generator(name, how.modality)
        self.name, self.model, self.how = name, model, how
        self.modality: Modality = settings.modalities[modality]
        self._objective = objective.generating(modality)
        alone = Objectives({name: self._objective}, settings.objectives.streams)
        self._settings = dataclasses.replace(settings, objectives=alone)
        self._number = list(settings.objectives).index(name)  # of the task, among all of the run
        pieces = self.modality.max_tokens - len(self.modality.marks)
        self.limit = min(how.max_tokens or pieces, pieces)
        size = self.modality.settings.vocabulary or model.config.model.vocab_size
        self._allowed = torch.from_numpy(self.modality.may_follow(size))

    @property
    def ways(self) -> list[set[str]]:
        """The modalities before what is generated: a sample must have all of one of them."""
        return [way - {self.modality.name} for way in self._objective.needs().values()]

    def prompt(self, sample: Sample, position: int = 0, given: int | None = None) -> Prompt | None:
        """Of a sample that has a value, which is cut after ``given`` of its tokens (default: ``how.prompt_tokens``).
        None where the task makes nothing of ``sample``, or where the value has no more tokens."""
        split = self._objective.split(sample)
        if split is None:
            return None
        before, whole = split
        given = self.how.prompt_tokens if given is None else given
        ids = self.modality.keys(whole.value)
        if given and given >= len(ids) - len(self.modality.marks):
            return None
        begun = np.concatenate([ids[: 1 + given], ids[-1:]])  # the end mark is no part of a segment
        cut = dataclasses.replace(sample, items=(*before, Item(self.modality.name, begun)))
        return Prompt(cut, position, 1 + given, whole) if self._segments(cut, position) else None

    def has_value(self, sample: Sample) -> bool:
        """``sample`` has a value of what is generated."""
        return self._objective.split(sample) is not None

    def begin(self, sample: Sample, given: Sequence[int] = (), position: int = 0) -> Prompt | None:
        """Of a sample without a value: it begins with the tokens ``given``. Raises ValueError where these leave no
        room; None where the task makes nothing of ``sample``."""
        name, most = self.modality.name, self.modality.max_tokens - len(self.modality.marks)
        if len(given) >= most:
            raise ValueError(
                f"a prompt of {len(given)} tokens leaves no room: {name} has at most {most} with what is generated "
                f"(modalities.{name}.max_tokens); shorten it"
            )
        first, last = self.modality.marks
        begun = Item(name, np.asarray([first, *given, last], dtype=np.int64))
        whole = dataclasses.replace(sample, items=(*sample.items, begun))
        return Prompt(whole, position, 1 + len(given)) if self._segments(whole, position) else None

    def _segments(self, sample: Sample, position: int) -> bool:
        """The task makes a segment that ends with the last item."""
        generator = self._settings.generator(position, self._stream)
        made = list(self._objective.segments(sample, generator))
        return any(segment.parts[-1].item == len(sample.items) - 1 for segment in made)

    @property
    def _stream(self) -> str:
        return f"objective/{self._settings.objectives.streams[self.name]}"

    def run(self, prompts: Iterable[Prompt]) -> Iterator[tuple[Prompt, Generated]]:
        """In their order, some at a time."""
        size, left = max(1, ROWS // (self.how.beams if self.how.method == "beam" else 1)), iter(prompts)
        while some := list(itertools.islice(left, size)):
            with torch.inference_mode(), dropless(self.model):
                found = self._of(some)
            yield from zip(some, found, strict=True)

    def _of(self, prompts: Sequence[Prompt]) -> list[Generated]:
        last = self.modality.max_tokens - 1  # the end mark's place
        limits = tuple(min(self.limit, last - prompt.places) for prompt in prompts)
        places = [prompt.places for prompt in prompts]
        growing = Sequences(self.model, self.name, self.packed(prompts), self.modality, places, max(limits))
        allowed_V = send(self._allowed, growing.logits_SV.device)
        keys = tuple(prompt.key for prompt in prompts)
        return generate(growing, Ahead(keys, limits, self.modality.marks[1], allowed_V), self.how)

    def packed(self, prompts: Sequence[Prompt]) -> Batch:
        """One segment each, in their order."""
        positions = [prompt.position for prompt in prompts]
        batch = pack([prompt.sample for prompt in prompts], self._settings, positions)
        assert batch.num_segments == len(prompts), (batch.num_segments, len(prompts))
        return dataclasses.replace(batch, task_ids=torch.full_like(batch.task_ids, self._number))

    def reference(self, prompt: Prompt) -> str | None:
        """The text that the sample has behind the beginning; None where it is unknown or no text."""
        if prompt.whole is None:
            return None
        if prompt.places == 1 and prompt.whole.raw:  # as it is in the shard: uncut, too
            return prompt.whole.raw
        return self.text(self.modality.keys(prompt.whole.value)[prompt.places : -1])

    @property
    def is_text(self) -> bool:
        """Whether its values are texts; others become files."""
        return self.text(()) is not None

    def file(self, prompt: Prompt, generated: Generated) -> tuple[bytes, str]:
        """Of a value that is no text, with its beginning: see ``Modality.render``."""
        begun = self.modality.keys(prompt.sample.items[-1].value)[1 : prompt.places]
        return self.modality.render(np.asarray([*begun, *generated.ids], dtype=np.int64))

    def own_file(self, prompt: Prompt) -> tuple[bytes, str]:
        """As ``file``, of the value that the sample has."""
        assert prompt.whole is not None
        return self.modality.render(self.modality.keys(prompt.whole.value))

    def text(self, ids: Sequence[int] | np.ndarray) -> str | None:
        """What tokens without marks say; None of kinds that are no texts."""
        first, last = self.modality.marks
        return self.modality.text_of(np.asarray([first, *ids, last], dtype=np.int64))
