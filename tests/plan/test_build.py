"""What the plan builds, by hand. That its parameters are those of the engines' ranks is in test_memory.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from mmmoe_pretrain.engines.megatron import prepare
from mmmoe_pretrain.plan.build import build
from tests.support import tiny_config

MOE = {"num_experts": 4, "expert_hidden_size": 8, "every": 2, "shared_expert_hidden_size": 8, "null_experts": 4,
       "expert_attention_size": 4, "routing_memory_size": 2}  # fmt: skip
PARTS = {  # hidden size 16, vocabulary 48
    "embedder of text": 48 * 16,
    "attention": 4 * 4 * 16 * 16,
    "dense feed-forward": 2 * 3 * 16 * 16,
    "routers": 2 * ((4 + 4) * (16 + 2) + 2 * 16 + 6 * 2 * 2 + 6 * 2),  # with a memory of 2 numbers
    "attention among experts": 2 * 4 * 16 * 4,
    "experts": 2 * 4 * 3 * 16 * 8,
    "shared experts": 2 * 3 * 16 * 8,
    "heads": 48 * 16 + 3 * 16 * 8,
}
LAYOUTS = {
    "one": (1, {}),
    "tensor and expert": (8, {"tensor_parallel_size": 2, "expert_parallel_size": 4, "sequence_parallel": True}),
    "pipeline": (8, {"pipeline_parallel_size": 2, "virtual_pipeline_size": 2, "expert_parallel_size": 2}),
    "DeepSpeed": (4, {"engine": "deepspeed", "zero_stage": 3}),
}


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_every_parameter_is_counted_once_under_any_layout(name: str, tmp_path: Path) -> None:
    """A token takes 2 of 8 choices in each MoE layer, four of which compute nothing."""
    prepare()  # here: it is what an engine would do, and takes seconds
    ranks, parallel = LAYOUTS[name]
    model = {"hidden_size": 16, "num_layers": 4, "num_heads": 2, "ffn_hidden_size": 16, "embedding_size": 8}
    config = tiny_config(tmp_path, model=model, moe=MOE, parallel=parallel)
    found = build(config, ranks)
    assert {part: found.by_part[part] for part in PARTS} == PARTS
    assert found.total == sum(found.by_part.values())
    assert found.total - found.active == PARTS["experts"] * 3 / 4
    assert len(found.ranks) == found.layout.pipeline
    for rank in found.ranks:
        assert sum(rank.by_part.values()) == sum(part.numel for stage in rank.parameters for part in stage)
    assert not dist.is_initialized()


def test_a_vocabulary_that_is_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.vocab_size is 0, and modality text reads text"):
        build(tiny_config(tmp_path, model={"vocab_size": 0, "hidden_size": 16, "num_heads": 2}), 1)
