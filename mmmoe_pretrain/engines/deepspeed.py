"""The engine on DeepSpeed: ZeRO stages 0 to 3 around one whole PretrainingModel.

Stage 0 and 1 reduce gradients once a step. Stages 2 and 3 never hold a whole gradient, so they reduce at
every microbatch. Everything is averaged over the data-parallel ranks; experts that are spread over ranks
are summed over their replicas and divided by the number of all data-parallel ranks, which is the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from mmmoe_pretrain.batch import Batch, send
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.engines.base import Engine, StepResult, add_reports, losses_of, not_finite
from mmmoe_pretrain.engines.deepspeed_config import deepspeed_json, updates_in_backward
from mmmoe_pretrain.engines.deepspeed_modules import complete_gathering, hold
from mmmoe_pretrain.engines.deepspeed_setup import (
    adopt_experts,
    join_process_group,
    join_tensor_ranks,
    local_rank_of,
    make_optimizer,
    need_async_io,
    prepare,
)
from mmmoe_pretrain.engines.deepspeed_state import DeepSpeedState
from mmmoe_pretrain.engines.hold import pull_before_updates
from mmmoe_pretrain.engines.task_gradients import Gradients
from mmmoe_pretrain.models.pretraining import LossReport, PretrainingModel
from mmmoe_pretrain.objectives import StepCounts, step_counts

__all__ = ["DeepSpeedEngine", "prepare"]


class DeepSpeedEngine(Engine):
    """Needs ``parallel.mesh.build_groups`` to have run.

    Raises ValueError where DeepSpeed is not installed or refuses ``parallel.deepspeed``.
    """

    def __init__(self, models: Sequence[PretrainingModel], config: RunConfig, device: torch.device) -> None:
        assert len(models) == models[0].groups.num_stages == 1, "a whole model: there is no pipeline here"
        deepspeed = prepare()
        super().__init__(models, config, device)
        self.model = model = self.models[0]
        self.stage = int(config.parallel.zero_stage)
        settings = deepspeed_json(config, self.groups, sum(p.numel() for p in model.parameters()))
        if config.parallel.offload_optimizer == "nvme":
            need_async_io()
        mpu = join_process_group(deepspeed, self.groups)
        adopt_experts(model, self.groups)
        join_tensor_ranks(model, self.groups)
        self._state: DeepSpeedState = DeepSpeedState(
            model, self.stage, config.optimizer.state, updates_in_backward(settings)
        )
        with local_rank_of(device):
            self._engine: Any = deepspeed.initialize(
                model=model,
                optimizer=make_optimizer(model, config.optimizer, self.groups),
                config=settings,
                mpu=mpu,
                dist_init_required=False,
            )[0]
        assert self._engine.has_moe_layers or self.groups.expert_size == 1, "it would average different experts"
        if self.stage == 3:
            complete_gathering(model)
        self._state.attach(self._engine)
        if config.optimizer.pull:
            own = self._engine.optimizer
            pull_before_updates(own.optimizer if self.stage else own, config.optimizer.pull)
        self._check_norms()

    def step(self, microbatches: list[Batch], learning_rate: float) -> StepResult:
        """See ``Engine.step``."""
        self._bound_parameters()
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        counts = step_counts(microbatches, self.model.objectives, self.groups.data, self.device)
        self._prepare_losses(microbatches, counts)
        with record_function("forward_backward"):
            (report,) = self._by_tasks(
                lambda: [self._forward_backward(microbatches, counts)], self._engine.zero_grad, self._gradients
            )
        self._sums = self._loss_sums([report])
        with record_function("optimizer"):
            self._begin_update()
            found = self._clip() if self.stage == 0 else None
            with self._tasks_enter_and_leave():
                self._engine.step()
        losses, grad_norm = found or self._results()
        if math.isfinite(grad_norm):
            self._update_average()
        return self._end_step([report], losses, grad_norm, counts, skipped=not math.isfinite(grad_norm))

    def _forward(self, microbatches: list[Batch], counts: StepCounts) -> list[LossReport]:
        if self.stage == 3:
            hold(self.model.loss_parameters())
        self.model.begin_step(self.steps_done, counts)
        sums: LossReport | None = None
        on_device = self._on_device(microbatches)
        for batch in on_device:
            report = self._engine(batch)[1]
            on_device.copy_next()
            sums = add_reports(sums, report)
        assert sums is not None
        return [sums]

    def _gradients(self) -> Gradients:
        """At stage 0, where each rank has whole ones."""
        shared, found = self._shared(), Gradients([], [], [])
        experts, others = list[int](), list[int]()
        for number, parameter in enumerate(self.model.parameters()):
            assert parameter.grad is not None
            found.tensors.append(parameter.grad)
            found.shared.append(parameter in shared)
            if self.groups.tensor_rank == 0 or getattr(parameter, "tensor_model_parallel", False):
                (others if getattr(parameter, "allreduce", True) else experts).append(number)
        found.counted.append((experts, (self.groups.expert, self.groups.tensor)))
        found.counted.append((others, (self.groups.tensor,)))
        return found

    def _forward_backward(self, batches: list[Batch], counts: StepCounts) -> LossReport:
        """The sums of the microbatches' reports."""
        self.model.begin_step(self.steps_done, counts)
        if self._progress.loss_scale is not None and self.stage:
            # ZeRO scales losses and unscales gradients.
            self._engine.optimizer.override_loss_scale(self._progress.scale)
        scale = 1.0 if self.stage else self._progress.scale
        sums: LossReport | None = None
        on_device = self._on_device(batches)
        for number, batch in enumerate(on_device, start=1):
            self._engine.set_gradient_accumulation_boundary(number == len(batches))
            loss, report = self._engine(batch)
            on_device.copy_next()
            self._engine.backward(loss * scale, scale_wrt_gas=False)
            sums = add_reports(sums, report)
        assert sums is not None
        return sums

    def _check_norms(self) -> None:
        """ZeRO skips a step with a non-finite norm, but only on the ranks with that norm. So all ranks get a
        non-finite norm if the loss or the norm of any rank is not finite."""
        optimizer = self._engine.optimizer
        if self.stage in (1, 2):
            norm_of = optimizer.scaled_global_norm

            def checked_norm() -> Any:
                return self._infinite_if_bad([norm_of()])[0]

            optimizer.scaled_global_norm = checked_norm
        elif self.stage == 3:
            norms_of = optimizer._get_norm_groups

            def checked_norms() -> list[Any]:
                # ZeRO-3 says -1 of a norm that is not finite.
                return self._infinite_if_bad([norm.masked_fill(norm < 0, math.inf) for norm in norms_of()])

            optimizer._get_norm_groups = checked_norms

    def _infinite_if_bad(self, norms: list[Tensor]) -> list[Tensor]:
        """``norms``, or infinite ones where a loss or a norm of any rank is not finite. The host does not wait."""
        found = [send(norm, self.device).to(self._sums.dtype).view(1) for norm in norms]
        bad = not_finite(torch.cat([self._sums, *found]), self.groups).bool().squeeze()
        return [norm.masked_fill(bad.to(norm.device), math.inf) for norm in norms]  # offloaded ones are on the host

    @torch.no_grad()
    def _bound_parameters(self) -> None:
        """Objectives bound some parameters in place, and ZeRO's master weights lie elsewhere; and they use parameters
        outside of any module's call, for which ZeRO-3 would gather them."""
        if self.stage == 0:
            return
        for parameter, bound in self.model.upper_bounds():
            for masters in self._state.masters(iter([parameter])):
                masters.data.clamp_(max=bound)  # no new version of the flat tensor, which may be being copied
        if self.stage == 3:
            hold(self.model.loss_parameters())

    def _results(self) -> tuple[dict[str, float], float]:
        """The losses and the gradient norm of the last step. The norm is infinite if the step was skipped, when ZeRO
        still has an earlier one."""
        norm = send(torch.as_tensor(self._engine.get_global_grad_norm()), self.device)
        *sums, norm_on_host = torch.cat([self._sums, norm.to(self._sums.dtype).view(1)]).tolist()
        losses = losses_of(sums, self.model.loss_names, self.groups)
        return losses, math.inf if self._engine.optimizer.overflow else norm_on_host

    @torch.no_grad()
    def _clip(self) -> tuple[dict[str, float], float]:
        """The losses, and the norm of the reduced gradient, unscaled and clipped to; gradients are dropped where the
        step is to be skipped, and the norm is then infinite. DeepSpeed's own at stage 0 averages the norms of
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
        losses, (norm,), finite = self._read(self._sums, squares.sum().sqrt().view(1))
        norm /= self._progress.scale
        if not finite:
            self._engine.zero_grad()  # torch's optimizers pass over parameters without a gradient
            return losses, math.inf
        factor = self._gradient_factor(norm)
        if factor != 1.0:
            torch._foreach_mul_([grad for _, grad in gradients], factor)
        return losses, norm
