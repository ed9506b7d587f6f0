"""The DeepSpeed engine where the parity matrix does not reach: minimal shards, offload,
recomputation, bf16 beside the other engine, state that moves between layouts, and its settings.

ZeRO-3 keeps parameters of few elements whole, which would be all of them here, so this is switched off.
"""

import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mmmoe_pretrain.checkpoint.state import ShardedState
from mmmoe_pretrain.engines import deepspeed as deepspeed_engine
from mmmoe_pretrain.engines.apply import build_engine
from mmmoe_pretrain.engines.base import Engine, Progress
from mmmoe_pretrain.engines.deepspeed_config import deepspeed_json
from mmmoe_pretrain.engines.deepspeed_modules import compute_in_half
from mmmoe_pretrain.models.pretraining import PretrainingModel
from mmmoe_pretrain.objectives.contrastive import MAX_LOG_SCALE
from mmmoe_pretrain.parallel.groups import SINGLE
from mmmoe_pretrain.parallel.mesh import destroy_groups
from mmmoe_pretrain.parallel.runtime import process_group
from tests.distributed import groups_of, run_ranks
from tests.layouts.cases import LEARNING_RATE, MICROBATCHES, Case, config_of, global_microbatch
from tests.layouts.matrix import compare
from tests.layouts.train import Outcome, train_alone, train_case

deepspeed_engine.prepare()  # before the first fork

STEPS = 2
NONE_WHOLE = {"zero_optimization": {"param_persistence_threshold": 0}}


def variant(layout: str, ranks: int, stage: int, train: dict[str, Any] | None = None, cached: bool = False,
            **parallel: Any) -> Case:  # fmt: skip
    own = NONE_WHOLE if stage == 3 else {}
    return Case(layout, ranks, "deepspeed", stage, {"deepspeed": own, **parallel}, train=train or {}, cached=cached)


EP2 = {"expert_parallel_size": 2}
OVERLAP = {"zero_optimization": {"overlap_comm": True, "reduce_bucket_size": 1000, "round_robin_gradients": True}}
STAGES = [
    variant("stage 0, experts spread", 2, 0, **EP2),
    variant("stage 1, small buckets that overlap", 2, 1, deepspeed=OVERLAP),
    variant("stage 2, small buckets that overlap, experts spread", 2, 2, deepspeed=OVERLAP, **EP2),
    variant("stage 3, blocks recomputed, experts spread", 2, 3, {"recompute": "blocks"}, **EP2),
]
LEVERS = [
    variant("stage 1 offloaded", 2, 1, offload_optimizer="cpu", **EP2),
    variant("stage 2 offloaded", 2, 2, offload_optimizer="cpu"),
    variant("stage 3 offloaded", 2, 3, offload_optimizer="cpu", **EP2),
    variant("stage 3, matrices cut", 2, 3, tensor_parallel_size=2),
    variant("stage 0, matrices and tokens cut", 2, 0, tensor_parallel_size=2, sequence_parallel=True),
]
FOUR_RANKS = [
    variant("stage 3, experts and matrices cut", 4, 3, tensor_parallel_size=2, **EP2),
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return run_ranks(1, train_alone, tmp_path_factory.mktemp("alone"), STEPS)[0]


def train_all(cases: list[Case], root: Path) -> list[Outcome]:
    with process_group(timeout_minutes=1) as device:
        return [train_case(case, root, STEPS, device) for case in cases]


@pytest.mark.parametrize("cases", [STAGES, LEVERS, FOUR_RANKS], ids=["stages", "levers", "4 ranks"])
def test_every_stage_and_lever_equals_one_process(tmp_path: Path, alone: Outcome, cases: list[Case]) -> None:
    assert_equal(cases, tmp_path, alone)


def assert_equal(cases: list[Case], root: Path, alone: Outcome) -> None:
    ranks = run_ranks(cases[0].ranks, train_all, cases, root, timeout=110)
    comparisons = [compare(case, [rank[i] for rank in ranks], alone) for i, case in enumerate(cases)]
    assert not [comparison for comparison in comparisons if not comparison.passed]


def test_a_cached_contrastive_loss_is_that_of_the_other_engine(tmp_path: Path) -> None:
    alone = run_ranks(1, train_all, [Case("alone", 1, "megatron", 0, cached=True)], tmp_path)[0][0]
    assert_equal([variant(f"stage {stage}", 2, stage, cached=True, **EP2) for stage in (1, 3)], tmp_path, alone)


# State


def engine_of(root: Path, device: torch.device, engine: str, stage: int, train: dict[str, Any] | None = None,
              **degrees: int) -> Engine:  # fmt: skip
    own = {"deepspeed": NONE_WHOLE} if engine == "deepspeed" and stage == 3 else {}
    parallel = {"engine": engine, "zero_stage": stage, "expert_parallel_size": 1, **degrees, **own}
    config = config_of(root, parallel, train=train)
    return build_engine(config, groups_of(config.parallel, config.moe.group_sizes), device)


def steps(engine: Any, first: int, count: int) -> list[tuple[float, float]]:
    groups, config, found = engine.groups, engine.config, []
    for step in range(first, first + count):
        batches = [global_microbatch(config, step * MICROBATCHES + a, groups.data_rank, groups.data_size)
                   for a in range(MICROBATCHES)]  # fmt: skip
        result = engine.step(batches, LEARNING_RATE)
        found.append((result.losses["total"], result.grad_norm))
    return found


def whole_state(state: ShardedState) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint, put together from the pieces of all ranks."""
    mine = {
        key: (s.shape, [(offset, piece.numpy()) for offset, piece in s.pieces.items()]) for key, s in state.items()
    }
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    found = {}
    for key, (shape, _) in mine.items():
        found[key] = np.full(shape, np.nan, dtype=np.float32)
        for rank in ranks:
            for offset, numbers in rank[key][1]:
                found[key][tuple(slice(o, o + n) for o, n in zip(offset, numbers.shape, strict=True))] = numbers
    return found


def cut_for(engine: Engine, whole: dict[str, np.ndarray]) -> ShardedState:
    """The pieces of ``whole`` that this rank of ``engine`` holds."""
    state = {name: shard.clone() for name, shard in engine.export_state().items()}
    for key, shard in state.items():
        for offset, piece in shard.pieces.items():
            here = tuple(slice(o, o + n) for o, n in zip(offset, piece.shape, strict=True))
            piece.copy_(torch.from_numpy(whole[key][here]))
    return state


HANDOVER = [("deepspeed", 1, EP2), ("deepspeed", 3, {}), ("megatron", 1, EP2), ("deepspeed", 3, EP2),
            ("deepspeed", 2, {}), ("deepspeed", 0, EP2), ("megatron", 1, EP2)]  # fmt: skip


def hand_over(root: Path) -> dict[str, Any]:
    """One step under each engine in turn, and the same steps under one alone. The moments that an engine was given
    show in the loss of the next."""
    with process_group(timeout_minutes=1) as device:
        uninterrupted = steps(engine_of(root, device, "deepspeed", 1), 0, len(HANDOVER))
        destroy_groups()
        found, whole, complete = [], None, True
        for turn, (engine, stage, degrees) in enumerate(HANDOVER):
            current = engine_of(root, device, engine, stage, **degrees)
            if whole is not None:
                current.import_state(cut_for(current, whole), Progress(turn, turn))
                again = whole_state(current.export_state())
                complete &= all(np.array_equal(again[key], numbers) for key, numbers in whole.items())
            found += steps(current, turn, 1)
            whole = whole_state(current.export_state())
            complete &= not any(np.isnan(numbers).any() for numbers in whole.values())
            destroy_groups()
    return {"found": found, "uninterrupted": uninterrupted, "complete": complete}


def test_state_goes_from_stage_to_stage_and_engine_to_engine(tmp_path: Path) -> None:
    """A run that changes hands after every step is the run that never does: its losses differ by the order
    of fp32 sums alone. A lost moment or a wrong step count changes them in the third decimal."""
    for rank in run_ranks(2, hand_over, tmp_path):
        assert rank["complete"]
        np.testing.assert_allclose(rank["found"], rank["uninterrupted"], rtol=1e-4)


def before_the_first_step(root: Path) -> list[bool]:
    found = []
    with process_group(timeout_minutes=1) as device:
        for stage in range(4):
            whole = whole_state(engine_of(root, device, "deepspeed", stage).export_state())
            found.append(all((numbers == 0).all() for key, numbers in whole.items() if key.startswith("optimizer/")))
            destroy_groups()
    return found


def test_moments_are_zeros_before_the_first_step(tmp_path: Path) -> None:
    assert run_ranks(2, before_the_first_step, tmp_path)[0] == [True] * 4


def temperatures_of_a_step_from_above_the_bound(root: Path) -> list[float]:
    found = []
    with process_group(timeout_minutes=1) as device:
        for stage in range(4):
            engine: Any = engine_of(root, device, "deepspeed", stage)
            whole = whole_state(engine.export_state())
            names = [key for key in whole if key.startswith("model/tasks.contrastive.log_scale")]
            whole |= {name: np.full(1, 5.0, dtype=np.float32) for name in names}
            engine.import_state(cut_for(engine, whole), Progress(0, 0))
            batch = global_microbatch(engine.config, 0, engine.groups.data_rank, engine.groups.data_size)
            engine.step([batch], learning_rate=0.0)
            after = whole_state(engine.export_state())
            found += [float(after[name].item()) for name in names]
            destroy_groups()
    return found


def test_the_bound_of_temperatures_reaches_the_master_weights(tmp_path: Path) -> None:
    found = run_ranks(2, temperatures_of_a_step_from_above_the_bound, tmp_path)[0]
    assert len(found) == 4 * 3
    assert found == pytest.approx([MAX_LOG_SCALE] * len(found))


# bf16


BF16 = [("megatron", 0, "none"), *(("deepspeed", stage, "none") for stage in range(4)), ("deepspeed", 3, "blocks")]


def bf16_histories(root: Path) -> list[list[tuple[float, float]]]:
    found = []
    with process_group(timeout_minutes=1) as device:
        for engine, stage, recompute in BF16:
            train = {"precision": "bf16", "recompute": recompute}
            found.append(steps(engine_of(root, device, engine, stage, train), 0, STEPS))
            destroy_groups()
    return found


def test_bf16_is_the_arithmetic_of_the_other_engine(tmp_path: Path) -> None:
    """In one process no sum has another order: masters, copies and fp32 gradients agree to their last bits."""
    megatron, *others = run_ranks(1, bf16_histories, tmp_path)[0]
    for what, history in zip(BF16[1:], others, strict=True):
        np.testing.assert_allclose(history, megatron, rtol=1e-5, err_msg=str(what))


@pytest.mark.parametrize("cast_again", [True, False])
def test_the_backward_pass_casts_weights_anew_and_keeps_no_copies(cast_again: bool) -> None:
    model = PretrainingModel(config_of(Path(), {}))
    copies = []
    linear = model.mmmoe.trunk.blocks["0"].attention.qkv
    plain = linear.forward

    def remember(x: torch.Tensor) -> torch.Tensor:
        copies.append(weakref.ref(linear.weight))
        return plain(x)

    linear.forward = remember
    compute_in_half(model, torch.bfloat16, cast_again)
    x = torch.ones(3, linear.in_features, dtype=torch.bfloat16, requires_grad=True)
    y = linear(x)
    assert y.dtype == torch.bfloat16
    assert (copies[0]() is None) == cast_again
    y.sum().backward()
    assert linear.weight.dtype == linear.weight.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad[0], linear.weight.bfloat16().sum(0), rtol=0.02, atol=0.02)  # of 8 bits


# Settings


def settings(**parallel: Any) -> dict[str, Any]:
    return deepspeed_json(config_of(Path(), {"engine": "deepspeed", **parallel}), SINGLE, 1001)


def test_own_json_goes_over_what_our_keys_say() -> None:
    own = {"zero_optimization": {"stage3_prefetch_bucket_size": 7, "offload_optimizer": {"pin_memory": True}},
           "steps_per_print": 5}  # fmt: skip
    found = settings(zero_stage=3, offload_optimizer="cpu", deepspeed=own)
    assert found["zero_optimization"] == {
        "stage": 3, "reduce_bucket_size": 1002, "stage3_prefetch_bucket_size": 7,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
    }  # fmt: skip
    assert found["steps_per_print"] == 5
    assert found["gradient_clipping"] == 1.0


@pytest.mark.parametrize("own,message", [
    ({"zero_optimisation": {}}, r"unknown key 'zero_optimisation'; did you mean 'zero_optimization'"),
    ({"zero_optimization": {"reduce_buket_size": 5}},
     r"unknown key 'zero_optimization.reduce_buket_size'; did you mean 'reduce_bucket_size'"),
    ({"zero_optimization": {"offload_optimizer": {"pin": True}}},
     r"unknown key 'zero_optimization.offload_optimizer.pin'"),
    ({"zero_optimization": {"reduce_bucket_size": -1}}, r"zero_optimization: reduce_bucket_size: .* \(got -1\)"),
    ({"zero_optimization": 3}, r"zero_optimization: a section, not 3"),
    ({"wall_clock_breakdown": "yes"}, r"wall_clock_breakdown: bool wanted, got 'yes'"),
    ({"flops_profiler": {"enabel": True}}, r"unknown key 'flops_profiler.enabel'; did you mean 'enabled'"),
    ({"train_batch_size": 4}, r"train_batch_size is decided by another key: train.global_batch_size"),
    ({"zero_optimization": {"stage": 2}}, r"zero_optimization.stage is decided by another key: parallel.zero_stage"),
    ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
     r"device is decided by another key: parallel.offload_optimizer"),
    ({"bf16": {"enabled": True}}, r"bf16 is decided by another key: train.precision"),
    ({"gradient_cliping": 1.0}, r"'gradient_clipping' is meant, it is decided by another key: optimizer.clip_norm"),
    ({"no_such_thing": 1}, r"unknown key 'no_such_thing'; known keys: aio, "),
])  # fmt: skip
def test_a_wrong_key_or_value_is_refused_by_name(own: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(zero_stage=1, deepspeed=own)


def test_without_deepspeed_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # then its import raises
    with pytest.raises(ValueError, match=r"pip install 'mmmoe\[deepspeed\]'"):
        deepspeed_engine.prepare()
