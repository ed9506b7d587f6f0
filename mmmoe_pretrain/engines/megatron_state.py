"""Exports and imports weights and optimizer state of megatron-core's optimizers, by key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmmoe_pretrain.engines.megatron_setup import inner_optimizers
from mmmoe_pretrain.engines.state import EngineState, Flat, Stretch
from mmmoe_pretrain.models.pretraining import PretrainingModel


class MegatronState(EngineState):
    """Of an engine's models and optimizer; ``wrapped``: the models in Megatron's DistributedDataParallel."""

    def __init__(
        self, models: Sequence[PretrainingModel], wrapped: Sequence[Any], optimizer: Any, names: Sequence[str]
    ) -> None:
        super().__init__(models, names)
        self._wrapped, self._inner = wrapped, inner_optimizers(optimizer)
        self._distributed = bool(wrapped[0].ddp_config.use_distributed_optimizer)
        self._reset_optimizer(0)
        self.begin()

    def _stretches(self) -> Iterator[tuple[nn.Parameter, Stretch]]:
        if self._distributed:
            yield from self._shards()
        else:
            for parameter in self._parts:
                yield parameter, Stretch(getattr(parameter, "main_param", parameter), 0, 0, parameter.numel())

    def _shards(self) -> Iterator[tuple[nn.Parameter, Stretch]]:
        """Those of the distributed optimizer."""
        for inner in self._inner:
            groups = (
                (inner.model_float16_groups, inner.shard_fp32_from_float16_groups),
                (inner.model_fp32_groups, inner.shard_fp32_groups),
            )
            for of_model, of_shards in groups:
                for parameters, mains in zip(of_model, of_shards, strict=True):
                    for parameter, main in zip(parameters, mains, strict=True):
                        start = inner._get_model_param_range_map(parameter)["param"].start
                        yield parameter, Stretch(main, 0, start, main.numel())

    def _optimizer_state(self, flat: Tensor) -> dict[str, Tensor]:
        return next(inner.optimizer.state[flat] for inner in self._inner if flat in inner.optimizer.state)

    def _publish(self, copies: Mapping[Tensor, Flat]) -> None:
        for inner in self._inner:
            if hasattr(inner, "_copy_main_params_to_model_params"):  # masters in fp32, or shards of them
                inner._copy_main_params_to_model_params()
        if self._distributed:
            for stage in self._wrapped:
                stage.start_param_sync(force_sync=True)

    def _reset_optimizer(self, updates: int) -> None:
        for inner in self._inner:
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
