"""The memory of routers against torch's recurrent unit, alone and through a trunk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mmmoe_pretrain.models.block import Block
from mmmoe_pretrain.moe.router import Router
from mmmoe_pretrain.moe.routing_memory import RoutingMemory, flops
from tests.models.stack import D, Stack, make_input, outcome

SIZE, EXPERTS = 3, 4


def as_cell(memory: RoutingMemory) -> nn.GRUCell:
    cell = nn.GRUCell(SIZE, SIZE)
    cell.weight_ih.data, cell.bias_ih.data = memory.of_input.weight.data, memory.of_input.bias.data
    cell.weight_hh.data, cell.bias_hh.data = memory.of_state.weight.data, memory.of_state.bias.data
    return cell


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_it_is_a_gated_recurrent_unit_over_layers() -> None:
    torch.manual_seed(0)
    layers = [RoutingMemory(D, SIZE, EXPERTS) for _ in range(3)]
    state = expected = torch.zeros(5, SIZE)
    for number, memory in enumerate(layers):
        x_nD = normal(5, D, seed=number)
        added, state = memory(x_nD, state)
        expected = as_cell(memory)(memory.read(x_nD), expected)
        torch.testing.assert_close(state, expected)
        torch.testing.assert_close(added, expected @ memory.logits.weight.t())


def test_it_costs_what_torch_counts() -> None:
    with FlopCounterMode(display=False) as counter:
        RoutingMemory(D, SIZE, EXPERTS)(torch.zeros(7, D), torch.zeros(7, SIZE))
    assert counter.get_total_flops() == 7 * flops(D, SIZE, EXPERTS)


def remembering(**settings: object) -> Stack:
    return Stack(every=1, routing_memory_size=SIZE, **settings)


def test_every_router_reads_the_state_that_the_one_before_left(tmp_path: Path) -> None:
    """Through a trunk of three MoE layers, recomputed by hand from what each router was given and each norm read."""
    stack, (x_nD, plan) = remembering(), make_input(tmp_path)
    given: list[tuple[Tensor, Tensor]] = []
    for block in stack.blocks.values():
        assert isinstance(block, Block) and isinstance(block.ffn.router, Router)
        block.ffn.router.register_forward_hook(lambda _, inputs, out: given.append((inputs[0], out.log_p_nE)))
    out_nW, _ = stack(x_nD, plan)
    state = torch.zeros(plan.num_valid, SIZE)
    for block, (seen_nD, log_p_nE) in zip(stack.blocks.values(), given, strict=True):
        router = block.ffn.router
        state = as_cell(router.memory)(router.memory.read(seen_nD), state)
        logits = seen_nD @ router.weight.t() + state @ router.memory.logits.weight.t()
        torch.testing.assert_close(log_p_nE, logits.log_softmax(-1), rtol=1e-4, atol=1e-5)  # fp32, D terms a logit
    torch.testing.assert_close(out_nW[:, D:], state, rtol=1e-4, atol=1e-5)  # for the next stage


def test_it_begins_as_the_plain_router(tmp_path: Path) -> None:
    with_memory, plain, (x_nD, plan) = remembering(), Stack(every=1), make_input(tmp_path)
    plain.load_state_dict({k: v for k, v in with_memory.state_dict().items() if ".memory." not in k})
    for block in with_memory.blocks.values():
        block.ffn.router.memory.logits.weight.data.zero_()
    assert torch.equal(with_memory(x_nD, plan)[0][:, :D], plain(x_nD, plan)[0])


@pytest.mark.parametrize("settings", [{}, {"expert_attention_size": 4, "expert_backend": "grouped_mm"}], ids=str)
def test_blocks_that_are_computed_again_give_the_same_gradients(settings: dict[str, object], tmp_path: Path) -> None:
    stack, inputs = remembering(**settings), [make_input(tmp_path)]
    for plain, again in zip(*(outcome(stack, mode, inputs) for mode in ("none", "blocks")), strict=True):
        torch.testing.assert_close(again, plain, rtol=0, atol=0)
