"""Tasks that enter and leave: their heads and moments, under engines that hold them in different ways."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from mmmoe_pretrain.config import OptimizerConfig
from mmmoe_pretrain.engines import deepspeed as deepspeed_engine
from mmmoe_pretrain.engines.idle import Corrections, correct_first
from mmmoe_pretrain.models.pretraining import PretrainingModel
from mmmoe_pretrain.models.task_parameters import own_parameters
from mmmoe_pretrain.parallel.mesh import destroy_groups
from mmmoe_pretrain.parallel.runtime import process_group
from tests.distributed import run_ranks
from tests.engines.test_skipped_steps import step
from tests.layouts.cases import LEARNING_RATE, TWO_MICROBATCHES, Case
from tests.layouts.train import Held, build, held_by_name, microbatches_of

deepspeed_engine.prepare()  # before the first fork

HEAD = "mmmoe.language_heads.reader.weight"
READING = {"kind": "next_token", "parts": ["text"], "head": "reader",
           "weight": [[1, 0.0], [2, 1.0], [3, 1.0], [4, 0.0]]}  # fmt: skip
OPTIMIZER = {"kind": "adamw", "weight_decay": 0.5, "eps": 1e-8, "beta1": 0.9, "beta2": 0.999}


def case(engine: str, zero_stage: int, precision: str = "fp32") -> Case:
    tasks = {"reading": READING}
    return Case("", 1, engine, zero_stage, {}, precision, TWO_MICROBATCHES, objectives=tasks, optimizer=OPTIMIZER)


CASES = [case("megatron", 0), case("megatron", 1, "bf16"), case("deepspeed", 0), case("deepspeed", 1),
         case("deepspeed", 3, "bf16")]  # fmt: skip


def _seen(cases: list[Case]) -> list[list[dict[str, np.ndarray]]]:
    """Of each case and step: the head and its moments, before the first step too."""
    found = []
    with process_group(timeout_minutes=1) as device:
        for each in cases:
            engine, seen = build(each, device), []
            for number in range(6):
                seen.append({kind or "weight": _numbers(held_by_name(engine, kind)) for kind in _KINDS})
                engine.step(microbatches_of(engine, number), LEARNING_RATE)
            seen.append({kind or "weight": _numbers(held_by_name(engine, kind)) for kind in _KINDS})
            found.append(seen)
            destroy_groups()
    return found


_KINDS = (None, "exp_avg", "exp_avg_sq")


def _numbers(held: Held) -> np.ndarray:
    return np.concatenate([numbers.reshape(-1) for _, numbers in held[HEAD][1]])


def test_a_head_stands_still_without_weight_and_begins_as_in_a_new_run() -> None:
    """At the first step with weight, update 3, Adam's moments would be (1 - beta) g and (1 - beta) g^2 over
    1 - beta^3; corrected they are g and g^2 at any count, so that the step is the learning rate."""
    for each, seen in zip(CASES, run_ranks(1, _seen, CASES)[0], strict=True):
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            for one, other in ((0, 1), (1, 2), (4, 5), (5, 6)):  # idle in steps 0, 1, 4 and 5
                np.testing.assert_array_equal(seen[one][kind], seen[other][kind], err_msg=f"{each.name} {kind}")
        assert not seen[2]["exp_avg"].any()
        first, second = seen[3]["exp_avg"] / (1 - 0.9**3), seen[3]["exp_avg_sq"] / (1 - 0.999**3)
        np.testing.assert_allclose(first**2, second, rtol=1e-3, atol=1e-14)
        decayed = Corrections.at(3, OptimizerConfig(**OPTIMIZER))
        assert decayed is not None
        moved = seen[3]["weight"] - seen[2]["weight"] * (1 - LEARNING_RATE * 0.5 / decayed.step)
        clear = np.abs(first) > 1e-5  # eps is 1e-8
        assert clear.mean() > 0.5
        np.testing.assert_allclose(moved[clear], -LEARNING_RATE * np.sign(first[clear]), rtol=5e-3)
        assert (seen[4]["weight"] != seen[3]["weight"]).any(), each.name


def _after_a_skip(cases: list[Case]) -> list[list[dict[str, np.ndarray]]]:
    """Of each case: the head's moments before and after the first update that it takes part in."""
    found = []
    with process_group(timeout_minutes=1) as device:
        for each in cases:
            engine, seen = build(each, device), []
            for number in range(4):
                step(engine, number, bad=number == 2)
                seen.append({kind: _numbers(held_by_name(engine, kind)) for kind in _KINDS[1:]})
            found.append(seen[2:])
            destroy_groups()
    return found


def test_a_head_begins_as_in_a_new_run_where_the_step_at_which_it_enters_is_skipped() -> None:
    """Step 2 has a NaN, so step 3 has update 3, and the head's first gradient."""
    for before, after in run_ranks(1, _after_a_skip, [case("megatron", 0), case("deepspeed", 1)])[0]:
        assert not before["exp_avg"].any()
        first, second = after["exp_avg"] / (1 - 0.9**3), after["exp_avg_sq"] / (1 - 0.999**3)
        assert first.any()
        np.testing.assert_allclose(first**2, second, rtol=1e-3, atol=1e-14)  # fp32


def test_corrections_leave_what_had_a_gradient_before() -> None:
    by = Corrections.at(1000, OptimizerConfig(beta1=0.9, beta2=0.999))
    assert by is not None and by.step == pytest.approx(0.1 / math.sqrt(0.001 / (1 - 0.999**1000)), rel=1e-6)
    before = [torch.tensor([1.0, 1.0]), torch.tensor([0.0, 0.5]), torch.tensor([0.0, 0.25])]
    now = [torch.tensor([2.0, 2.0]), torch.tensor([0.1, 0.6]), torch.tensor([0.001, 0.3])]
    correct_first(now, before, by)
    torch.testing.assert_close(now[0], torch.tensor([1 + 1 / by.step, 2.0]))
    torch.testing.assert_close(now[1], torch.tensor([1.0 * (1 - 0.9**1000), 0.6]))
    torch.testing.assert_close(now[2], torch.tensor([1 - 0.999**1000, 0.3]))
    assert Corrections.at(1, OptimizerConfig(kind="sgd")) is None


def test_what_other_tasks_use_is_not_a_task_s_own() -> None:
    config = case("megatron", 0).config()
    model = PretrainingModel(config)
    names = {parameter: name for name, parameter in model.named_parameters()}
    own = {names[parameter] for parameter in own_parameters(model, {"reading"})}
    assert own == {HEAD}
    own = {names[parameter] for parameter in own_parameters(model, {"contrastive"})}
    pairs = {f"tasks.contrastive.log_scale.{pair}" for pair in ("image-text", "audio-text", "image-audio")}
    assert own == pairs | {f"mmmoe.joint_heads.{name}.weight" for name in ("image", "audio", "text")}
    own = {names[parameter] for parameter in own_parameters(model, {"captioning"})}
    assert own == {"mmmoe.language_head.weight"}


def test_rows_of_routers_and_learned_weights_are_a_task_s_own() -> None:
    train = {**TWO_MICROBATCHES, "loss_weighting": "uncertainty"}
    config = dataclasses.replace(case("megatron", 0), moe={"task_conditioned": True}, train=train).config()
    model = PretrainingModel(config)
    names = {parameter: name for name, parameter in model.named_parameters()}
    rows = {f"mmmoe.trunk.blocks.{layer}.ffn.router.task_embedding.reading" for layer in (1, 3)}
    own = {names[parameter] for parameter in own_parameters(model, {"reading"})}
    assert own == {HEAD, "loss_weighting.log_variance.reading", *rows}
