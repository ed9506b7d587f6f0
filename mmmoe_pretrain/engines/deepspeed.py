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

from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.checkpoint.sharded import ShardedState
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.engines.base import Progress, StepResult
from mmmoe_pretrain.engines.deepspeed_config import deepspeed_json
from mmmoe_pretrain.engines.deepspeed_gather import hold, prepare_gathering
from mmmoe_pretrain.engines.deepspeed_precision import compute_in_half
from mmmoe_pretrain.engines.deepspeed_setup import (
    adopt_experts,
    join_process_group,
    join_tensor_ranks,
    make_optimizer,
    need_async_io,
    prepare,
)
from mmmoe_pretrain.engines.deepspeed_state import DeepSpeedState
from mmmoe_pretrain.engines.loss_scaling import HALF_TYPES, after_step, first_progress, gradient_factor, resumed
from mmmoe_pretrain.engines.results import add_reports, finite_everywhere, step_losses
from mmmoe_pretrain.models.pretraining import LossReport, PretrainingModel
from mmmoe_pretrain.objectives.contrastive import MAX_LOG_SCALE
from mmmoe_pretrain.objectives.counts import StepCounts, step_counts

__all__ = ["DeepSpeedEngine", "prepare"]


class DeepSpeedEngine:
    """Implements the ``Engine`` protocol; needs ``parallel.mesh.build_groups`` to have run.

    Raises ValueError where DeepSpeed is not installed or refuses ``parallel.deepspeed``.
    """

    def __init__(self, model: PretrainingModel, config: RunConfig, device: torch.device) -> None:
        assert model.groups.num_stages == 1, "a whole model; pipelines are megatron's"
        deepspeed = prepare()
        self.config, self.device, self.groups = config, device, model.groups
        self.stage = int(config.parallel.zero_stage)
        self._progress = first_progress(config.train)
        settings = deepspeed_json(config, self.groups, sum(p.numel() for p in model.parameters()))
        self.model = model.to(device)
        self.models = [self.model]
        if config.train.precision in HALF_TYPES:
            compute_in_half(model, HALF_TYPES[config.train.precision], cast_again=config.train.recompute != "blocks")
        if config.parallel.offload_optimizer == "nvme":
            need_async_io()
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
        self._judge_norms()

    def step(self, microbatches: list[Batch], learning_rate: float) -> StepResult:
        """See ``Engine.step``."""
        self._ready_temperatures()
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        counts = step_counts(microbatches, self.config.objectives, self.groups.data, self.device)
        if self.config.objectives.contrastive.in_two_passes:
            self._fill_cache(microbatches, counts)
        report = self._forward_backward(microbatches, counts)
        losses = step_losses([report], self.model.loss_names, self.groups, self.device)
        self._total = losses["total"]
        grad_norm = self._clip() if self.stage == 0 else None
        self._engine.step()
        if grad_norm is None:
            grad_norm = self._norm()
        skipped = not math.isfinite(grad_norm)
        self.model.end_step(None if skipped else report.routing)
        result = StepResult(losses, grad_norm, counts, report.routing, skipped, self._progress.scale)
        self._progress = after_step(self._progress, skipped, self.config.train.loss_scale)
        return result

    def _fill_cache(self, batches: list[Batch], counts: StepCounts) -> None:
        """The first pass of a step whose contrastive loss is of all its microbatches."""
        self.model.begin_step(self.steps_done, counts)
        self.model.begin_caching()
        with torch.no_grad():
            for batch in batches:
                self._engine(batch.to(self.device))
        self.model.end_caching()

    def _forward_backward(self, batches: list[Batch], counts: StepCounts) -> LossReport:
        """The sums of the microbatches' reports."""
        self.model.begin_step(self.steps_done, counts)
        if self._progress.loss_scale is not None and self.stage:
            # ZeRO scales losses and unscales gradients.
            self._engine.optimizer.override_loss_scale(self._progress.scale)
        scale = 1.0 if self.stage else self._progress.scale
        sums: LossReport | None = None
        for number, batch in enumerate(batches, start=1):
            self._engine.set_gradient_accumulation_boundary(number == len(batches))
            loss, report = self._engine(batch.to(self.device))
            self._engine.backward(loss * scale, scale_wrt_gas=False)
            sums = add_reports(sums, report)
        assert sums is not None
        return sums

    def _judge_norms(self) -> None:
        """ZeRO leaves out a step whose norm it finds to be no number, on the ranks that find it. It is given such
        a norm on all ranks where the loss or the norm of any is none."""
        optimizer = self._engine.optimizer
        if self.stage in (1, 2):
            norm_of = optimizer.scaled_global_norm

            def judged_norm() -> Any:
                norm = norm_of()
                return norm if self._is_finite(float(norm)) else torch.full_like(norm, math.inf)

            optimizer.scaled_global_norm = judged_norm
        elif self.stage == 3:
            norms_of = optimizer._get_norm_groups

            def judged_norms() -> list[Any]:
                norms = norms_of()
                invalid = any(float(norm) < 0 for norm in norms)  # -1 stands for no number
                fine = self._is_finite(math.nan if invalid else sum(map(float, norms)))
                return norms if fine else [torch.full_like(norm, math.inf) for norm in norms]

            optimizer._get_norm_groups = judged_norms

    def _is_finite(self, norm: float) -> bool:
        return finite_everywhere((self._total, norm), self.groups, self.device)

    @torch.no_grad()
    def _ready_temperatures(self) -> None:
        """The objective bounds its temperatures in place, and ZeRO's master weights lie elsewhere; and no
        module of theirs is ever called, for which ZeRO-3 would gather them."""
        if self.model.contrastive is None or self.stage == 0:
            return
        for masters in self._state.masters(self.model.contrastive.parameters()):
            masters.clamp_(max=MAX_LOG_SCALE)
        if self.stage == 3:
            hold(self.model.contrastive.parameters())

    def _norm(self) -> float:
        """Of the step just made; infinite where it was left out, when ZeRO has a norm of before."""
        return math.inf if self._engine.optimizer.overflow else float(self._engine.get_global_grad_norm())

    @torch.no_grad()
    def _clip(self) -> float:
        """The norm of the reduced gradient, unscaled and clipped to; gradients are dropped where the step is to be
        left out, and the norm is then infinite. DeepSpeed's own at stage 0 averages the norms of different
        experts (its issue 8475)."""
        gradients = [(p, p.grad) for p in self.model.parameters() if p.grad is not None]
        squares = torch.zeros(2, dtype=torch.float64, device=self.device)  # of experts, and of all else
        for parameter, grad in gradients:
            if self.groups.tensor_rank == 0 or getattr(parameter, "tensor_model_parallel", False):
                squares[int(getattr(parameter, "allreduce", True))] += grad.float().norm() ** 2
        if self.groups.expert_size > 1:
            dist.all_reduce(squares[:1], group=self.groups.expert)
        if self.groups.tensor_size > 1:
            dist.all_reduce(squares, group=self.groups.tensor)
        norm = float(squares.sum().sqrt()) / self._progress.scale
        if not self._is_finite(norm):
            self._engine.zero_grad()  # torch's AdamW passes over parameters without a gradient
            return math.inf
        limit = self.config.optimizer.clip_norm
        factor = gradient_factor(norm, limit, self._progress.scale)
        if factor != 1.0:
            torch._foreach_mul_([grad for _, grad in gradients], factor)
        return norm

    @property
    def steps_done(self) -> int:
        """Those left out included."""
        return self._progress.steps

    def progress(self) -> Progress:
        """See ``Engine.progress``."""
        return self._progress

    def export_state(self) -> ShardedState:
        """See ``Engine.export_state``."""
        return self._state.export()

    def import_state(self, state: ShardedState, progress: Progress) -> None:
        """See ``Engine.import_state``."""
        self._progress = resumed(progress, self.config.train)
        self._state.load(state, progress.updates)
