"""Weights that are held: the pull by hand, and frozen rows bit for bit. Layouts: tests/layouts/test_variants.py."""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from mmmoe_pretrain.checkpoint.state import ShardedState, model_key, optimizer_key
from mmmoe_pretrain.config import OptimizerConfig
from mmmoe_pretrain.engines.base import Progress
from mmmoe_pretrain.engines.hold import pull_, pull_before_updates, rows_of
from mmmoe_pretrain.parallel.layout import resolve_layout
from mmmoe_pretrain.parallel.mesh import destroy_groups
from mmmoe_pretrain.parallel.runtime import process_group
from tests.distributed import run_ranks
from tests.layouts.cases import ALONE, LEARNING_RATE, TWO_MICROBATCHES, Case
from tests.layouts.train import build, microbatches_of

EXPERTS = "mmmoe.trunk.blocks.1.ffn.experts.up"
EMBEDDER = "mmmoe.modality_embedding.image"


def with_hold(**hold: Any) -> Case:
    optimizer = {"eps": 1e-4, "kind": "adamw", "average": 0.5, "hold": hold}
    return dataclasses.replace(ALONE, optimizer=optimizer, train=TWO_MICROBATCHES)


FROZEN = with_hold(frozen=[f"{EXPERTS}[1:3]", "mmmoe.modality_embedding.*", "tasks.contrastive.*"])
PULLED = with_hold(strength=2.0)
KEPT = ("exp_avg", "exp_avg_sq")


def test_the_pull_is_the_minimum_of_distance_and_penalty() -> None:
    """Of (w - 2)^2 / 2 + c (w - 1)^2 / 2: with c = 0 it stays, with c = 1 it is half way, with c = 3 a quarter of the
    way is left; a penalty without bound ends at the anchor and not behind it."""
    weights = torch.full((4,), 2.0)
    pull_(weights, torch.ones(4), torch.tensor([0.0, 1.0, 3.0, 1e30]), factor=1.0)
    assert weights.tolist() == [2.0, 1.5, 1.25, 1.0]


def test_with_sgd_a_run_ends_at_the_minimum_of_its_loss_and_ewc_s_penalty() -> None:
    """Of h2 (w - b)^2 / 2 + strength h1 (w - a)^2 / 2, the Fisher information h1 of the run before and its weights a:
    (h2 b + strength h1 a) / (h2 + strength h1). What the run before did not use, h1 = 0, is b. With steps that
    are not small the strength is divided by 1 + c, with c of at most 0.05, which moves the end by less than 0.01."""
    a, b = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([-1.0, -1.0, -1.0])
    h1, h2, strength = torch.tensor([0.0, 2.0, 10.0]), torch.tensor([1.0, 1.0, 0.5]), 0.5
    weights = torch.nn.Parameter(a.clone())
    optimizer = torch.optim.SGD([weights], lr=1e-2)
    optimizer.state[weights] = {"anchor": a, "importance": h1}
    pull_before_updates(optimizer, strength)
    for _ in range(2000):
        weights.grad = h2 * (weights.detach() - b)
        optimizer.step()
    expected = (h2 * b + strength * h1 * a) / (h2 + strength * h1)
    torch.testing.assert_close(weights.detach(), expected, atol=1e-2, rtol=0)
    assert expected.tolist() == pytest.approx([-1.0, 0.0, 9 / 11])
    weights.grad = None  # as in a step that is skipped
    before = weights.detach().clone()
    optimizer.step()
    assert torch.equal(before, weights.detach())


State = dict[str, np.ndarray]


def whole(state: ShardedState) -> State:
    """Copies: one process holds all of each."""
    return {key: piece.float().numpy().copy() for key, held in state.items() for piece in held.pieces.values()}


def by_engine(case: Case, before: Sequence[str] = ()) -> tuple[State, State]:
    """The state before and after two steps. Moments are not 0 at first, as where freezing begins in a later run, and
    importance is 0 but of ``before``, where it is 4, and the anchor is a little off."""
    with process_group(timeout_minutes=1) as device:
        engine = build(case, device)
        first = {key: held.clone() for key, held in engine.export_state().items()}
        for key, held in first.items():
            for piece in held.pieces.values():
                if key.endswith(KEPT):
                    piece.fill_(0.01)
                elif key.endswith("/importance"):
                    piece.fill_(4.0 * (key.split("/")[1] in before))
                elif key.endswith("/anchor"):
                    piece.add_(0.1)
        engine.import_state(first, Progress(1, 1))
        loaded = whole(engine.export_state())
        for step in range(2):
            engine.step(microbatches_of(engine, step), LEARNING_RATE)
        after = whole(engine.export_state())
        destroy_groups()
    return loaded, after


def test_frozen_rows_stay_bit_for_bit_and_the_others_learn() -> None:
    ((loaded, after),) = run_ranks(1, by_engine, FROZEN)
    old, new = loaded[model_key(EXPERTS)], after[model_key(EXPERTS)]
    assert np.array_equal(old[1:3], new[1:3])
    assert not (old[[0, 3]] == new[[0, 3]]).all(axis=(1, 2)).any()
    for kept in KEPT:  # of rows that are frozen they are 0 from the loading on
        moments = [state[optimizer_key(EXPERTS, kept)] for state in (loaded, after)]
        assert not any(each[1:3].any() for each in moments) and all(each[0].any() for each in moments)
    frozen = [key for key in loaded if key.startswith((model_key(EMBEDDER[:-5]), model_key("tasks.contrastive.")))]
    assert len(frozen) > 3 and all(np.array_equal(loaded[key], after[key]) for key in frozen)
    free = model_key("mmmoe.trunk.blocks.3.attention.qkv.weight")
    assert not np.array_equal(loaded[free], after[free])


def test_what_has_no_importance_is_not_pulled_and_the_anchor_stays() -> None:
    """Two pulls of c = 4 * 2 * the learning rate to an anchor that is 0.1 off, beside updates of at most about the
    learning rate, which the pull of the step before changes by less than a tenth."""
    free, held = (run_ranks(1, by_engine, PULLED, names)[0][1] for names in ((), (EXPERTS,)))
    other = model_key("mmmoe.trunk.blocks.3.attention.qkv.weight")
    np.testing.assert_allclose(free[other], held[other], atol=LEARNING_RATE / 10)
    before, anchor = free[model_key(EXPERTS)], free[optimizer_key(EXPERTS, "anchor")]
    moved = held[model_key(EXPERTS)] - before
    share = 1 - (1 + 4 * 2.0 * LEARNING_RATE) ** -2
    np.testing.assert_allclose(moved, share * (anchor - before), atol=LEARNING_RATE / 10)
    assert np.abs(moved).mean() > LEARNING_RATE
    assert np.array_equal(anchor, held[optimizer_key(EXPERTS, "anchor")])


def fails_with(hold: dict[str, Any]) -> str:
    case = copy.deepcopy(with_hold(**hold))
    with process_group(timeout_minutes=1) as device:
        try:
            build(case, device)
        except ValueError as error:
            return str(error)
        finally:
            destroy_groups(after_error=True)
    return ""


def test_names_and_rows_that_are_not_there_are_refused() -> None:
    assert "no parameter has such a name" in run_ranks(1, fails_with, {"frozen": ["mmmoe.trunk.no.*"]})[0]
    with pytest.raises(ValueError, match=r"experts.up has rows 0 to 3; choose some of these"):
        rows_of(f"{EXPERTS}[2:5]", EXPERTS, (4, 8, 16))
    assert rows_of(f"{EXPERTS}[2:]", EXPERTS, (4, 8, 16)) == range(2, 4)
    with pytest.raises(ValueError, match="holds nothing; give one of them"):
        OptimizerConfig(hold={})
    with pytest.raises(ValueError, match="is not the name of a parameter"):
        OptimizerConfig(hold={"frozen": ["mmmoe.a[1]"]})


def test_masters_in_files_are_refused() -> None:
    case = dataclasses.replace(FROZEN, engine="deepspeed", zero_stage=3, parallel={"offload_optimizer": "nvme"})
    config = case.config()
    config = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"average": None})})
    with pytest.raises(ValueError, match=r"optimizer\.hold with parallel.offload_optimizer nvme"):
        resolve_layout(config, 1)
