"""Exports and imports weights and optimizer state of DeepSpeed's optimizers, by key.

Legend: a parameter's *part* is what this rank's model holds of it (``parallel/placement.py``). ZeRO flattens and
concatenates parts, and gives each rank an equal range of the whole (stages 1 and 2) or of every part (stage 3); the
end is padding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmmoe_pretrain.checkpoint.state import (
    Pieces,
    ShardedState,
    ShardedTensor,
    model_key,
    optimizer_key,
    persistent_buffers,
    pieces_of_range,
)
from mmmoe_pretrain.parallel.placement import Placement, logical_shape, placements

_Flat = list[Tensor]  # a flat master weight, and what the optimizer keeps for it, in the order of the names


@dataclass(frozen=True)
class _Part:
    """The metadata of one parameter, stored before ZeRO-3 removes its shape."""

    name: str
    shape: tuple[int, ...]
    placement: Placement


@dataclass(frozen=True)
class _Stretch:
    """Elements ``start`` to ``start + length`` of a flattened part, and their offset in ``flat``."""

    flat: Tensor
    begin: int
    start: int
    length: int

    def of(self, tensor: Tensor, part: _Part) -> Pieces:
        """Views of ``tensor``, which is laid out like ``flat``, or is a copy of it."""
        numbers = tensor.detach().view(-1).narrow(0, self.begin, self.length)
        return pieces_of_range(numbers, self.start, part.shape, part.placement)


class DeepSpeedState:
    """The state of an engine's model and optimizer. ``names``: of the tensors that the optimizer keeps for each
    parameter (``OptimizerConfig.state``); they exist from the start, as zeros.

    Make it before ``deepspeed.initialize`` and ``attach`` the engine after.
    """

    def __init__(self, model: nn.Module, stage: int, names: Sequence[str]) -> None:
        placed = placements(model)
        self._parts = {
            parameter: _Part(name, tuple(parameter.shape), placed[name])
            for name, parameter in model.named_parameters()
        }
        self._model, self._stage, self._names = model, stage, names
        self._optimizer: Any = None

    def attach(self, engine: Any) -> None:
        """``engine``: DeepSpeed's."""
        self._optimizer = engine.optimizer
        self._reset_optimizer(0)

    def export(self) -> ShardedState:
        """Views of this rank's state; copies in host memory of state that is in files."""
        return self._export(self._copies_of_files())

    def _export(self, copies: dict[Tensor, _Flat]) -> ShardedState:
        stretches = dict(self._stretches())
        found: ShardedState = {}
        for parameter, part in self._parts.items():
            shape = logical_shape(part.shape, part.placement)
            keys = [model_key(part.name), *(optimizer_key(part.name, name) for name in self._names)]
            stretch = stretches.get(parameter)
            if stretch is None:
                found |= {key: ShardedTensor(shape, {}) for key in keys}
                continue
            tensors = copies.get(stretch.flat) or self._live(stretch.flat)
            for key, tensor in zip(keys, tensors, strict=True):
                found[key] = ShardedTensor(shape, stretch.of(tensor, part))
        return found | {model_key(n): ShardedTensor.whole(b) for n, b in persistent_buffers(self._model).items()}

    @torch.no_grad()
    def load(self, state: ShardedState, updates: int) -> None:
        """Import a state with the pieces of ``export``, made by ``updates`` updates."""
        self._reset_optimizer(updates)
        copies = self._copies_of_files()
        for key, mine in self._export(copies).items():
            mine.copy_(state[key])
        optimizer = self._optimizer
        if self._stage == 3:
            optimizer._partition_all_parameters()  # some stay gathered between steps
            for index, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
                with self._resident(flat, changed=True):
                    for live, copied in zip(self._live(flat), copies.get(flat, ()), strict=False):
                        live.detach().copy_(copied)
                    optimizer._reassign_or_swap_out_partitioned_parameters(index)
            if optimizer.persistent_parameters:
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        elif self._stage:
            optimizer.update_lp_params()

    def masters(self, parameters: Iterator[nn.Parameter]) -> Iterator[Tensor]:
        """What this rank holds of their master weights, flat, to be changed one after the other."""
        wanted = set(parameters)
        for parameter, stretch in self._stretches():
            if parameter in wanted:
                with self._resident(stretch.flat, changed=True):
                    yield stretch.flat.detach().view(-1).narrow(0, stretch.begin, stretch.length)

    def _live(self, flat: Tensor) -> _Flat:
        state = self._torch_state[flat]
        return [flat, *(state[name] for name in self._names)]

    @torch.no_grad()
    def _copies_of_files(self) -> dict[Tensor, _Flat]:
        copies: dict[Tensor, _Flat] = {}
        for _, stretch in self._stretches(padding_too=True):
            if self._in_files(stretch.flat) and stretch.flat not in copies:
                with self._resident(stretch.flat, changed=False):
                    copies[stretch.flat] = [tensor.detach().clone() for tensor in self._live(stretch.flat)]
        return copies

    def _in_files(self, flat: Tensor) -> bool:
        """ZeRO-3 offloaded to NVMe keeps its large sub-groups there between steps, and they are empty here."""
        swapper = getattr(self._optimizer, "optimizer_swapper", None)
        return swapper is not None and flat.ds_id in swapper.swap_params_info  # type: ignore[attr-defined]

    @contextlib.contextmanager
    def _resident(self, flat: Tensor, changed: bool) -> Iterator[None]:
        """Inside, it and its optimizer state are in memory; they are written back to their files if ``changed``."""
        if not self._in_files(flat):
            yield
            return
        swapper = self._optimizer.optimizer_swapper
        swapper.swap_in_optimizer_state(flat)
        try:
            yield
        finally:
            (swapper.swap_out_optimizer_state if changed else swapper.release_swap_buffers)(flat)

    @property
    def _torch_state(self) -> dict[Tensor, dict[str, Tensor]]:
        return self._optimizer.optimizer.state if self._stage else self._optimizer.state

    def _reset_optimizer(self, updates: int) -> None:
        for flat in {id(stretch.flat): stretch.flat for _, stretch in self._stretches(padding_too=True)}.values():
            with self._resident(flat, changed=True):
                state = self._torch_state[flat]
                for name in self._names:
                    if self._in_files(flat) and name in state:
                        state[name].zero_()  # its file is known by the tensor that is there
                    else:
                        state[name] = torch.zeros_like(flat, requires_grad=False)
                # Each its own, as torch adds to it in place; the fused kernel of a GPU reads it there.
                state["step"] = torch.tensor(float(updates), device=flat.device)

    def _stretches(self, padding_too: bool = False) -> Iterator[tuple[nn.Parameter, _Stretch]]:
        """The ranges of each parameter that this rank holds; ``padding_too``: also of those of which it holds
        nothing."""
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
