"""Steps of one small config under many layouts on gloo ranks of this machine, timed."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.common.forked import on_ranks, over_ranks, slowest_rank
from benchmarks.planning.loads import Loads
from benchmarks.stepping.workload import OBJECTIVES
from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.engines.apply import build_engine
from mmmoe_pretrain.parallel.degrees import resolve_degrees
from mmmoe_pretrain.parallel.mesh import build_groups, destroy_groups
from mmmoe_pretrain.parallel.runtime import process_group
from mmmoe_pretrain.plan.workload import full_batch

TIMEOUT = 300.0  # seconds of one round of a layout
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Trial:
    """A layout on ``ranks`` ranks. Three are ``calibrating``: one process for computation, two ranks for the exchange
    of tokens, and four for all links and for ranks that share cores."""

    name: str
    ranks: int
    parallel: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    calibrating: bool = False


EP1 = {"expert_parallel_size": 1}
TP2 = {"tensor_parallel_size": 2}
PP2 = {"pipeline_parallel_size": 2}
DEEPSPEED = {"engine": "deepspeed"}
TRIALS = (
    Trial("one process", 1, calibrating=True),
    Trial("EP2", 2, calibrating=True),
    Trial("TP2 x EP2", 4, TP2, calibrating=True),
    Trial("one process, blocks recomputed", 1, train={"recompute": "blocks"}),
    Trial("one process, experts recomputed", 1, train={"recompute": "experts"}),
    Trial("DP2", 2, EP1),
    Trial("DP2, ZeRO-1", 2, {**EP1, "zero_stage": 1}),
    Trial("EP2, blocks recomputed", 2, train={"recompute": "blocks"}),
    Trial("TP2", 2, TP2),
    Trial("TP2 + SP", 2, {**TP2, "sequence_parallel": True}),
    Trial("PP2", 2, PP2),
    Trial("PP2 x VPP2", 2, {**PP2, "virtual_pipeline_size": 2}),
    Trial("EP2, DeepSpeed ZeRO-1", 2, {**DEEPSPEED, "zero_stage": 1}),
    Trial("EP2, DeepSpeed ZeRO-2", 2, {**DEEPSPEED, "zero_stage": 2}),
    Trial("EP2, DeepSpeed ZeRO-3", 2, {**DEEPSPEED, "zero_stage": 3}),
    Trial("EP4", 4),
    Trial("DP4", 4, EP1),
    Trial("EP2 x DP2", 4, {"expert_parallel_size": 2}),
    Trial("PP2 x EP2", 4, PP2),
)


@dataclass(frozen=True)
class Steps:
    """Medians over the steps of one round: ``wall`` seconds of the slowest rank, and ``work``, seconds of CPU time of
    all ranks together, which other processes on the machine hardly change. ``tokens``: of a rank's microbatch.
    ``imbalance``: what came to the fullest expert rank over an even share."""

    wall: float
    work: float
    tokens: float
    imbalance: float


@dataclass(frozen=True)
class Measured:
    """Of each round."""

    rounds: tuple[Steps, ...]

    def seconds(self, busy: bool) -> list[float]:
        return [steps.work if busy else steps.wall for steps in self.rounds]

    def median(self, busy: bool) -> float:
        return statistics.median(self.seconds(busy))

    def spread(self, busy: bool) -> float:
        """Between the quartiles of the rounds."""
        if len(self.rounds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds(busy), n=4, method="inclusive")
        return high - low


def trial_config(trial: Trial, samples: int = 64) -> RunConfig:
    """Four blocks of width 256, every other one an MoE layer of 8 experts of which a token takes 2; four microbatches
    of ``samples`` / 4 over all data-parallel ranks, each with every modality at its full length."""
    return run_config.parse(
        {
            "name": "plan",
            "seed": 1,
            "data": {"train": [{"path": "nowhere"}], "tokenizer": "none.model"},
            "modalities": {
                "image": {"kind": "image", "size": 64, "patch": 16, "stem": "linear"},
                "audio": {"kind": "audio", "max_seconds": 1.0, "stem": "linear"},
                "text": {"kind": "text", "max_tokens": 24},
            },
            "model": {
                "hidden_size": 256,
                "num_layers": 4,
                "num_heads": 8,
                "ffn_hidden_size": 1024,
                "embedding_size": 64,
                "vocab_size": 1024,
            },
            "moe": {
                "every": 2,
                "num_experts": 8,
                "experts_per_token": 2,
                "expert_hidden_size": 512,
                "losses": {"balance": 0.01},
            },
            "objectives": {"pairs": OBJECTIVES["pairs"]},
            "parallel": trial.parallel,
            "train": {"num_microbatches": 4, "global_batch_size": samples, **trial.train},
        }
    )


def run_trial(trial: Trial, config: RunConfig, steps: int) -> Steps:
    """On every rank."""
    torch.set_num_threads(1)
    with process_group(timeout_minutes=2) as device:
        groups = build_groups(resolve_degrees(config.parallel, config.moe.group_sizes, dist.get_world_size()))
        engine = build_engine(config, groups, device)
        number = config.train.num_microbatches
        batch = full_batch(config, config.train.global_batch_size // (number * groups.data_size))
        loads = Loads(engine)
        engine.step([batch] * number, LEARNING_RATE)  # warms up
        imbalance = loads.fullest_rank()
        loads.remove()
        walls, works = [], []
        for _ in range(steps):
            dist.barrier()
            began, used = time.perf_counter(), time.process_time()
            engine.step([batch] * number, LEARNING_RATE)
            walls.append(slowest_rank(time.perf_counter() - began))
            works.append(over_ranks(time.process_time() - used))
        tokens = over_ranks(batch.num_valid) / trial.ranks
        del engine
        gc.collect()
        destroy_groups()
    return Steps(statistics.median(walls), statistics.median(works), tokens, imbalance)


def measure(trials: Sequence[Trial], rounds: int, steps: int) -> dict[str, Measured]:
    """All trials in turn, ``rounds`` times, so that a slow minute of the machine meets all alike."""
    found: dict[str, list[Steps]] = {trial.name: [] for trial in trials}
    for _ in range(rounds):
        for trial in trials:
            one = on_ranks(trial.ranks, run_trial, trial, trial_config(trial), steps, timeout=TIMEOUT)
            found[trial.name].append(one)
    return {name: Measured(tuple(rows)) for name, rows in found.items()}
