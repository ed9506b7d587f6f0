"""The JSON config for DeepSpeed: our own settings, overridden by ``parallel.deepspeed``. DeepSpeed silently accepts
unknown top-level keys, and some known ones would contradict our settings. So every key of ``parallel.deepspeed`` must
be one of ``ALLOWED`` (DeepSpeed's own models validate the values) and not one that our settings determine.
"""

from __future__ import annotations

import difflib
import importlib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Union

from pydantic import BaseModel, ValidationError

from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.parallel.groups import Groups
from mmmoe_pretrain.paths import expand

BUCKET = 50_000_000  # numbers reduced or gathered at once; DeepSpeed's own default allocates ten times it

# Key -> the type of its value, the keys of a section, or where DeepSpeed's model of the section is.
ALLOWED: dict[str, Any] = {
    "zero_optimization": "deepspeed.runtime.zero.config:DeepSpeedZeroConfig",
    "comms_logger": "deepspeed.comm.config:CommsLoggerConfig",
    "tensorboard": "deepspeed.monitor.config:TensorBoardConfig",
    "wandb": "deepspeed.monitor.config:WandbConfig",
    "csv_monitor": "deepspeed.monitor.config:CSVConfig",
    "comet": "deepspeed.monitor.config:CometConfig",
    "aio": {"block_size": int, "queue_depth": int, "intra_op_parallelism": int, "single_submit": bool,
            "overlap_events": bool, "use_gds": bool},
    "flops_profiler": {"enabled": bool, "recompute_fwd_factor": float, "profile_step": int, "module_depth": int,
                       "top_modules": int, "detailed": bool, "output_file": str},
    "timers": {"throughput": {"enabled": bool, "synchronized": bool}},
    "communication_data_type": str,
    "prescale_gradients": bool,
    "gradient_predivide_factor": float,
    "steps_per_print": int,
    "wall_clock_breakdown": bool,
    "memory_breakdown": bool,
    "dump_state": bool,
    "disable_python_gc": bool,
}  # fmt: skip

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

Scalar = type[int] | type[float] | type[bool] | type[str]


def deepspeed_json(config: RunConfig, groups: Groups, num_parameters: int) -> dict[str, Any]:
    """For ``deepspeed.initialize``. Raises ValueError for a bad key or value of ``parallel.deepspeed``."""
    own = config.parallel.deepspeed
    _check(own, ALLOWED, "")
    settings = _generated(config, groups, num_parameters)
    merged = _merged(settings, own)
    if config.parallel.offload_optimizer == "nvme":
        _own_swap_folder(merged["zero_optimization"]["offload_optimizer"], config.name)
    zero = _model(ALLOWED["zero_optimization"])
    try:
        zero(**merged["zero_optimization"])
    except (ValidationError, AssertionError) as error:
        raise ValueError(f"parallel.deepspeed.zero_optimization: {_first_line(error)}") from None
    return merged


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


def _check(values: Mapping[str, Any], known: Any, path: str) -> None:
    """``known``: {key: type, section or place of a model}, or a model."""
    names = _names(known)
    for key, value in values.items():
        where = f"{path}{key}"
        if where in OURS:
            raise ValueError(f"parallel.deepspeed.{where} is decided by another key: {OURS[where]}")
        if key not in names:
            raise ValueError(f"parallel.deepspeed: unknown key {where!r}; {_hint(str(key), names, path)}")
        expected = names[key]
        section = _model(expected) if isinstance(expected, str) else expected
        if isinstance(section, dict) or _is_model(section):
            if not isinstance(value, dict):
                raise ValueError(
                    f"parallel.deepspeed.{where}: a section, not {value!r}; known keys: {_list(section)}"
                )
            _check(value, section, f"{where}.")
        elif section in (int, float, bool, str) and not _fits(value, section):
            raise ValueError(f"parallel.deepspeed.{where}: {section.__name__} wanted, got {value!r}")
    if _is_model(known):
        try:
            known(**values)
        except (ValidationError, AssertionError) as error:
            raise ValueError(f"parallel.deepspeed.{path.rstrip('.')}: {_first_line(error)}") from None


def _hint(key: str, names: Mapping[str, Any], path: str) -> str:
    close = difflib.get_close_matches(key, [*names, *(() if path else OURS)], n=1)
    if close and close[0] in OURS and not path:
        return f"if {close[0]!r} is meant, it is decided by another key: {OURS[close[0]]}"
    return f"did you mean {close[0]!r}?" if close else f"known keys: {_list(names)}"


def _list(known: Any) -> str:
    return ", ".join(sorted(_names(known)))


def _names(known: Any) -> dict[str, Any]:
    """The keys of a section: those of the table, or a model's fields under all their names."""
    if isinstance(known, Mapping):
        return dict(known)
    names: dict[str, Any] = {}
    for name, field in known.model_fields.items():
        nested = next((option for option in _options(field.annotation) if _is_model(option)), None)
        for alias in filter(None, (name, field.alias)):
            names[alias] = nested
    return names


def _options(annotation: Any) -> Iterable[Any]:
    """X, or what X | None consists of."""
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _model(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def _fits(value: Any, kind: Scalar) -> bool:
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    return isinstance(value, (int, float) if kind is float else kind)


def _first_line(error: ValidationError | AssertionError) -> str:
    if isinstance(error, ValidationError):
        item = error.errors()[0]
        return f"{'.'.join(map(str, item['loc']))}: {item['msg']} (got {item['input']!r})"
    return str(error)
