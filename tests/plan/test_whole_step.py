"""Memory of losses over a whole step, beside the real model's first pass and by hand."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.models.pretraining import PretrainingModel
from mmmoe_pretrain.objectives import step_counts
from mmmoe_pretrain.parallel.layout import resolve_layout
from mmmoe_pretrain.plan.activations import StageMemory, StageSizes
from mmmoe_pretrain.plan.build import build, pretended_groups
from mmmoe_pretrain.plan.layouts import Choice, resolve
from mmmoe_pretrain.plan.live import LiveTensors
from mmmoe_pretrain.plan.machines import find_machine
from mmmoe_pretrain.plan.peak import rank_memories, rank_memory
from mmmoe_pretrain.plan.report import Asked
from mmmoe_pretrain.plan.search import Search
from mmmoe_pretrain.plan.whole_step import NONE, WholeStep, whole_step
from mmmoe_pretrain.plan.workload import full_batch
from tests.support import objectives, tiny_config

MICROBATCHES, SAMPLES = 24, 2
MANY = 120  # microbatches, whose logits are the most of a rank's memory


def config_of(root: Path, microbatches: int = MANY, cached: bool = True, **sections: object) -> RunConfig:
    train = {"num_microbatches": microbatches, "global_batch_size": microbatches * SAMPLES}
    return tiny_config(root, objectives=objectives(contrastive={"cached": cached}), train=train, **sections)


def test_what_is_held_between_the_passes_is_what_a_real_step_holds(tmp_path: Path) -> None:
    config = config_of(tmp_path, MICROBATCHES)
    model = PretrainingModel(config)
    batches = [full_batch(config, SAMPLES, i * SAMPLES) for i in range(MICROBATCHES)]
    model.begin_step(0, step_counts(batches, model.objectives, None, torch.device("cpu")))
    model.begin_look("collecting")
    with LiveTensors() as live:
        with torch.no_grad():
            for batch in batches:
                model(batch)
        gc.collect()
        live.reset_peak()
        model.end_look()
        gc.collect()
        kept, peak = live.live, live.peak
    with pretended_groups(resolve_layout(config, 1)) as groups:
        planned = whole_step(config, groups, batches[0])
    assert planned.peak == pytest.approx(peak, rel=0.01)
    assert planned.kept == pytest.approx(kept, rel=0.01)
    features = MICROBATCHES * SAMPLES * 3 * config.model.embedding_size * 4  # of image, audio and text, in fp32
    assert features <= planned.kept <= features + 200  # and gradients of temperatures
    assert planned.peak > 4 * (MICROBATCHES * SAMPLES) ** 2 * 4  # logits and softmax, either way round


def test_with_other_losses_nothing_stands_between_passes(tmp_path: Path) -> None:
    config = config_of(tmp_path, cached=False)
    with pretended_groups(resolve_layout(config, 1)) as groups:
        assert whole_step(config, groups, full_batch(config, SAMPLES)) == NONE


def test_the_peak_of_a_rank_is_that_of_the_loss_of_a_large_step(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    made = build(config, 1)
    (found,) = rank_memories(made, device="cpu")
    with pretended_groups(made.layout) as groups:
        planned = whole_step(config, groups, full_batch(config, SAMPLES))
    assert (found.activations, found.transient) == (0, planned.peak)


@pytest.mark.parametrize(("engine", "zero", "gradients"), [("megatron", 0, True), ("deepspeed", 1, False)])
def test_deepspeed_has_no_gradients_between_the_passes(
    engine: str, zero: int, gradients: bool, tmp_path: Path
) -> None:
    config = config_of(tmp_path, parallel={"engine": engine, "zero_stage": zero})
    made = build(config, 1)
    sizes = StageSizes(StageMemory(1, 2, 3), 0, WholeStep(kept=10, peak=10**9))
    found = rank_memory(made, made.ranks[0], [sizes], "cpu")
    assert found.transient == 10**9
    assert (found.gradients > 0) == gradients


def test_a_search_knows_the_loss_of_the_whole_step(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    found = resolve(config, Choice("megatron", 1, False, 1, 1, 2, 1, "none"), 2)
    closed = Search(Asked(2, find_machine("h100")), config).fullest(found)
    with pretended_groups(found.layout) as groups:
        planned = whole_step(found.config, groups, full_batch(config, found.samples))
    assert closed.memory.transient == planned.peak


def test_a_memory_queue_is_held_by_the_last_stage(tmp_path: Path) -> None:
    """Of 3 representations in fp32, their flags, and an id of each sample."""
    parallel, train = {"pipeline_parallel_size": 2}, {"global_batch_size": 8, "num_microbatches": 2}
    without, with_queue = (
        rank_memories(
            build(
                tiny_config(tmp_path, objectives=objectives({"queue_size": size}), parallel=parallel, train=train), 2
            ),
            device="cpu",
        )
        for size in (0, 1 << 16)
    )
    more = [a.weights - b.weights for a, b in zip(with_queue, without, strict=True)]
    assert more == [0, (1 << 16) * (3 * 8 * 4 + 3 + 8)]
