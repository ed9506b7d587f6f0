"""The layouts that plans are held against, and their small model: four blocks, every other one an MoE layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.stepping.workload import OBJECTIVES, SMALL_MODEL, SMALL_MOE
from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.config import RunConfig

MICROBATCHES, SAMPLES = 4, 8


@dataclass(frozen=True)
class Case:
    """A layout on ``ranks``. ``parallel``, ``train``, ``moe``, ``model``: of the config's sections. ``samples``: of a
    microbatch of one data-parallel rank; a step has ``microbatches``. ``cached``: contrastive losses are of the whole
    step."""

    name: str
    ranks: int
    parallel: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    moe: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    samples: int = SAMPLES
    microbatches: int = MICROBATCHES
    cached: bool = False

    def config(self) -> RunConfig:
        data = self.ranks // self.parallel.get("tensor_parallel_size", 1)
        data //= self.parallel.get("pipeline_parallel_size", 1)
        return run_config.parse(
            {
                "name": "plan",
                "seed": 1,
                "data": {"train": [{"path": "nowhere"}], "tokenizer": "none.model"},
                "modalities": {
                    "image": {"kind": "image", "size": 64, "patch": 16, "stem_channels": 8},
                    "audio": {"kind": "audio", "max_seconds": 1.0, "stem_channels": 8},
                    "text": {"kind": "text", "max_tokens": 30},
                },
                "model": {**SMALL_MODEL, **self.model},
                "moe": {**SMALL_MOE, **self.moe},
                "objectives": {
                    "pairs": {**OBJECTIVES["pairs"], "cached": self.cached},
                    "captions": {"kind": "next_token", "parts": ["image", "text"], "weight": 0.25},
                },
                "parallel": {"expert_parallel_size": 1, **self.parallel},
                "train": {
                    "num_microbatches": self.microbatches,
                    "global_batch_size": self.microbatches * self.samples * data,
                    **self.train,
                },
            }
        )


TP2: dict[str, Any] = {"tensor_parallel_size": 2}
SP2 = {**TP2, "sequence_parallel": True}
PP2 = {"pipeline_parallel_size": 2}
EP2 = {"expert_parallel_size": 2}
BF16, BLOCKS, EXPERTS = {"precision": "bf16"}, {"recompute": "blocks"}, {"recompute": "experts"}
COMPILED = {"compile": "blocks"}
WIDE = {"expert_hidden_size": 512}  # with few samples, the optimizer's state is most of the memory
SHARED = {"shared_expert_hidden_size": 64}


def deepspeed(stage: int, **parallel: Any) -> dict[str, Any]:
    return {"engine": "deepspeed", "zero_stage": stage, **parallel}


def zero(**settings: Any) -> dict[str, Any]:
    return {"zero_optimization": settings}


MANY: dict[str, Any] = {  # most memory between the passes
    "model": {"num_layers": 2},
    "samples": 3,
    "microbatches": 128,
    "cached": True,
}
FEW_GATHERED = zero(
    param_persistence_threshold=0,
    max_live_parameters=150_000,
    max_reuse_distance=150_000,
    prefetch_bucket_size=20_000,
)
CASES = (
    Case("one process", 1),
    Case("DP2, ZeRO-1, bf16", 2, {"zero_stage": 1}, BF16),
    Case("EP2", 2, EP2, moe=SHARED),
    Case("EP2, blocks recomputed", 2, EP2, BLOCKS),
    Case("EP2, experts recomputed, bf16", 2, EP2, {**EXPERTS, **BF16}),
    Case("EP2, in 2 chunks", 2, EP2, moe={"dispatch_chunks": 2}),
    Case("TP2", 2, TP2),
    Case("TP2 + SP, bf16", 2, SP2, BF16),
    Case("PP2, ZeRO-1", 2, {**PP2, "zero_stage": 1}),
    Case("PP2 x VPP2", 2, {**PP2, "virtual_pipeline_size": 2}),
    Case("TP2 + SP x PP2", 4, {**SP2, **PP2}),
    Case("PP2 x EP2, bf16", 4, {**PP2, **EP2}, BF16),
    Case("DP2, ZeRO-1, mostly state", 2, {"zero_stage": 1}, moe=WIDE, samples=1),
    Case("EP2, bf16, mostly state", 2, EP2, BF16, WIDE, samples=1),
    Case("EP2, cached", 2, EP2, cached=True),
    Case("DP2, ZeRO-1, mostly cached", 2, {"zero_stage": 1}, **MANY),
    Case("PP2, mostly cached, bf16", 2, PP2, BF16, **MANY),
    Case("DeepSpeed, ZeRO-2, mostly cached", 2, deepspeed(2), **MANY),
    Case("one process, compiled", 1, {}, COMPILED),
    Case("one process, compiled, blocks recomputed", 1, {}, {**COMPILED, **BLOCKS}),
    Case("PP2, compiled, bf16", 2, PP2, {**COMPILED, **BF16}),
    Case("DeepSpeed, ZeRO-1, mostly state", 2, deepspeed(1), moe=WIDE, samples=1),
    Case("DeepSpeed, ZeRO-2, mostly state", 2, deepspeed(2), moe=WIDE, samples=1),
    Case("DeepSpeed, ZeRO-3 x EP2, mostly state", 2, deepspeed(3, **EP2), moe=WIDE, samples=1),
    Case("DeepSpeed, ZeRO-0", 2, deepspeed(0)),
    Case("DeepSpeed, ZeRO-1 x EP2", 2, deepspeed(1, **EP2)),
    Case("DeepSpeed, ZeRO-2, bf16", 2, deepspeed(2), BF16),
    Case("DeepSpeed, ZeRO-2 x EP2, blocks recomputed", 2, deepspeed(2, **EP2), BLOCKS),
    Case("DeepSpeed, ZeRO-3", 2, deepspeed(3)),
    Case("DeepSpeed, ZeRO-3, all parameters sharded", 2, deepspeed(3, deepspeed=zero(param_persistence_threshold=0))),
    Case("DeepSpeed, ZeRO-3, few gathered", 2, deepspeed(3, deepspeed=FEW_GATHERED)),
    Case("DeepSpeed, ZeRO-3 x EP2, bf16", 2, deepspeed(3, **EP2), BF16),
    Case("DeepSpeed, ZeRO-2 x TP2 + SP", 2, deepspeed(2, **SP2)),
)
MEMORY_QUICK = ("PP2, ZeRO-1", "DeepSpeed, ZeRO-3 x EP2, bf16")
