"""Next-token prediction: on a text alone, on a text after images or audio (captioning), on interleaved documents.

Its loss is the mean negative log-likelihood of all targets of an optimizer step, or with ``balance`` the mean of such
losses, one for each group of targets (token_groups.py). Each item whose tokens are discrete
stands as its begin mark and pieces, each of which predicts the next piece or the end mark.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from mmmoe_pretrain import kinds
from mmmoe_pretrain.batch import Batch, Item, Part, Sample, Segment
from mmmoe_pretrain.config.base import Head, ModalitySettings, ObjectiveSettings
from mmmoe_pretrain.objectives.base import (
    Expected,
    Objective,
    ObjectiveModule,
    Outputs,
    num_tokens,
)
from mmmoe_pretrain.objectives.token_groups import MODALITY, Balance, TokenGroups
from mmmoe_pretrain.parallel.groups import Groups


class NextTokenSettings(ObjectiveSettings):
    """``parts``: the modalities of a segment in order, each a name or a list of alternatives of which one is drawn:
    ``[[image, audio], text]``. Empty: all items of a document in its order, and of another sample those whose tokens
    can be predicted. ``loss_on``: of those modalities, the ones that have a loss (empty: all). ``balance``:
    ``modality``, so that each of these counts equally instead of by its tokens, or a field of the samples with its
    values, each of which does: ``{language: [en, de, other]}``. Targets of other values have a loss where ``other``
    is named. ``fraction``: of the samples that get such a segment, drawn at random. ``head``: of the language head;
    objectives that name the same one share it, and so do all that name none."""

    kind: Literal["next_token"] = "next_token"
    parts: tuple[str | tuple[str, ...], ...] = ()
    loss_on: tuple[str, ...] = ()
    balance: Balance = None
    fraction: float = Field(1.0, gt=0, le=1)
    head: Head = None

    def of_every_sample(self) -> ObjectiveSettings:
        """See ``ObjectiveSettings.of_every_sample``."""
        return self.model_copy(update={"fraction": 1.0})

    @property
    def ways_of_parts(self) -> tuple[tuple[str, ...], ...]:
        """The alternatives of each part."""
        return tuple((part,) if isinstance(part, str) else part for part in self.parts)

    @property
    def named(self) -> set[str]:
        return {name for part in self.ways_of_parts for name in part}

    def check_names(
        self, name: str, modalities: Mapping[str, ModalitySettings], representations: Mapping[str, tuple[str, ...]]
    ) -> None:
        """See ``ObjectiveSettings.check_names``; and something must be predicted."""
        if unknown := sorted((self.named | set(self.loss_on)) - modalities.keys()):
            raise ValueError(
                f"objectives.{name} names {', '.join(unknown)}, and the modalities are {', '.join(modalities)}; "
                f"correct its parts or loss_on"
            )
        twice = sorted(m for m in self.named if sum(m in way for way in self.ways_of_parts) > 1)
        if twice or () in self.ways_of_parts:
            raise ValueError(
                f"objectives.{name}.parts names {', '.join(twice) or 'nothing in a list'}"
                f"{' twice' if twice else ''}, and each part is another modality; e.g. [[image, audio], text] "
                f"for one of two before a text"
            )
        able = {m for m, its in modalities.items() if kinds.MODALITIES.load(its.kind).predictable}
        among = self.named or set(modalities)
        if wrong := sorted(set(self.loss_on) - (able & among)):
            raise ValueError(
                f"objectives.{name}.loss_on {', '.join(wrong)}: it is not a part, or its tokens are not discrete and "
                f"cannot be predicted; name of {', '.join(sorted(able & among)) or 'no part'}"
            )
        if not able & among:
            raise ValueError(
                f"objectives.{name} predicts nothing: none of {', '.join(sorted(among))} has discrete tokens; add a "
                f"modality that has (kind: text) to its parts, or leave the objective out"
            )
        predicted = set(self.loss_on) or able & among
        if self.balance == MODALITY and len(predicted) < 2:
            raise ValueError(
                f"objectives.{name}.balance modality weighs several modalities with a loss, and this one has "
                f"{', '.join(predicted)} alone; remove it, or balance by a field of the samples, e.g. "
                f"{{language: [en, de, other]}}"
            )


class NextToken(Objective):
    """Parts before the first that can be predicted attend to each other in both directions, those after causally."""

    Settings = NextTokenSettings
    causal = True
    predicts = True

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.head = self.settings.head
        self._parts = self.settings.ways_of_parts
        predictable = {m for m, modality in self.modalities.items() if modality.predictable}
        self._predicted = set(self.settings.loss_on) or predictable & (self.settings.named or predictable)
        in_order = (name for way in self._parts for name in way) if self._parts else self.modalities
        self.generates = tuple(name for name in in_order if name in self._predicted)
        self.groups = TokenGroups.of(self.settings.balance, tuple(self.modalities), self._predicted)

    def segments(self, sample: Sample, rng: np.random.Generator) -> Iterator[Segment]:
        """See ``Objective.segments``."""
        drawn = rng.random() < self.settings.fraction
        items = self._items(sample, rng) if drawn else []
        parts = list(self._laid_out(sample, items))
        if any(part.targets is not None for part in parts):
            yield Segment(self.name, tuple(parts))

    def generating(self, modality: str) -> NextToken:
        """See ``Objective.generating``."""
        parts = list(itertools.takewhile(lambda way: modality not in way, self._parts))
        of_it = {"parts": (*parts, (modality,)) if self._parts else (), "loss_on": (modality,)}
        settings = self.settings.model_copy(update={**of_it, "balance": None, "fraction": 1.0})
        return NextToken(self.name, settings, self.modalities, self.all_representations)

    def split(self, sample: Sample) -> tuple[tuple[Item, ...], Item] | None:
        """See ``Objective.split``: without ``parts``, as of a document, it is the last value."""
        found = [i for i, item in enumerate(sample.items) if item.modality in self._predicted and item.loss]
        if not found:
            return None
        if not self._parts:
            return sample.items[: found[-1]], sample.items[found[-1]]
        return tuple(item for item in sample.items if item.modality not in self._predicted), sample.items[found[0]]

    def _items(self, sample: Sample, rng: np.random.Generator) -> list[int]:
        if not self._parts:
            return [
                i
                for i, item in enumerate(sample.items)
                if sample.document or self.modalities[item.modality].predictable
            ]
        found = []
        for part in self._parts:
            options = [i for i in map(sample.index, part) if i is not None]
            if not options:
                return []
            found.append(options[int(rng.random() * len(options))] if len(options) > 1 else options[0])
        return found

    def _laid_out(self, sample: Sample, items: list[int]) -> Iterator[Part]:
        causal, position = False, 0
        for i in items:
            item = sample.items[i]
            modality, count = self.modalities[item.modality], num_tokens(sample, i, self.modalities)
            causal = causal or modality.predictable
            targets = None
            if modality.predictable:
                ids = modality.keys(item.value)
                count -= 1  # the end mark is a target alone
                if item.loss and item.modality in self._predicted:
                    targets = ids[1:]
            yield Part(i, 0, count, "causal" if causal else "full", targets, position)
            if not self._parts:
                position += count

    @property
    def predicted(self) -> tuple[str, ...]:
        return tuple(name for name in self.modalities if name in self._predicted)

    @property
    def losses(self) -> dict[str, float]:
        if self.groups is None:
            return {self.name: 1.0}
        return {f"{self.name}/{group}": 1 / len(self.groups.names) for group in self.groups.names}

    def counts(self, batch: Batch) -> dict[str, int]:
        targets = batch.targets[self.name]
        if self.groups is None:
            return {self.name: len(targets)}
        group_N = self.groups.numbers(batch, targets)
        return {loss: int((group_N == number).sum()) for number, loss in enumerate(self.losses)}

    def module(self, embedding_size: int) -> ObjectiveModule:
        return _SumOfTargets(self.name, self.groups)

    def needs(self) -> dict[str, set[str]]:
        """See ``Objective.needs``: of alternatives, one way for each."""
        if not self._parts:
            return {f"{self.name} of {name}": {name} for name in sorted(self._predicted)}
        return {f"{self.name} of {' and '.join(way)}": set(way) for way in self._ways()}

    def expected(self) -> list[Expected]:
        ways = self._ways()
        return [self._expected(way, self.settings.fraction / len(ways)) for way in ways]

    def _ways(self) -> list[tuple[str, ...]]:
        """The modalities of a segment's parts, in every choice of alternatives."""
        if not self._parts:
            return [tuple(name for name, modality in self.modalities.items() if modality.predictable)]
        return list(itertools.product(*self._parts))

    def _expected(self, way: tuple[str, ...], count: float) -> Expected:
        tokens = [(name, self.modalities[name].max_tokens - int(self.modalities[name].predictable)) for name in way]
        targets = tuple((name, number) for name, number in tokens if name in self._predicted)
        causal = itertools.dropwhile(lambda part: not self.modalities[part[0]].predictable, tokens)
        number, last = sum(number for _, number in targets), sum(number for _, number in causal)
        return Expected(count, tuple(tokens), number, last, targets_of=targets)

    def share(self, loss: str) -> float:
        return float(self.settings.fraction)

    def why_idle(self, loss: str, count: int, so_far: str) -> str:
        ways = ", or ".join(what.removeprefix(f"{self.name} of ") for what in self.needs())
        more, cause = "", "parts"
        if self.groups is not None:
            group, cause = loss.removeprefix(f"{self.name}/"), "balance"
            more = f", as {self.groups.field or 'modality'} {group}, which is in its balance"
        return (
            f"objectives.{self.name} had no target {so_far}: no sample drawn for it has {ways}{more}. Give the data "
            f"such samples, correct its {cause}, or set its weight: 0"
        )


class _SumOfTargets(ObjectiveModule):
    def __init__(self, name: str, groups: TokenGroups | None) -> None:
        super().__init__()
        self.name, self.groups = name, groups

    def forward(self, outputs: Outputs, batch: Batch, groups: Groups) -> dict[str, Tensor]:
        nll_N = outputs.token_nll[self.name]
        if self.groups is None:
            return {self.name: nll_N.sum()}
        group_N = self.groups.numbers(batch, batch.targets[self.name])
        return {
            f"{self.name}/{group}": (nll_N * (group_N == number)).sum()
            for number, group in enumerate(self.groups.names)
        }
