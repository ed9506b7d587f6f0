"""The layouts that must train like one process, and the run that they all train."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.pack import pack
from tests.support import objectives, pack_settings, random_sample, tiny_values

MICROBATCHES = 4
STEPS = 3
LEARNING_RATE = 3e-3
SEED = 6  # no routing decision of 100 steps is within rounding of two experts: golden.py
# Of a global microbatch. With two data-parallel ranks or more the later ones see no image; one sample has
# text alone, which no pair of the contrastive objective can use.
GLOBAL = ("iat", "it", "ia", "iat", "t", "at", "a", "t")
TWO_MICROBATCHES = {"num_microbatches": 2, "global_batch_size": 2 * len(GLOBAL)}
# For half types. Where scores choose, a rounding sends a token near the edge between two experts to the other one,
# and that moves a loss by up to 10% (one process against itself): no bound would tell it from a mistake.
FIXED_ROUTING = {"router": "hash", "bias_balancing": {}}


@dataclass(frozen=True)
class Case:
    """A layout under an engine; ``parallel`` are values of the config's section."""

    layout: str
    ranks: int
    engine: str
    zero_stage: int
    parallel: dict[str, Any] = field(default_factory=dict, hash=False)
    precision: str = "fp32"
    train: dict[str, Any] = field(default_factory=dict, hash=False)  # more of the config's section
    contrastive: dict[str, Any] = field(default_factory=dict, hash=False)  # of the objective between pairs
    objectives: dict[str, Any] = field(default_factory=dict, hash=False)  # more of them
    representations: dict[str, Any] = field(default_factory=dict, hash=False)  # the config's section
    samples: tuple[tuple[str, ...], ...] = (GLOBAL,)  # of each step in turn: the modalities of a global microbatch
    moe: dict[str, Any] = field(default_factory=dict, hash=False)  # more of the config's section
    one_expert: bool = False  # routers that send every token to the same experts
    optimizer: dict[str, Any] = field(default_factory=dict, hash=False)  # of the config's section; {}: AdamW

    @property
    def name(self) -> str:
        zero = f" ZeRO-{self.zero_stage}" if self.zero_stage else ""
        kind = f" {self.optimizer['kind']}" if self.optimizer else ""
        return f"{self.layout} {self.engine}{zero}{kind} {self.precision}"

    @property
    def alone(self) -> Case:
        """The same run in one process, without what saves memory or time."""
        one = dataclasses.replace(self, layout="one process", ranks=1, engine="megatron", zero_stage=0, parallel={})
        train = {key: value for key, value in self.train.items() if key != "recompute"}
        moe = {key: value for key, value in self.moe.items() if key not in ("dispatch_chunks", "lending")}
        return dataclasses.replace(one, train=train, moe=moe)

    def samples_in(self, step: int) -> tuple[str, ...]:
        """Of this step; those of the last step stay."""
        return self.samples[min(step, len(self.samples) - 1)]

    def config(self, root: Path = Path()) -> RunConfig:
        parallel = {"expert_parallel_size": 1, **self.parallel, "engine": self.engine, "zero_stage": self.zero_stage}
        if self.zero_stage == 3:  # else it would leave parameters as small as these whole
            parallel["deepspeed"] = {"zero_optimization": {"param_persistence_threshold": 0}}
        values = config_of(root, parallel, self.precision, self.train, self.optimizer).model_dump(mode="json")
        values["objectives"]["contrastive"] |= self.contrastive
        values["objectives"] |= self.objectives
        values["representations"] = self.representations
        values["moe"] |= self.moe
        return run_config.parse(values)


ALONE = Case("one process", 1, "megatron", 0)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {  # ranks, and the degrees
    "DP2": (2, {}),
    "DP4": (4, {}),
    "EP2": (2, {"expert_parallel_size": 2}),
    "EP4": (4, {"expert_parallel_size": 4}),
    "EP2 x EDP2": (4, {"expert_parallel_size": 2}),
    "TP2": (2, {"tensor_parallel_size": 2}),
    "TP2 + SP": (2, {"tensor_parallel_size": 2, "sequence_parallel": True}),
    "PP2": (2, {"pipeline_parallel_size": 2}),
    "PP4": (4, {"pipeline_parallel_size": 4}),
    "PP2 x VPP2": (2, {"pipeline_parallel_size": 2, "virtual_pipeline_size": 2}),
    "TP2 x EP2": (4, {"tensor_parallel_size": 2, "expert_parallel_size": 2}),
    "PP2 x EP2": (4, {"pipeline_parallel_size": 2, "expert_parallel_size": 2}),
    "EP4 + lending": (4, {"expert_parallel_size": 4}),
    "TP2 x EP2 + lending": (4, {"tensor_parallel_size": 2, "expert_parallel_size": 2}),
    "TP2 + SP x PP2 x EP2": (8, {"tensor_parallel_size": 2, "sequence_parallel": True, "pipeline_parallel_size": 2,
                            "expert_parallel_size": 2}),
}  # fmt: skip
LENDING = {"lending": {"threshold": 1.0, "min_rows": 1}}  # almost any routing is out of balance


def moe_of(layout: str) -> dict[str, Any]:
    """More settings of the section ``moe`` that belong to the layout."""
    return LENDING if layout.endswith("+ lending") else {}


def all_cases() -> list[Case]:
    """Every layout under every engine and ZeRO stage that may run it, in fp32; each in bf16 under both engines;
    fp16 where something is cut in each way, and under every ZeRO stage."""
    cases = []
    for layout, (ranks, degrees) in LAYOUTS.items():
        moe = moe_of(layout)
        cases += [Case(layout, ranks, "megatron", zero, degrees, moe=moe) for zero in (0, 1)]
        cases += [Case(layout, ranks, "megatron", 1, degrees, "bf16", moe={**FIXED_ROUTING, **moe})]
        cases += [in_fp16(layout, stage, engine) for engine, stage in FP16.get(layout, ())]
        if "pipeline_parallel_size" in degrees:
            continue  # refused: pipelines belong to the other engine
        stages = (1, 2) if moe else (1, 2, 3)  # the others are refused
        cases += [Case(layout, ranks, "deepspeed", zero, degrees, moe=moe) for zero in stages]
        cases += [Case(layout, ranks, "deepspeed", 2, degrees, "bf16", moe={**FIXED_ROUTING, **moe})]
    return cases


def cover(cases: Sequence[Case], chosen: Sequence[Case] = ()) -> list[Case]:
    """``chosen`` and few more of ``cases``, with every layout, in which every two features that meet in one of them
    still meet: a kind of parallelism, an engine with its ZeRO stage, a type. The greedy choice, in which few ranks
    count, too; ``make parity`` runs all cases."""
    chosen = list(chosen)
    left = {pair for case in cases for pair in _pairs(case)}.difference(*map(_pairs, chosen))
    while left:
        best = max(cases, key=lambda case: (len(_pairs(case) & left) / case.ranks**0.25, case.precision == "fp32"))
        left -= _pairs(best)
        chosen.append(best)
    return sorted(chosen, key=cases.index)


def brief(case: Case) -> Case:
    """With two microbatches, whose gradients are added up as those of four are. Not of pipelines: with as many
    microbatches as stages they never alternate between forward and backward passes."""
    if "pipeline_parallel_size" in case.parallel:
        return case
    return dataclasses.replace(case, train={**TWO_MICROBATCHES, **case.train})


def _pairs(case: Case) -> set[frozenset[str]]:
    features = [*(case.parallel or ["data alone"]), f"{case.engine} {case.zero_stage}", case.precision]
    return {frozenset(pair) for pair in itertools.combinations(features, 2)} | {frozenset([case.layout])}


FP16 = {
    "DP2": (("megatron", 0), ("deepspeed", 1)),
    "EP2": (("megatron", 1), ("deepspeed", 3)),
    "TP2": (("megatron", 1), ("deepspeed", 2)),
    "PP2": (("megatron", 0),),
    "PP2 x EP2": (("megatron", 1),),
}


def in_fp16(layout: str, zero_stage: int, engine: str) -> Case:
    """At a scale at which this run, whose gradients are large, does not overflow: every step is an update."""
    ranks, degrees = LAYOUTS.get(layout, (1, {}))
    scale = {"loss_scale": {"initial": 1024.0}}
    return Case(layout, ranks, engine, zero_stage, degrees, "fp16", scale, moe=FIXED_ROUTING)


SGD = {"kind": "sgd", "momentum": 0.9}
# Rows of experts on one rank and on both, of a matrix whose rows are cut by two blocks, and a whole embedder; the
# pull of a step is a fifth of the way back.
HOLD = {"kind": "adamw", "eps": 1e-4, "hold": {"strength": 80.0, "importance": "uniform", "frozen": [
    "mmmoe.trunk.blocks.1.ffn.experts.*[:1]", "mmmoe.trunk.blocks.3.ffn.experts.*[1:3]", "mmmoe.embedders.image.*",
    "mmmoe.trunk.blocks.*.ffn.router.weight[:3]", "mmmoe.trunk.blocks.0.ffn.gate_up.weight[4:21]"]}}  # fmt: skip

# All that other people's blocks have: GPT-OSS, Qwen2-MoE, Llama 4, DeepSeek.
OTHER_BLOCKS = {
    "activation": "clamped_swiglu",
    "expert_biases": True,
    "router_bias": True,
    "shared_expert_gate": True,
    "router_weight_on_input": True,
    "routed_scaling_factor": 1.5,
}


def config_of(
    root: Path,
    parallel: dict[str, Any],
    precision: str = "fp32",
    train: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
) -> RunConfig:
    """All objectives, all kinds of auxiliary losses, shared and identity experts, two MoE layers in four blocks."""
    values = tiny_values(
        root,
        seed=SEED,
        parallel=parallel,
        model={"hidden_size": 16, "num_layers": 4, "num_heads": 2, "ffn_hidden_size": 16, "embedding_size": 8},
        moe={"num_experts": 4, "expert_hidden_size": 8, "every": 2, "shared_expert_hidden_size": 8,
             "identity_experts": 1, "bias_balancing": {"rate": 0.001}, "router": "sigmoid_top_k",
             "losses": {"local_entropy": 0.01, "global_entropy": 0.01, "importance": 0.01, "balance": 0.01,
                        "balance_scope": "global_batch", "z": 0.001, "orthogonality": 0.01}},
        objectives=objectives(),
        optimizer={"learning_rate": LEARNING_RATE, "warmup_steps": 0, "clip_norm": 1.0,
                   **(optimizer or {"eps": 1e-4})},
        train={"steps": STEPS, "global_batch_size": MICROBATCHES * len(GLOBAL), "num_microbatches": MICROBATCHES,
               "precision": precision, **(train or {})},
    )  # fmt: skip
    return run_config.parse(values)


def global_microbatch(
    config: RunConfig, number: int, rank: int, ranks: int, modalities: Sequence[str] = GLOBAL
) -> Batch:
    """This data-parallel rank's share of global microbatch ``number``."""
    share = len(modalities) // ranks
    positions = range(rank * share, (rank + 1) * share)
    samples = [random_sample(100 * number + i, modalities[i], config) for i in positions]
    return pack(samples, pack_settings(config), [100 * number + i for i in positions])
