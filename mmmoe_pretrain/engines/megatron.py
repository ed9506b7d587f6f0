"""The engine on megatron-core: its schedules, DistributedDataParallel, gradient finalisation
and optimizer step a PretrainingModel, or the pipeline stages of one that this rank holds.

Expert parameters (``allreduce = False``) are reduced over their replicas alone, and everything
is averaged over the data-parallel ranks; megatron-core does both.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.checkpoint.sharded import ShardedState
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.engines import megatron_cpu
from mmmoe_pretrain.engines.base import StepResult
from mmmoe_pretrain.engines.megatron_setup import data_parallel, make_optimizer, prepare, transformer_config
from mmmoe_pretrain.engines.megatron_state import MegatronState
from mmmoe_pretrain.engines.results import add_routing, mean_losses
from mmmoe_pretrain.models.pretraining import LossReport, PretrainingModel
from mmmoe_pretrain.parallel.groups import Groups
from mmmoe_pretrain.parallel.quiet import quiet_megatron

__all__ = ["MegatronEngine", "prepare"]


class MegatronEngine:
    """Implements the ``Engine`` protocol; needs ``parallel.mesh.build_groups`` to have run.

    ``models``: the stages of this rank in the order of the data's way through them.
    """

    def __init__(self, models: Sequence[PretrainingModel], config: RunConfig, device: torch.device) -> None:
        prepare()
        self.config, self.device = config, device
        self.models = [model.to(device) for model in models]
        self.groups = self.models[0].groups
        self.steps_done = 0
        if config.train.precision == "bf16":
            for model in self.models:
                model.use_bf16()
        with quiet_megatron():
            self.transformer = transformer_config(config, self.groups)
            self.stages = [_Stage(model, self.transformer, i) for i, model in enumerate(self.models)]
            self.wrapped = data_parallel(self.stages, self.transformer, config)
            self.optimizer = make_optimizer(self.wrapped, config)
        self._state = MegatronState(self.models, self.wrapped, self.optimizer)

    def step(self, microbatches: list[Batch], learning_rate: float) -> StepResult:
        """See ``Engine.step``."""
        for wrapped in self.wrapped:
            wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
            group["weight_decay"] = self.config.optimizer.weight_decay * group["wd_mult"]
        if self.config.objectives.contrastive.cached:
            self._fill_cache(microbatches)
        reports = self._run(microbatches)
        with megatron_cpu.optimizer_calls():
            _, grad_norm, _ = self.optimizer.step()
        everything = list(itertools.chain.from_iterable(reports))
        losses, tokens = mean_losses(everything, self.models[0].loss_names, microbatches, self.groups, self.device)
        routing = [add_routing([report.routing for report in own]) for own in reports]
        for model, stats in zip(self.models, routing, strict=True):
            model.end_step(stats)
        self.steps_done += 1
        return StepResult(losses, float(grad_norm), tokens, tuple(itertools.chain.from_iterable(routing)))

    def _fill_cache(self, batches: list[Batch]) -> None:
        """The first pass of a step whose contrastive loss is of all its microbatches."""
        for model in self.models:
            model.begin_caching()
        with torch.no_grad():
            self._run(batches, forward_only=True)
        for model in self.models:
            model.end_caching()

    def _run(self, batches: list[Batch], forward_only: bool = False) -> list[list[LossReport]]:
        """Run the schedule; the reports of each stage of this rank, by microbatch."""
        from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

        for model in self.models:
            model.begin_step(self.steps_done, len(batches))
        reports: list[list[LossReport]] = [[] for _ in self.models]

        def forward_step(batch_iterator: Iterator[Batch], wrapped: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
            output, report = wrapped(next(batch_iterator).to(self.device))
            chunk = next(i for i, other in enumerate(self.wrapped) if other is wrapped)
            reports[chunk].append(report)
            return output, lambda loss: (loss, None)

        iterators = [iter(batches) for _ in self.models]
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
        return reports

    def export_state(self) -> ShardedState:
        """See ``Engine.export_state``."""
        return self._state.export()

    def import_state(self, state: ShardedState, steps_done: int) -> None:
        """See ``Engine.import_state``."""
        self.steps_done = steps_done
        self._state.load(state, steps_done)


class _Stage(nn.Module):
    """A PretrainingModel with the attributes that Megatron's schedules and wrappers ask for.

    Between stages hidden states are [rows, 1, D] for every microbatch of a step: the longest one's, which
    each stage knows from its own copy of the batches, so that no sizes travel. The others are padded.
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
