"""Exports and imports weights and optimizer state of DeepSpeed's optimizers, by key.

ZeRO flattens and concatenates parts, and gives each rank an equal range of the whole (stages 1 and 2) or of every
part (stage 3); the end is padding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmmoe_pretrain.engines.state import EngineState, Flat, Stretch
from mmmoe_pretrain.models.pretraining import PretrainingModel


class DeepSpeedState(EngineState):
    """The state of an engine's model and optimizer. Make it before ``deepspeed.initialize`` and ``attach`` the engine
    after. ``early_updates``: weights are updated during the passes of a step, too."""

    def __init__(self, model: PretrainingModel, stage: int, names: Sequence[str], early_updates: bool) -> None:
        super().__init__([model], names)
        self._stage, self._early_updates = stage, early_updates
        self._optimizer: Any = None

    def attach(self, engine: Any) -> None:
        """``engine``: DeepSpeed's."""
        self._optimizer = engine.optimizer
        self._reset_optimizer(0)
        self.begin()

    def _publish(self, copies: Mapping[Tensor, Flat]) -> None:
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

    def _changes_in_updates_alone(self, parameter: nn.Parameter) -> bool:
        return not self._early_updates and super()._changes_in_updates_alone(parameter)

    def masters(self, parameters: Iterator[nn.Parameter]) -> Iterator[Tensor]:
        """What this rank holds of their master weights, flat, to be changed one after the other."""
        wanted = set(parameters)
        for parameter, stretch in self._stretches():
            if parameter in wanted:
                with self._resident(stretch.flat, changed=True):
                    yield stretch.of(stretch.flat)

    @torch.no_grad()
    def _copies_of_files(self) -> dict[Tensor, Flat]:
        copies: dict[Tensor, Flat] = {}
        for flat in filter(self._in_files, self._flats()):
            with self._resident(flat, changed=False):
                copies[flat] = [tensor.detach().clone() for tensor in self._live(flat)]
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

    def _optimizer_state(self, flat: Tensor) -> dict[str, Tensor]:
        return (self._optimizer.optimizer if self._stage else self._optimizer).state[flat]

    def _reset_optimizer(self, updates: int) -> None:
        for flat in self._flats():
            with self._resident(flat, changed=True):
                state = self._optimizer_state(flat)
                for name in self._names:
                    if self._in_files(flat) and name in state:
                        state[name].zero_()  # its file is known by the tensor that is there
                    else:
                        state[name] = torch.zeros_like(flat, requires_grad=False)
                # Each its own, as torch adds to it in place; the fused kernel of a GPU reads it there.
                state["step"] = torch.tensor(float(updates), device=flat.device)

    def _stretches(self) -> Iterator[tuple[nn.Parameter, Stretch]]:
        return (self._whole, self._of_flat_groups, self._of_flat_groups, self._of_sub_groups)[self._stage]()

    def _whole(self) -> Iterator[tuple[nn.Parameter, Stretch]]:
        for parameter in self._parts:
            yield parameter, Stretch(parameter, 0, 0, parameter.numel())

    def _of_flat_groups(self) -> Iterator[tuple[nn.Parameter, Stretch]]:
        optimizer = self._optimizer
        for index, flat in enumerate(optimizer.single_partition_of_fp32_groups):
            held = dist.get_rank(optimizer.real_dp_process_group[index]) * flat.numel()
            of_group = zip(
                optimizer.round_robin_bit16_groups[index], optimizer.round_robin_bit16_offsets[index], strict=True
            )
            for parameter, offset in of_group:
                begin, end = max(offset, held), min(offset + parameter.numel(), held + flat.numel())
                yield parameter, Stretch(flat, begin - held, begin - offset, end - begin)

    def _of_sub_groups(self) -> Iterator[tuple[nn.Parameter, Stretch]]:
        optimizer = self._optimizer
        for flat, parameters in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
            begin = 0
            for parameter in parameters:
                share = parameter.partition_numel()
                start = dist.get_rank(parameter.ds_process_group) * share
                yield parameter, Stretch(flat, begin, start, min(share, parameter.ds_numel - start))
                begin += share
