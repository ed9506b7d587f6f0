"""The JSON config for DeepSpeed: our own settings, overridden by ``parallel.deepspeed``. DeepSpeed silently accepts
unknown top-level keys, and some known ones would contradict our settings. So every key of ``parallel.deepspeed`` must
be one of ``_allowed`` (DeepSpeed's own models validate their sections) and not one that our settings determine.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.parallel.groups import Groups
from mmmoe_pretrain.paths import expand

BUCKET = 50_000_000  # numbers reduced or gathered at once; DeepSpeed's own default allocates ten times it


class _Section(BaseModel):
    """Keys that DeepSpeed reads without a model of its own; without values, as only their names and types count."""

    model_config = ConfigDict(extra="forbid", strict=True)


class _Aio(_Section):
    block_size: int = 0
    queue_depth: int = 0
    intra_op_parallelism: int = 0
    single_submit: bool = False
    overlap_events: bool = False
    use_gds: bool = False


class _FlopsProfiler(_Section):
    enabled: bool = False
    recompute_fwd_factor: float = 0.0
    profile_step: int = 0
    module_depth: int = 0
    top_modules: int = 0
    detailed: bool = False
    output_file: str = ""


class _Throughput(_Section):
    enabled: bool = False
    synchronized: bool = False


class _Timers(_Section):
    throughput: _Throughput | None = None


class _TopLevel(_Section):
    aio: _Aio | None = None
    flops_profiler: _FlopsProfiler | None = None
    timers: _Timers | None = None
    communication_data_type: str = ""
    prescale_gradients: bool = False
    gradient_predivide_factor: float = 0.0
    steps_per_print: int = 0
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    dump_state: bool = False
    disable_python_gc: bool = False


def _allowed() -> type[BaseModel]:
    """Every key of ``parallel.deepspeed``."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    class DeepSpeed(_TopLevel):
        zero_optimization: DeepSpeedZeroConfig | None = None
        comms_logger: CommsLoggerConfig | None = None
        tensorboard: TensorBoardConfig | None = None
        wandb: WandbConfig | None = None
        csv_monitor: CSVConfig | None = None
        comet: CometConfig | None = None

    return DeepSpeed


# Keys that our own settings decide -> which.
OURS: dict[str, str] = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.global_batch_size and train.num_microbatches",
    "gradient_accumulation_steps": "train.num_microbatches",
    "managed_gradient_accumulation": "train.num_microbatches",
    "gradient_clipping": "optimizer.clip_norm",
    "optimizer": "the section optimizer",
    "scheduler": "the section optimizer (learning_rate, warmup_steps, schedule, min_learning_rate)",
    "zero_allow_untested_optimizer": "the section optimizer",
    "zero_force_ds_cpu_optimizer": "parallel.offload_optimizer",
    "bf16": "train.precision",
    "bfloat16": "train.precision",
    "fp16": "train.precision",
    "torch_autocast": "train.precision",
    "data_types": "train.precision",
    "activation_checkpointing": "train.recompute",
    "compile": "train.compile",
    "tensor_parallel": "parallel.tensor_parallel_size",
    "expert_parallel": "parallel.expert_parallel_size",
    "use_data_before_expert_parallelism": "parallel.expert_parallel_size",
    "sequence_parallel_size": "parallel.sequence_parallel",
    "pipeline": "parallel.pipeline_parallel_size with parallel.engine megatron",
    "checkpoint": "checkpoint.every (checkpoints are ours, for every layout and engine)",
    "zero_optimization.stage": "parallel.zero_stage",
    "zero_optimization.cpu_offload": "parallel.offload_optimizer",
    "zero_optimization.offload_optimizer.device": "parallel.offload_optimizer",
    "zero_optimization.offload_optimizer.pipeline_read": "none: it has no part in checkpoints of NVMe state",
    "zero_optimization.offload_optimizer.pipeline_write": "none: it has no part in checkpoints of NVMe state",
    "zero_optimization.compute_grad_norm": "none: the gradient's norm is reported at every step",
}


def deepspeed_json(config: RunConfig, groups: Groups, num_parameters: int) -> dict[str, Any]:
    """For ``deepspeed.initialize``. Raises ValueError for a bad key or value of ``parallel.deepspeed``."""
    own = config.parallel.deepspeed
    for path in _paths(own):
        if path in OURS:
            raise ValueError(f"parallel.deepspeed.{path} is decided by another key: {OURS[path]}")
    allowed = _allowed()
    _check(allowed, own)
    merged = _merged(_generated(config, groups, num_parameters), own)
    if config.parallel.offload_optimizer == "nvme":
        _own_swap_folder(merged["zero_optimization"]["offload_optimizer"], config.name)
    _check(allowed, {"zero_optimization": merged["zero_optimization"]})
    return merged


def updates_in_backward(settings: Mapping[str, Any]) -> bool:
    """Whether weights are updated beside the passes of a step: ZenFlow and SuperOffload do that on the CPU."""
    zero = settings["zero_optimization"]
    return bool(zero.get("zenflow")) or bool((zero.get("offload_optimizer") or {}).get("super_offload"))


def _own_swap_folder(offload: dict[str, Any], run: str) -> None:
    """DeepSpeed names its files by rank alone, and two runs may share a disk."""
    if not offload.get("nvme_path"):
        raise ValueError(
            "parallel.offload_optimizer nvme needs a folder on a local disk of every machine; set "
            "parallel.deepspeed: {zero_optimization: {offload_optimizer: {nvme_path: /local/nvme}}}, or "
            "offload_optimizer: cpu"
        )
    offload["nvme_path"] = str(Path(expand(str(offload["nvme_path"]))) / run)


def _generated(config: RunConfig, groups: Groups, num_parameters: int) -> dict[str, Any]:
    parallel = config.parallel
    bucket = min(BUCKET, num_parameters + num_parameters % 2)
    zero: dict[str, Any] = {"stage": int(parallel.zero_stage), "reduce_bucket_size": bucket}
    if parallel.zero_stage in (1, 2):
        zero["allgather_bucket_size"] = bucket
    if parallel.offload_optimizer != "none":
        zero["offload_optimizer"] = {"device": parallel.offload_optimizer, "pin_memory": False}
    return {
        "train_micro_batch_size_per_gpu": 1,  # these three have a meaning for its own loader alone
        "gradient_accumulation_steps": 1,
        "train_batch_size": groups.data_size,
        "steps_per_print": None,
        "gradient_clipping": config.optimizer.clip_norm if parallel.zero_stage else 0.0,  # else the engine clips
        "zero_force_ds_cpu_optimizer": False,  # its CPU Adam is compiled, for minutes
        "zero_allow_untested_optimizer": True,  # torch's SGD, which tests/layouts/test_reshard.py tests
        "timers": {"throughput": {"enabled": False}},
        "zero_optimization": zero,
    }


def _merged(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(ours)
    for key, value in theirs.items():
        below = merged.get(key)
        merged[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _paths(values: Mapping[str, Any]) -> Iterator[str]:
    """Every key, those in sections with their sections, as ``zero_optimization.stage``."""
    for key, value in values.items():
        yield str(key)
        if isinstance(value, dict):
            yield from (f"{key}.{inner}" for inner in _paths(value))


def _check(allowed: type[BaseModel], values: Mapping[str, Any]) -> None:
    try:
        allowed.model_validate(values)
    except ValidationError as error:
        item = error.errors()[0]
        path = ".".join(map(str, item["loc"]))
        if item["type"] != "extra_forbidden":
            raise ValueError(f"parallel.deepspeed.{path}: {item['msg']} (got {item['input']!r})") from None
        hint = _hint(str(item["loc"][-1]), _names(allowed, item["loc"][:-1]), top=len(item["loc"]) == 1)
        raise ValueError(f"parallel.deepspeed: unknown key {path!r}; {hint}") from None


def _hint(key: str, names: list[str], top: bool) -> str:
    close = difflib.get_close_matches(key, [*names, *(OURS if top else ())], n=1)
    if top and close and close[0] in OURS:
        return f"if {close[0]!r} is meant, it is decided by another key: {OURS[close[0]]}"
    return f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(sorted(names))}"


def _names(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """The keys of the section at ``path``: fields under all their names."""
    for part in path:
        field = next(field for name, field in model.model_fields.items() if part in (name, field.alias))
        options = (field.annotation, *get_args(field.annotation))  # X, or X | None
        model = next(kind for kind in options if isinstance(kind, type) and issubclass(kind, BaseModel))
    return [alias for name, field in model.model_fields.items() for alias in {name, field.alias} if alias]
