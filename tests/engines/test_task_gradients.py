"""Gradients of tasks: PCGrad against the paper's algorithm on vectors, and a step by plain torch against engines."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.engines import deepspeed as deepspeed_engine
from mmmoe_pretrain.engines.task_gradients import cosines, pcgrad
from mmmoe_pretrain.models.pretraining import REST, PretrainingModel
from mmmoe_pretrain.models.task_parameters import SHARED
from mmmoe_pretrain.objectives import step_counts
from mmmoe_pretrain.parallel.layout import resolve_layout
from mmmoe_pretrain.parallel.mesh import destroy_groups
from mmmoe_pretrain.parallel.runtime import process_group
from tests.distributed import run_ranks
from tests.layouts.cases import GLOBAL, LAYOUTS, LEARNING_RATE, TWO_MICROBATCHES, Case, global_microbatch
from tests.layouts.train import Held, assemble, build, held_by_name, microbatches_of

deepspeed_engine.prepare()  # before the first fork

READING = {"reading": {"kind": "next_token", "parts": ["text"], "head": "reader", "weight": 2.0}}
CLASSES = {"classes": {"kind": "classify", "of": "text", "field": "subset", "classes": ["a", "b"]}}
BETA1 = 0.9


def by_hand(gradients: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Algorithm 1 of arXiv 2001.06782 on the vectors themselves."""
    projected = gradients.copy()
    for i in range(len(gradients)):
        for j in rng.permutation(len(gradients)):
            product = projected[i] @ gradients[j]
            if j != i and product < 0:
                projected[i] -= product / (gradients[j] @ gradients[j]) * gradients[j]
    return projected.sum(axis=0)


def test_two_gradients_at_an_obtuse_angle_by_hand() -> None:
    """(1, 0) and (-1, 1): each loses its part along the other, and (1/2, 1/2) and (0, 1) are left."""
    gradients = np.array([[1.0, 0.0], [-1.0, 1.0]])
    weights = pcgrad(gradients @ gradients.T, np.random.default_rng(0))
    np.testing.assert_allclose(weights @ gradients, [0.5, 1.5])
    assert cosines(gradients @ gradients.T, ["a", "b"]) == {"conflict/a-b": pytest.approx(-np.sqrt(0.5))}


def test_weights_from_inner_products_are_those_of_the_algorithm_on_vectors() -> None:
    for seed in range(20):
        gradients = np.random.default_rng(seed).normal(size=(4, 6))
        gradients[1] = gradients[0] * (seed % 2)  # equal, or none
        weights = pcgrad(gradients @ gradients.T, np.random.default_rng(seed))
        np.testing.assert_allclose(weights @ gradients, by_hand(gradients, np.random.default_rng(seed)), atol=1e-12)


def test_gradients_that_agree_stay_as_they_are_and_no_gradient_has_no_cosine() -> None:
    gram = np.array([[1.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 0.0]])
    assert pcgrad(gram, np.random.default_rng(0)).tolist() == [1, 1, 1]
    assert cosines(gram, ["a", "b", "c"]) == {"conflict/a-b": 0.5}


def case(layout: str, engine: str = "megatron", zero_stage: int = 0, combine: str = "pcgrad", **more: Any) -> Case:
    """``more``: settings of ``train``, and of ``parallel`` where they overlap."""
    ranks, degrees = LAYOUTS.get(layout, (1, {}))
    overlap = {key: more.pop(key) for key in list(more) if key.startswith("overlap")}
    train = {**TWO_MICROBATCHES, "log_every": 1, "task_gradients": {"combine": combine}, **more}
    tasks = {**READING, **CLASSES}
    return Case(layout, ranks, engine, zero_stage, {**degrees, **overlap}, train=train, objectives=tasks)


def plain(config: RunConfig) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The clipped gradient of the first step by plain torch, one backward pass for each task, on vectors; and the
    cosines."""
    model = PretrainingModel(config)
    batches = [global_microbatch(config, number, 0, 1) for number in range(config.train.num_microbatches)]
    counts = step_counts(batches, model.objectives, None, torch.device("cpu"))
    names = [name for name, _ in model.named_parameters()]
    found: dict[str, list[Tensor]] = {}
    for task in (*model.objectives, REST):
        model.begin_pass(task)
        model.begin_step(0, counts)
        for batch in batches:
            model(batch)[0].backward()
        found[task] = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
    shared = [name.startswith(SHARED) for name in names]
    flat = {
        task: torch.cat([g.reshape(-1) for g, its in zip(grads, shared, strict=True) if its]).double().numpy()
        for task, grads in found.items()
    }
    stacked = np.stack([flat[task] for task in model.objectives])
    rng = np.random.default_rng((config.seed, 0))
    settings = config.train.task_gradients
    assert settings is not None
    total = by_hand(stacked, rng) if settings.combine == "pcgrad" else stacked.sum(axis=0)
    total += flat[REST]
    summed = {name: sum(grads[i] for grads in found.values()) for i, name in enumerate(names)}
    place = 0
    for name, its in zip(names, shared, strict=True):
        if its:
            size = summed[name].numel()
            summed[name] = torch.from_numpy(total[place : place + size]).float().view_as(summed[name])
            place += size
    norm = torch.sqrt(sum(grad.double().square().sum() for grad in summed.values()))
    factor = min(1.0, config.optimizer.clip_norm / (float(norm) + 1e-6))
    return {name: factor * grad for name, grad in summed.items()}, cosines(
        stacked @ stacked.T, list(model.objectives)
    )


@dataclasses.dataclass(frozen=True)
class Seen:
    losses: dict[str, float]
    conflicts: dict[str, float]
    moments: Held


def _step(cases: list[Case]) -> list[Seen]:
    found = []
    with process_group(timeout_minutes=1) as device:
        for each in cases:
            engine = build(each, device)
            result = engine.step(microbatches_of(engine, 0, GLOBAL), LEARNING_RATE)
            cosine = {k: float(v) for k, v in result.balance.items() if k.startswith("conflict/")}
            found.append(Seen(result.losses, cosine, held_by_name(engine, "exp_avg")))
            destroy_groups()
    return found


ALONE = [case("one process"), case("one process", "deepspeed"), case("one process", combine="sum")]
GATHERED = {"overlap_grad_reduce": True, "overlap_param_gather": True}
TWO = [case("DP2"), case("DP2", zero_stage=1, **GATHERED), case("EP2"), case("TP2 + SP"), case("PP2"),
       case("PP2 x VPP2"), case("EP2", "deepspeed"), case("TP2", "deepspeed")]  # fmt: skip


@pytest.mark.parametrize(("ranks", "cases"), [(1, ALONE), (2, TWO)])
def test_the_gradient_of_a_step_is_that_of_plain_torch_at_any_layout(ranks: int, cases: list[Case]) -> None:
    """Moments after one step are (1 - beta1) times the clipped gradient. Bounds as in layouts/matrix.py: fp32 sums in
    another order; the projection divides by lengths that are far from 0 here."""
    expected = {its.train["task_gradients"]["combine"]: plain(its.alone.config()) for its in cases}
    outcomes = run_ranks(ranks, _step, cases, timeout=240)
    for number, each in enumerate(cases):
        gradients, conflicts = expected[each.train["task_gradients"]["combine"]]
        assert min(conflicts.values()) < -0.02, "nothing is projected"
        for rank in outcomes:
            assert rank[number].conflicts == pytest.approx(conflicts, abs=2e-5), each.name
        for name, gradient in gradients.items():
            held = assemble([rank[number].moments for rank in outcomes], name) / (1 - BETA1)
            np.testing.assert_allclose(held, gradient.numpy(), atol=2e-5, err_msg=f"{each.name}: {name}")


def test_what_cannot_keep_gradients_is_refused() -> None:
    for engine, stage in (("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3)):
        with pytest.raises(
            ValueError, match=f"engine {engine} with parallel.zero_stage {stage} has none to keep; use"
        ):
            resolve_layout(case("DP2", engine, stage).config(), 2)
    with pytest.raises(ValueError, match=r"every 3 is not a multiple of train.log_every 2, so .* use 4"):
        case("DP2", combine="sum", log_every=2, task_gradients={"every": 3}).config()
    with pytest.raises(ValueError, match="every 2 with combine: pcgrad, which measures in every step"):
        case("DP2", task_gradients={"every": 2, "combine": "pcgrad"}).config()


def test_a_run_of_one_task_has_nothing_to_compare() -> None:
    one = dataclasses.replace(case("DP2"), objectives={"captioning": {"kind": "next_token", "weight": 0}})
    with pytest.raises(ValueError, match="two objectives or more, and contrastive alone has a weight"):
        one.config()
