"""Recomputation changes what is kept and nothing else: losses and gradients are equal bit for bit.

They can be, since the backward pass repeats the forward pass with the same operations on the same
shapes, in an order that is the graph's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from mmmoe_pretrain.config import ParallelConfig
from mmmoe_pretrain.models.attention import StreamPlan
from mmmoe_pretrain.models.trunk import set_recompute
from mmmoe_pretrain.parallel.mesh import destroy_groups
from mmmoe_pretrain.parallel.runtime import process_group
from mmmoe_pretrain.parallel.stages import Stage
from tests.distributed import groups_of, run_ranks
from tests.models.stack import EXPERTS, FF, MODEL, D, Stack, make_input, outcome

MODES = ("none", "experts", "blocks")
MOE_CASES = {
    "noise": {"router": "noisy_top_k", "jitter": 0.1, "experts_per_token": 2},
    "all": {"capacity_factor": 0.8, "shared_expert_hidden_size": 8, "identity_experts": 1, "dispatch_chunks": 2,
            "experts_per_token": 2},
    "lending": {"experts_per_token": 2, "lending": {"threshold": 1, "min_rows": 1}, "expert_biases": True},
    "lending in grouped products": {"lending": {"threshold": 1, "min_rows": 1}, "expert_backend": "grouped_mm"},
    "top-1 in grouped products": {"expert_backend": "grouped_mm", "experts_per_token": 1},
    "grouped products with biases": {"expert_backend": "grouped_mm", "experts_per_token": 2, "expert_biases": True},
}  # fmt: skip


def assert_modes_agree(stack: Stack, inputs: list[tuple[Tensor, StreamPlan]]) -> None:
    plain, *others = (outcome(stack, mode, inputs) for mode in MODES)
    assert sum(bool(tensor.any()) for tensor in plain) > 10 or not inputs[0][1].num_valid
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


@pytest.mark.parametrize("case", MOE_CASES)
def test_one_process(case: str, tmp_path: Path) -> None:
    inputs = [make_input(tmp_path, draw, seed=draw) for draw in range(2)]
    assert_modes_agree(Stack(**MOE_CASES[case]), inputs)


def test_two_threads_with_small_experts_side_by_side(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(2)
    assert_modes_agree(Stack(num_experts=16, experts_per_token=2), [make_input(tmp_path)])


LAYOUTS = (
    ParallelConfig(expert_parallel_size=2), ParallelConfig(tensor_parallel_size=2, sequence_parallel=True)
)  # fmt: skip


def modes_of_rank(root: Path) -> None:
    with process_group(timeout_minutes=0.5):
        for layout in LAYOUTS:
            groups = groups_of(layout, EXPERTS)
            for settings in MOE_CASES.values():
                for samples in (6, 0) if groups.data_rank else (6, 6):  # the second time rank 1 has no token
                    inputs = [make_input(root, draw, groups.data_rank, samples) for draw in range(2)]
                    assert_modes_agree(Stack(groups, **settings), inputs)
            destroy_groups()


def test_two_ranks_that_communicate_within_a_block(tmp_path: Path) -> None:
    run_ranks(2, modes_of_rank, tmp_path)


def test_nothing_in_a_block_draws_from_the_global_generator(tmp_path: Path) -> None:
    stack = Stack(**MOE_CASES["noise"])
    before = torch.get_rng_state()
    stack.loss(*make_input(tmp_path)).backward()
    assert torch.equal(before, torch.get_rng_state())


def saved_bytes(forward: Callable[[], object], without: Iterable[Tensor]) -> int:
    """Bytes of the storages that ``forward`` saves, each counted once; those of ``without`` (parameters,
    which are there anyway) not at all. What it returns is held meanwhile, so no storage is freed."""
    known = {tensor.untyped_storage().data_ptr() for tensor in without}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        held = forward()
    del held
    return sum(found.values())


@pytest.mark.parametrize("backend", ["blocked", "grouped_mm"])
def test_bytes_that_are_kept_for_the_backward_pass(backend: str, tmp_path: Path) -> None:
    stack, (x_nD, plan) = Stack(experts_per_token=2, expert_backend=backend), make_input(tmp_path)
    kept = {}
    for mode in MODES:
        set_recompute(stack, mode)
        kept[mode] = saved_bytes(lambda: stack(x_nD, plan), stack.parameters())
    tokens, itemsize = plan.num_valid, 4
    first_products = (2 * tokens) * (2 * FF) * itemsize  # two experts a token, gate and up of each
    saving = kept["none"] - kept["experts"]
    if backend == "blocked":
        assert saving == pytest.approx(first_products, rel=0.1)  # a long expert's rows are padded
    else:
        assert saving == first_products
    assert kept["blocks"] == len(stack.blocks) * tokens * D * itemsize
    assert kept["blocks"] < kept["experts"] / 10


@pytest.mark.parametrize("hooks_after_modules", [False, True])
def test_nothing_is_computed_again_that_no_gradient_needs(
    hooks_after_modules: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the second product of the experts, nor of a dense layer where the pass may stop before it."""
    x_nD, plan = make_input(tmp_path)
    grouped, plain, flops = [], F.grouped_mm, []
    monkeypatch.setattr(F, "grouped_mm", lambda *of, **by: grouped.append(1) or plain(*of, **by))
    for mode in ("none", "blocks"):
        stack = Stack(experts_per_token=2, expert_backend="grouped_mm")
        set_recompute(stack, mode, hooks_after_modules)
        out_nD, _ = stack(x_nD, plan)
        with FlopCounterMode(display=False) as counter:  # it does not know grouped products
            out_nD.sum().backward()
        flops.append(counter.get_total_flops())
    # Queries, keys, values and outputs of three blocks, the router with two sums over experts for 3 modalities and 2
    # tasks, and the first product of two dense layers.
    router = 2 * D * EXPERTS + 2 * 2 * 3 * 2 * EXPERTS
    a_token = 3 * 2 * D * 4 * D + router + 2 * 2 * D * 2 * MODEL.ffn_hidden_size
    a_token += 2 * 2 * D * MODEL.ffn_hidden_size if hooks_after_modules else 0
    assert flops[1] - flops[0] == plan.num_valid * a_token
    assert len(grouped) == (2 + 4) + (2 + 4 + 1)


def test_the_last_block_of_the_model_is_not_computed_again(tmp_path: Path) -> None:
    """Of three blocks two keep their input alone; the last one, dense, also its first product (2 F) and h (F)."""
    stack, (x_nD, plan) = Stack(), make_input(tmp_path)
    set_recompute(stack, "blocks")
    kept = {}
    for last in (False, True):
        stack.stage = Stage(0, 3, last=last)
        kept[last] = saved_bytes(lambda: stack(x_nD, plan), stack.parameters())
    row = plan.num_valid * 4
    assert kept[False] == 3 * row * D
    assert kept[True] - kept[False] > row * 3 * MODEL.ffn_hidden_size
    assert [list(Stage(4, 6, last=last).recomputed) for last in (False, True)] == [[4, 5], [4]]
