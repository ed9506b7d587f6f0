"""The section ``parallel``: engine and degrees of parallelism."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from mmmoe_pretrain.config.base import StrictModel
from mmmoe_pretrain.config.engines import EngineName


class ParallelConfig(StrictModel):
    """Degrees of parallelism. What depends on the number of ranks is checked in ``parallel/layout.py``."""

    engine: EngineName = "megatron"
    data_parallel_size: int | Literal["auto"] = "auto"  # what the other degrees leave of the ranks
    tensor_parallel_size: int = Field(1, ge=1)  # ranks that share each matrix
    sequence_parallel: bool = False  # between matrices, tensor ranks hold a share of the tokens each
    pipeline_parallel_size: int = Field(1, ge=1)
    virtual_pipeline_size: int = Field(1, ge=1)  # stages that a pipeline rank holds (interleaved schedule)
    expert_parallel_size: int | Literal["auto"] = "auto"  # ranks over which the experts are spread
    expert_tensor_parallel_size: int | Literal["auto"] = "auto"  # ranks that share one expert's matrices
    context_parallel_size: int = Field(1, ge=1)
    zero_stage: Literal[0, 1, 2, 3] = 0  # shards optimizer state (1), gradients (2), parameters (3)
    overlap_grad_reduce: bool = False  # megatron: reduce gradients during the backward pass
    overlap_param_gather: bool = False  # megatron, zero_stage 1: gather parameters during the forward pass
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"  # nvme: zero_stage 3, nvme_path in deepspeed
    deepspeed: dict[str, Any] = Field({})  # DeepSpeed's own JSON, for what has no key here
    timeout_minutes: int = Field(5, ge=1)  # of a collective, before the job ends
