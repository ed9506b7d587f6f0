"""Which layouts are legal, and what is said of the others."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.config.engines import ENGINES, Capabilities, Offload
from mmmoe_pretrain.engines.apply import build_engine
from mmmoe_pretrain.engines.base import Engine, StepResult
from mmmoe_pretrain.models.pretraining import LossReport
from mmmoe_pretrain.objectives import StepCounts
from mmmoe_pretrain.parallel.degrees import resolve_expert_parallel_size
from mmmoe_pretrain.parallel.groups import Groups
from mmmoe_pretrain.parallel.layout import Layout, resolve_layout
from tests.support import objectives, tiny_config

MODEL = {"hidden_size": 16, "num_layers": 4, "num_heads": 4, "ffn_hidden_size": 24, "embedding_size": 8}
MOE = {"num_experts": 4, "expert_hidden_size": 8}
TRAIN = {"steps": 2, "global_batch_size": 32, "num_microbatches": 4}


def config_of(parallel: dict[str, Any], **sections: dict[str, Any]) -> RunConfig:
    """A run of 4 blocks, every second one an MoE layer of 4 experts, and 4 microbatches; ``sections`` are
    changes to those."""
    standard = {"model": MODEL, "moe": MOE, "train": TRAIN}
    merged = {name: {**values, **sections.pop(name, {})} for name, values in standard.items()}
    return tiny_config(Path("."), parallel=parallel, **merged, **sections)


def refusal(ranks: int, parallel: dict[str, Any], **sections: dict[str, Any]) -> str:
    with pytest.raises(ValueError) as error:
        resolve_layout(config_of(parallel, **sections), ranks)
    return str(error.value)


PP2, TP2, DEEPSPEED = {"pipeline_parallel_size": 2}, {"tensor_parallel_size": 2}, {"engine": "deepspeed"}

# Ranks, the parallel section, and by hand: data, tensor, pipeline, virtual, expert, expert-data.
LEGAL = {
    "one": (1, {}, (1, 1, 1, 1, 1, 1)),
    "DP2": (2, {"expert_parallel_size": 1}, (2, 1, 1, 1, 1, 2)),
    "DP4": (4, {"expert_parallel_size": 1, "data_parallel_size": 4}, (4, 1, 1, 1, 1, 4)),
    "EP2": (2, {}, (2, 1, 1, 1, 2, 1)),
    "EP4": (4, {}, (4, 1, 1, 1, 4, 1)),
    "EP4 of 8": (8, {}, (8, 1, 1, 1, 4, 2)),  # there are 4 experts
    "EP2 x EDP2": (4, {"expert_parallel_size": 2}, (4, 1, 1, 1, 2, 2)),
    "TP2": (2, TP2, (1, 2, 1, 1, 1, 1)),
    "TP2 + SP": (2, {**TP2, "sequence_parallel": True, "expert_tensor_parallel_size": 2}, (1, 2, 1, 1, 1, 1)),
    "PP2": (2, PP2, (1, 1, 2, 1, 1, 1)),
    "PP4": (4, {"pipeline_parallel_size": 4}, (1, 1, 4, 1, 1, 1)),
    "PP2 x VPP2": (2, {**PP2, "virtual_pipeline_size": 2}, (1, 1, 2, 2, 1, 1)),
    "TP2 x EP2": (4, TP2, (2, 2, 1, 1, 2, 1)),
    "PP2 x EP2": (4, PP2, (2, 1, 2, 1, 2, 1)),
    "TP2 x PP2 x EP2": (8, {**TP2, **PP2}, (2, 2, 2, 1, 2, 1)),
    "overlap": (2, {"zero_stage": 1, "overlap_grad_reduce": True, "overlap_param_gather": True}, (2, 1, 1, 1, 2, 1)),
    "ZeRO 3 x TP2 x EP2": (4, {**DEEPSPEED, **TP2, "zero_stage": 3}, (2, 2, 1, 1, 2, 1)),
    "ZeRO 0": (2, {**DEEPSPEED}, (2, 1, 1, 1, 2, 1)),
    "offload": (2, {**DEEPSPEED, "zero_stage": 1, "offload_optimizer": "cpu"}, (2, 1, 1, 1, 2, 1)),
    "DeepSpeed's own settings": (2, {**DEEPSPEED, "zero_stage": 3, "deepspeed": {"a": 1}}, (2, 1, 1, 1, 2, 1)),
}


@pytest.mark.parametrize("name", LEGAL)
def test_a_legal_layout_becomes_numbers(name: str) -> None:
    ranks, parallel, (data, tensor, pipeline, virtual, expert, expert_data) = LEGAL[name]
    assert resolve_layout(config_of(parallel), ranks) == Layout(
        ranks, data, tensor, pipeline, virtual, expert, expert_data,
        bool(parallel.get("sequence_parallel")), parallel.get("zero_stage", 0), parallel.get("engine", "megatron"),
    )  # fmt: skip


# Ranks, the parallel section, changes to others, and what the error must say: keys, values, remedy.
ILLEGAL: dict[str, tuple[int, dict[str, Any], dict[str, Any], str]] = {
    "context": (
        2, {"context_parallel_size": 2}, {},
        "context_parallel_size 2: .* within one segment .*set context_parallel_size: 1.*sequence_parallel",
    ),
    "tensor ranks do not divide": (
        8, {"tensor_parallel_size": 3}, {},
        "tensor_parallel_size 3 x parallel.pipeline_parallel_size 1 is 3 ranks.* the 8 that run; start 6 or 9 ranks, "
        r"or use tensor_parallel_size \[1, 2, 4, 8\]$",
    ),
    "too few ranks": (
        2, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, {},
        r"is 4 ranks .* the 2 that run; start 4 ranks, or use tensor_parallel_size \[1\], or use "
        r"pipeline_parallel_size \[1\]",
    ),
    "data size": (
        8, {**TP2, "data_parallel_size": 3}, {},
        "data_parallel_size 3 x tensor_parallel_size 2 x pipeline_parallel_size 1 is 6 ranks, and 8 run; "
        "use data_parallel_size 4 or auto, or start 6 ranks",
    ),
    "virtual stages without a pipeline": (
        4, {"virtual_pipeline_size": 2}, {},
        r"virtual_pipeline_size 2 .*pipeline_parallel_size is 1; set virtual_pipeline_size: 1, or use "
        r"pipeline_parallel_size \[2, 4\]",
    ),
    "sequence without tensor": (
        2, {"sequence_parallel": True}, {},
        r"sequence_parallel .*tensor_parallel_size is 1; set sequence_parallel: false, or use .*_size \[2\]",
    ),
    "sequence on one rank": (1, {"sequence_parallel": True}, {}, "start more ranks for a tensor_parallel_size"),
    "expert tensor": (
        2, {**TP2, "expert_tensor_parallel_size": 1}, {},
        "expert_tensor_parallel_size 1 is not parallel.tensor_parallel_size 2: .*wrong experts "
        ".*expert_parallel_size 1; set expert_tensor_parallel_size: 2 or auto",
    ),
    "expert size does not divide ranks": (
        4, {**PP2, "expert_parallel_size": 4}, {},
        r"expert_parallel_size 4 .*num_experts 4 on 2 data-parallel ranks.*use one of \[1, 2\] or auto",
    ),
    "expert size does not divide a layer": (
        4, {"expert_parallel_size": 4}, {"moe": {"layers": {3: {"num_experts": 6}}}},
        r"expert_parallel_size 4 .*num_experts 4, 6 on 4 .*use one of \[1, 2\] or auto",
    ),
    "expert size does not divide a group": (
        2, {"expert_parallel_size": 2},
        {"moe": {"experts_per_token": 1, "expert_groups": [{"num_experts": 3}, {"num_experts": 1}]}},
        r"expert_parallel_size 2 .*num_experts 1, 3 on 2 .*use one of \[1\] or auto",
    ),
    "heads": (
        8, {"tensor_parallel_size": 8}, {"moe": {"shared_expert_hidden_size": 4}},
        r"tensor_parallel_size 8 does not divide model.num_heads 4, moe.shared_expert_hidden_size 4; "
        r"use tensor_parallel_size \[1, 2, 4\]",
    ),
    "heads of keys and values": (
        4, {"tensor_parallel_size": 4}, {"model": {"num_kv_heads": 2}},
        r"tensor_parallel_size 4 does not divide model.num_kv_heads 2; use tensor_parallel_size \[1, 2\], or "
        "multiples of 4",
    ),
    "vocabulary": (
        2, TP2, {"model": {"vocab_size": 47}},
        r"tensor_parallel_size 2 does not divide model.vocab_size \(of data.tokenizer\) 47",
    ),
    "dense width": (
        2, TP2, {"model": {"ffn_hidden_size": 15}},
        r"tensor_parallel_size 2 does not divide model.ffn_hidden_size 15; use tensor_parallel_size \[1\], or "
        "multiples of 2",
    ),
    "width of a dense model's MoE layers": (
        2, TP2, {"moe": {"num_experts": 1, "experts_per_token": 1, "expert_hidden_size": 7, "losses": {}}},
        "does not divide moe.expert_hidden_size 7;",
    ),
    "expert width of a layer": (
        2, TP2, {"moe": {"layers": {1: {"expert_hidden_size": 9}}}},
        "does not divide moe.layers.1.expert_hidden_size 9;",
    ),
    "expert width of a group": (
        2, TP2,
        {"moe": {"expert_groups": [{"num_experts": 2, "expert_hidden_size": 5}, {"num_experts": 2}]}},
        "does not divide moe.expert_groups.0.expert_hidden_size 5;",
    ),
    "more stages than blocks": (
        8, {"pipeline_parallel_size": 8}, {},
        r"pipeline_parallel_size 8 x parallel.virtual_pipeline_size 1 is 8 stages, and model.num_layers 4 .*use "
        r"model.num_layers 8 or more, or pipeline_parallel_size \[1, 2, 4\]",
    ),
    "more virtual stages than blocks": (
        4, {**PP2, "virtual_pipeline_size": 3}, {"train": {"num_microbatches": 2}},
        r"is 6 stages, and model.num_layers 4 .*or virtual_pipeline_size \[1, 2\]$",
    ),
    "microbatches of an interleaved schedule": (
        2, {**PP2, "virtual_pipeline_size": 2}, {"train": {"num_microbatches": 3, "global_batch_size": 6}},
        "num_microbatches 3 is not a multiple of parallel.pipeline_parallel_size 2.*use 2 or 4 microbatches, or "
        "virtual_pipeline_size: 1",
    ),
    "fewer microbatches than interleaved ranks": (
        2, {**PP2, "virtual_pipeline_size": 2}, {"train": {"num_microbatches": 1}}, "; use 2 microbatches, or",
    ),
    "one sample a microbatch": (
        1, {}, {"train": {"num_microbatches": 32}},
        r"global_batch_size 32 in train.num_microbatches 32: .*one sample a microbatch .*contrastive has no negatives"
        r".*use train.global_batch_size 64 or more, num_microbatches \[1, 2, 4, 8, 16\], .*cached: true",
    ),
    "one sample a step": (
        1, {}, {"train": {"num_microbatches": 1, "global_batch_size": 1}},
        "no negatives and .*; use train.global_batch_size 2 or more, or objectives.contrastive.weight: 0$",
    ),
    "lending without expert ranks": (
        4, {**PP2, "expert_parallel_size": 1}, {"moe": {"lending": {}}},
        r"moe.lending moves rows .*expert_parallel_size is 1; use expert_parallel_size 2, or set moe.lending: null",
    ),
    "lending in one process": (1, {}, {"moe": {"lending": {}}}, "start more data-parallel ranks, or set moe.lending"),
    "lending under ZeRO 3": (
        2, {**DEEPSPEED, "zero_stage": 3}, {"moe": {"lending": {}}},
        "moe.lending holds .*parallel.zero_stage 3 .*use zero_stage 0, 1 or 2, or set moe.lending: null",
    ),
    "pipeline under DeepSpeed": (
        4, {**DEEPSPEED, **PP2}, {},
        "pipeline_parallel_size 2 with parallel.engine deepspeed: .*set engine: megatron, or pipeline_parallel",
    ),
    "ZeRO 2 under Megatron": (2, {"zero_stage": 2}, {}, "zero_stage 2 shards gradients.*use zero_stage: 1.*deeps"),
    "ZeRO 3 under Megatron": (2, {"zero_stage": 3}, {}, "zero_stage 3 shards parameters.*use zero_stage: 1.*deep"),
    "SGD under Megatron's ZeRO-1": (
        2, {"zero_stage": 1}, {"optimizer": {"kind": "sgd"}},
        "optimizer.kind sgd with parallel.engine megatron and parallel.zero_stage 1.*use zero_stage 0, or "
        "engine: deepspeed, or optimizer.kind: adamw",
    ),
    "DeepSpeed's settings under Megatron": (
        1, {"deepspeed": {"wall_clock_breakdown": True}}, {},
        r"parallel.deepspeed \(wall_clock_breakdown\) .*parallel.engine is megatron.*set engine: deepspeed, or leave",
    ),
    "overlap under DeepSpeed": (
        1, {**DEEPSPEED, "overlap_grad_reduce": True}, {},
        "overlap_grad_reduce .*engine deepspeed; set overlap_grad_reduce: false.*overlap_comm: true.*: megatron",
    ),
    "gather overlap without ZeRO": (
        2, {"overlap_param_gather": True, "overlap_grad_reduce": True}, {},
        "overlap_param_gather .*zero_stage is 0.*set zero_stage: 1 and overlap_grad_reduce: true",
    ),
    "gather overlap without reduce overlap": (
        2, {"overlap_param_gather": True, "zero_stage": 1}, {}, "overlap_param_gather .*overlap_grad_reduce false",
    ),
    "offload under Megatron": (
        2, {"offload_optimizer": "cpu", "zero_stage": 1}, {},
        "offload_optimizer cpu with parallel.engine megatron, parallel.zero_stage 1 .*use engine: deepspeed and "
        "zero_stage 1, 2 or 3 with optimizer.kind adamw or sgd, or offload_optimizer: none .*1/2 of it",
    ),
    "offload without ZeRO": (
        2, {**DEEPSPEED, "offload_optimizer": "cpu", "expert_parallel_size": 1}, {},
        "offload_optimizer cpu .*zero_stage 0 .*zero_stage 1, 2 or 3 .*offload_optimizer: none",
    ),
    "nvme under ZeRO-2": (
        2, {**DEEPSPEED, "offload_optimizer": "nvme", "zero_stage": 2}, {},
        "nvme with parallel.engine deepspeed, parallel.zero_stage 2.*use engine: deepspeed and zero_stage 3 .*, or "
        "offload_optimizer: cpu with zero_stage 1, 2 or 3, or offload_optimizer: none",
    ),
    "nvme under Megatron": (
        2, {"offload_optimizer": "nvme", "zero_stage": 1}, {},
        "nvme with parallel.engine megatron, parallel.zero_stage 1.*use engine: deepspeed and zero_stage 3 .*, or",
    ),
    "nvme with SGD": (
        2, {**DEEPSPEED, "offload_optimizer": "nvme", "zero_stage": 3}, {"optimizer": {"kind": "sgd"}},
        "nvme .*optimizer.kind sgd, .*zero_stage 3 with optimizer.kind adamw, or offload_optimizer: cpu with zero_st",
    ),
    "ZeRO 2 with a pipeline": (
        2, {"pipeline_parallel_size": 2, "zero_stage": 2}, {},
        "or engine: deepspeed with pipeline_parallel_size: 1",
    ),
    "ZeRO 2 with a pipeline under DeepSpeed": (
        2, {**DEEPSPEED, "pipeline_parallel_size": 2, "zero_stage": 2}, {}, "set engine: megatron, or",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ILLEGAL)
def test_an_illegal_layout_is_refused_with_what_would_work(name: str) -> None:
    ranks, parallel, sections, pattern = ILLEGAL[name]
    message = refusal(ranks, parallel, **sections)
    assert re.search(pattern, message), message


@pytest.mark.parametrize("contrastive", [{"cached": True}, {"weight": 0}])
def test_one_sample_a_microbatch_is_fine_for_what_needs_no_negatives_of_it(contrastive: dict[str, Any]) -> None:
    resolve_layout(config_of({}, train={"num_microbatches": 32}, objectives=objectives(contrastive)), 1)


def test_a_width_that_no_block_has_is_not_asked_to_divide() -> None:
    """With moe.every 1 all blocks are MoE layers, and no block uses ffn_hidden_size."""
    everywhere = config_of(TP2, model={"ffn_hidden_size": 15}, moe={"every": 1})
    assert resolve_layout(everywhere, 2).tensor == 2


def test_fewer_microbatches_than_plain_pipeline_ranks_are_allowed() -> None:
    """1F1B runs them with a wider bubble; Megatron requires more only for the interleaved schedule."""
    config = config_of({"pipeline_parallel_size": 4}, train={"num_microbatches": 1})
    assert resolve_layout(config, 4).pipeline == 4


@pytest.mark.parametrize("num_experts,data_size,expected", [(8, 1, 1), (8, 2, 2), (8, 6, 2), (6, 4, 2), (1, 4, 1)])
def test_auto_takes_the_widest_spread_that_divides_experts_and_ranks(
    num_experts: int, data_size: int, expected: int
) -> None:
    assert resolve_expert_parallel_size("auto", num_experts, data_size) == expected


class ThirdEngine(Engine):
    """As a new file in ``engines/`` would have it."""

    def step(self, microbatches: list[Batch], learning_rate: float) -> StepResult:
        raise NotImplementedError

    def _forward(self, microbatches: list[Batch], counts: StepCounts) -> list[LossReport]:
        raise NotImplementedError


def test_an_engine_is_a_class_and_an_entry_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The config takes its name, layouts are held against what it can, and it is built."""
    entry = Capabilities(place=f"{__name__}:ThirdEngine", pipeline=False, zero_stages=(2,),
                         optimizers={"adamw": (2,)}, offload={"nvme": Offload((2,), ("adamw",))},
                         precisions=("bf16",), overlap=("overlap_grad_reduce",))  # fmt: skip
    with pytest.raises(ValueError, match="'third' is not an engine; use one of: megatron, deepspeed"):
        config_of({"engine": "third"})
    monkeypatch.setitem(ENGINES, "third", entry)
    legal = {"engine": "third", "zero_stage": 2, "offload_optimizer": "nvme", "overlap_grad_reduce": True}
    half = {"train": {"precision": "bf16"}}
    config = config_of(legal, **half)
    assert resolve_layout(config, 2).engine == "third"
    refused = {
        "pipeline_parallel_size 2 with parallel.engine third.*set engine: megatron": ({**legal, **PP2}, half),
        "zero_stage 1 .*third has the stages 2 alone; use zero_stage: 2": ({**legal, "zero_stage": 1}, half),
        "train.precision fp32 with parallel.engine third, which computes in bf16": (legal, {}),
        "optimizer.kind sgd with parallel.engine third.*optimizer.kind: adamw": (
            legal,
            {**half, "optimizer": {"kind": "sgd"}},
        ),
        "offload_optimizer cpu with parallel.engine third": ({**legal, "offload_optimizer": "cpu"}, half),
        "parallel.deepspeed .*parallel.engine is third": ({**legal, "deepspeed": {"a": 1}}, half),
        "parallel.overlap_param_gather .*third": ({**legal, "overlap_param_gather": True}, half),
    }
    for pattern, (parallel, sections) in refused.items():
        message = refusal(2, parallel, **sections)
        assert re.search(pattern, message), message
    assert "engine: third" in refusal(2, {"zero_stage": 2})
    engine = build_engine(config, Groups(), torch.device("cpu"))
    assert isinstance(engine, ThirdEngine) and len(engine.models) == 1 and engine.steps_done == 0
