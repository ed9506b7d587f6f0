"""Weights and moments in and out of DeepSpeed's optimizers, by logical name.

Legend: a parameter's *part* is what this rank's model holds of it (``parallel/placement.py``). ZeRO
flattens parts, lays them one behind the other, and gives each rank an equal stretch of the whole (stages
1 and 2) or of every part (stage 3); the end is padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmmoe_pretrain.checkpoint.sharded import Piece, ShardedParameter, ShardedState, pieces_of_part, pieces_of_range
from mmmoe_pretrain.checkpoint.state import persistent_buffers
from mmmoe_pretrain.parallel.placement import Placement, logical_shape, placements

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class _Part:
    """Of one parameter, noted before ZeRO-3 takes its shape away."""

    name: str
    shape: tuple[int, ...]
    placement: Placement


@dataclass(frozen=True)
class _Stretch:
    """Elements ``start`` to ``start + length`` of a flattened part: where they lie in ``flat``."""

    flat: Tensor
    begin: int
    start: int
    length: int

    def of(self, tensor: Tensor, part: _Part) -> tuple[Piece, ...]:
        """Views of ``tensor``, which is laid out like ``flat``."""
        numbers = tensor.detach().view(-1).narrow(0, self.begin, self.length)
        return pieces_of_range(numbers, self.start, part.shape, part.placement)


class DeepSpeedState:
    """The state of an engine's model and optimizer. Moments exist from the start, as zeros.

    Make it before ``deepspeed.initialize`` and ``attach`` the engine after.
    """

    def __init__(self, model: nn.Module, stage: int) -> None:
        placed = placements(model)
        self._parts = {
            parameter: _Part(name, tuple(parameter.shape), placed[name])
            for name, parameter in model.named_parameters()
        }
        self._model, self._stage = model, stage
        self._optimizer: Any = None

    def attach(self, engine: Any) -> None:
        """``engine``: DeepSpeed's."""
        self._optimizer = engine.optimizer
        self._reset_moments(0)

    def export(self) -> ShardedState:
        """Views of what this rank holds."""
        stretches = dict(self._stretches())
        found: ShardedState = {}
        for parameter, part in self._parts.items():
            shape = logical_shape(part.shape, part.placement)
            stretch = stretches.get(parameter)
            if stretch is None:
                found[part.name] = ShardedParameter(shape, (), (), ())
                continue
            moments = self._torch_state[stretch.flat]
            value, first, second = (stretch.of(t, part) for t in (stretch.flat, *(moments[k] for k in MOMENTS)))
            found[part.name] = ShardedParameter(shape, value, first, second)
        for name, buffer in persistent_buffers(self._model).items():
            found[name] = ShardedParameter(tuple(buffer.shape), pieces_of_part(buffer, ()), None, None)
        return found

    @torch.no_grad()
    def load(self, state: ShardedState, steps_done: int) -> None:
        """Take over a state with the pieces that ``export`` gives."""
        self._reset_moments(steps_done)
        for name, mine in self.export().items():
            mine.copy_(state[name])
        optimizer = self._optimizer
        if self._stage == 3:
            optimizer._partition_all_parameters()  # some stay gathered between steps
            for index in range(len(optimizer.fp16_groups)):
                optimizer._reassign_or_swap_out_partitioned_parameters(index)
            if optimizer.persistent_parameters:
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        elif self._stage:
            optimizer.update_lp_params()

    def masters(self, parameters: Iterator[nn.Parameter]) -> list[Tensor]:
        """What this rank holds of their master weights, flat."""
        wanted = set(parameters)
        return [s.flat.detach().view(-1).narrow(0, s.begin, s.length) for p, s in self._stretches() if p in wanted]

    @property
    def _torch_state(self) -> dict[Tensor, dict[str, Tensor]]:
        return self._optimizer.optimizer.state if self._stage else self._optimizer.state

    def _reset_moments(self, steps_done: int) -> None:
        for flat in {id(stretch.flat): stretch.flat for _, stretch in self._stretches(padding_too=True)}.values():
            # Each its own step count: torch adds to it in place.
            state = {"step": torch.tensor(float(steps_done)), **{key: torch.zeros_like(flat) for key in MOMENTS}}
            self._torch_state[flat] = state

    def _stretches(self, padding_too: bool = False) -> Iterator[tuple[nn.Parameter, _Stretch]]:
        """Of each parameter of which this rank holds something; ``padding_too``: or nothing."""
        every = (self._whole, self._of_flat_groups, self._of_flat_groups, self._of_sub_groups)[self._stage]()
        for parameter, stretch in every:
            if stretch.length > 0 or padding_too:
                yield parameter, stretch

    def _whole(self) -> Iterator[tuple[nn.Parameter, _Stretch]]:
        for parameter in self._parts:
            yield parameter, _Stretch(parameter, 0, 0, parameter.numel())

    def _of_flat_groups(self) -> Iterator[tuple[nn.Parameter, _Stretch]]:
        optimizer = self._optimizer
        for index, flat in enumerate(optimizer.single_partition_of_fp32_groups):
            held = dist.get_rank(optimizer.real_dp_process_group[index]) * flat.numel()
            of_group = zip(
                optimizer.round_robin_bit16_groups[index], optimizer.round_robin_bit16_offsets[index], strict=True
            )
            for parameter, offset in of_group:
                begin, end = max(offset, held), min(offset + parameter.numel(), held + flat.numel())
                yield parameter, _Stretch(flat, begin - held, begin - offset, end - begin)

    def _of_sub_groups(self) -> Iterator[tuple[nn.Parameter, _Stretch]]:
        optimizer = self._optimizer
        for flat, parameters in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
            begin = 0
            for parameter in parameters:
                share = parameter.partition_numel()
                start = dist.get_rank(parameter.ds_process_group) * share
                yield parameter, _Stretch(flat, begin, start, min(share, parameter.ds_numel - start))
                begin += share
