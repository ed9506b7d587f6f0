"""The objectives: one file a kind (the table is ``kinds.OBJECTIVES``), those of a run by name, and what the losses of
a step are divided by.

A loss is a sum over its terms (targets, samples that have both sides of a pair) divided by their number in the step,
over all microbatches and data-parallel ranks, known before the first forward pass. So every term has the same weight
however a step is split into microbatches and ranks, and a microbatch without terms does not count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from mmmoe_pretrain import kinds
from mmmoe_pretrain.batch import OF_TOKENIZER, Batch, send
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.config.base import RepresentationSettings, representation_settings, sides_of
from mmmoe_pretrain.config.evaluate import ImputeConfig
from mmmoe_pretrain.modalities import Modality, build_modalities
from mmmoe_pretrain.objectives.base import Objective, ObjectiveModule, ObjectiveSettings, Outputs, Representation
from mmmoe_pretrain.parallel.collectives import group_size
from mmmoe_pretrain.parallel.groups import Group

__all__ = [
    "Objective", "ObjectiveModule", "ObjectiveSettings", "Objectives", "Outputs", "Representation", "StepCounts",
    "build_objectives", "objectives_of", "step_counts",
]  # fmt: skip


Pair = tuple[str, str]  # of representations


class Objectives(dict[str, Objective]):
    """Those of a run that have a weight, by name, in the config's order, which defines the task ids in a batch."""

    def __init__(self, by_name: Mapping[str, Objective], streams: Mapping[str, str]) -> None:
        super().__init__(by_name)
        self.streams = streams  # keys of the random numbers of each (``kinds.stream_keys``)
        self.losses = {loss: name for name, objective in self.items() for loss in objective.losses}

    @property
    def representations(self) -> dict[str, Representation]:
        """Those that some objective reads, by name."""
        return {rep: its.all_representations[rep] for its in self.values() for rep in its.representations}

    @property
    def pooled(self) -> tuple[str, ...]:
        """Names of the representations that a batch says the segments of: those, and the parts of the fused ones."""
        all_names = ((*its.segment_names, name) for name, its in self.representations.items())
        return tuple(dict.fromkeys(name for names in all_names for name in names))

    @property
    def read_by_token(self) -> tuple[str, ...]:
        """Names of the representations whose tokens some fusion module reads."""
        names = (its.segment_names for its in self.representations.values() if its.settings.reads_tokens)
        return tuple(dict.fromkeys(name for each in names for name in each))

    @property
    def aligned(self) -> tuple[Pair, ...]:
        """Pairs of representations that some objective brings into one space, each once."""
        return _each_once(pair for objective in self.values() for pair in objective.aligned)

    def scored(self, more: Iterable[str]) -> tuple[Pair, ...]:
        """The aligned pairs, and the pairs ``more`` (``evaluate.pairs``), whose two are not compared in training.
        Raises ValueError where one of two is in no aligned pair: it has no joint head that was trained."""
        known = {name for pair in self.aligned for name in pair}
        for pair in more:
            if unknown := [name for name in sides_of(pair) if name not in known]:
                raise ValueError(
                    f"evaluate.pairs {pair}: no objective brings {unknown[0]} into a space with others, so it has no "
                    f"vector to compare; compared are {', '.join(sorted(known)) or 'none'}"
                )
        return _each_once((*self.aligned, *map(sides_of, more)))

    def check_imputed(self, impute: Mapping[str, ImputeConfig]) -> None:
        """``impute``: by target. Raises ValueError where the model has no vector of one that it needs."""
        for target, its in impute.items():
            if unread := [name for name in (target, *its.observed) if name not in self.representations]:
                known = kinds.nearest(unread[0], self.representations, "they read")
                raise ValueError(
                    f"evaluate.impute.{target} needs {unread[0]}, and no objective reads that, so the model has no "
                    f"vector of it; {known}"
                )

    @property
    def correlated(self) -> tuple[Pair, ...]:
        """Pairs of representations that some objective makes alike up to a linear map, and none brings into one
        space, each once."""
        aligned = {frozenset(pair) for pair in self.aligned}
        every = (pair for objective in self.values() for pair in objective.correlated)
        return _each_once(pair for pair in every if frozenset(pair) not in aligned)

    @property
    def predicting(self) -> tuple[str, ...]:
        """Names of the tasks that predict tokens."""
        return tuple(name for name, objective in self.items() if objective.predicts)

    def generator(self, task: str, modality: str = "") -> tuple[Objective, str]:
        """The objective that generates values of ``modality`` (empty: of the last that it predicts), and its name.
        Raises ValueError where ``task`` generates nothing such."""
        able = [name for name, objective in self.items() if objective.generates]
        if not able:
            raise ValueError(
                f"no objective predicts tokens (objectives: {', '.join(self) or 'none'}), so nothing is generated; "
                f"train one of kind next_token"
            )
        if task not in able:
            raise ValueError(f"no task {task} generates; {kinds.nearest(task, able, 'those that do are')}")
        can = self[task].generates
        if modality and modality not in can:
            raise ValueError(f"task {task} does not generate {modality}; it generates {', '.join(can)}")
        return self[task], modality or can[-1]

    @property
    def language_heads(self) -> tuple[str | None, ...]:
        """Names of the language heads, each once; None is that of objectives that name none."""
        reading = [objective for objective in self.values() if OF_TOKENIZER in objective.vocabularies]
        return tuple(dict.fromkeys(objective.head for objective in reading))

    @property
    def classifying(self) -> dict[str, Objective]:
        """Those with classes."""
        return {name: objective for name, objective in self.items() if objective.classes}

    @property
    def vocabularies(self) -> tuple[str, ...]:
        """Those of which some token is predicted. A vocabulary of a modality's own has one head."""
        return tuple(dict.fromkeys(name for objective in self.values() for name in objective.vocabularies))

    @property
    def contents(self) -> dict[str, str]:
        """The losses that predict contents of hidden tokens, each with the modality."""
        return {loss: name for objective in self.values() for loss, name in objective.contents.items()}

    @property
    def hidden(self) -> tuple[str, ...]:
        """The modalities of which some objective hides tokens, in the order of the config."""
        found = {name for objective in self.values() for name in objective.hidden}
        every = (name for objective in self.values() for name in objective.modalities)
        return tuple(name for name in dict.fromkeys(every) if name in found)

    @property
    def reconstructed(self) -> tuple[str, ...]:
        """The modalities that some objective generates from latent numbers, each once."""
        return tuple(dict.fromkeys(name for objective in self.values() for name in objective.reconstructs))

    @property
    def whole_step(self) -> bool:
        """Some loss is of the whole step: its microbatches run twice, the first time without gradients."""
        return any(objective.whole_step for objective in self.values())

    @property
    def taught(self) -> bool:
        """Some objective learns from the model with the average of its weights."""
        return any(objective.settings.taught for objective in self.values())

    def weights(self, step: int) -> dict[str, float]:
        """Every loss by name, with its weight in the total."""
        return {
            loss: self[name].settings.weight_at(step) * self[name].losses[loss] for loss, name in self.losses.items()
        }

    def needs(self) -> dict[str, set[str]]:
        """The needs of all objectives (``Objective.needs``)."""
        return {what: wanted for objective in self.values() for what, wanted in objective.needs().items()}


def _each_once(pairs: Iterable[Pair]) -> tuple[Pair, ...]:
    """In either order of its two names."""
    found: dict[frozenset[str], Pair] = {}
    for pair in pairs:
        found.setdefault(frozenset(pair), pair)
    return tuple(found.values())


def build_objectives(
    settings: Mapping[str, ObjectiveSettings],
    modalities: Mapping[str, Modality],
    representations: Mapping[str, RepresentationSettings] = {},
    vocab_size: int = 0,
) -> Objectives:
    """``representations``: those that the config adds to one for each modality. ``vocab_size``: see ``Objective``."""
    alone = {name: representation_settings([name]) for name in modalities}
    known = {name: Representation(name, its) for name, its in {**alone, **representations}.items()}
    for representation in known.values():
        representation.check(modalities)
    on = {
        name: kinds.OBJECTIVES.load(value.kind)(name, value, modalities, known)
        for name, value in settings.items()
        if value.on
    }
    for objective in on.values():
        objective.vocab_size = vocab_size
    return Objectives(on, kinds.stream_keys({name: value.kind for name, value in settings.items()}))


def objectives_of(config: RunConfig) -> Objectives:
    """The objectives of ``config``; no file is read. Raises ValueError where they do not suit its other sections."""
    modalities = build_modalities(config.modalities, decoding=False)
    vocab_size = config.model.vocab_size
    objectives = build_objectives(config.objectives, modalities, config.representations, vocab_size)
    objectives.scored(config.evaluate.pairs)
    objectives.check_imputed(config.evaluate.impute)
    for task, how in config.evaluate.generate.items():
        objectives.generator(task, how.modality)
    return objectives


@dataclass(frozen=True)
class StepCounts:
    """Over all microbatches and data-parallel ranks of a step. ``terms``: of each objective's loss, by its name."""

    tokens: int  # padding not counted
    terms: dict[str, int]


def step_counts(batches: Sequence[Batch], objectives: Objectives, group: Group, device: torch.device) -> StepCounts:
    """The counts of a step with the microbatches ``batches`` on this rank, by one small reduction over the
    data-parallel ranks in ``group``, all of which must call it. Equal on every pipeline stage, since each has the
    batches."""
    terms = dict.fromkeys(objectives.losses, 0)
    for batch in batches:
        for objective in objectives.values():
            for loss, count in objective.counts(batch).items():
                terms[loss] += count
    counts = [sum(batch.num_valid for batch in batches), *terms.values()]
    if group_size(group) > 1:
        sums = send(torch.tensor(counts), device)
        dist.all_reduce(sums, group=group)
        counts = sums.tolist()
    return StepCounts(counts[0], dict(zip(terms, counts[1:], strict=True)))
