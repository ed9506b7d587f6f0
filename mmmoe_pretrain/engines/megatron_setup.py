"""How megatron-core is set up for a run: its configs, wrappers and optimizer."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.engines import megatron_cpu
from mmmoe_pretrain.engines.base import HALF_TYPES
from mmmoe_pretrain.engines.hold import decays
from mmmoe_pretrain.models.block import stream_width
from mmmoe_pretrain.parallel.cuts import computed_alike
from mmmoe_pretrain.parallel.groups import Groups
from mmmoe_pretrain.parallel.runtime import silence_megatron


def prepare() -> None:
    """Import megatron-core (seconds, once) without its notes on optional packages; shim it on CPUs."""
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # its fused helpers compile for a minute
    with silence_megatron():
        megatron_cpu.install()
        importlib.import_module("megatron.core.pipeline_parallel.schedules")  # of the first step, else


def transformer_config(config: RunConfig, groups: Groups) -> Any:
    """The config that Megatron's schedules, wrappers and gradient finalisation read from a model."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    precision = config.train.precision
    dtype = HALF_TYPES.get(precision, torch.float32)
    return TransformerConfig(
        num_layers=groups.num_stages,  # it wants a multiple of the stages; which blocks they hold is ours
        hidden_size=stream_width(config.model, config.moe),  # of the messages between stages
        num_attention_heads=config.model.num_heads,
        num_moe_experts=None if config.moe.dense else config.moe.num_experts,
        tensor_model_parallel_size=groups.tensor_size,
        sequence_parallel=groups.sequence_parallel,
        pipeline_model_parallel_size=groups.pipeline_size,
        virtual_pipeline_model_parallel_size=groups.virtual_size if groups.virtual_size > 1 else None,
        pipeline_dtype=dtype,
        batch_p2p_comm=groups.virtual_size == 1,  # two ranks would mix up the two ways of an interleaved batch
        batch_p2p_sync=False,  # a wait of the host after every message, for old versions of torch
        expert_model_parallel_size=groups.expert_size,
        moe_token_dispatcher_type="alltoall",
        add_bias_linear=False,
        use_cpu_initialization=True,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        params_dtype=dtype,
        finalize_model_grads_func=functools.partial(_finalize, groups),
    )


def _finalize(groups: Groups, stages: list[Any], *args: Any, **kwargs: Any) -> None:
    """megatron-core's, and the copies of the tensor ranks brought together; once a step."""
    from megatron.core.distributed import finalize_model_grads

    finalize_model_grads(stages, *args, **kwargs)
    if groups.tensor_size == 1:
        return
    alike = [p.main_grad for stage in stages for p in stage.parameters() if computed_alike(p)]
    if alike:
        together = torch.cat([grad.reshape(-1) for grad in alike])
        dist.all_reduce(together, group=groups.tensor)
        together /= groups.tensor_size  # gloo cannot average
        for grad, mean in zip(alike, together.split([grad.numel() for grad in alike]), strict=True):
            grad.copy_(mean.view_as(grad))


def data_parallel(stages: Sequence[nn.Module], transformer: Any, config: RunConfig) -> list[Any]:
    """Each stage in Megatron's DistributedDataParallel; gradients are reduced once a step."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    parallel = config.parallel
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.zero_stage == 1,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    wrapped = [
        DistributedDataParallel(config=transformer, ddp_config=settings, module=stage, disable_bucketing=i > 0)
        for i, stage in enumerate(stages)
    ]
    no_sync = [stage.no_sync for stage in wrapped]
    transformer.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return wrapped


def make_optimizer(wrapped: list[Any], config: RunConfig) -> Any:
    """Over all stages of this rank; vectors and what is frozen do not decay. The engine does clipping and
    loss scaling: ``bf16`` means half parameters of either type with fp32 masters, without a loss scale."""
    from megatron.core.optimizer import OptimizerConfig, ParamKey, get_megatron_optimizer
    from megatron.core.optimizer.optimizer_config import ParamPredicate
    from megatron.core.optimizer_param_scheduler import ParamGroupOverride

    settings = config.optimizer
    common = {
        "lr": settings.learning_rate,
        "weight_decay": settings.weight_decay,
        "clip_grad": 0.0,
        "bf16": config.train.precision in HALF_TYPES,
        "use_distributed_optimizer": config.parallel.zero_stage == 1,
        "overlap_param_gather": config.parallel.overlap_param_gather,
    }
    match settings.kind:  # by name: AdamOptimizerConfig and SGDOptimizerConfig both mean Adam from 0.18 on
        case "adamw":
            own = {f"adam_{key}": value for key, value in settings.own.items()}
            optimizer = OptimizerConfig(optimizer="adam", **common, **own)
        case "sgd":
            optimizer = OptimizerConfig(optimizer="sgd", **common, sgd_momentum=settings.own["momentum"])
    undecayed = ParamKey(predicate=ParamPredicate(name="undecayed", fn=lambda parameter: not decays(parameter)))
    with megatron_cpu.optimizer_calls():
        made = get_megatron_optimizer(
            config=optimizer,
            model_chunks=wrapped,
            config_overrides={undecayed: ParamGroupOverride(wd_mult=0.0)},
            use_gloo_process_groups=False,
        )
    if config.parallel.zero_stage == 1:
        # One optimizer steps dense parameters and one experts, and each would then gather all of both.
        for inner in getattr(made, "chained_optimizers", [])[:-1]:
            inner.model_chunks = []
    for inner in inner_optimizers(made):
        fuse_adam(inner.optimizer)
    return made


def fuse_adam(optimizer: Any) -> None:
    """Let torch's Adam, which megatron-core falls back to without TE and Apex, update GPU parameters by one kernel:
    a third of the memory traffic of the default (measured on an H100: 33 bytes a parameter against 92)."""
    if isinstance(optimizer, torch.optim.AdamW | torch.optim.Adam):
        for group in optimizer.param_groups:
            if all(parameter.device.type == "cuda" for parameter in group["params"]):
                group["fused"] = True


@torch.no_grad()
def squared_norms(optimizer: Any, device: torch.device) -> Tensor:
    """The squares of the norms of dense gradients and of those of experts, or of all together, over the ranks that
    have shares of them. megatron-core's ``get_grad_norm`` on the device: its own reads a number from there for each
    parameter where Transformer Engine and Apex are missing, and one for each inner optimizer in any case."""
    optimizers = getattr(optimizer, "chained_optimizers", [optimizer])
    parts = [(inner.get_main_grads_for_grad_norm(), inner.get_grad_stats_parallel_group()) for inner in optimizers]
    if len(parts) > 1 and optimizer.grads_states_parallel_group_is_shared():
        parts = [([grad for grads, _ in parts for grad in grads], optimizer.get_grad_stats_parallel_group())]
    squares = []
    for grads, group in parts:
        square = torch.zeros(1, device=device)
        if grads:
            square = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))).square().view(1)
        dist.all_reduce(square, group=group)
        squares.append(square)
    return torch.cat(squares)


def inner_optimizers(optimizer: Any) -> list[Any]:
    """One of dense parameters and one of experts, or one of both; without those that hold nothing."""
    optimizers = getattr(optimizer, "chained_optimizers", [optimizer])
    return [inner for inner in optimizers if getattr(inner, "optimizer", None) is not None]
