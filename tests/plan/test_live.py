"""The count of live tensors, by hand."""

from __future__ import annotations

import gc

import torch

from mmmoe_pretrain.plan.live import LiveTensors

KIB = 256  # elements of fp32


def test_tensors_count_from_their_making_to_their_end() -> None:
    there = torch.ones(KIB)
    with LiveTensors() as tensors:
        there.add_(1)  # was there before, as are its views
        there[:10].t()
        a = torch.ones(2 * KIB)
        view = a[:1]
        assert (tensors.live, tensors.peak) == (2048, 2048)
        torch.ones(4 * KIB)  # dropped at once
        del a
        assert (tensors.live, tensors.peak) == (2048, 6144)
        del view
        assert (tensors.live, tensors.peak) == (0, 6144)


def test_what_a_backward_pass_keeps_is_live_until_it_is_used() -> None:
    leaf = torch.ones(KIB, requires_grad=True)
    gc.collect()
    with LiveTensors() as tensors:
        out = leaf.exp().sin().sum()  # exp keeps its output, which is sin's input; sin's output is dropped
        assert tensors.live == 1024 + 4
        out.backward()
        del out
        assert leaf.grad is not None
        assert tensors.live == 1024  # the gradient
