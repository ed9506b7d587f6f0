"""Exports and imports weights and optimizer state of megatron-core's optimizers, by key."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmmoe_pretrain.checkpoint.state import (
    Pieces,
    ShardedState,
    ShardedTensor,
    model_key,
    optimizer_key,
    persistent_buffers,
    pieces_of_part,
    pieces_of_range,
)
from mmmoe_pretrain.engines.megatron_setup import inner_optimizers
from mmmoe_pretrain.models.pretraining import PretrainingModel
from mmmoe_pretrain.parallel.placement import Placement, logical_shape, placements


class MegatronState:
    """The state of an engine's models and optimizer. ``names``: of the tensors that the optimizer keeps for each
    parameter (``OptimizerConfig.state``); they exist from the start, as zeros."""

    def __init__(
        self, models: Sequence[PretrainingModel], wrapped: Sequence[Any], optimizer: Any, names: Sequence[str]
    ) -> None:
        self._models, self._wrapped, self._optimizer, self._names = models, wrapped, optimizer, names
        self._reset_optimizer(0)

    def export(self) -> ShardedState:
        """Views of this rank's state."""
        shards = {parameter: (main, start) for parameter, main, start in self._shards()}
        states = {main: state for inner in self._inner() for main, state in inner.optimizer.state.items()}
        found: ShardedState = {}
        for model in self._models:
            placed = placements(model)
            for name, parameter in model.named_parameters():
                main, start = shards.get(parameter, (None, 0))
                if not self._distributed:
                    main = getattr(parameter, "main_param", parameter)
                shape = logical_shape(tuple(parameter.shape), placed[name])
                held = {model_key(name): main}
                held |= {optimizer_key(name, k): None if main is None else states[main][k] for k in self._names}
                for key, tensor in held.items():
                    pieces = {} if tensor is None else self._pieces(tensor.detach(), start, parameter, placed[name])
                    found[key] = ShardedTensor(shape, pieces)
            found |= {model_key(name): ShardedTensor.whole(b) for name, b in persistent_buffers(model).items()}
        return found

    def _pieces(self, held: Tensor, start: int, parameter: Tensor, placement: Placement) -> Pieces:
        """The pieces of a whole part, or of a range of the flat part from ``start`` on."""
        if not self._distributed:
            return pieces_of_part(held, placement)
        return pieces_of_range(held.view(-1), start, tuple(parameter.shape), placement)

    @torch.no_grad()
    def load(self, state: ShardedState, updates: int) -> None:
        """Import a state with the pieces of ``export``, made by ``updates`` updates."""
        self._reset_optimizer(updates)
        for key, mine in self.export().items():
            mine.copy_(state[key])
        for inner in self._inner():
            if hasattr(inner, "_copy_main_params_to_model_params"):  # masters in fp32, or shards of them
                inner._copy_main_params_to_model_params()
        if self._distributed:
            for stage in self._wrapped:
                stage.start_param_sync(force_sync=True)

    def _reset_optimizer(self, updates: int) -> None:
        for inner in self._inner():
            by_parameter = type(inner.optimizer).__module__.startswith("torch.")  # TE's and Apex's count by group
            for group in inner.optimizer.param_groups:
                if not by_parameter:
                    group["step"] = updates
                for main in group["params"]:
                    state = {name: torch.zeros_like(main, dtype=torch.float32) for name in self._names}
                    if by_parameter:
                        # The fused kernel reads the step on the device, the others on the host.
                        state["step"] = torch.tensor(
                            float(updates), device=main.device if group.get("fused") else "cpu"
                        )
                    inner.optimizer.state[main] = state

    @property
    def _distributed(self) -> bool:
        return bool(self._wrapped[0].ddp_config.use_distributed_optimizer)

    def _inner(self) -> list[Any]:
        return inner_optimizers(self._optimizer)

    def _shards(self) -> Iterator[tuple[nn.Parameter, Tensor, int]]:
        """The shards of the distributed optimizer on this rank: parameter, range, and its start in the flat
        parameter."""
        if not self._distributed:
            return
        for inner in self._inner():
            groups = (
                (inner.model_float16_groups, inner.shard_fp32_from_float16_groups),
                (inner.model_fp32_groups, inner.shard_fp32_groups),
            )
            for of_model, of_shards in groups:
                for parameters, mains in zip(of_model, of_shards, strict=True):
                    for parameter, main in zip(parameters, mains, strict=True):
                        held = inner._get_model_param_range_map(parameter)["param"]
                        yield parameter, main, held.start
