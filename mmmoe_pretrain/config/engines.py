"""The engines and what each can do: plain values, so that a layout can be checked without megatron-core or DeepSpeed.

``parallel/layout.py`` reads them, and ``engines/apply.py`` builds from them. A new engine is one file in ``engines/``
and one entry of ``ENGINES``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator


@dataclass(frozen=True)
class Offload:
    """Optimizer state off the device: under which ZeRO stages, and of which ``optimizer.kind``."""

    zero_stages: tuple[int, ...]
    optimizers: tuple[str, ...]


@dataclass(frozen=True)
class Capabilities:
    """The capabilities of one engine. Keys and values are those of the config; a ZeRO stage is a
    ``parallel.zero_stage``."""

    place: str  # module:class of the implementation (``engines/base.py`` has the protocol)
    pipeline: bool  # more than one pipeline stage
    zero_stages: tuple[int, ...]
    optimizers: Mapping[str, tuple[int, ...]]  # optimizer.kind -> ZeRO stages that it works with
    offload: Mapping[str, Offload]  # by parallel.offload_optimizer
    precisions: tuple[str, ...]  # train.precision
    overlap: tuple[str, ...]  # keys of ``parallel`` that let communication overlap computation
    instead_of_overlap: str = ""  # the remedy where a key is not in ``overlap``
    task_gradients: tuple[int, ...] = ()  # ZeRO stages at which whole reduced gradients can be compared
    settings: str | None = None  # the key of ``parallel`` that has the engine's own JSON
    half_parameters: bool = False  # of the trunk, in bf16 and fp16; else they stay fp32, with half copies


ENGINES: dict[str, Capabilities] = {
    "megatron": Capabilities(
        place="mmmoe_pretrain.engines.megatron:MegatronEngine",
        pipeline=True,
        zero_stages=(0, 1),  # 1 is its distributed optimizer
        optimizers={"adamw": (0, 1), "sgd": (0,)},  # its distributed optimizer asserts Adam
        offload={},
        precisions=("fp32", "bf16", "fp16"),
        half_parameters=True,
        task_gradients=(0, 1),
        overlap=("overlap_grad_reduce", "overlap_param_gather"),
    ),
    "deepspeed": Capabilities(
        place="mmmoe_pretrain.engines.deepspeed:DeepSpeedEngine",
        pipeline=False,  # its own excludes ZeRO stages 2 and 3
        zero_stages=(0, 1, 2, 3),
        optimizers={"adamw": (0, 1, 2, 3), "sgd": (0, 1, 2, 3)},
        offload={"cpu": Offload((1, 2, 3), ("adamw", "sgd")), "nvme": Offload((3,), ("adamw",))},
        precisions=("fp32", "bf16", "fp16"),
        task_gradients=(0,),  # stage 1 frees gradients as it reduces them, 2 and 3 never have whole ones
        overlap=(),
        instead_of_overlap="parallel.deepspeed: {zero_optimization: {overlap_comm: true}} for its own overlap",
        settings="deepspeed",
    ),
}


def _known(name: str) -> str:
    if name not in ENGINES:
        raise ValueError(f"parallel.engine {name!r} is not an engine; use one of: {', '.join(ENGINES)}")
    return name


EngineName = Annotated[str, AfterValidator(_known)]
