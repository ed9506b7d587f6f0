"""The engine on megatron-core: its schedules, DistributedDataParallel, gradient finalisation
and optimizer step a PretrainingModel, or the pipeline stages of one that this rank holds.

Expert parameters (``allreduce = False``) are reduced over their replicas alone, and everything
is averaged over the data-parallel ranks; megatron-core does both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.engines import megatron_cpu
from mmmoe_pretrain.engines.ahead import CopiedAhead
from mmmoe_pretrain.engines.base import Engine, StepResult, add_reports
from mmmoe_pretrain.engines.hold import pull_before_updates
from mmmoe_pretrain.engines.megatron_setup import (
    data_parallel,
    inner_optimizers,
    make_optimizer,
    prepare,
    squared_norms,
    transformer_config,
)
from mmmoe_pretrain.engines.megatron_state import MegatronState
from mmmoe_pretrain.engines.task_gradients import Gradients
from mmmoe_pretrain.models.pretraining import LossReport, PretrainingModel
from mmmoe_pretrain.objectives import StepCounts, step_counts
from mmmoe_pretrain.parallel.groups import Groups
from mmmoe_pretrain.parallel.runtime import silence_megatron

__all__ = ["MegatronEngine", "prepare"]


class MegatronEngine(Engine):
    """Needs ``parallel.mesh.build_groups`` to have run."""

    def __init__(self, models: Sequence[PretrainingModel], config: RunConfig, device: torch.device) -> None:
        prepare()
        super().__init__(models, config, device)
        with silence_megatron():
            self.transformer = transformer_config(config, self.groups)
            if self._progress.loss_scale is not None:
                self.transformer.grad_scale_func = lambda loss: loss * self._progress.scale
            self.stages = [_Stage(model, self.transformer, i) for i, model in enumerate(self.models)]
            self.wrapped = data_parallel(self.stages, self.transformer, config)
            self.optimizer = make_optimizer(self.wrapped, config)
        self._state = MegatronState(self.models, self.wrapped, self.optimizer, config.optimizer.state)
        for inner in inner_optimizers(self.optimizer) if config.optimizer.pull else ():
            pull_before_updates(inner.optimizer, config.optimizer.pull)

    def step(self, microbatches: list[Batch], learning_rate: float) -> StepResult:
        """See ``Engine.step``."""
        self._clear()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
            group["weight_decay"] = self.config.optimizer.weight_decay * group["wd_mult"]
        counts = step_counts(microbatches, self.models[0].objectives, self.groups.data, self.device)
        self._prepare_losses(microbatches, counts)
        with record_function("forward_backward"):
            reports = self._by_tasks(lambda: self._run(microbatches, counts), self._clear, self._gradients)
        with record_function("optimizer"), megatron_cpu.optimizer_calls():
            self.optimizer.prepare_grads()
            losses, squares, finite = self._read(self._loss_sums(reports), self._squared_norms())
            grad_norm = math.sqrt(sum(squares)) / self._progress.scale
            if finite:
                self._update(grad_norm)
        return self._end_step(reports, losses, grad_norm, counts, skipped=not finite)

    def _clear(self) -> None:
        for wrapped in self.wrapped:
            wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()

    def _gradients(self) -> Gradients:
        """Those of dense parameters and those of experts are summed over groups of their own, as norms are."""
        with megatron_cpu.optimizer_calls():
            self.optimizer.prepare_grads()
        shared = {id(flat) for flat in self._state.flats_of(self._shared())}
        found = Gradients([], [], [])
        for inner in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
            mains = inner.get_parameters() if getattr(inner, "optimizer", None) is not None else []
            once = {id(grad) for grad in inner.get_main_grads_for_grad_norm()}
            begin = len(found.tensors)
            for main in mains:
                found.tensors.append(main.grad)
                found.shared.append(id(main) in shared)
            counted = [begin + i for i, main in enumerate(mains) if id(main.grad) in once]
            found.counted.append((counted, (inner.get_grad_stats_parallel_group(),)))
        return found

    def _squared_norms(self) -> Tensor:
        return squared_norms(self.optimizer, self.device)

    @torch.no_grad()
    def _update(self, grad_norm: float) -> None:
        """Unscale and clip the gradients, and step the optimizer."""
        self._begin_update()
        factor = self._gradient_factor(grad_norm)
        mains = [main for inner in inner_optimizers(self.optimizer) for main in inner.get_parameters()]
        gradients = [main.grad for main in mains if main.grad is not None]
        if gradients and factor != 1.0:
            torch._foreach_mul_(gradients, factor)
        with self._tasks_enter_and_leave():
            self.optimizer.step_with_ready_grads()
        self._update_average()

    def _forward(self, microbatches: list[Batch], counts: StepCounts) -> list[LossReport]:
        return self._run(microbatches, counts, forward_only=True)

    def _run(self, batches: list[Batch], counts: StepCounts, forward_only: bool = False) -> list[LossReport]:
        """Run the schedule; of each stage of this rank, the sums of its reports over the microbatches."""
        from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

        for model in self.models:
            model.begin_step(self.steps_done, counts, self._progress.scale)
        reports: list[LossReport | None] = [None for _ in self.models]

        def forward_step(on_device: CopiedAhead, wrapped: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
            output, report = wrapped(next(on_device))
            on_device.copy_next()
            chunk = next(i for i, other in enumerate(self.wrapped) if other is wrapped)
            reports[chunk] = add_reports(reports[chunk], report)
            return output, lambda loss: (loss * len(batches), None)  # the schedule divides it by their number

        iterators = [self._on_device(batches) for _ in self.models]
        rows = max(rows_of(batch, self.groups) for batch in batches)
        for stage in self.stages:
            stage.rows = rows
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.wrapped,
            num_microbatches=len(batches),
            seq_length=rows * (self.groups.tensor_size if self.groups.sequence_parallel else 1),
            micro_batch_size=1,
            forward_only=forward_only,
        )
        return [report for report in reports if report is not None]


class _Stage(nn.Module):
    """A PretrainingModel with the attributes that Megatron's schedules and wrappers ask for.

    Between stages hidden states are [rows, 1, D] for every microbatch of a step: the longest one's, which
    each stage knows from its own copy of the batches, so that no sizes are sent. The others are padded.
    """

    def __init__(self, model: PretrainingModel, config: Any, chunk: int) -> None:
        from megatron.core.enums import ModelType

        super().__init__()
        self.model = model
        self.config = config
        self.model_type = ModelType.encoder_or_decoder
        self.vp_stage = chunk if model.groups.virtual_size > 1 else None
        self.pre_process, self.post_process = model.stage.first, model.stage.last
        self.share_embeddings_and_output_weights = False
        self.rows = 1  # of hidden states between stages in this step
        self._received: Tensor | None = None

    def set_input_tensor(self, tensor: Any) -> None:
        """Activations of the stage before; None on the first."""
        self._received = tensor[0] if isinstance(tensor, list) else tensor

    def forward(self, batch: Batch) -> tuple[Tensor, LossReport]:
        received = None
        if not self.model.stage.first:
            assert self._received is not None
            received = self._received[: _shard(batch.num_valid, self.model.groups), 0]
        output, report = self.model(batch, received)
        if not self.model.stage.last:
            output = F.pad(output, (0, 0, 0, self.rows - output.shape[0]))[:, None]
        return output, report


def rows_of(batch: Batch, groups: Groups) -> int:
    """Rows of hidden states that a tensor rank sends of ``batch``; one at least: messages are never empty."""
    return max(1, _shard(batch.num_valid, groups))


def _shard(valid: int, groups: Groups) -> int:
    return -(-valid // groups.tensor_size) if groups.sequence_parallel else valid
