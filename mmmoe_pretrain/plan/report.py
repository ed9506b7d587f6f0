"""A plan as plain values: what ``mmmoe plan --json`` prints and what its table shows."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.order.assign import microbatch_size
from mmmoe_pretrain.moe.lending import rows_that_pay
from mmmoe_pretrain.parallel.groups import Groups
from mmmoe_pretrain.parallel.layout import resolve_layout
from mmmoe_pretrain.plan.activations import Imbalance
from mmmoe_pretrain.plan.build import Build, build, pretended_groups
from mmmoe_pretrain.plan.layouts import Choice
from mmmoe_pretrain.plan.machines import Machine, find_machine
from mmmoe_pretrain.plan.peak import Device, RankMemory, rank_memories
from mmmoe_pretrain.plan.tables import MEMORY, TIME, size
from mmmoe_pretrain.plan.time import StepTime, budget, step_time


@dataclass(frozen=True)
class Asked:
    """``tokens``: of the whole run. ``imbalance``: what comes to the fullest expert rank over its even share."""

    gpus: int
    machine: Machine
    tokens: float = 1e12
    imbalance: float = 1.0

    @property
    def device(self) -> Device:
        return "cuda" if self.machine.cores is None else "cpu"


@dataclass(frozen=True)
class Fullest:
    """The pipeline rank whose peak is the highest."""

    pipeline_rank: int
    memory: RankMemory


def fullest(made: Build, asked: Asked, groups: Groups | None = None) -> Fullest:
    """Over the pipeline ranks. ``groups``: those of the build, where they are still there."""
    imbalance = Imbalance(asked.imbalance, asked.imbalance)
    found = rank_memories(made, imbalance=imbalance, device=asked.device, groups=groups)
    rank = max(range(len(found)), key=lambda number: found[number].total)
    return Fullest(rank, found[rank])


@contextmanager
def hidden_gpus() -> Iterator[None]:
    """A plan runs on the CPU, also where there are GPUs that the process has not used yet."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        yield
    finally:
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def does_not_fit(config: RunConfig, gpus: int, gpu: str) -> str | None:
    """Why the run cannot work on so many of these GPUs, or None."""
    asked = Asked(gpus, find_machine(gpu))
    with hidden_gpus():
        found = fullest(build(config, gpus), asked)
    if found.memory.total <= asked.machine.memory:
        return None
    terms = sorted(dataclasses.asdict(found.memory).items(), key=lambda term: -term[1])
    most = ", ".join(f"{MEMORY.get(name, name)} {size(value)}" for name, value in terms[:3])
    return (
        f"{config.name} on {gpus} GPUs: the GPUs of pipeline rank {found.pipeline_rank} would need "
        f"{size(found.memory.total)} ({most}), and {gpu} has {size(asked.machine.memory)}"
    )


def values_of(asked: Asked, config: RunConfig, assumptions: Sequence[str] = ()) -> dict[str, Any]:
    """The whole plan of ``config``, by the real build."""
    layout = resolve_layout(config, asked.gpus)
    microbatch_size(config, layout.data)  # before a build of many ranks, which is slow
    with pretended_groups(layout) as groups:  # of 16,384 ranks they take 5 s
        made = build(config, asked.gpus, groups)
        found = fullest(made, asked, groups)
    taken = step_time(made, asked.machine, imbalance=asked.imbalance)
    return {
        "config": config.name,
        "gpus": asked.gpus,
        "gpu": asked.machine.name,
        "layout": _layout(made),
        "parameters": _parameters(made),
        "memory": memory_values(found, asked.machine),
        "step": step_values(made, taken),
        "budget": budget_values(taken, asked),
        "limit": limit(found, taken, asked.machine),
        "assumptions": [*assumptions, *assumed_lending(asked, config), *_assumed_links(asked)],
    }


def assumed_lending(asked: Asked, config: RunConfig) -> list[str]:
    """Of a config that lends experts."""
    lending, machine, precision = config.moe.lending, asked.machine, config.train.precision
    if lending is None:
        return []
    rate = machine.product_rate(precision, min(config.model.hidden_size, config.moe.expert_hidden_size))
    element = 4 if precision == "fp32" else 2
    pays = [f"{rows_that_pay(rate, link.bandwidth, element):,.0f}" for link in (machine.node, machine.network)]
    return [
        f"no lending of experts, which depends on the routing of each step; on {machine.name} it pays from about "
        f"{pays[0]} rows of an expert inside a node and {pays[1]} across nodes (moe.lending.min_rows is "
        f"{lending.min_rows:,})"
    ]


def _assumed_links(asked: Asked) -> list[str]:
    """Of a machine that was measured in one process."""
    machine = asked.machine
    if machine.cores is None or machine.collectives or asked.gpus == 1:
        return []
    link = machine.node
    return [
        f"links of {link.bandwidth / 1e9:g} GB/s and {1e6 * link.latency:g} us, which were not measured; run "
        f"--calibrate by torchrun on several ranks"
    ]


def _layout(made: Build) -> dict[str, Any]:
    choice, layout = Choice.of(made.config, made.layout), made.layout
    return {
        "degrees": f"data {layout.data}, {choice}",
        "data": layout.data,
        **dataclasses.asdict(choice),
        "samples": microbatch_size(made.config, layout.data),
    }


def _parameters(made: Build) -> dict[str, Any]:
    by_part = {part: [numel, round(made.active_by_part[part])] for part, numel in made.by_part.items()}
    return {"total": made.total, "active": made.active, "by_part": by_part}


def memory_values(found: Fullest, machine: Machine) -> dict[str, Any]:
    """Bytes of the fullest rank, by term."""
    total = found.memory.total
    return {
        "pipeline_rank": found.pipeline_rank,
        "terms": dataclasses.asdict(found.memory),
        "total": total,
        "capacity": machine.memory,
        "fits": total <= machine.memory,
    }


def step_values(made: Build, taken: StepTime) -> dict[str, Any]:
    """One optimizer step: its size, its time, and the bytes that a rank of the slowest stage sends."""
    traffic: dict[str, dict[str, float]] = {}
    for each in taken.traffic:
        links = traffic.setdefault(each.kind, {"inside": 0.0, "across": 0.0})
        links["inside"] += each.inside
        links["across"] += each.across
    return {
        "samples": made.config.train.global_batch_size,
        "microbatches": made.config.train.num_microbatches,
        "tokens": taken.tokens,
        "flops_per_token": taken.flops / taken.tokens,
        "seconds": taken.seconds,
        "parts": taken.parts,
        "tokens_per_second": taken.tokens_per_second,
        "mfu": taken.mfu,
        "traffic": traffic,
    }


def budget_values(taken: StepTime, asked: Asked) -> dict[str, float]:
    """What the tokens of the whole run take."""
    return {"tokens": asked.tokens, **dataclasses.asdict(budget(taken, asked.tokens))}


def limit(found: Fullest, taken: StepTime, machine: Machine) -> str:
    """What keeps the run from being larger or faster."""
    spare = machine.memory - found.memory.total
    terms = dataclasses.asdict(found.memory)
    most = max(terms, key=lambda name: terms[name])
    largest = f"{MEMORY.get(most, most)}, {size(terms[most])}"
    if spare < 0:
        return f"memory: {size(-spare)} too much, so it does not fit; largest term: {largest}"
    part = max(taken.parts, key=lambda name: taken.parts[name])
    share = taken.parts[part] / taken.seconds
    return (
        f"time: {TIME.get(part, part)}, {share:.0%} of a step; {size(spare)} of memory are free; "
        f"largest term: {largest}"
    )
