"""Distillation from the weights that a run began with, against a second model of plain torch."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.models.pretraining import PretrainingModel
from mmmoe_pretrain.objectives import step_counts
from mmmoe_pretrain.parallel.runtime import process_group
from tests.distributed import run_ranks
from tests.layouts.cases import ALONE, LEARNING_RATE, TWO_MICROBATCHES, Case, global_microbatch
from tests.layouts.train import build, microbatches_of, torch_optimizer
from tests.support import objectives, tiny_config

KEPT = {"kind": "distillation", "representations": ["text", "image"], "weight": 5.0}
STEPS = 3
CASE = dataclasses.replace(
    ALONE,
    optimizer={"kind": "adamw", "eps": 1e-4, "average": 1.0},
    objectives={"kept": KEPT},
    train=TWO_MICROBATCHES,
)


def by_engine(case: Case) -> list[dict[str, float]]:
    with process_group(timeout_minutes=1) as device:
        engine = build(case, device)
        return [engine.step(microbatches_of(engine, step), LEARNING_RATE).losses for step in range(STEPS)]


def distance(model: PretrainingModel, teacher: PretrainingModel, batch: Batch, rep: str) -> Tensor:
    """The sum of half the squared distances of its unit vectors."""
    with torch.no_grad():
        old = teacher.mmmoe(batch)[0].features[rep]
    new = model.mmmoe(batch)[0].features[rep]
    return 0.5 * (new - old).square().sum(-1)[batch.pooled[rep] >= 0].sum()


def by_hand(case: Case) -> list[dict[str, float]]:
    config = case.config()
    model = PretrainingModel(config)
    teacher, optimizer, found = copy.deepcopy(model), torch_optimizer(model, config), []
    for step in range(STEPS):
        batches = [global_microbatch(config, 2 * step + i, 0, 1) for i in range(2)]
        counts = step_counts(batches, model.objectives, None, torch.device("cpu"))
        model.begin_step(step, counts)
        sums, reports = dict.fromkeys(("image", "text"), 0.0), []
        for batch in batches:
            loss, report = model(batch)  # without a teacher its own loss of this kind is 0, and so is the gradient
            total = loss
            for rep in sums:
                part = distance(model, teacher, batch, rep) * 5.0 / counts.terms[f"kept/{rep}"]
                sums[rep] += float(part.detach())
                total = total + part
            total.backward()
            reports.append(report)
        found.append(sums)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        model.end_step(tuple(sum(layer[1:], layer[0]) for layer in zip(*(r.routing for r in reports), strict=True)))
    return found


@pytest.mark.timeout(120)
def test_the_engine_trains_as_two_models_by_hand() -> None:
    """The first step begins at the teacher, so its distance is 0 up to rounding; routing is without randomness."""
    expected = by_hand(CASE)
    (steps,) = run_ranks(1, by_engine, CASE, timeout=90)
    for rep in ("image", "text"):
        losses = [step[f"kept/{rep}"] for step in steps]
        assert losses == pytest.approx([step[rep] for step in expected], rel=2e-4, abs=1e-6)
        assert abs(losses[0]) < 1e-6 < losses[1]


def test_it_needs_an_average_and_representations_that_are_there() -> None:
    with pytest.raises(ValueError, match=r"objectives\.kept learns from the model with the average"):
        tiny_config(Path("unused"), objectives={**objectives(), "kept": KEPT})
    with pytest.raises(ValueError, match=r"objectives\.kept\.representations: there is no taste; there are"):
        tiny_config(
            Path("unused"),
            objectives={**objectives(), "kept": {**KEPT, "representations": "taste"}},
            optimizer={"average": 1.0},
        )
