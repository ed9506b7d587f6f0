"""How DeepSpeed is set up for a run: its import, process groups, experts and optimizer.

DeepSpeed makes no process group of its own here. It takes the running one, and ours by way of its
registries (``deepspeed.utils.groups``) and, under tensor parallelism, of an ``mpu`` object.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mmmoe_pretrain.config import OptimizerConfig
from mmmoe_pretrain.engines.hold import decays
from mmmoe_pretrain.moe.layer import MoELayer
from mmmoe_pretrain.parallel.collectives import summed
from mmmoe_pretrain.parallel.cuts import computed_alike
from mmmoe_pretrain.parallel.groups import Group, Groups


def prepare() -> Any:
    """DeepSpeed, imported (a second, once) without its log lines; nothing is compiled.

    Raises ValueError where it is not installed.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ModuleNotFoundError as error:
        if error.name != "deepspeed":
            raise
        raise ValueError(
            "parallel.engine deepspeed needs DeepSpeed, which is not installed here: pip install "
            "'deepspeed>=0.19.8', or set parallel.engine: megatron"
        ) from None
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would compile for minutes on CPUs
    deepspeed.utils.logger.setLevel(logging.WARNING)
    return deepspeed


def need_async_io() -> None:
    """Build DeepSpeed's operator for files, which takes some minutes the first time on a machine.

    Raises ValueError where that cannot be done.
    """
    from deepspeed.ops.op_builder import AsyncIOBuilder

    builder = AsyncIOBuilder()
    reason: Exception | None = None
    if builder.is_compatible(verbose=False):
        try:
            builder.load(verbose=False)
            return
        except RuntimeError as error:
            reason = error
    raise ValueError(
        "parallel.offload_optimizer nvme needs DeepSpeed's operator async_io, which is compiled when it is first "
        "used, and that failed; install libaio with its headers, a C++ compiler and ninja (Debian, Ubuntu: apt-get "
        "install libaio-dev g++ ninja-build), or set offload_optimizer: cpu"
    ) from reason


def join_process_group(deepspeed: Any, groups: Groups) -> Any:
    """Let DeepSpeed use the running process group and ``groups``; the ``mpu`` for its engine, or None.

    Experts that are spread over ranks are reduced within the group of name ``expert_group_name``.
    """
    os.environ.setdefault("LOCAL_RANK", "0")  # of a process without a launcher, as in parallel/runtime.py
    deepspeed.init_distributed(dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    from deepspeed.utils import groups as registry

    mpu = _TensorRanks(groups) if groups.tensor_size > 1 else None
    registry.mpu = mpu  # it outlives an engine, and one without tensor ranks does not overwrite it
    registry._WORLD_GROUP = None  # so does its copy of the group of all ranks, which ends with the other groups
    for name, group in (("_EXPERT_PARALLEL_GROUP", _all_experts(groups)),
                        ("_EXPERT_DATA_PARALLEL_GROUP", groups.expert_data)):  # fmt: skip
        of_groups, of_ranks = getattr(registry, name), getattr(registry, f"{name}_RANKS")
        of_groups.clear()
        of_ranks.clear()
        if groups.expert_size > 1:
            of_groups[expert_group_name(groups)] = group
            of_ranks[expert_group_name(groups)] = dist.get_process_group_ranks(group)
    return mpu


@contextmanager
def local_rank_of(device: torch.device) -> Iterator[None]:
    """Around ``deepspeed.initialize``, which takes the GPU of number LOCAL_RANK. A rank that sees one GPU alone has
    number 0 (``runtime.local_device``)."""
    before = os.environ["LOCAL_RANK"]
    os.environ["LOCAL_RANK"] = before if device.index is None else str(device.index)
    try:
        yield
    finally:
        os.environ["LOCAL_RANK"] = before


def _all_experts(groups: Groups) -> Group:
    """The ranks that together hold all experts. DeepSpeed sums an expert norm over them (ZeRO-3), so
    with tensor ranks, which hold parts of each expert, it is the group of both."""
    if groups.tensor_size == 1 or groups.expert_size == 1:
        return groups.expert
    from megatron.core import parallel_state

    return parallel_state.get_expert_tensor_and_model_parallel_group()


def expert_group_name(groups: Groups) -> str:
    """DeepSpeed's name of the groups that replicate experts; it reads the number in it."""
    return f"ep_size_{groups.expert_size}"


class _TensorRanks:
    """``mpu`` of a layout with tensor parallelism, as DeepSpeed asks for it."""

    def __init__(self, groups: Groups) -> None:
        self._groups = groups

    def get_tensor_model_parallel_rank(self) -> int:
        return self._groups.tensor_rank

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._groups.tensor_size

    def get_tensor_model_parallel_group(self) -> Group:
        return self._groups.tensor

    get_model_parallel_rank = get_tensor_model_parallel_rank
    get_model_parallel_world_size = get_tensor_model_parallel_world_size
    get_model_parallel_group = get_tensor_model_parallel_group

    def get_data_parallel_rank(self) -> int:
        return self._groups.data_rank

    def get_data_parallel_world_size(self) -> int:
        return self._groups.data_size

    def get_data_parallel_group(self) -> Group:
        return self._groups.data

    def get_pipeline_model_parallel_world_size(self) -> int:
        return 1


def adopt_experts(model: nn.Module, groups: Groups) -> None:
    """Register the experts with DeepSpeed, which then sums their gradients only over their replicas.

    It looks for instances of its own ``AutoEPMoELayer``, so a ``MoELayer`` becomes one: routing,
    dispatch and arithmetic stay ours. Where every rank holds all experts they are plain parameters.
    """
    spread = groups.expert_size > 1
    for parameter in model.parameters():
        if getattr(parameter, "allreduce", True):
            continue
        parameter.allreduce = not spread  # type: ignore[attr-defined]
        if spread:
            parameter.group_name = expert_group_name(groups)  # type: ignore[attr-defined]
            parameter.ds_zero_placement_family = "autoep_expert"  # type: ignore[attr-defined]
            parameter.ds_zero_partition_group_name = expert_group_name(groups)  # type: ignore[attr-defined]
    if not spread:
        return
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    class ExpertParallelLayer(MoELayer, AutoEPMoELayer):
        def set_deepspeed_parallelism(self, *args: Any, **kwargs: Any) -> None:
            """The groups are there already."""

    for module in list(model.modules()):
        if isinstance(module, MoELayer):
            module.__class__ = ExpertParallelLayer
            module.num_experts = module.config.num_experts  # type: ignore[assignment]


def join_tensor_ranks(model: nn.Module, groups: Groups) -> None:
    """The reductions that megatron-core makes at the end of a step, here per gradient: parameters that meet a tensor
    rank's share of the tokens alone (``sequence_parallel``, megatron-core's mark) are summed over the tensor
    ranks, and those that all of them compute equally are averaged (``cuts.computed_alike``)."""
    if groups.tensor_size == 1:
        return

    for parameter in model.parameters():
        if getattr(parameter, "sequence_parallel", False):
            parameter.register_hook(lambda grad: summed(grad, groups.tensor))
        elif computed_alike(parameter):
            parameter.register_hook(lambda grad: summed(grad, groups.tensor) / groups.tensor_size)


def make_optimizer(model: nn.Module, settings: OptimizerConfig, groups: Groups) -> torch.optim.Optimizer:
    """torch's own; vectors and what is frozen do not decay. Sharded experts form separate groups, as DeepSpeed
    requires."""
    parameters = list(model.parameters())
    decayed = {"name": "matrices", "weight_decay": settings.weight_decay}
    plain = {"name": "vectors", "weight_decay": 0.0}
    param_groups: list[dict[str, Any]] = [
        {**decayed, "params": [p for p in parameters if decays(p)]},
        {**plain, "params": [p for p in parameters if not decays(p)]},
    ]
    if groups.expert_size > 1:
        from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

        param_groups = split_params_into_different_moe_groups_for_optimizer(param_groups)
    param_groups = [group for group in param_groups if group["params"]]
    rate, own = settings.learning_rate, settings.own
    fused = all(parameter.device.type == "cuda" for parameter in parameters)
    match settings.kind:
        case "adamw":
            betas = (own["beta1"], own["beta2"])
            return torch.optim.AdamW(param_groups, lr=rate, betas=betas, eps=own["eps"], fused=fused)
        case "sgd":
            return torch.optim.SGD(param_groups, lr=rate, momentum=own["momentum"])
