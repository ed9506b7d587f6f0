"""Bytes that one rank holds from step to step: weights, gradients, fp32 masters and Adam's moments, in closed form.

Exact for both engines: tests/plan/test_memory.py holds them against the engines' own tensors. Left out are buffers of
process groups and DeepSpeed's buckets of gradients, parameters so small that ZeRO-3 keeps them whole beside its
shares (its ``param_persistence_threshold``), and that DeepSpeed pads experts of more than 178 million numbers in
several runs. What a step takes beside is measured: ``foretold_peak``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from mmmoe_pretrain.parallel.cuts import is_vector
from mmmoe_pretrain.parallel.degrees import Layout
from mmmoe_pretrain.plan.communication import FP32, PARAMETER_ALIGNMENT, padded_numel

NCCL_ALIGNMENT = 2  # numbers of a rank's share of DeepSpeed's flat buffers


@dataclass(frozen=True)
class Part:
    """What a rank's model has of one parameter. ``bytes``: of an element. ``expert``: not reduced over all
    data-parallel ranks."""

    numel: int
    bytes: int
    expert: bool
    vector: bool


@dataclass(frozen=True)
class Held:
    """Bytes. ``weights`` are what the model computes with; ``masters`` the fp32 numbers that the optimizer steps,
    where those are others."""

    weights: int
    gradients: int
    masters: int
    moments: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.masters + self.moments

    def __add__(self, other: Held) -> Held:
        return Held(
            self.weights + other.weights,
            self.gradients + other.gradients,
            self.masters + other.masters,
            self.moments + other.moments,
        )


NOTHING = Held(0, 0, 0, 0)


def parts_of(model: nn.Module) -> list[Part]:
    """Of a model before or after an engine took it; one on the device ``meta`` will do. DeepSpeed's engine keeps
    fp32 whatever the precision; ZeRO-3 empties parameters, so ask before."""
    return [Part(p.numel(), p.element_size(), not getattr(p, "allreduce", True), is_vector(p))
            for p in model.parameters()]  # fmt: skip


def held_bytes(
    layout: Layout, stages: Sequence[Sequence[Part]], data_rank: int = 0, expert_data_rank: int = 0
) -> Held:
    """Of one rank, which holds ``stages``; its ranks decide only which padding its shares have."""
    held = NOTHING
    for parts in stages:
        if layout.engine == "deepspeed":
            held += _deepspeed(layout, parts)
            continue
        for expert, ranks, rank in ((False, layout.data, data_rank), (True, layout.expert_data, expert_data_rank)):
            for size in sorted({part.bytes for part in parts if part.expert == expert}):
                numels = [part.numel for part in parts if part.expert == expert and part.bytes == size]
                held += _megatron(layout.zero_stage, numels, size, ranks, rank)
    return held


def foretold_peak(held: int, smaller: tuple[int, int], larger: tuple[int, int], tokens: int) -> tuple[float, float]:
    """Of a step of ``tokens``, in bytes, and what a token adds to it. Peaks grow in a straight line with the tokens:
    ``held``, what a step takes once, and activations. The line is drawn through two measured pairs (tokens, bytes
    beyond ``held``) of the same config and like lengths of segments."""
    a_token = (larger[1] - smaller[1]) / (larger[0] - smaller[0])
    return held + larger[1] + a_token * (tokens - larger[0]), a_token


def _megatron(zero_stage: int, numels: Sequence[int], size: int, ranks: int, rank: int) -> Held:
    """One buffer of parameters of one type. ZeRO-1 lays it out with padding and gives each rank a share of it;
    weights and gradients stay whole."""
    numel = own = sum(numels)
    if zero_stage == 1:
        numel = padded_numel(numels, ranks)
        own = _own_numel(numels, numel // ranks, rank)
    return Held(numel * size, numel * FP32, own * FP32 if size < FP32 else 0, own * 2 * FP32)


def _own_numel(numels: Sequence[int], share: int, rank: int) -> int:
    """Numbers of parameters, not padding, in the share of ``rank`` of megatron-core's buffer."""
    begin, end, own = rank * share, (rank + 1) * share, 0
    at = 0
    for numel in reversed(numels):
        at = -(-at // PARAMETER_ALIGNMENT) * PARAMETER_ALIGNMENT
        own += max(0, min(end, at + numel) - max(begin, at))
        at += numel
    return own


def _deepspeed(layout: Layout, parts: Sequence[Part]) -> Held:
    """Parameters are fp32. Stages 1 and 2 flatten each group of the optimizer, pad it, and keep a master copy and
    the reduced gradient of a rank's share; stage 3 keeps shares alone, of each parameter."""
    held, spread = NOTHING, layout.expert > 1
    if layout.zero_stage == 0:
        numel = sum(part.numel for part in parts)
        return Held(numel * FP32, numel * FP32, 0, numel * 2 * FP32)
    for expert in (False, True):
        ranks = layout.expert_data if expert else layout.data
        for vector in (False, True):
            numels = [p.numel for p in parts if (p.expert and spread) == expert and p.vector == vector]
            if layout.zero_stage == 3:
                own = sum(-(-numel // ranks) for numel in numels)
                held += Held(own * FP32, own * FP32, own * FP32, own * 2 * FP32)
                continue
            alignment = NCCL_ALIGNMENT * ranks
            padded = math.ceil(sum(numels) / alignment) * alignment
            own = padded // ranks
            held += Held(padded * FP32, own * FP32, own * FP32, own * 2 * FP32)
    return held
