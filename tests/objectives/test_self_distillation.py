"""Self-distillation: the teacher's weights and answers, the centre and the loss, against plain torch."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmmoe_pretrain.models.pretraining import PretrainingModel
from mmmoe_pretrain.objectives import step_counts
from mmmoe_pretrain.parallel.runtime import process_group
from tests.distributed import run_ranks
from tests.layouts.cases import ALONE, GLOBAL, LEARNING_RATE, Case, global_microbatch
from tests.layouts.train import build, microbatches_of, torch_optimizer
from tests.support import objectives, tiny_config

PAIR = {"kind": "self_distillation", "pairs": {"image-text": 1.0}}
KEPT, STEPS = 0.9, 3
CASE = dataclasses.replace(
    ALONE,
    optimizer={"eps": 1e-4, "average": [[0, KEPT], [1, 0.5]]},
    objectives={"taught": {**PAIR, "prototypes": 12, "center_momentum": 0.75}},
    train={"num_microbatches": 2, "global_batch_size": 2 * len(GLOBAL)},
)


def by_engine(case: Case) -> list[dict[str, float]]:
    with process_group(timeout_minutes=1) as device:
        engine = build(case, device)
        return [engine.step(microbatches_of(engine, step), LEARNING_RATE).losses for step in range(STEPS)]


def answers(model: PretrainingModel, batch: Any) -> dict[str, Tensor]:
    """Cosines [B, K] with the prototypes, of images and texts."""
    prototypes = F.normalize(model.tasks["taught"].get_parameter("prototypes"), dim=-1)
    outputs, _ = model.mmmoe(batch)
    return {side: outputs.features[side] @ prototypes.t() for side in ("image", "text")}


def by_hand(case: Case) -> list[float]:
    """The loss of each step with a second model as the teacher."""
    config = case.config()
    model = PretrainingModel(config)
    teacher, optimizer = copy.deepcopy(model), torch_optimizer(model, config)
    center = {"image": torch.zeros(12), "text": torch.zeros(12)}
    found = []
    for step in range(STEPS):
        batches = [global_microbatch(config, 2 * step + i, 0, 1) for i in range(2)]
        counts = step_counts(batches, model.objectives, None, torch.device("cpu"))
        parts: list[Tensor] = []
        logits_of: dict[str, list[Tensor]] = {"image": [], "text": []}
        model.begin_step(step, counts)
        reports = []
        for batch in batches:
            both = (batch.pooled["image"] >= 0) & (batch.pooled["text"] >= 0)
            with torch.no_grad():
                taught = answers(teacher, batch)
            for side, logits in taught.items():
                logits_of[side].append(logits[batch.pooled[side] >= 0])
            sharp = {side: F.softmax((logits - center[side]) / 0.04, dim=-1) for side, logits in taught.items()}
            mine = {side: F.log_softmax(logits / 0.1, dim=-1) for side, logits in answers(model, batch).items()}
            there = -(sharp["text"] * mine["image"]).sum(-1)[both].sum()
            back = -(sharp["image"] * mine["text"]).sum(-1)[both].sum()
            parts.append(0.5 * (there + back).detach() / counts.terms["taught/image-text"])
            model.tasks["taught"]._taught = [torch.stack([sharp["image"], sharp["text"]], dim=1)]
            loss, report = model(batch)
            loss.backward()
            reports.append(report)
        found.append(float(sum(parts)))
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        model.end_step(tuple(sum(layer[1:], layer[0]) for layer in zip(*(r.routing for r in reports), strict=True)))
        kept = KEPT if step == 0 else 0.5
        with torch.no_grad():
            for old, new in zip(teacher.parameters(), model.parameters(), strict=True):
                old.mul_(kept).add_(new, alpha=1 - kept)
            for old, new in zip(teacher.buffers(), model.buffers(), strict=True):
                old.copy_(new)
        for side, logits in logits_of.items():
            center[side] = 0.75 * center[side] + 0.25 * torch.cat(logits).mean(0)
    return found


@pytest.mark.timeout(120)
def test_the_engine_trains_as_two_models_by_hand() -> None:
    expected = by_hand(CASE)
    (steps,) = run_ranks(1, by_engine, CASE, timeout=90)
    assert [losses["taught/image-text"] for losses in steps] == pytest.approx(expected, rel=1e-5)
    assert expected[-1] != pytest.approx(expected[0], rel=1e-3)


def test_a_teacher_needs_the_average_of_the_weights() -> None:
    with pytest.raises(ValueError, match=r"objectives\.taught learns from the model with the average"):
        tiny_config(Path("unused"), objectives={**objectives(), "taught": PAIR})
    tiny_config(Path("unused"), objectives={**objectives(), "taught": PAIR}, optimizer={"average": 0.996})
    with pytest.raises(ValueError, match=r"at most 1; e\.g\. 0\.996"):
        tiny_config(Path("unused"), optimizer={"average": 1.5})


def test_the_centre_is_kept_where_a_step_is_skipped_or_held_out() -> None:
    config = CASE.config()
    model = PretrainingModel(config)
    batch = global_microbatch(config, 0, 0, 1)
    model.begin_step(0, step_counts([batch], model.objectives, None, torch.device("cpu")))
    for committed in (False, True):
        model.begin_look("teaching")
        with torch.no_grad():
            model(batch)
        model.end_look()
        _, report = model(batch)
        before = model.tasks["taught"].get_buffer("center").clone()
        model.end_step(report.routing if committed else None)
        assert torch.equal(before, model.tasks["taught"].get_buffer("center")) is not committed
