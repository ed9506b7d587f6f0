"""Weights, buffers and optimizer state of an engine, by the keys of ``checkpoint/state.py``: what all engines share.

Legend: a parameter's *part* is what this rank's model holds of it (``parallel/placement.py``). An optimizer holds a
range of the flattened part, or all of it, somewhere in a *flat* tensor: its fp32 master weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmmoe_pretrain.checkpoint.state import (
    Pieces,
    ShardedState,
    ShardedTensor,
    model_key,
    optimizer_key,
    persistent_buffers,
    pieces_of_range,
    split_key,
)
from mmmoe_pretrain.config.optimizer import ANCHOR, AVERAGE, IMPORTANCE
from mmmoe_pretrain.engines.hold import clear_rows
from mmmoe_pretrain.models.pretraining import PretrainingModel
from mmmoe_pretrain.parallel.placement import Placement, logical_shape, placements

SWAPPED = 1 << 24  # numbers that are swapped at once

Held = list[Tensor]  # of one parameter: its master weight, and what the optimizer keeps for it
Flat = list[Tensor]  # a flat master weight, and what the optimizer keeps for it, in the order of the names


@dataclass(frozen=True)
class Part:
    """The metadata of one parameter, stored before ZeRO-3 removes its shape."""

    name: str
    shape: tuple[int, ...]
    placement: Placement


@dataclass(frozen=True)
class Stretch:
    """Elements ``start`` to ``start + length`` of a flattened part, and their offset in ``flat``; none where
    ``length`` is below 1."""

    flat: Tensor
    begin: int
    start: int
    length: int

    def of(self, tensor: Tensor) -> Tensor:
        """A view of ``tensor``, which is laid out like ``flat``, or is a copy of it."""
        return tensor.detach().view(-1)[max(0, self.begin) :][: max(0, self.length)]


class EngineState(ABC):
    """``names``: of the tensors that the optimizer keeps for each parameter (``OptimizerConfig.state``); they exist
    from the start, as zeros."""

    def __init__(self, models: Sequence[PretrainingModel], names: Sequence[str]) -> None:
        self._models, self._names = models, names
        self._bounded = {parameter for model in models for parameter, _ in model.upper_bounds()}
        self._parts: dict[nn.Parameter, Part] = {}
        for model in models:
            placed = placements(model)
            for name, parameter in model.named_parameters():
                self._parts[parameter] = Part(name, tuple(parameter.shape), placed[name])

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Logical shapes of the parameters, by name."""
        return {part.name: logical_shape(part.shape, part.placement) for part in self._parts.values()}

    def export(self) -> ShardedState:
        """Views of this rank's state; copies in host memory of state that is in files."""
        return self._export(self._copies_of_files())

    @torch.no_grad()
    def load(self, state: ShardedState, updates: int) -> None:
        """Import a state with the pieces of ``export``, made by ``updates`` updates."""
        self._reset_optimizer(updates)
        copies = self._copies_of_files()
        frozen = {part.name: its.frozen for its, part in self._parts.items() if hasattr(its, "frozen")}
        for key, mine in self._export(copies).items():
            mine.copy_(state[key])
            name, tensor = split_key(key)
            if name in frozen and tensor not in (None, AVERAGE, ANCHOR, IMPORTANCE):
                clear_rows(mine, frozen[name])
        self._publish(copies)

    @torch.no_grad()
    def begin(self) -> None:
        """The average of the weights and the anchor begin as the weights, and importance as 1, until a state is
        loaded; nothing to do where none is kept."""
        for flat in self._flats() if {AVERAGE, ANCHOR} & {*self._names} else ():
            held = self._optimizer_state(flat)
            for name in {AVERAGE, ANCHOR} & {*self._names}:
                held[name].copy_(flat)
            if IMPORTANCE in self._names:
                held[IMPORTANCE].fill_(1)

    @torch.no_grad()
    def update_average(self, kept: float) -> None:
        """After an update: the average keeps the share ``kept`` of itself."""
        for flat, average in self._averages():
            average.lerp_(flat, 1 - kept)

    @torch.no_grad()
    def swap_average(self) -> None:
        """Exchange the weights and their average; once more, and all is as it was, bit for bit."""
        for flat, average in self._averages():
            for mine, other in zip(flat.view(-1).split(SWAPPED), average.view(-1).split(SWAPPED), strict=True):
                before = mine.clone()
                mine.copy_(other)
                other.copy_(before)
        self._publish({})

    @torch.no_grad()
    def held(self, parameters: Collection[nn.Parameter]) -> list[Held]:
        """What this rank's optimizer holds of ``parameters`` in memory: views of weights and optimizer state."""
        return [
            [stretch.of(tensor.data) for tensor in self._live(stretch.flat)]  # .data: as in _averages
            for parameter, stretch in self._stretches()
            if parameter in parameters and stretch.length > 0 and not self._in_files(stretch.flat)
        ]

    def flats_of(self, parameters: Collection[nn.Parameter]) -> list[Tensor]:
        """The flat tensors of which some stretch is of ``parameters``."""
        return [stretch.flat for parameter, stretch in self._stretches() if parameter in parameters]

    def publish(self) -> None:
        """After weights of ``held`` have changed."""
        self._publish({})

    def _in_files(self, flat: Tensor) -> bool:
        """Its numbers are not in memory between steps."""
        return False

    def _averages(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each flat master weight with its average."""
        if AVERAGE in self._names:
            for flat in self._flats():
                yield flat.data, self._optimizer_state(flat)[AVERAGE]  # .data: no new version, as saves may read it

    def _flats(self) -> list[Tensor]:
        """Every flat tensor of this rank, also one that holds padding alone."""
        return list(dict.fromkeys(stretch.flat for _, stretch in self._stretches()))

    @abstractmethod
    def _stretches(self) -> Iterator[tuple[nn.Parameter, Stretch]]:
        """What this rank's optimizer holds of each parameter."""

    @abstractmethod
    def _optimizer_state(self, flat: Tensor) -> dict[str, Tensor]:
        """What the optimizer keeps for a flat master weight."""

    @abstractmethod
    def _reset_optimizer(self, updates: int) -> None:
        """Zeros, and ``updates`` as the number of steps."""

    @abstractmethod
    def _publish(self, copies: Mapping[Tensor, Flat]) -> None:
        """After the master weights have changed: the working weights, and the files that ``copies`` are of."""

    def _copies_of_files(self) -> dict[Tensor, Flat]:
        """Copies of the flat tensors that are in files."""
        return {}

    def _live(self, flat: Tensor) -> Flat:
        state = self._optimizer_state(flat)
        return [flat, *(state[name] for name in self._names)]

    def _export(self, copies: Mapping[Tensor, Flat]) -> ShardedState:
        stretches = dict(self._stretches())
        found: ShardedState = {}
        for parameter, part in self._parts.items():
            keys = [model_key(part.name), *(optimizer_key(part.name, name) for name in self._names)]
            pieces: list[Pieces] = [{} for _ in keys]
            if parameter in stretches:
                stretch = stretches[parameter]
                tensors = map(stretch.of, copies.get(stretch.flat) or self._live(stretch.flat))
                pieces = [pieces_of_range(held, stretch.start, part.shape, part.placement) for held in tensors]
            shape = logical_shape(part.shape, part.placement)
            steady = self._changes_in_updates_alone(parameter)
            found |= {key: ShardedTensor(shape, held, steady) for key, held in zip(keys, pieces, strict=True)}
        for model in self._models:
            for name, buffer in persistent_buffers(model).items():
                found[model_key(name)] = ShardedTensor.whole(buffer, steady=False)
        return found

    def _changes_in_updates_alone(self, parameter: nn.Parameter) -> bool:
        """Its master weight and the optimizer's tensors. Forward passes keep ``upper_bounds``."""
        return parameter not in self._bounded
