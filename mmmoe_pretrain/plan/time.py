"""The time of one optimizer step of a layout on a machine, by part, in closed form.

    step = m * (slowest stage's microbatch) + bubble + gradients + parameters + optimizer + reports

for m microbatches. A stage's microbatch is what it computes (``computation.py``), and the communication that nothing
hides (bytes and calls: ``communication.py``; seconds: ``links.py``).
The bubble is that of 1F1B and, with v stages a rank, of the interleaved schedule: (p - 1) / v of a microbatch (arXiv
2104.04473, section 2.2). Docs: docs/plan.md, "Time", with every assumption.

benchmarks/planning/time.py compares it with gloo ranks on a CPU; of GPUs with one step on one H100 (docs/plan.md).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.models.costs import BACKWARD, ModelCosts, gradient_passes, model_costs
from mmmoe_pretrain.objectives import objectives_of
from mmmoe_pretrain.parallel.degrees import Layout
from mmmoe_pretrain.plan import communication as plan
from mmmoe_pretrain.plan import computation
from mmmoe_pretrain.plan.communication import Microbatch, Transfer
from mmmoe_pretrain.plan.links import LinkTraffic, placed
from mmmoe_pretrain.plan.machines import ALL_PARTS, PARTS, Machine
from mmmoe_pretrain.plan.traffic import RankParts, rank_traffic

SECONDS_A_DAY = 86_400.0


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
    number = config.train.num_microbatches * gradient_passes(config)
    ranks = _ranks(built, machine, costs, batch, imbalance)
    slowest = max(ranks, key=lambda rank: rank.microbatch_seconds)
    last = max(ranks, key=lambda rank: rank.step_seconds)
    parts = {name: number * seconds for name, seconds in slowest.microbatch.items()}
    waiting = sum(rank.microbatch_seconds for rank in ranks) - slowest.microbatch_seconds
    parts["pipeline bubble"] = gradient_passes(config) * waiting / layout.virtual_pipeline
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
    tokens = float(batch.tokens * config.train.num_microbatches * layout.data)
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
    """By part: the measured factor, times how much slower a rank is beside the others of its node. The factor of
    communication does not apply where ranks share cores: it was measured with the waits of calls, and there only
    their CPU time counts."""
    factors = dict(machine.factors)
    if machine.shares_cores(ranks):
        factors |= dict.fromkeys(PARTS["communication"], 1.0)
    return {part: machine.slowed(part, ranks) * factors.get(part, 1.0) for part in ALL_PARTS}


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
    found = computation.of_microbatch(config, layout, rank.stages, costs, batch, machine, imbalance)
    found["gradient accumulation"] = computation.accumulated_bytes(layout, held) / machine.streaming
    computed = scaled(found)
    host = scales["host"] * computation.host_seconds(config, layout, rank.stages, machine)
    hooks = scales["host"] * computation.hook_seconds(layout, rank.stages, machine)
    if machine.asynchronous:
        waiting = scales["host"] * computation.waiting_seconds(config, layout, rank.stages, machine)
        computed["host"] = max(waiting, host + hooks - sum(computed.values()))
    else:
        computed |= {"host": host, "ZeRO-3 hooks": hooks}
    each, once, traffic = _communicated(config, layout, rank, machine, batch, imbalance)
    each, once = scaled(each), scaled(once)
    _overlap(config, layout, machine, computed, each, once)
    optimizer = computation.optimizer_seconds(layout, held, machine)
    step = scaled({"optimizer": optimizer, "host": computation.host_seconds_of_step(rank.stages, machine)})
    return _Rank({**computed, **each}, {**once, **step}, traffic)


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
