"""Communication of one optimizer step of a rank, in closed form: every call, and the bytes that leave the rank.

Engine megatron; ``zero.py`` has what DeepSpeed sends instead. Bytes are counted as ``parallel/counting.py`` counts
them, so that a plan can be held against a measurement (``benchmarks/scaling.py``). Everything is exact but for what
routing decides: how many rows and assignments go to other ranks. Those are given, or ``expected_routed``.

Not here: losses of the whole step (its first pass), and overlap (it changes when, not how much, but cuts the
gradients into more calls).

Shapes: n tokens, t rows of a tensor rank, D hidden size, K experts a token, E experts, R ranks of the group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.config.base import StreamNames
from mmmoe_pretrain.config.moe import MoEConfig
from mmmoe_pretrain.modalities import build_modalities
from mmmoe_pretrain.models.block import is_sparse, stream_width
from mmmoe_pretrain.moe.losses import loss_names
from mmmoe_pretrain.objectives import objectives_of
from mmmoe_pretrain.parallel.counting import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, POINT_TO_POINT, REDUCE_SCATTER, RING
from mmmoe_pretrain.parallel.cuts import computed_alike, is_vector
from mmmoe_pretrain.parallel.degrees import Layout
from mmmoe_pretrain.parallel.stages import Stage

# Groups: those of ``Groups``, and megatron-core's for the gradient's norm.
DATA, EXPERT, EXPERT_DATA, TENSOR, PIPELINE = "data", "expert", "expert_data", "tensor", "pipeline"
MODEL, EXPERT_MODEL, WORLD = "tensor x pipeline", "tensor x expert x pipeline", "world"

FP32, INT32, FP64, INT64 = 4, 4, 8, 8  # bytes
METADATA = 4  # bytes sent with an assignment's weight: its expert
PARAMETER_ALIGNMENT, BUCKET_ALIGNMENT = 64, 128  # elements, of megatron-core's sharded buffers


@dataclass(frozen=True)
class Transfer:
    """``calls`` of one kind in one group of ``ranks``, for one purpose; ``sent``: bytes of all of them."""

    what: str
    kind: str
    group: str
    ranks: int
    calls: int
    sent: float


@dataclass(frozen=True)
class Routed:
    """The traffic of one MoE layer and microbatch: rows (token, rank) and assignments (token, expert) that are sent
    to other ranks of the expert group, and received from them."""

    rows_out: float
    rows_in: float
    assignments_out: float
    assignments_in: float


@dataclass(frozen=True)
class Microbatch:
    """A microbatch of one data-parallel rank. ``routed``: for each MoE layer of this rank's stages, in their
    order."""

    tokens: int
    samples: int
    discrete_tokens: int  # rows that are looked up in tables of the vocabulary
    targets: int  # of all tasks that predict tokens
    routed: tuple[Routed, ...]


@dataclass(frozen=True)
class Parameter:
    """A rank's part of one. ``bytes``: of an element. ``expert``: not reduced over all data-parallel ranks.
    ``partial``: its gradient is summed over the tensor ranks, since each sees only a share of the tokens.
    ``replicated``: each tensor rank computes all of it, and they take the mean."""

    numel: int
    bytes: int
    expert: bool
    vector: bool = False
    partial: bool = False
    replicated: bool = False


def parameters_of(model: nn.Module) -> list[Parameter]:
    """Of a model before or after an engine wraps it, also on the device ``meta``. DeepSpeed's engine always keeps
    fp32; ZeRO-3 empties parameters, so call this before."""
    return [
        Parameter(
            parameter.numel(),
            parameter.element_size(),
            expert=not getattr(parameter, "allreduce", True),
            vector=is_vector(parameter),
            partial=getattr(parameter, "sequence_parallel", False),
            replicated=computed_alike(parameter),
        )
        for parameter in model.parameters()
    ]


def step_traffic(
    config: RunConfig,
    layout: Layout,
    stages: Sequence[Stage],
    parameters: Sequence[Sequence[Parameter]],
    microbatches: Sequence[Microbatch],
) -> list[Transfer]:
    """Of one rank under engine megatron: ``stages`` that it holds, ``parameters`` of each in the model's order."""
    found = model_traffic(config, layout, stages, microbatches)
    mixed = any(is_sparse(config.moe, index) for index in range(config.model.num_layers))
    for held in parameters:
        found += gradients(layout, held)
    found += _joined_gradients(layout, [parameter for held in parameters for parameter in held])
    found += _norm(layout, mixed)
    return [transfer for transfer in found if transfer.ranks > 1]


def model_traffic(
    config: RunConfig, layout: Layout, stages: Sequence[Stage], microbatches: Sequence[Microbatch]
) -> list[Transfer]:
    """What both engines send alike: inside and between the stages, and reports."""
    found: list[Transfer] = []
    for batch in microbatches:
        routed = iter(batch.routed)
        for stage in stages:
            found += _stage(config, layout, stage, batch, routed)
    found += _between_stages(config, layout, stages, microbatches)
    found += _reports(config, layout)
    return found


def ring(what: str, kind: str, group: str, ranks: int, payload: float, calls: int = 1) -> Transfer:
    """``payload``: bytes that go into all calls together."""
    return Transfer(what, kind, group, ranks, calls, RING[kind](ranks) * payload)


def _stage(
    config: RunConfig, layout: Layout, stage: Stage, batch: Microbatch, routed: Iterator[Routed]
) -> Iterator[Transfer]:
    """One microbatch through one stage, forward and backward."""
    element, hidden = _element(config), config.model.hidden_size
    sequence = layout.sequence_parallel and layout.tensor > 1
    rows = padded(batch.tokens, layout.tensor) if sequence else batch.tokens
    if stage.first:
        yield from _embedding(config, layout, batch, rows * hidden * element if sequence else 0)
    moe_layers = [index for index in stage.blocks if is_sparse(config.moe, index)]
    for index in stage.blocks:
        passes = 2 if config.train.recompute == "blocks" and index in stage.recomputed else 1
        yield from matrices(layout, rows * hidden * element, passes)
        if index not in moe_layers:
            yield from matrices(layout, rows * hidden * element, passes)
            continue
        moe = config.moe.for_layer(index)
        choices = batch.tokens * moe.experts_per_token
        parts = _parts_after_attention if moe.expert_attention_size else _expert_parts
        sizes = (choices * hidden * element, choices * FP32)
        yield from parts(layout, moe, rows * hidden * element, sizes, passes)
        if sequence and moe.routing_memory_size:
            memory = rows * moe.routing_memory_size * element / layout.tensor
            yield ring("routing memory", ALL_GATHER, TENSOR, layout.tensor, (passes + 1) * memory, passes + 1)
        if moe.shared_expert_gate:
            yield ring("shared expert's gate", ALL_REDUCE, TENSOR, layout.tensor, batch.tokens * element)
        yield from dispatch(
            layout.expert, moe.num_experts, moe.dispatch_chunks, next(routed), hidden * element, passes,
            weighted=not moe.expert_attention_size,
        )  # fmt: skip
    if moe_layers:
        yield from _statistics(config, layout, moe_layers)
    if stage.last:
        yield from _objectives(config, layout, batch, rows * hidden * element if sequence else 0)


def dispatch(
    ranks: int, num_experts: int, chunks: int, routed: Routed, row_bytes: float, forward_passes: int = 1,
    weighted: bool = True,
) -> Iterator[Transfer]:  # fmt: skip
    """Tokens to their experts and back, forward and backward, for one MoE layer.

    Sizes: int32 rows and assignments by local expert for each chunk. Assignments: weight and expert there,
    the weight's gradient back, where experts weigh (``weighted``). Rows: there and back, and their gradients the same
    two ways.
    """
    sizes = (ranks - 1) * chunks * (1 + num_experts // ranks) * INT32
    both = routed.rows_out + routed.rows_in
    yield Transfer("sizes", ALL_TO_ALL, EXPERT, ranks, forward_passes, forward_passes * sizes)
    weights = forward_passes * routed.assignments_out * (FP32 + METADATA) + weighted * routed.assignments_in * FP32
    yield Transfer("assignments", ALL_TO_ALL, EXPERT, ranks, (forward_passes + weighted) * chunks, weights)
    sent = (forward_passes + 1) * both * row_bytes
    yield Transfer("rows", ALL_TO_ALL, EXPERT, ranks, (forward_passes + 1) * 2 * chunks, sent)


def expected_routed(tokens: float, top_k: int, num_experts: int, ranks: int) -> Routed:
    """If every set of K experts were equally likely: ``ranks_of_token`` ranks, of which one is its own."""
    rows = tokens * (ranks - 1) / ranks * ranks_of_token(top_k, num_experts, ranks)
    assignments = tokens * top_k * (ranks - 1) / ranks
    return Routed(rows, rows, assignments, assignments)


def routed_of(moe: MoEConfig, tokens: float, ranks: int) -> Routed:
    """``expected_routed`` of an MoE layer. For attention among a token's experts each choice has a row of its own."""
    k, alone = moe.experts_per_token, moe.expert_attention_size > 0
    return expected_routed(tokens * k if alone else tokens, 1 if alone else k, moe.num_experts, ranks)


def ranks_of_token(top_k: int, num_experts: int, ranks: int) -> float:
    """The mean number of ranks that have an expert of a token, where every set of K experts is equally likely. A rank
    has none if all K are among the E - E / R others: probability C(E - E / R, K) / C(E, K)."""
    elsewhere = num_experts - num_experts // ranks
    return ranks * (1 - math.comb(elsewhere, top_k) / math.comb(num_experts, top_k))


def most_rows(tokens: int, top_k: int, ranks: int) -> int:
    """The most rows that any routing sends: a token goes once to each other rank, and at most K times."""
    return tokens * min(top_k, ranks - 1)


def matrices(layout: Layout, activation: float, forward_passes: int = 1) -> Iterator[Transfer]:
    """A column-parallel matrix and a row-parallel one after it (attention, or a dense layer).
    ``activation``: bytes of [n, D], padding included.

    The sum of the products forward, of the gradients backward. Under sequence parallelism each is half an
    all-reduce on either side, and the rows are gathered once more for the first matrix's gradient.
    """
    yield from _sums(layout, "matrices", activation, forward_passes + 1, forward_passes + 2)


def _sums(layout: Layout, what: str, activation: float, sums: int, gathers: int) -> Iterator[Transfer]:
    """Sums over the tensor ranks of ``activation`` bytes, each scattered under sequence parallelism, where rows are
    also gathered ``gathers`` times."""
    if not layout.sequence_parallel:
        yield ring(what, ALL_REDUCE, TENSOR, layout.tensor, sums * activation, sums)
        return
    yield ring(what, ALL_GATHER, TENSOR, layout.tensor, gathers * activation / layout.tensor, gathers)
    yield ring(what, REDUCE_SCATTER, TENSOR, layout.tensor, sums * activation, sums)


def _expert_parts(
    layout: Layout, moe: MoEConfig, activation: float, of_choices: tuple[float, float], forward_passes: int
) -> Iterator[Transfer]:
    """Around an MoE layer of whose experts each tensor rank has a part: the sum of the parts forward, of the
    tokens' gradients and the routing weights' backward. ``of_choices``: bytes of the outputs of all choices, and of
    their weights."""
    yield ring("routing weights", ALL_REDUCE, TENSOR, layout.tensor, of_choices[1])
    yield from _sums(layout, "experts' parts", activation, forward_passes + 1, forward_passes + 1)


def _parts_after_attention(
    layout: Layout, moe: MoEConfig, activation: float, of_choices: tuple[float, float], forward_passes: int
) -> Iterator[Transfer]:
    """As ``_expert_parts``, but the outputs of all choices are summed, and of tokens the shared expert's alone."""
    shared = int(moe.shared_expert_hidden_size > 0)
    sent = forward_passes * of_choices[0]
    yield ring("experts' outputs", ALL_REDUCE, TENSOR, layout.tensor, sent, forward_passes)
    yield from _sums(layout, "experts' parts", activation, forward_passes * shared + 1, forward_passes + 1 + shared)


def _embedding(config: RunConfig, layout: Layout, batch: Microbatch, divided: float) -> Iterator[Transfer]:
    """The vocabulary's rows are summed, by modality; rows that were divided have their gradients gathered."""
    looked_up = batch.discrete_tokens * config.model.hidden_size * FP32
    tables = len(build_modalities(config.modalities, decoding=False).predictable)
    if tables:
        yield ring("vocabulary", ALL_REDUCE, TENSOR, layout.tensor, looked_up, calls=tables)
    if divided:
        yield ring("rows", ALL_GATHER, TENSOR, layout.tensor, divided / layout.tensor)


def _objectives(config: RunConfig, layout: Layout, batch: Microbatch, divided: float) -> Iterator[Transfer]:
    """Features and flags of all samples, of each objective that compares representations; the vocabulary's logits
    over its parts, of each that predicts tokens: their maximum, the target's own and the sum of exponentials, and the
    gradient of the head's input."""
    objectives = objectives_of(config)
    if divided:
        yield ring("rows", ALL_GATHER, TENSOR, layout.tensor, divided / layout.tensor)
    for compared in (
        len(objective.representations) for objective in objectives.values() if objective.representations
    ):
        features = batch.samples * compared * config.model.embedding_size * FP32
        flags = batch.samples * (compared + 1) * INT64
        yield ring("features", ALL_GATHER, DATA, layout.data, features + flags, calls=2)
        yield ring("features", ALL_REDUCE, DATA, layout.data, layout.data * features)
    if tasks := sum(len(objective.vocabularies) for objective in objectives.values()):
        yield ring("logits", ALL_REDUCE, TENSOR, layout.tensor, 3 * batch.targets * FP32, calls=3 * tasks)
        head = batch.targets * config.model.hidden_size * _element(config)
        yield ring("head", ALL_REDUCE, TENSOR, layout.tensor, head, calls=tasks)


def _statistics(config: RunConfig, layout: Layout, moe_layers: Sequence[int]) -> Iterator[Transfer]:
    """Routing statistics of a stage's MoE layers, and their gradient where a loss asks for one."""
    names = config.stream_names
    numel = sum(statistics_numel(names, config.moe.for_layer(index).router_outputs) for index in moe_layers)
    calls = 2 if config.moe.losses.any_of_tokens else 1
    yield ring("statistics", ALL_REDUCE, DATA, layout.data, calls * numel * FP32, calls)


def statistics_numel(names: StreamNames, num_experts: int) -> int:
    """The numbers that ``RoutingStats`` reduces: probabilities and counts [M, X, E], smooth load [M, E]; entropy, z,
    tokens and drops [M, X]; and the sum and number of segments."""
    modalities, tasks = len(names.modalities), len(names.tasks)
    return (2 * tasks + 1) * modalities * num_experts + 4 * modalities * tasks + 2


def _between_stages(
    config: RunConfig, layout: Layout, stages: Sequence[Stage], microbatches: Sequence[Microbatch]
) -> Iterator[Transfer]:
    """Hidden states to the next stage, their gradients to the one before; every microbatch has the rows of
    the longest."""
    rows = max((max(1, batch.tokens) for batch in microbatches), default=0)
    if layout.sequence_parallel:
        rows = padded(rows, layout.tensor) // layout.tensor
    messages = len(microbatches) * sum((not stage.last) + (not stage.first) for stage in stages)
    sent = messages * rows * stream_width(config.model, config.moe) * _element(config)
    yield Transfer("hidden states", POINT_TO_POINT, PIPELINE, layout.pipeline, messages, sent)


def gradients(layout: Layout, parameters: Sequence[Parameter]) -> Iterator[Transfer]:
    """One stage's gradients in fp32, once a step: dense ones over ``data``, an expert's over its replicas.

    ZeRO-1 reduces and scatters them and, after the optimizer, gathers the parameters; its buffers, one for
    each type of parameter, are padded.
    """
    for expert, group, ranks in ((False, DATA, layout.data), (True, EXPERT_DATA, layout.expert_data)):
        for size in sorted({p.bytes for p in parameters if p.expert == expert}):
            numels = [p.numel for p in parameters if p.expert == expert and p.bytes == size]
            what = "expert gradients" if expert else "gradients"
            if layout.zero_stage == 0:
                yield ring(what, ALL_REDUCE, group, ranks, sum(numels) * FP32)
                continue
            numel = padded_numel(numels, ranks)
            yield ring(what, REDUCE_SCATTER, group, ranks, numel * FP32)
            yield ring(what.replace("gradients", "parameters"), ALL_GATHER, group, ranks, numel // ranks * size)


def padded_numel(numels: Sequence[int], ranks: int) -> int:
    """The size of megatron-core's buffer of parameters, laid out from the last to the first."""
    end = 0
    for numel in reversed(numels):
        end = padded(end, PARAMETER_ALIGNMENT) + numel
    return padded(end, math.lcm(ranks, BUCKET_ALIGNMENT))


def _joined_gradients(layout: Layout, parameters: Sequence[Parameter]) -> Iterator[Transfer]:
    """Between tensor ranks: sums of partial gradients, means of replicated ones."""
    partial = sum(p.numel for p in parameters if p.partial)
    if partial and layout.sequence_parallel:
        yield ring("partial gradients", ALL_REDUCE, TENSOR, layout.tensor, partial * FP32)
    replicated = sum(p.numel for p in parameters if p.replicated)
    if replicated:
        yield ring("replicated gradients", ALL_REDUCE, TENSOR, layout.tensor, replicated * FP32)


def _norm(layout: Layout, mixed: bool) -> Iterator[Transfer]:
    """Squares of the dense and the expert gradients, over the ranks that have different parts of them.
    ``mixed``: some stage has experts."""
    if layout.zero_stage == 1:
        yield ring("norm", ALL_REDUCE, WORLD, layout.world_size, FP32)
        return
    model = layout.tensor * layout.pipeline
    yield ring("norm", ALL_REDUCE, MODEL, model, FP32)
    if mixed:
        yield ring("norm", ALL_REDUCE, EXPERT_MODEL, model * layout.expert, FP32)


def _reports(config: RunConfig, layout: Layout) -> Iterator[Transfer]:
    """What the losses are divided by, and the tokens; the losses by name; whether the step is finite everywhere."""
    names = len(objectives_of(config).losses)
    yield ring("counts", ALL_REDUCE, DATA, layout.data, (1 + names) * INT64)
    if any(is_sparse(config.moe, index) for index in range(config.model.num_layers)):
        names += len(loss_names(config.moe.losses, tuple(config.modalities)))
    for group, ranks in ((DATA, layout.data), (PIPELINE, layout.pipeline)):
        yield ring("losses", ALL_REDUCE, group, ranks, names * FP64)
    for group, ranks in ((TENSOR, layout.tensor), (DATA, layout.data), (PIPELINE, layout.pipeline)):
        yield ring("finite", ALL_REDUCE, group, ranks, FP32)


def _element(config: RunConfig) -> int:
    """Bytes of an element of the trunk's hidden states."""
    return 4 if config.train.precision == "fp32" else 2


def padded(number: int, divisor: int) -> int:
    return -(-number // divisor) * divisor
