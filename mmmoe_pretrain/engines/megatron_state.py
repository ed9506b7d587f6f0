"""Weights and moments in and out of megatron-core's optimizers, by logical name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmmoe_pretrain.checkpoint.sharded import (
    Piece,
    ShardedParameter,
    ShardedState,
    pieces_of_part,
    pieces_of_range,
    whole_shape,
)
from mmmoe_pretrain.checkpoint.state import persistent_buffers
from mmmoe_pretrain.engines.megatron_setup import inner_optimizers
from mmmoe_pretrain.models.pretraining import PretrainingModel
from mmmoe_pretrain.parallel.placement import Placement, placements


class MegatronState:
    """The state of an engine's models and optimizer. Moments exist from the start, as zeros."""

    def __init__(self, models: Sequence[PretrainingModel], wrapped: Sequence[Any], optimizer: Any) -> None:
        self._models, self._wrapped, self._optimizer = models, wrapped, optimizer
        self._reset_moments(0)

    def export(self) -> ShardedState:
        """Views of what this rank holds."""
        shards = {parameter: (main, start) for parameter, main, start in self._shards()}
        states = {main: state for inner in self._inner() for main, state in inner.optimizer.state.items()}
        found: ShardedState = {}
        for model in self._models:
            placed = placements(model)
            for name, parameter in model.named_parameters():
                main, start = shards.get(parameter, (None, 0))
                if not self._distributed:
                    main = getattr(parameter, "main_param", parameter)
                held = [] if main is None else [main, states[main]["exp_avg"], states[main]["exp_avg_sq"]]
                value, first, second = self._pieces(held, start, parameter, placed[name])
                found[name] = ShardedParameter(whole_shape(parameter, placed[name]), value, first, second)
            for name, buffer in persistent_buffers(model).items():
                found[name] = ShardedParameter(tuple(buffer.shape), pieces_of_part(buffer, ()), None, None)
        return found

    def _pieces(
        self, held: Sequence[Tensor], start: int, parameter: Tensor, placement: Placement
    ) -> list[tuple[Piece, ...]]:
        """Of weight and moments: none, whole parts, or stretches of the flat part from ``start`` on."""
        if not held:
            return [()] * 3
        if not self._distributed:
            return [pieces_of_part(tensor.detach(), placement) for tensor in held]
        shape = tuple(parameter.shape)
        return [pieces_of_range(tensor.detach().view(-1), start, shape, placement) for tensor in held]

    @torch.no_grad()
    def load(self, state: ShardedState, updates: int) -> None:
        """Take over a state with the pieces that ``export`` gives; ``updates`` made its moments."""
        self._reset_moments(updates)
        for name, mine in self.export().items():
            mine.copy_(state[name])
        for inner in self._inner():
            if hasattr(inner, "_copy_main_params_to_model_params"):  # masters in fp32, or shards of them
                inner._copy_main_params_to_model_params()
        if self._distributed:
            for stage in self._wrapped:
                stage.start_param_sync(force_sync=True)

    def _reset_moments(self, updates: int) -> None:
        for inner in self._inner():
            by_parameter = type(inner.optimizer).__module__.startswith("torch.")  # TE's and Apex's count by group
            for group in inner.optimizer.param_groups:
                if not by_parameter:
                    group["step"] = updates
                for main in group["params"]:
                    state = {name: torch.zeros_like(main, dtype=torch.float32) for name in ("exp_avg", "exp_avg_sq")}
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
        """Of the distributed optimizer: each parameter of which this rank holds a stretch, the stretch,
        and where it begins in the flat parameter."""
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
