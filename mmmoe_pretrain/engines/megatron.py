"""The engine on megatron-core: its schedules, DistributedDataParallel, gradient finalisation
and optimizer step a PretrainingModel.

Expert parameters (``allreduce = False``) are reduced over their replicas alone, and everything
is averaged over the data-parallel ranks; megatron-core does both.
"""

from __future__ import annotations

import functools
import operator
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.checkpoint.state import ParameterState, persistent_buffers
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.engines import megatron_cpu
from mmmoe_pretrain.engines.base import StepResult
from mmmoe_pretrain.models.pretraining import LossReport, PretrainingModel
from mmmoe_pretrain.moe.stats import RoutingStats
from mmmoe_pretrain.parallel.quiet import quiet_megatron

NEVER_CLIPS = 1e30  # megatron-core reports a norm only where it clips


class _Stage(nn.Module):
    """A PretrainingModel with the attributes that Megatron's schedules and wrappers ask for."""

    def __init__(self, model: PretrainingModel, config: Any, model_type: Any) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.model_type = model_type
        self.pre_process = self.post_process = True
        self.share_embeddings_and_output_weights = False

    def set_input_tensor(self, tensor: Any) -> None:
        """Activations of the stage before; there is none where the whole model is one stage."""

    def forward(self, batch: Batch) -> tuple[Tensor, LossReport]:
        return self.model(batch)


class MegatronEngine:
    """Implements the ``Engine`` protocol; needs ``parallel.mesh.build_groups`` to have run."""

    def __init__(self, model: PretrainingModel, config: RunConfig, device: torch.device) -> None:
        prepare()
        from megatron.core.enums import ModelType

        if config.train.precision == "bf16":
            model.use_bf16()
        self.config = config
        self.model = model.to(device)
        self.device = device
        self.steps_done = 0
        with quiet_megatron():
            transformer = _transformer_config(config, model)
            stage = _Stage(model, transformer, ModelType.encoder_or_decoder)
            self.wrapped = _data_parallel(stage, transformer)
            self.optimizer = _make_optimizer(self.wrapped, config)

    def step(self, microbatches: list[Batch], learning_rate: float) -> StepResult:
        """See ``Engine.step``."""
        self.model.begin_step(self.steps_done)
        self.wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
            group["weight_decay"] = self.config.optimizer.weight_decay * group["wd_mult"]
        batches = [batch.to(self.device) for batch in microbatches]
        reports = self._forward_backward(batches)
        with megatron_cpu.optimizer_calls():
            _, grad_norm, _ = self.optimizer.step()
        losses, tokens = _mean_over_ranks(reports, batches, self.model.groups.data)
        routing = _add_routing([r.routing for r in reports])
        self.model.end_step(routing)
        self.steps_done += 1
        return StepResult(losses, float(grad_norm), tokens, routing)

    def _forward_backward(self, batches: list[Batch]) -> list[LossReport]:
        from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

        def forward_step(batch_iterator: Iterator[Batch], model: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
            loss, report = model(next(batch_iterator))
            return loss, lambda output: (output, report)

        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=[self.wrapped],
            num_microbatches=len(batches),
            seq_length=1,  # of activations between stages; one stage sends none
            micro_batch_size=1,
            forward_only=False,
        )

    def export_state(self) -> dict[str, ParameterState]:
        """See ``Engine.export_state``; moments are zeros before the first step."""
        moments = self._torch_state()
        state = {}
        for name, parameter in self.model.named_parameters():
            main = getattr(parameter, "main_param", parameter)
            moment = moments.get(main)  # none before the first step
            exp_avg, exp_avg_sq = (moment[k] if moment else torch.zeros_like(main) for k in ("exp_avg", "exp_avg_sq"))
            expert_axis = not getattr(parameter, "allreduce", True)
            state[name] = ParameterState(main.detach(), exp_avg, exp_avg_sq, expert_axis)
        for name, buffer in persistent_buffers(self.model).items():
            state[name] = ParameterState(buffer, None, None, expert_axis=False)
        return state

    @torch.no_grad()
    def import_state(self, state: dict[str, ParameterState], steps_done: int) -> None:
        """See ``Engine.import_state``."""
        self.steps_done = steps_done
        for name, buffer in persistent_buffers(self.model).items():
            buffer.copy_(state[name].value)
        owner = {
            parameter: inner.optimizer
            for inner in self._inner_optimizers()
            for group in inner.optimizer.param_groups
            for parameter in group["params"]
        }
        for inner in self._inner_optimizers():
            if not type(inner.optimizer).__module__.startswith("torch."):  # TE's and Apex's count by group
                for group in inner.optimizer.param_groups:
                    group["step"] = steps_done
        for name, parameter in self.model.named_parameters():
            main = getattr(parameter, "main_param", parameter)
            saved = state[name]
            assert saved.exp_avg is not None and saved.exp_avg_sq is not None
            main.copy_(saved.value)
            parameter.copy_(main)
            owner[main].state[main] = {
                "step": torch.tensor(float(steps_done)),
                "exp_avg": saved.exp_avg.clone(),
                "exp_avg_sq": saved.exp_avg_sq.clone(),
            }

    def _inner_optimizers(self) -> list[Any]:
        return getattr(self.optimizer, "chained_optimizers", [self.optimizer])

    def _torch_state(self) -> dict[Tensor, dict[str, Tensor]]:
        return {
            parameter: state
            for inner in self._inner_optimizers()
            for parameter, state in inner.optimizer.state.items()
        }


def prepare() -> None:
    """Import megatron-core (seconds, once) without its notes on optional packages; shim it on CPUs."""
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # its fused helpers compile for a minute
    with quiet_megatron():
        megatron_cpu.install()


def _transformer_config(config: RunConfig, model: PretrainingModel) -> Any:
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.transformer.transformer_config import TransformerConfig

    bf16 = config.train.precision == "bf16"
    return TransformerConfig(
        num_layers=config.model.num_layers,
        hidden_size=config.model.hidden_size,
        num_attention_heads=config.model.num_heads,
        num_moe_experts=None if config.moe.dense else config.moe.num_experts,
        expert_model_parallel_size=model.groups.expert_size,
        moe_token_dispatcher_type="alltoall",
        add_bias_linear=False,
        use_cpu_initialization=True,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        finalize_model_grads_func=finalize_model_grads,
    )


def _data_parallel(stage: _Stage, transformer: Any) -> Any:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=False)
    wrapped = DistributedDataParallel(transformer, settings, stage)
    transformer.no_sync_func = wrapped.no_sync  # reduce once a step, not once a microbatch
    return wrapped


def _make_optimizer(wrapped: Any, config: RunConfig) -> Any:
    from megatron.core.optimizer import OptimizerConfig, ParamKey, get_megatron_optimizer
    from megatron.core.optimizer.optimizer_config import ParamPredicate
    from megatron.core.optimizer_param_scheduler import ParamGroupOverride

    settings = config.optimizer
    optimizer = OptimizerConfig(
        optimizer="adam",
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.eps,
        clip_grad=settings.clip_norm or NEVER_CLIPS,
        bf16=config.train.precision == "bf16",
        use_distributed_optimizer=False,
    )
    vectors = ParamKey(predicate=ParamPredicate(name="vectors", fn=lambda parameter: parameter.ndim < 2))
    with megatron_cpu.optimizer_calls():
        return get_megatron_optimizer(optimizer, [wrapped], {vectors: ParamGroupOverride(wd_mult=0.0)})


def _mean_over_ranks(
    reports: list[LossReport], batches: list[Batch], group: dist.ProcessGroup | None
) -> tuple[dict[str, float], int]:
    """Losses averaged over microbatches and ranks, and valid tokens summed, by one reduction."""
    names = list(reports[0].losses)
    sums = torch.stack([torch.stack([r.losses[name].float() for name in names]) for r in reports]).mean(0)
    tokens = torch.tensor([float(sum(rows.shape[0] for b in batches for rows in b.rows))], device=sums.device)
    values = torch.cat([sums, tokens])
    dist.all_reduce(values, group=group)
    *means, total_tokens = values.tolist()
    ranks = dist.get_world_size(group)
    losses = {name: value / ranks for name, value in zip(names, means, strict=True)}
    return {"total": sum(losses.values()), **losses}, round(total_tokens)


def _add_routing(reports: list[tuple[RoutingStats, ...]]) -> tuple[RoutingStats, ...]:
    """Sums over the microbatches; each report is over all ranks already."""
    layers = []
    for stats in zip(*reports, strict=True):
        layers.append(functools.reduce(operator.add, [layer.detach() for layer in stats]))
    return tuple(layers)
