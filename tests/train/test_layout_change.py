"""A run stops under one layout and engine and resumes under another with the same losses."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.engines import deepspeed
from mmmoe_pretrain.train.loop import train
from tests.distributed import run_ranks
from tests.support import things, write_shards
from tests.train.faulty import config_in, logged, losses, steps_of

STEPS = {"global_batch_size": 16, "num_microbatches": 2}
EVERY_LEG = {"every": 3, "keep_last": 9}
LEGS: list[tuple[int, int, dict[str, Any]]] = [  # up to this step, on so many ranks, in this layout
    (3, 2, {"pipeline_parallel_size": 2}),
    (6, 2, {"expert_parallel_size": 2, "zero_stage": 1}),
    (9, 2, {"engine": "deepspeed", "zero_stage": 3}),
    (12, 2, {"tensor_parallel_size": 2, "sequence_parallel": True}),
]


def until(config: RunConfig, step: int, parallel: dict[str, Any]) -> RunConfig:
    """The same run that ends at ``step``; its learning rate is constant, so the schedule does not show."""
    return config.model_copy(
        update={
            "train": config.train.model_copy(update={"steps": step}),
            "parallel": config.parallel.model_validate({"expert_parallel_size": 1, **parallel}),
        }
    )


def held_out(config: RunConfig) -> list[dict[str, float]]:
    """The losses and scores of each record that has some."""
    found = [record["held_out"] for record in logged(config) if "held_out" in record]
    return [{**each["losses"], **each["scores"], "samples": each["samples"]} for each in found]


TEXT_ALONE = {  # of the same shards
    "modalities": {"text": {"kind": "text", "max_tokens": 16}},
    "objectives": {"prose": {"kind": "next_token"}},
}


@pytest.mark.parametrize(("sections", "legs"), [({}, LEGS), (TEXT_ALONE, LEGS[:3:2])], ids=["all", "text alone"])
def test_a_run_resumes_under_other_layouts(
    tmp_path: Path, tiny_data: Path, sections: dict[str, Any], legs: list[tuple[int, int, dict[str, Any]]]
) -> None:
    steps = legs[-1][0]
    deepspeed.prepare()  # once, and not in every fork
    constant = {"learning_rate": 3e-3, "min_learning_rate": 3e-3, "warmup_steps": 0, "eps": 1e-4}
    write_shards(tmp_path / "validation", things(60)[48:])
    scored = {"validation": str(tmp_path / "validation"), "every": 3, "samples": 11, "min_items": 2}
    sections = {"train": STEPS, "checkpoint": EVERY_LEG, "optimizer": constant, "evaluate": scored, **sections}
    straight, changing = (config_in(tmp_path / name, tiny_data, **sections) for name in ("straight", "changing"))
    run_ranks(1, train, until(straight, steps, {}))
    for step, ranks, parallel in legs:
        run_ranks(ranks, train, until(changing, step, parallel))
    assert steps_of(changing) == list(range(1, steps + 1))
    # Layouts differ in the order of sums; with this eps Adam does not magnify it (tests/layouts/matrix.py).
    np.testing.assert_allclose(losses(changing), losses(straight), rtol=2e-5, atol=2e-5)
    assert losses(changing)[-1, 0] < 0.9 * losses(changing)[0, 0]
    by_name = [held_out(config) for config in (straight, changing)]
    assert [its.keys() for its in by_name[0]] == [its.keys() for its in by_name[1]] and len(by_name[0]) == steps // 3
    values = [[list(its.values()) for its in each] for each in by_name]
    np.testing.assert_allclose(values[1], values[0], rtol=2e-5, atol=2e-5)
    layers = [[layer["layer"] for layer in record["routing"]] for record in logged(changing)]
    assert layers == [[layer["layer"] for layer in logged(straight)[0]["routing"]]] * steps
