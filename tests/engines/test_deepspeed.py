"""The DeepSpeed engine where the parity matrix (tests/layouts) does not reach: state before the first step, bounds of
parameters, bf16 beside the other engine, and its settings."""

import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmmoe_pretrain.engines import deepspeed as deepspeed_engine
from mmmoe_pretrain.engines.base import Progress
from mmmoe_pretrain.engines.deepspeed_config import deepspeed_json
from mmmoe_pretrain.engines.deepspeed_modules import compute_in_half
from mmmoe_pretrain.models.pretraining import PretrainingModel
from mmmoe_pretrain.objectives.pairs import MAX_LOG_SCALE
from mmmoe_pretrain.parallel.groups import SINGLE
from mmmoe_pretrain.parallel.mesh import destroy_groups
from mmmoe_pretrain.parallel.runtime import process_group
from tests.distributed import run_ranks
from tests.layouts.cases import Case, config_of
from tests.layouts.train import build, microbatches_of, start_ranks

deepspeed_engine.prepare()  # before the first fork


def first_steps_of_every_stage() -> list[tuple[bool, list[float]]]:
    """Are all moments zeros, and the temperatures after a step of no learning from above their bound."""
    found = []
    with process_group(timeout_minutes=1) as device:
        for stage in range(4):
            engine = build(Case("DP2", 2, "deepspeed", stage), device)
            state = {name: tensor.clone() for name, tensor in engine.export_state().items()}
            moments = [p for key, held in state.items() if key.startswith("optimizer/") for p in held.pieces.values()]
            zeros = bool(moments) and all(bool((piece == 0).all()) for piece in moments)
            scales = [key for key in state if key.startswith("model/tasks.contrastive.log_scale")]
            for piece in (piece for key in scales for piece in state[key].pieces.values()):
                piece.fill_(5.0)
            engine.import_state(state, Progress(0, 0))
            engine.step(microbatches_of(engine, 0), learning_rate=0.0)
            after = engine.export_state()
            found.append((zeros, [p.item() for key in scales for p in after[key].pieces.values()]))
            destroy_groups()
    return found


def test_moments_begin_as_zeros_and_the_bound_of_temperatures_reaches_the_master_weights() -> None:
    by_rank = run_ranks(2, first_steps_of_every_stage)
    for stage, ranks in enumerate(zip(*by_rank, strict=True)):
        assert all(zeros for zeros, _ in ranks), stage
        scales = [scale for _, found in ranks for scale in found]
        assert len(scales) == (6 if stage == 0 else 3)  # stage 0 holds everything on both ranks
        assert scales == pytest.approx([MAX_LOG_SCALE] * len(scales)), stage


BF16 = [Case("one process", 1, "megatron", 0, {}, "bf16"),
        *(Case("one process", 1, "deepspeed", stage, {}, "bf16") for stage in range(4)),
        Case("one process", 1, "deepspeed", 3, {}, "bf16", {"recompute": "blocks"})]  # fmt: skip


def test_bf16_is_the_arithmetic_of_the_other_engine() -> None:
    """In one process no sum has another order: masters, copies and fp32 gradients agree to their last bits."""
    megatron, *others = start_ranks(1, [(case, 2) for case in BF16], 90)[0]
    for case, found in zip(BF16[1:], others, strict=True):
        totals = [step["total"] for step in found.losses]
        np.testing.assert_allclose(totals, [step["total"] for step in megatron.losses], rtol=1e-5, err_msg=case.name)
        np.testing.assert_allclose(found.norms, megatron.norms, rtol=1e-5, err_msg=case.name)


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
    ({"zero_optimization": {"reduce_bucket_size": -1}}, r"zero_optimization.reduce_bucket_size: .* \(got -1\)"),
    ({"zero_optimization": 3}, r"zero_optimization: .* dictionary .*got 3"),
    ({"wall_clock_breakdown": "yes"}, r"wall_clock_breakdown: .* boolean \(got 'yes'\)"),
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
    with pytest.raises(ValueError, match=r"pip install 'deepspeed>=0.19.8'"):
        deepspeed_engine.prepare()
