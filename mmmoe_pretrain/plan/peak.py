"""Peak memory of a rank: what it holds, and what a step needs on top at the schedule's fullest moment.

The parts: held bytes in closed form (``memory.py``); a microbatch's activations and the peaks of its passes, by
running the model on fake tensors (``activations.py``); how many microbatches are in flight at once, by going through
the schedule; and an engine's own buffers in closed form. benchmarks/plan.py holds all but the allowance to the
tensors of real steps.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.engines.deepspeed_config import BUCKET
from mmmoe_pretrain.engines.megatron import prepare
from mmmoe_pretrain.objectives import objectives_of
from mmmoe_pretrain.parallel.degrees import Layout
from mmmoe_pretrain.parallel.groups import Groups
from mmmoe_pretrain.parallel.stages import Stage
from mmmoe_pretrain.plan.activations import BALANCED, Device, Imbalance, StageMemory, StageSizes, stage_memory
from mmmoe_pretrain.plan.build import HEADS, Build, RankBuild, pretended_groups
from mmmoe_pretrain.plan.communication import FP32, Parameter, padded
from mmmoe_pretrain.plan.memory import NCCL_ALIGNMENT, Held, held_bytes
from mmmoe_pretrain.plan.whole_step import queue_bytes
from mmmoe_pretrain.plan.workload import Workload, full_batch

LONG = 3  # repetitions of blocks
# Not measured: what CUDA, NCCL and the libraries of matrix products take outside of torch's allocator, and the share
# of what it has reserved that no tensor fills.
OUTSIDE_ALLOCATOR, FRAGMENTATION = 2 << 30, 0.05
SUB_GROUP = 10**9  # numbers that ZeRO-3 steps at once (sub_group_size)
# DeepSpeed's defaults (runtime/zero/config.py), in numbers.
ZERO_3 = {
    "param_persistence_threshold": 100_000,
    "prefetch_bucket_size": 50_000_000,
    "max_reuse_distance": 10**9,
    "max_live_parameters": 10**9,
}


@dataclass(frozen=True)
class RankMemory:
    """Bytes at the fullest moment of a step. ``weights`` to ``moments``: held from step to step, memory queues among
    the weights. ``activations``: of the microbatches that are in flight, until their backward passes. ``transient``:
    above that, within one pass or the optimizer's step: logits, gradients under way, dispatch. ``communication``:
    buckets and gathered parameters. ``allowance``: assumed, not counted: fragmentation, and what is outside of
    torch's allocator."""

    weights: int
    gradients: int
    masters: int
    moments: int
    activations: int
    transient: int
    communication: int
    allowance: int

    @property
    def tensors(self) -> int:
        """Without the allowance."""
        return self.total - self.allowance

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


def rank_memories(
    build: Build,
    work: Workload | None = None,
    imbalance: Imbalance = BALANCED,
    device: Device = "cuda",
    groups: Groups | None = None,
) -> tuple[RankMemory, ...]:
    """Of each pipeline rank (its data-parallel rank 0, which has no less than others). ``work``: a microbatch of a
    rank; by default that of the config with every modality at full length. ``groups``: pretended ones.

    Raises ValueError in a process that has a GPU, and without ``groups`` in one that has process groups.
    """
    if torch.cuda.is_available():
        raise ValueError("a plan of memory runs the model on the CPU; start it with CUDA_VISIBLE_DEVICES= in front")
    if build.layout.tensor > 1:
        prepare()
    work = work or Workload.of(build.config, build.layout.data)
    batch = full_batch(build.config, work.samples)
    with pretended_groups(build.layout) if groups is None else nullcontext(groups) as made:
        measure = functools.cache(lambda stage: stage_memory(build.config, made, stage, batch, imbalance, device))
        return tuple(
            rank_memory(build, rank, [sizes_of(build.config, stage, measure) for stage in rank.stages], device)
            for rank in build.ranks
        )


def sizes_of(config: RunConfig, stage: Stage, measure: Callable[[Stage], StageSizes]) -> StageSizes:
    """Of a stage by ``measure``; of a long one, whose blocks repeat, from two short ones with the same end: memory is
    linear in the repetitions. Equal stages are measured once."""
    every, blocks = config.moe.every, len(stage.blocks)
    repeats = blocks // every
    usual = not config.moe.layers
    if not usual or repeats < LONG:
        end = (
            config.model.num_layers - (config.model.num_layers - stage.end_block) % every
            if usual
            else stage.end_block
        )
        return measure(dataclasses.replace(stage, first_block=end - blocks, end_block=end))
    one, two = (
        sizes_of(config, dataclasses.replace(stage, first_block=stage.end_block - blocks + every * less), measure)
        for less in (repeats - 1, repeats - 2)
    )
    short, added = dataclasses.astuple(one.memory), dataclasses.astuple(two.memory)
    memory = StageMemory(*(a + (repeats - 1) * (b - a) for a, b in zip(short, added, strict=True)))
    return StageSizes(memory, one.buffers, one.whole_step)


def rank_memory(build: Build, rank: RankBuild, sizes: Sequence[StageSizes], device: Device) -> RankMemory:
    config, layout = build.config, build.layout
    own = held_bytes(layout, rank.parameters, config.optimizer.state)
    held = in_a_step(layout, rank.parameters, own)
    if device == "cuda":
        held = on_device(config, held)
    queue = queue_bytes(config) if rank.stages[-1].last else 0
    kept_apart = task_gradients(config, rank.by_part, own.optimizer // max(1, len(config.optimizer.state)))
    held = dataclasses.replace(held, weights=held.weights + queue, gradients=held.gradients + kept_apart)
    whole = sizes[-1].whole_step  # the last stage is the last one of its rank
    kept, transient = fullest_moment(
        layout, rank.pipeline_rank, config.train.num_microbatches, [size.memory for size in sizes]
    )
    buffers = max(size.buffers for size in sizes) + engine_buffers(config, layout, rank.parameters)
    state = own.optimizer // max(1, len(config.optimizer.state))
    step = optimizer_transient(layout, state, rank.parameters, device)
    if layout.engine == "deepspeed" and layout.zero_stage == 2:
        step = max(step, engine_buffers(config, layout, rank.parameters))  # the last bucket is summed in a copy
    moments = [
        _moment(held, whole.kept + kept, transient, buffers),
        _moment(held, 0, max(step, queue), buffers),  # after the optimizer's step the queue is put together in a copy
        _moment(*_before_gradients(layout, held, whole.peak, buffers)),
    ]
    found = max(moments, key=lambda each: each.total)
    if device == "cpu":
        return found
    spread = found.activations + found.transient + found.communication
    return dataclasses.replace(found, allowance=OUTSIDE_ALLOCATOR + round(FRAGMENTATION * spread))


def task_gradients(config: RunConfig, by_part: Mapping[str, int], whole: int) -> int:
    """Bytes of the gradients that are kept of each task alone: of what all tasks share once for each, and the sum of
    the rest once. ``whole``: of all gradients that the optimizer of a rank steps by, in fp32."""
    if config.train.task_gradients is None:
        return 0
    shared = 1 - by_part.get(HEADS, 0) / max(1, sum(by_part.values()))
    return round(whole * (1 + shared * len(objectives_of(config))))


def _moment(held: Held, activations: int, transient: int, communication: int) -> RankMemory:
    return RankMemory(
        held.weights, held.gradients, held.masters, held.optimizer, activations, transient, communication, 0
    )


def _before_gradients(layout: Layout, held: Held, needed: int, buffers: int) -> tuple[Held, int, int, int]:
    """Between the passes of a loss over the whole step, which needs so much. DeepSpeed has no gradients then, and no
    bucket, but ZeRO-3's shares of them."""
    if layout.engine == "deepspeed" and layout.zero_stage < 3:
        held, buffers = dataclasses.replace(held, gradients=0), 0
    return held, 0, needed, buffers


def in_a_step(layout: Layout, parameters: Sequence[Sequence[Parameter]], held: Held) -> Held:
    """Gradients that DeepSpeed holds between microbatches: all of them under ZeRO-1; under ZeRO-2 whole those of
    which the rank has some part."""
    if layout.engine != "deepspeed" or layout.zero_stage not in (1, 2):
        return held
    (whole,) = parameters
    gradients = sum(p.numel for p in whole) if layout.zero_stage == 1 else _touched(layout, whole)
    return dataclasses.replace(held, gradients=max(held.gradients, gradients * FP32))


def _touched(layout: Layout, parameters: Sequence[Parameter]) -> int:
    """Numbers of all parameters of which the fullest rank has some part, where each group of ``memory._deepspeed`` is
    laid out as one and cut into equal shares."""
    found = np.zeros(layout.data, dtype=np.int64)
    for expert, vector in itertools.product((False, True), repeat=2):
        ranks = layout.expert_data if expert else layout.data
        numels = [p.numel for p in parameters if (p.expert and layout.expert > 1) == expert and p.vector == vector]
        share = padded(sum(numels), NCCL_ALIGNMENT * ranks) // ranks
        of_rank = np.zeros(ranks, dtype=np.int64)
        for end, numel in zip(itertools.accumulate(numels), numels, strict=True):
            of_rank[(end - numel) // share : (end - 1) // share + 1] += numel
        found += np.repeat(of_rank, layout.data // ranks)
    return int(found.max())


def on_device(config: RunConfig, held: Held) -> Held:
    """Without what ``parallel.offload_optimizer`` keeps in the host's memory: masters, moments, and under ZeRO-2 and
    3 the reduced gradients (read in DeepSpeed's source, not measured)."""
    if config.parallel.offload_optimizer == "none":
        return held
    gradients = held.gradients if config.parallel.zero_stage == 1 else 0
    return Held(held.weights, gradients, masters=0, optimizer=0)


def optimizer_transient(layout: Layout, own: int, parameters: Sequence[Sequence[Parameter]], device: Device) -> int:
    """Bytes of the optimizer's step. On a CPU torch's Adam needs two of the largest tensor that it steps; its fused
    Adam on a GPU needs none. ZeRO-1 and 2 make one flat gradient of their ``own`` bytes of reduced ones."""
    zero = layout.zero_stage if layout.engine == "deepspeed" else 0
    flat = own if zero in (1, 2) else 0
    if device == "cuda":
        return flat
    largest = max(p.numel for held in parameters for p in held) * FP32
    return 2 * min(own, {0: largest, 3: SUB_GROUP * FP32}.get(zero, own))


def engine_buffers(config: RunConfig, layout: Layout, parameters: Sequence[Sequence[Parameter]]) -> int:
    """Bytes that DeepSpeed's ZeRO has beside what it holds: a bucket of gradients; under stage 3 the small parameters
    whole, and of the others those gathered. megatron-core reduces in its gradients."""
    if layout.engine != "deepspeed" or layout.zero_stage == 0:
        return 0
    own = config.parallel.deepspeed.get("zero_optimization", {})
    numels = [p.numel for held in parameters for p in held]
    bucket = int(own.get("reduce_bucket_size", min(BUCKET, sum(numels) + sum(numels) % 2)))
    found = bucket * FP32 * (2 if own.get("overlap_comm") else 1)
    if layout.zero_stage == 3:
        sharded = [p.numel for held in parameters for p in held if _replicas(layout, p) > 1]
        found += FP32 * _whole_under_zero_3(sharded, own)
    return found


def _replicas(layout: Layout, parameter: Parameter) -> int:
    """Ranks that ZeRO spreads a parameter over."""
    return layout.expert_data if parameter.expert and layout.expert > 1 else layout.data


def _whole_under_zero_3(numels: Sequence[int], settings: Mapping[str, Any]) -> int:
    """Numbers of parameters that are whole at the fullest moment, between the passes: the largest, those gathered
    ahead, and the last ones, whose next use in the backward pass is near (a distance there and back). DeepSpeed does
    not release what it has passed over when it gathered ahead, up to its limit of live parameters."""
    least, ahead, near, live = (
        int(settings.get(f"stage3_{key}", settings.get(key, value))) for key, value in ZERO_3.items()
    )
    large = [numel for numel in numels if numel >= least]
    gathered = max(large, default=0) + ahead + near // 2
    if ahead:
        gathered = max(gathered, live)
    return sum(numels) - sum(large) + min(sum(large), gathered)


def fullest_moment(
    layout: Layout, pipeline_rank: int, microbatches: int, stages: Sequence[StageMemory]
) -> tuple[int, int]:
    """Bytes kept of microbatches in flight, and what the pass under way needs above, at the moment when both are the
    most. ``stages``: one microbatch in each stage of this rank."""
    live, fullest = 0, (0, 0)
    for forward, chunk in passes(layout, pipeline_rank, microbatches):
        size = stages[chunk]
        if not forward:
            live -= size.kept
        peak = size.forward if forward else size.backward
        kept = live + min(size.kept, peak)
        fullest = max(fullest, (kept, live + peak - kept), key=sum)
        if forward:
            live += size.kept
    return fullest


def passes(layout: Layout, pipeline_rank: int, microbatches: int) -> Iterator[tuple[bool, int]]:
    """The passes of a rank in megatron-core's order (1F1B, arXiv 2006.09503; interleaved, arXiv 2104.04473): whether
    forward, and through which of its stages."""
    ranks, chunks = layout.pipeline, layout.virtual_pipeline
    total = microbatches * chunks
    warmup = ranks - pipeline_rank - 1
    if chunks > 1:
        warmup = 2 * warmup + (chunks - 1) * ranks
    warmup = min(warmup, total)
    order = [number % (ranks * chunks) // ranks for number in range(total)]
    yield from ((True, chunk) for chunk in order[:warmup])
    for number in range(total - warmup):
        yield True, order[warmup + number]
        yield False, chunks - 1 - order[number]
    yield from ((False, chunks - 1 - chunk) for chunk in order[total - warmup :])
