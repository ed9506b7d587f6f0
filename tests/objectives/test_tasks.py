"""Tasks that enter and leave, and heads of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.pack import pack
from mmmoe_pretrain.models.pretraining import PretrainingModel
from tests.support import pack_settings, random_sample, tiny_config

READING = {"kind": "next_token", "parts": ["text"]}
PAIRS = {"kind": "contrastive", "pairs": {"image-text": 1.0}}


def config_of(**tasks: dict[str, Any]) -> RunConfig:
    return tiny_config(Path("unused"), objectives=tasks)


def test_a_task_without_weight_at_a_step_gets_no_segment_and_changes_no_other() -> None:
    later = {**READING, "weight": [[3, 0.0], [4, 1.0], [6, 1.0], [7, 0.0]]}
    config, alone = config_of(pairs=PAIRS, later=later), config_of(pairs=PAIRS)
    samples = [random_sample(i, "it", config) for i in range(4)]
    packed = {step: pack(samples, pack_settings(config), step=step) for step in (0, 3, 4, 6, 7, None)}
    for step in (0, 3, 7):
        assert packed[step].task_ids.unique().tolist() == [0] and not len(packed[step].targets["later"])
        torch.testing.assert_close(packed[step].keys, pack(samples, pack_settings(alone)).keys)
    whole = packed[None]
    for step in (4, 6):
        assert packed[step].task_ids.tolist() == whole.task_ids.tolist()
        assert packed[step].targets["later"].ids.tolist() == whole.targets["later"].ids.tolist()


def test_a_representation_of_an_idle_task_is_packed_for_the_next_that_reads_it() -> None:
    config = config_of(first={**PAIRS, "weight": [[0, 0.0], [1, 1.0]]}, second=PAIRS)
    samples = [random_sample(i, "it", config) for i in range(3)]
    tasks = [pack(samples, pack_settings(config), step=step).task_ids.unique().tolist() for step in (0, 1)]
    assert tasks == [[1], [0]]


def test_heads_are_shared_where_names_are_equal_and_follow_their_order_not_their_names() -> None:
    config = config_of(
        one=READING,
        two={**READING, "head": "own"},
        three={**READING, "head": "own"},
        four={**READING, "head": "more"},
    )
    model = PretrainingModel(config).mmmoe
    assert model.token_head("two") is model.token_head("three")
    heads = [model.token_head(task) for task in ("one", "two", "four")]
    assert len({id(head) for head in heads}) == 3
    assert not torch.equal(heads[0].weight, heads[1].weight)
    assert not torch.equal(heads[1].weight, heads[2].weight)
    renamed = PretrainingModel(config_of(one=READING, two={**READING, "head": "named"})).mmmoe
    torch.testing.assert_close(renamed.token_head("two").weight, heads[1].weight, rtol=0, atol=0)
    lone = PretrainingModel(config_of(two={**READING, "head": "own"})).mmmoe
    assert lone.language_head is None
    batch = pack([random_sample(i, "t", config) for i in range(3)], pack_settings(config))
    nll = model(batch)[0].token_nll
    torch.testing.assert_close(nll["two"], nll["three"])
    assert not torch.isclose(nll["one"], nll["two"]).any()
