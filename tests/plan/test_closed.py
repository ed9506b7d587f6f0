"""The closed form that a search ranks by, against the real build: equal to the last number."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmmoe_pretrain.plan.build import build
from mmmoe_pretrain.plan.closed import ClosedForm
from mmmoe_pretrain.plan.layouts import Choice, resolve
from mmmoe_pretrain.plan.machines import find_machine
from mmmoe_pretrain.plan.report import Asked, fullest
from mmmoe_pretrain.plan.search import Search
from tests.support import tiny_config

MODEL = {"hidden_size": 16, "num_layers": 6, "num_heads": 2, "ffn_hidden_size": 16, "embedding_size": 8}
MOE = {"num_experts": 4, "expert_hidden_size": 8, "shared_expert_hidden_size": 8, "layers": {3: {"num_experts": 8}}}


def test_a_layout_put_together_from_blocks_is_the_one_that_is_built(tmp_path: Path) -> None:
    """Three kinds of blocks: dense, sparse, and one with more experts."""
    train = {"global_batch_size": 64, "num_microbatches": 8, "precision": "bf16"}
    config = tiny_config(tmp_path, model=MODEL, moe=MOE, train=train)
    closed = ClosedForm(config)
    for choice in (
        Choice("megatron", 1, False, 1, 1, 1, 0, "none"),
        Choice("megatron", 2, True, 1, 1, 4, 1, "blocks"),
        Choice("megatron", 2, False, 2, 2, 2, 1, "experts"),
        Choice("megatron", 1, False, 4, 1, 2, 0, "none"),
        Choice("deepspeed", 2, False, 1, 1, 2, 3, "none"),
    ):
        found = resolve(config, choice, 8)
        assert closed.build(found.config, found.layout) == build(found.config, 8), choice


@pytest.mark.parametrize(
    "choice",
    [
        Choice("megatron", 1, False, 2, 1, 4, 1, "none"),
        Choice("megatron", 2, True, 1, 1, 2, 1, "blocks"),
        Choice("deepspeed", 1, False, 1, 1, 1, 2, "experts"),
    ],
    ids=str,
)
def test_the_peak_from_single_blocks_is_that_of_whole_stages(choice: Choice, tmp_path: Path) -> None:
    """Within 2% of the run of the whole model on fake tensors, at other samples than the blocks were run at."""
    train = {"global_batch_size": 64, "num_microbatches": 2, "precision": "bf16"}
    model = {"hidden_size": 64, "num_layers": 6, "num_heads": 4, "ffn_hidden_size": 128, "embedding_size": 32}
    config = tiny_config(tmp_path, model=model, moe={**MOE, "layers": {}}, train=train)
    found = resolve(config, choice, 8)
    looking = Search(Asked(8, find_machine("h100")), config)
    planned = fullest(build(found.config, 8), looking.asked)
    closed = looking.fullest(found)
    assert closed.pipeline_rank == planned.pipeline_rank
    assert closed.memory.tensors == pytest.approx(planned.memory.tensors, rel=0.02)
