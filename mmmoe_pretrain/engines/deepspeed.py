"""The engine on DeepSpeed: ZeRO stages 0 to 3 around one whole PretrainingModel.

Stage 0 and 1 reduce gradients once a step. Stages 2 and 3 never hold a whole gradient, so they reduce at
every microbatch. Everything is averaged over the data-parallel ranks; experts that are spread over ranks
are summed over their replicas and divided by the number of all data-parallel ranks, which is the same.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.checkpoint.sharded import ShardedState
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.engines.base import StepResult
from mmmoe_pretrain.engines.deepspeed_config import deepspeed_json
from mmmoe_pretrain.engines.deepspeed_gather import hold, prepare_gathering
from mmmoe_pretrain.engines.deepspeed_precision import compute_in_bf16
from mmmoe_pretrain.engines.deepspeed_setup import (
    adopt_experts,
    join_process_group,
    join_tensor_ranks,
    make_optimizer,
    prepare,
)
from mmmoe_pretrain.engines.deepspeed_state import DeepSpeedState
from mmmoe_pretrain.engines.results import add_routing, mean_losses
from mmmoe_pretrain.models.pretraining import LossReport, PretrainingModel
from mmmoe_pretrain.objectives.contrastive import MAX_LOG_SCALE

__all__ = ["DeepSpeedEngine", "prepare"]

CLIP_EPS = 1e-6  # as in torch.nn.utils.clip_grad_norm_


class DeepSpeedEngine:
    """Implements the ``Engine`` protocol; needs ``parallel.mesh.build_groups`` to have run.

    Raises ValueError where DeepSpeed is not installed or refuses ``parallel.deepspeed``.
    """

    def __init__(self, model: PretrainingModel, config: RunConfig, device: torch.device) -> None:
        assert model.groups.num_stages == 1, "a whole model; pipelines are megatron's"
        deepspeed = prepare()
        self.config, self.device, self.groups = config, device, model.groups
        self.stage = int(config.parallel.zero_stage)
        self.steps_done = 0
        settings = deepspeed_json(config, self.groups, sum(p.numel() for p in model.parameters()))
        self.model = model.to(device)
        if config.train.precision == "bf16":
            compute_in_bf16(model, cast_again=config.train.recompute != "blocks")
        mpu = join_process_group(deepspeed, self.groups)
        adopt_experts(model, self.groups)
        join_tensor_ranks(model, self.groups)
        finish = prepare_gathering(model) if self.stage == 3 else None
        self._state = DeepSpeedState(model, self.stage)
        self._engine: Any = deepspeed.initialize(
            model=model,
            optimizer=make_optimizer(model, config.optimizer, self.groups),
            config=settings,
            mpu=mpu,
            dist_init_required=False,
        )[0]
        assert self._engine.has_moe_layers or self.groups.expert_size == 1, "it would average different experts"
        if finish is not None:
            finish()
        self._state.attach(self._engine)

    def step(self, microbatches: list[Batch], learning_rate: float) -> StepResult:
        """See ``Engine.step``."""
        self._ready_temperatures()
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        if self.config.objectives.contrastive.cached:
            self._fill_cache(microbatches)
        reports = self._forward_backward(microbatches)
        grad_norm = float(self._clip()) if self.stage == 0 else None
        self._engine.step()
        if grad_norm is None:
            grad_norm = self._norm()
        losses, tokens = mean_losses(reports, self.model.loss_names, microbatches, self.groups, self.device)
        routing = add_routing([report.routing for report in reports])
        self.model.end_step(routing)
        self.steps_done += 1
        return StepResult(losses, grad_norm, tokens, routing)

    def _fill_cache(self, batches: list[Batch]) -> None:
        """The first pass of a step whose contrastive loss is of all its microbatches."""
        self.model.begin_step(self.steps_done, len(batches))
        self.model.begin_caching()
        with torch.no_grad():
            for batch in batches:
                self._engine(batch.to(self.device))
        self.model.end_caching()

    def _forward_backward(self, batches: list[Batch]) -> list[LossReport]:
        self.model.begin_step(self.steps_done, len(batches))
        reports = []
        for number, batch in enumerate(batches, start=1):
            self._engine.set_gradient_accumulation_boundary(number == len(batches))
            loss, report = self._engine(batch.to(self.device))
            self._engine.backward(loss / len(batches), scale_wrt_gas=False)
            reports.append(report)
        return reports

    @torch.no_grad()
    def _ready_temperatures(self) -> None:
        """The objective bounds its temperatures in place, and ZeRO's master weights lie elsewhere; and no
        module of theirs is ever called, for which ZeRO-3 would gather them."""
        if self.model.contrastive is None or self.stage == 0:
            return
        for master in self._state.masters(self.model.contrastive.parameters()):
            master.clamp_(max=MAX_LOG_SCALE)
        if self.stage == 3:
            hold(self.model.contrastive.parameters())

    def _norm(self) -> float:
        """Of the step just made. ZeRO leaves a step out whose gradient is not finite, and a norm of before."""
        return math.inf if self._engine.optimizer.overflow else float(self._engine.get_global_grad_norm())

    @torch.no_grad()
    def _clip(self) -> Tensor:
        """The norm of the reduced gradient, clipped to. DeepSpeed's own at stage 0 averages the norms of
        different experts (its issue 8475)."""
        gradients = [(p, p.grad) for p in self.model.parameters() if p.grad is not None]
        squares = torch.zeros(2, dtype=torch.float64, device=self.device)  # of experts, and of all else
        for parameter, grad in gradients:
            if self.groups.tensor_rank == 0 or getattr(parameter, "tensor_model_parallel", False):
                squares[int(getattr(parameter, "allreduce", True))] += grad.float().norm() ** 2
        if self.groups.expert_size > 1:
            dist.all_reduce(squares[:1], group=self.groups.expert)
        if self.groups.tensor_size > 1:
            dist.all_reduce(squares, group=self.groups.tensor)
        norm = squares.sum().sqrt()
        limit = self.config.optimizer.clip_norm
        if limit:
            torch._foreach_mul_([grad for _, grad in gradients], float((limit / (norm + CLIP_EPS)).clamp(max=1)))
        return norm

    def export_state(self) -> ShardedState:
        """See ``Engine.export_state``."""
        return self._state.export()

    def import_state(self, state: ShardedState, steps_done: int) -> None:
        """See ``Engine.import_state``."""
        self.steps_done = steps_done
        self._state.load(state, steps_done)
