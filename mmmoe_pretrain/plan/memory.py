"""Bytes that one rank holds from step to step: weights, gradients, fp32 masters and optimizer state, in closed form.

Exact for both engines: tests/plan/test_memory.py compares them with the engines' own tensors. Not counted are buffers
of process groups and DeepSpeed's buckets of gradients, parameters so small that ZeRO-3 keeps them whole beside its
shares (its ``param_persistence_threshold``), and that DeepSpeed pads experts of more than 178 million numbers in
several runs. The memory of a step comes on top; ``estimate_peak`` extrapolates it from measurements.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mmmoe_pretrain.parallel.degrees import Layout
from mmmoe_pretrain.plan.communication import FP32, PARAMETER_ALIGNMENT, Parameter, padded, padded_numel

NCCL_ALIGNMENT = 2  # numbers of a rank's share of DeepSpeed's flat buffers


@dataclass(frozen=True)
class Held:
    """Bytes. ``weights`` are what the model computes with; ``masters`` the fp32 numbers that the optimizer steps,
    where those are others."""

    weights: int
    gradients: int
    masters: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.masters + self.optimizer

    def __add__(self, other: Held) -> Held:
        sums = map(sum, zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True))
        return Held(*sums)


NOTHING = Held(0, 0, 0, 0)


def held_bytes(
    layout: Layout,
    stages: Sequence[Sequence[Parameter]],
    optimizer: Sequence[str],
    data_rank: int = 0,
    expert_data_rank: int = 0,
) -> Held:
    """The memory of one rank with ``stages``; ``data_rank`` and ``expert_data_rank`` only affect the padding of its
    shards. ``optimizer``: the tensors that it keeps for each parameter (``OptimizerConfig.state``)."""
    of_stage = HELD_BY[layout.engine]
    held = sum((of_stage(layout, parts, data_rank, expert_data_rank) for parts in stages), NOTHING)
    return dataclasses.replace(held, optimizer=held.optimizer * len(optimizer))


def estimate_peak(held: int, smaller: tuple[int, int], larger: tuple[int, int], tokens: int) -> tuple[float, float]:
    """Estimates the peak memory of a step of ``tokens``, in bytes, and the bytes per token. Peak memory is linear in
    the tokens: ``held``, a constant, and activations. The line goes through two measured pairs (tokens, bytes beyond
    ``held``) of the same config and similar lengths of segments."""
    a_token = (larger[1] - smaller[1]) / (larger[0] - smaller[0])
    return held + larger[1] + a_token * (tokens - larger[0]), a_token


def _megatron(layout: Layout, parts: Sequence[Parameter], data_rank: int, expert_data_rank: int) -> Held:
    """One buffer for the parameters of one type, and one for the experts. ZeRO-1 lays each out with padding and gives
    each rank a share of it; weights and gradients stay whole."""
    held = NOTHING
    for expert, ranks, rank in ((False, layout.data, data_rank), (True, layout.expert_data, expert_data_rank)):
        for size in sorted({part.bytes for part in parts if part.expert == expert}):
            numels = [part.numel for part in parts if part.expert == expert and part.bytes == size]
            numel = own = sum(numels)
            if layout.zero_stage == 1:
                numel = padded_numel(numels, ranks)
                own = _own_numel(numels, numel // ranks, rank)
            held += Held(numel * size, numel * FP32, own * FP32 if size < FP32 else 0, own * FP32)
    return held


def _own_numel(numels: Sequence[int], share: int, rank: int) -> int:
    """Numbers of parameters, not padding, in the share of ``rank`` of megatron-core's buffer."""
    begin, end, own = rank * share, (rank + 1) * share, 0
    at = 0
    for numel in reversed(numels):
        at = padded(at, PARAMETER_ALIGNMENT)
        own += max(0, min(end, at + numel) - max(begin, at))
        at += numel
    return own


def _deepspeed(layout: Layout, parts: Sequence[Parameter], data_rank: int, expert_data_rank: int) -> Held:
    """Parameters are fp32. Stages 1 and 2 flatten each group of the optimizer, pad it, and keep a master copy and the
    reduced gradient of a rank's share; stage 3 keeps shares alone, of each parameter. All ranks hold as much."""
    held, spread = NOTHING, layout.expert > 1
    if layout.zero_stage == 0:
        numel = sum(part.numel for part in parts)
        return Held(numel * FP32, numel * FP32, 0, numel * FP32)
    for expert in (False, True):
        ranks = layout.expert_data if expert else layout.data
        for vector in (False, True):
            numels = [p.numel for p in parts if (p.expert and spread) == expert and p.vector == vector]
            if layout.zero_stage == 3:
                own = sum(-(-numel // ranks) for numel in numels)
                held += Held(own * FP32, own * FP32, own * FP32, own * FP32)
                continue
            whole = padded(sum(numels), NCCL_ALIGNMENT * ranks)
            own = whole // ranks
            held += Held(whole * FP32, own * FP32, own * FP32, own * FP32)
    return held


HELD_BY: dict[str, Callable[[Layout, Sequence[Parameter], int, int], Held]] = {
    "megatron": _megatron,
    "deepspeed": _deepspeed,
}  # engine -> bytes of one stage, with one tensor of the optimizer
