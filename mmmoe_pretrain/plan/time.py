"""The time of one optimizer step of a layout on a machine, by part, in closed form.

    step = m * (slowest stage's microbatch) + bubble + gradients + parameters + optimizer + reports

for m microbatches. A stage's microbatch is its products (FLOPs over the rate of products of that size), attention's
scores, operations bound by memory (bytes over bandwidth), recomputation, and the communication that nothing hides.
The bubble is that of 1F1B and, with v stages a rank, of the interleaved schedule: (p - 1) / v of a microbatch (arXiv
2104.04473, section 2.2). Docs: docs/plan.md, "Time", with every assumption.

benchmarks/planning/time.py compares it with gloo ranks on a CPU; of GPUs with one step on one H100 (docs/plan.md).

Shapes: n tokens, t rows of a tensor rank, D hidden size, F of a feed-forward layer, K experts a token, E experts.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.models.block import dense_width, is_sparse
from mmmoe_pretrain.models.costs import BACKWARD, BlockCosts, ModelCosts, model_costs
from mmmoe_pretrain.moe.activation import ACTIVATIONS
from mmmoe_pretrain.objectives import objectives_of
from mmmoe_pretrain.parallel.degrees import Layout
from mmmoe_pretrain.parallel.stages import Stage
from mmmoe_pretrain.plan import communication as plan
from mmmoe_pretrain.plan.communication import FP32, Microbatch, Parameter, Transfer
from mmmoe_pretrain.plan.links import LinkTraffic, placed
from mmmoe_pretrain.plan.machines import PARTS, Machine
from mmmoe_pretrain.plan.traffic import RankParts, rank_traffic

SECONDS_A_DAY = 86_400.0
# The host's time under ZeRO-3, whose hooks run before and after each module, over that under ZeRO-2: measured on a
# CPU with narrow models, 3.4 (2 dense blocks) to 1.9 (6 MoE blocks).
ZERO_3_HOST = 2.5
# Bytes of memory traffic of a gradient at each microbatch beside reading it: added to the sum in fp32 (read and
# written); under DeepSpeed copied to a bucket from stage 2 on, and at stage 3 its parameter gathered into one buffer.
SUMMED, BUCKETED, GATHERED = 8, 8, 8


class Built(Protocol):
    """A layout with what its pipeline ranks hold, one after the other (``plan/build.py``)."""

    @property
    def config(self) -> RunConfig: ...
    @property
    def layout(self) -> Layout: ...
    @property
    def ranks(self) -> Sequence[RankParts]: ...


@dataclass(frozen=True)
class StepTime:
    """``parts`` sum to ``seconds``. ``tokens``: of a step over all ranks. ``flops``: of the model, over all ranks,
    forward and backward without recomputation. ``traffic``: of the rank with the slowest stage."""

    seconds: float
    parts: dict[str, float]
    tokens: float
    flops: float
    peak: float  # FLOP/s of all ranks
    ranks: int
    power: float  # watts of all ranks
    traffic: tuple[LinkTraffic, ...]
    work: float  # seconds of all ranks, each on a core of its own and without waiting

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation (arXiv 2204.02311, appendix B): recomputation is no use and does not count."""
        return self.flops / self.seconds / self.peak


@dataclass(frozen=True)
class Budget:
    """``kwh``: of the GPUs at their board power; hosts, network and cooling come on top."""

    days: float
    gpu_hours: float
    kwh: float


def budget(step: StepTime, tokens: float) -> Budget:
    """What training on ``tokens`` takes, without evaluation, checkpoints and faults."""
    seconds = tokens / step.tokens_per_second
    return Budget(seconds / SECONDS_A_DAY, seconds / 3600 * step.ranks, seconds / 3600 * step.power / 1000)


def expected_microbatch(config: RunConfig, layout: Layout, tokens_a_sample: float | None = None) -> Microbatch:
    """A microbatch of one data-parallel rank whose samples have every modality: at its full length, or together
    ``tokens_a_sample``."""
    samples = config.train.global_batch_size / (config.train.num_microbatches * layout.data)
    tokens = targets = discrete = 0.0
    for objective in objectives_of(config).values():
        for segment in objective.expected():
            tokens += segment.count * segment.length
            targets += segment.count * segment.targets
            looked_up = (n for name, n in segment.tokens if objective.modalities[name].predictable)
            discrete += segment.count * sum(looked_up)
    scale = samples if tokens_a_sample is None else samples * tokens_a_sample / tokens
    return Microbatch(round(tokens * scale), round(samples), round(discrete * scale), round(targets * scale), ())


def step_time(
    built: Built,
    machine: Machine,
    microbatch: Microbatch | None = None,
    imbalance: float = 1.0,
    costs: ModelCosts | None = None,
) -> StepTime:
    """Milliseconds where ``costs`` are given: ``model_costs(config)``, which no layout changes.

    ``microbatch``: of a data-parallel rank, without its routing; default: ``expected_microbatch``. ``imbalance``:
    tokens of the fullest expert rank over the mean, by which experts and all-to-all take longer."""
    config, layout = built.config, built.layout
    batch = microbatch or expected_microbatch(config, layout)
    costs = costs or model_costs(config)
    number = config.train.num_microbatches
    ranks = _ranks(built, machine, costs, batch, imbalance)
    slowest = max(ranks, key=lambda rank: rank.microbatch_seconds)
    last = max(ranks, key=lambda rank: rank.step_seconds)
    parts = {name: number * seconds for name, seconds in slowest.microbatch.items()}
    waiting = sum(rank.microbatch_seconds for rank in ranks) - slowest.microbatch_seconds
    parts["pipeline bubble"] = waiting / layout.virtual_pipeline
    for name, seconds in last.step.items():
        parts[name] = parts.get(name, 0.0) + seconds
    alone = sum(parts.values())
    mean = _ranks(built, machine, costs, batch, 1.0) if imbalance > 1 and machine.cores else ranks
    work = sum(number * rank.microbatch_seconds + rank.step_seconds for rank in mean) * layout.tensor * layout.data
    # Ranks that share cores take turns: the longer of the critical path and of the work over the cores (Brent 1974).
    ranks_of_node = min(layout.world_size, machine.ranks_per_node)
    cores = machine.cores or ranks_of_node
    shared = max(alone, work / layout.world_size * ranks_of_node / cores)
    parts["shared cores"] = shared - alone if machine.cores else 0.0
    parts = {name: seconds for name, seconds in parts.items() if seconds > 0}
    tokens = float(batch.tokens * number * layout.data)
    return StepTime(
        seconds=sum(parts.values()),
        parts=parts,
        tokens=tokens,
        flops=costs.training * tokens,
        peak=machine.peak[config.train.precision] * layout.world_size,
        ranks=layout.world_size,
        power=machine.power * layout.world_size,
        traffic=slowest.traffic,
        work=work,
    )


def _ranks(built: Built, machine: Machine, costs: ModelCosts, batch: Microbatch, imbalance: float) -> list[_Rank]:
    known: dict[object, _Rank] = {}  # ranks whose blocks are alike take as long
    for rank in built.ranks:
        if (key := _held(rank, costs)) not in known:
            known[key] = _rank(built, rank, machine, costs, batch, imbalance)
    return [known[_held(rank, costs)] for rank in built.ranks]


def _held(rank: RankParts, costs: ModelCosts) -> object:
    """What a rank holds, as far as its time goes."""
    return tuple((s.first, s.last, costs.blocks[s.first_block : s.end_block]) for s in rank.stages)


def _scales(machine: Machine, ranks: int) -> dict[str, float]:
    """By part: the measured factor, times how much slower a rank is beside the others of its node."""
    ranks_of_node = min(ranks, machine.ranks_per_node)
    busy = min(1.0, (ranks_of_node - 1) / max(1, machine.cores - 1)) if machine.cores else 0.0
    slower = {limit: 1 + busy * (machine.crowded.get(limit, 1.0) - 1) for limit in PARTS}
    return {part: slower[limit] * machine.factors.get(part, 1.0) for limit, parts in PARTS.items() for part in parts}


@dataclass(frozen=True)
class _Rank:
    """Seconds of one pipeline rank by part: of each microbatch, and once a step."""

    microbatch: dict[str, float]
    step: dict[str, float]
    traffic: tuple[LinkTraffic, ...]

    @property
    def microbatch_seconds(self) -> float:
        return sum(self.microbatch.values())

    @property
    def step_seconds(self) -> float:
        return sum(self.step.values())


def _rank(
    built: Built, rank: RankParts, machine: Machine, costs: ModelCosts, batch: Microbatch, imbalance: float
) -> _Rank:
    config, layout = built.config, built.layout
    scales = _scales(machine, layout.world_size)

    def scaled(parts: dict[str, float]) -> dict[str, float]:
        return {name: seconds * scales.get(name, 1.0) for name, seconds in parts.items()}

    held = [parameter for parameters in rank.parameters for parameter in parameters]
    accumulated = {"gradient accumulation": _accumulated(layout, held) / machine.streaming}
    computed = scaled({**_computed(config, layout, rank.stages, costs, batch, machine, imbalance), **accumulated})
    host = scales["host"] * _host(config, layout, rank.stages, machine)
    hooks = (ZERO_3_HOST - 1) * host if layout.zero_stage == 3 else 0.0
    if machine.asynchronous:
        waiting = scales["host"] * _waiting(config, layout, rank.stages, machine)
        computed["host"] = max(waiting, host + hooks - sum(computed.values()))
    else:
        computed |= {"host": host, "ZeRO-3 hooks": hooks}
    each, once, traffic = _communicated(config, layout, rank, machine, batch, imbalance)
    each, once = scaled(each), scaled(once)
    _overlap(config, layout, machine, computed, each, once)
    step = scaled({"optimizer": _optimizer(layout, held, machine), "host": _host_of_step(rank.stages, machine)})
    return _Rank({**computed, **each}, {**once, **step}, traffic)


def _computed(
    config: RunConfig,
    layout: Layout,
    stages: Sequence[Stage],
    costs: ModelCosts,
    batch: Microbatch,
    machine: Machine,
    imbalance: float,
) -> dict[str, float]:
    """Seconds of one microbatch, forward and backward."""
    forward: dict[str, float] = defaultdict(float)
    recomputed = 0.0
    for stage in stages:
        for index in stage.blocks:
            block = _block(config, layout, index, costs.blocks[index], batch, machine, imbalance)
            for name, seconds in block.items():
                forward[name] += seconds
            recomputed += _recomputed(config, machine, stage, index, block)
        rate = machine.product_rate(config.train.precision, min(batch.tokens, config.model.hidden_size))
        forward["embedders"] += stage.first * batch.tokens * costs.first_extra / rate
        forward["heads"] += stage.last * batch.tokens * costs.last_extra / layout.tensor / rate
    passes = 1 + BACKWARD + objectives_of(config).whole_step
    found = {name: passes * seconds for name, seconds in forward.items()}
    return {**found, "recomputation": recomputed}


def _block(
    config: RunConfig, layout: Layout, index: int, costs: BlockCosts, batch: Microbatch, machine: Machine,
    imbalance: float,
) -> dict[str, float]:  # fmt: skip
    """Seconds of one block's forward pass."""
    precision, hidden, tensor = config.train.precision, config.model.hidden_size, layout.tensor
    n = batch.tokens

    def products(flops: float, *dimensions: float) -> float:
        return n * flops / machine.product_rate(precision, min(dimensions)) if flops else 0.0

    found = {
        "products": products(costs.projections / tensor, n, hidden / tensor),
        "attention": n * costs.scores / tensor / machine.attention_rate(precision, costs.scores / (4 * hidden)),
        "memory bound": n * _streamed(config, layout, index) / machine.streaming,
    }
    if not is_sparse(config.moe, index):
        width = dense_width(config.model, config.moe, index) / tensor
        found["products"] += products(costs.dense / tensor, n, hidden, width)
        return found
    moe = config.moe.for_layer(index)
    shared = moe.shared_expert_hidden_size / tensor
    found["products"] += products(costs.router, n, hidden, moe.router_outputs)
    found["products"] += products(costs.shared / tensor, n, hidden, shared)
    rows = n * layout.expert * moe.experts_per_token / moe.router_outputs  # of one expert
    width = moe.expert_hidden_size / tensor
    rate = machine.expert_rate(precision, rows, min(hidden, width))
    found["experts"] = imbalance * n * costs.experts / tensor / rate
    return found


def _streamed(config: RunConfig, layout: Layout, index: int) -> float:
    """Bytes a token that a block's operations without products move, forward: norms and residual sums (read and write
    of [t, D]: 10 D in all), heads prepared (read and written once), activations (two read, one written of each
    hidden unit), and an MoE layer's rows permuted and combined (2 K D, and K D + D). Where experts are on several
    ranks, a token has a row for each of r ranks, which are gathered (2 r D) and added up twice: those of one rank's
    experts (r D instead of D) and those of all ranks (r D + D)."""
    model, tensor = config.model, layout.tensor
    element = FP32 if config.train.precision == "fp32" else 2
    hidden = model.hidden_size
    rows = 10 * hidden / (tensor if layout.sequence_parallel else 1)
    heads = 2 * hidden * (1 + 2 * model.kv_heads / model.num_heads) / tensor
    if not is_sparse(config.moe, index):
        return element * (rows + heads + 3 * dense_width(config.model, config.moe, index) / tensor)
    moe = config.moe.for_layer(index)
    k, widths = moe.experts_per_token, ACTIVATIONS[moe.activation].width + 1
    units = k * moe.expert_hidden_size + moe.shared_expert_hidden_size
    sent = plan.ranks_of_token(k, moe.num_experts, layout.expert) if layout.expert > 1 else 0.0
    return element * (rows + heads + widths * units / tensor + (3 * k + 1 + 4 * sent) * hidden)


def _runs_again(config: RunConfig, stage: Stage, index: int) -> bool:
    return config.train.recompute == "blocks" and index in stage.recomputed


def _recomputed(config: RunConfig, machine: Machine, stage: Stage, index: int, block: dict[str, float]) -> float:
    """Seconds of a block that the backward pass computes again: all of it, on GPUs without the experts' second
    product; or of experts the first product (width of the activation + 1 of the products)."""
    first_products = 0.0
    if is_sparse(config.moe, index):
        width = ACTIVATIONS[config.moe.for_layer(index).activation].width
        first_products = block["experts"] * width / (width + 1)
    if _runs_again(config, stage, index):
        needed = {**block, "experts": first_products} if machine.asynchronous else block
        return sum(needed.values())
    return first_products if config.train.recompute == "experts" else 0.0


def _accumulated(layout: Layout, held: Sequence[Parameter]) -> float:
    """Bytes of one microbatch's gradients."""
    if layout.engine == "megatron":
        return sum(p.numel * (p.bytes + SUMMED) for p in held)
    copied = BUCKETED * (layout.zero_stage >= 2) + GATHERED * (layout.zero_stage == 3)
    return sum(p.numel for p in held) * (FP32 + SUMMED + copied)


def _host(config: RunConfig, layout: Layout, stages: Sequence[Stage], machine: Machine) -> float:
    """Seconds of one microbatch that the host takes to start its operations."""
    moe_block = machine.host.moe_block + (machine.host.dispatch if layout.expert > 1 else 0.0)
    blocks = 0.0
    for stage in stages:
        for index in stage.blocks:
            once = moe_block if is_sparse(config.moe, index) else machine.host.dense_block
            blocks += once * (1 + _runs_again(config, stage, index) / (1 + BACKWARD))
    ends = machine.host.microbatch * sum(stage.first + stage.last for stage in stages) / 2
    return blocks + ends


def _waiting(config: RunConfig, layout: Layout, stages: Sequence[Stage], machine: Machine) -> float:
    """Seconds of one microbatch in which a device idles: each MoE layer with experts on several ranks waits for the
    sizes of its exchange, and then for the host to start its forward operations (a third of all)."""
    if layout.expert == 1:
        return 0.0
    sparse = [(stage, index) for stage in stages for index in stage.blocks if is_sparse(config.moe, index)]
    passes = sum(1 + _runs_again(config, stage, index) for stage, index in sparse)
    return passes * (machine.host.moe_block + machine.host.dispatch) / (1 + BACKWARD)


def _host_of_step(stages: Sequence[Stage], machine: Machine) -> float:
    return machine.host.step + machine.host.step_block * sum(len(stage.blocks) for stage in stages)


def _optimizer(layout: Layout, held: Sequence[Parameter], machine: Machine) -> float:
    """Seconds of the optimizer's step over a rank's share of its parameters."""
    shared = layout.zero_stage > 0
    numel = sum(p.numel / ((layout.expert_data if p.expert else layout.data) if shared else 1) for p in held)
    return numel * machine.optimizer_bytes / machine.streaming


def _communicated(
    config: RunConfig, layout: Layout, rank: RankParts, machine: Machine, batch: Microbatch, imbalance: float
) -> tuple[dict[str, float], dict[str, float], tuple[LinkTraffic, ...]]:
    """Seconds by part of each microbatch and once a step, and the traffic of the whole step."""
    each, once = rank_traffic(config, layout, rank, batch, imbalance)
    traffic, seconds = [], []
    for transfers, times in ((each, config.train.num_microbatches), (once, 1)):
        found: dict[str, float] = defaultdict(float)
        for transfer in transfers:
            one = placed(transfer, layout, machine, times)
            found[_part_of(transfer)] += one.seconds / times
            traffic.append(one)
        seconds.append(dict(found))
    return seconds[0], seconds[1], tuple(traffic)


def _part_of(transfer: Transfer) -> str:
    if transfer.what.endswith("gradients"):
        return "gradients"
    if transfer.what.endswith("parameters"):
        return "parameters"
    names = {plan.TENSOR: "tensor parallel", plan.EXPERT: "all-to-all", plan.PIPELINE: "pipeline messages"}
    return names.get(transfer.group, "statistics") if transfer.what != "finite" else "statistics"


def _overlap(
    config: RunConfig, layout: Layout, machine: Machine, computed: dict[str, float], each: dict[str, float],
    once: dict[str, float],
) -> None:  # fmt: skip
    """Take what runs beside computation from the communication, in place; only where a device computes while its host
    waits. Gradients hide behind the last backward pass, gathered parameters behind the first forward pass, ZeRO-3's
    gathers and reductions behind every microbatch; of c chunks of an all-to-all the first is seen, and the others so
    far as they are longer than the experts."""
    if not machine.asynchronous:
        return
    device = sum(computed.values())
    backward = device * BACKWARD / (1 + BACKWARD)
    if config.parallel.overlap_grad_reduce:
        once["gradients"] = max(0.0, once.get("gradients", 0.0) - backward)
    if config.parallel.overlap_param_gather:
        once["parameters"] = max(0.0, once.get("parameters", 0.0) - (device - backward))
    if layout.zero_stage == 3:
        hidden = device
        for name in ("parameters", "gradients"):
            seen = max(0.0, each.get(name, 0.0) - hidden)
            hidden, each[name] = max(0.0, hidden - each.get(name, 0.0)), seen
    chunks = config.moe.dispatch_chunks
    if chunks > 1 and "all-to-all" in each:
        first = each["all-to-all"] / chunks
        experts = computed.get("experts", 0.0) * (1 - 1 / chunks)
        each["all-to-all"] = first + max(0.0, each["all-to-all"] - first - experts)
    assert all(math.isfinite(seconds) for seconds in (*each.values(), *once.values()))
