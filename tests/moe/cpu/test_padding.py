"""Pieces and their padding, by hand."""

import pytest
import torch

from mmmoe_pretrain.moe.cpu import padding
from mmmoe_pretrain.moe.cpu.padding import pad_plan, padded_length
from mmmoe_pretrain.moe.plan import plan_of_slots

# Five tokens of one slot each: expert 0 has tokens 1 and 3, expert 2 tokens 0, 2 and 4.
SLOTS = torch.tensor([[2], [0], [2], [0], [2]])
WEIGHTS = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])


def test_short_lengths_stay_and_longer_ones_are_sixteen_an_octave() -> None:
    lengths = {1: 1, 5: 5, 32: 32, 33: 36, 63: 64, 64: 64, 65: 68, 129: 136, 1025: 1088, 2048: 2048}
    assert {n: padded_length(n) for n in lengths} == lengths
    octave = {padded_length(n) for n in range(1025, 2049)}
    assert len(octave) == 16
    assert all(n <= padded_length(n) <= 1.07 * n for n in range(64, 5000))


def test_assignments_keep_their_order_and_padding_weighs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(padding, "SHORT", 0)
    plan = plan_of_slots(SLOTS, 3)[0]
    laid = pad_plan(plan, WEIGHTS, most_rows=2, pad=True)
    assert [(p.expert, p.start, p.end, p.count) for p in laid.pieces] == [(0, 0, 4, 2), (2, 4, 8, 2), (2, 8, 12, 1)]
    assert laid.position_A.tolist() == [0, 1, 4, 5, 8]
    assert laid.plan.rows_A.tolist() == [1, 3, 1, 1, 0, 2, 0, 0, 4, 4, 4, 4]  # of their own piece
    assert laid.weights_P.tolist() == [*WEIGHTS[:2].tolist(), 0, 0, *WEIGHTS[2:4].tolist(), 0, 0, 0.5, 0, 0, 0]
    assert laid.plan.place_A.tolist() == [4, 0, 5, 1, 8]  # of tokens 0 to 4
    assert pad_plan(plan, WEIGHTS, most_rows=100, pad=False).plan is plan
