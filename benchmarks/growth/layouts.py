"""Families of layouts over numbers of ranks, and their small model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.stepping.workload import OBJECTIVES, SMALL_MODEL, SMALL_MOE
from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.config import RunConfig

MICROBATCHES, SAMPLES = 2, 8  # a step; samples a rank and microbatch


@dataclass(frozen=True)
class Family:
    """Layouts that grow with the ranks. ``degrees``: of ``parallel``; the data-parallel size is the rest.
    ``experts_spread``: over all data-parallel ranks, else every rank holds them all."""

    name: str
    fewest: int
    degrees: dict[str, Any] = field(default_factory=dict)
    experts_spread: bool = False
    train: dict[str, Any] = field(default_factory=dict)

    @property
    def sharing(self) -> int:
        """Ranks that see the same samples."""
        return self.degrees.get("tensor_parallel_size", 1) * self.degrees.get("pipeline_parallel_size", 1)


TP2 = {"tensor_parallel_size": 2}
PP2 = {"pipeline_parallel_size": 2}
FAMILIES = (
    Family("DP", 1),
    Family("DP, ZeRO-1", 2, {"zero_stage": 1}),
    Family("EP", 2, experts_spread=True),
    Family("EP, ZeRO-1", 2, {"zero_stage": 1}, experts_spread=True),
    Family("EP, blocks recomputed", 2, experts_spread=True, train={"recompute": "blocks"}),
    Family("EP2 x DP", 4, {"expert_parallel_size": 2}),
    Family("EP, bf16", 2, experts_spread=True, train={"precision": "bf16"}),
    Family("TP2 x EP", 2, TP2, experts_spread=True),
    Family("TP2 + SP x EP", 2, {**TP2, "sequence_parallel": True}, experts_spread=True),
    Family("PP2 x EP", 2, PP2, experts_spread=True),
    Family("PP2 x VPP2 x EP", 2, {**PP2, "virtual_pipeline_size": 2}, experts_spread=True),
    Family("TP2 x PP2 x EP", 4, {**TP2, **PP2}, experts_spread=True),
)


def zero_family(stage: int, **degrees: Any) -> Family:
    """Under DeepSpeed; stage 3 would else leave parameters as small as these whole."""
    own = {"zero_optimization": {"param_persistence_threshold": 0}} if stage == 3 else {}
    engine = {"engine": "deepspeed", "zero_stage": stage, "deepspeed": own}
    return Family(f"DeepSpeed ZeRO-{stage} {degrees}", 2, {**engine, **degrees})


def layout_config(family: Family, ranks: int) -> RunConfig:
    """Four blocks, every other one an MoE layer of 8 experts; all objectives and usual auxiliary losses."""
    data = ranks // family.sharing
    degrees = {"expert_parallel_size": data if family.experts_spread else 1, **family.degrees}
    return run_config.parse(
        {
            "name": "growth",
            "seed": 1,
            "data": {"train": [{"path": "nowhere"}], "tokenizer": "none.model"},
            "modalities": {
                "image": {"kind": "image", "size": 64, "patch": 16, "stem_channels": 8},
                "audio": {"kind": "audio", "stem_channels": 8},
                "text": {"kind": "text"},
            },
            "model": SMALL_MODEL,
            "moe": SMALL_MOE,
            "objectives": OBJECTIVES,
            "parallel": degrees,
            "train": {"num_microbatches": MICROBATCHES, **family.train},
        }
    )
