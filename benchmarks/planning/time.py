"""The time part of benchmarks/plan.py: planned beside measured seconds of a step, over layouts of both engines.

The machine is calibrated (plan/calibrate.py): its rates in one process, its links on 2 and 4 gloo ranks, and four
factors (computation, memory, host, communication) by the measured steps of the three layouts marked ``*``. All other
layouts are predicted and compared. Rounds go over all layouts in turn; a layout's time is the median of its rounds.

``busy``: seconds of CPU time of all ranks together instead of wall-clock seconds of the slowest, for a machine that
others use. Waiting does not count there, so that a pipeline's bubble is not compared.

Legend. ms: measured median. spread: between the quartiles of the rounds. plan: planned over measured.
``time_worst``: the largest relative error of a predicted layout. ``order_right``: of the pairs of predicted layouts
whose medians differ by more than the larger of their spreads, the share that the plan puts in the same order.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from benchmarks.common.forked import on_ranks
from benchmarks.common.start_deepspeed import prepare_deepspeed
from benchmarks.planning.steps import TIMEOUT, TRIALS, Measured, Trial, measure, trial_config
from mmmoe_pretrain.engines.megatron import prepare
from mmmoe_pretrain.models.costs import ModelCosts, model_costs
from mmmoe_pretrain.parallel.runtime import process_group
from mmmoe_pretrain.plan.build import Build, build
from mmmoe_pretrain.plan.calibrate import Clock, add_links, calibrate, fit
from mmmoe_pretrain.plan.machines import PARTS, Machine
from mmmoe_pretrain.plan.time import StepTime, expected_microbatch, step_time

LINKED_RANKS = (2, 4)


def calibrated(busy: bool) -> Machine:
    """All on forks: a process that has run a backward pass has threads that its forks lack."""
    clock = time.process_time if busy else None
    machine = on_ranks(1, _alone, clock, timeout=TIMEOUT)
    for ranks in LINKED_RANKS:
        machine = on_ranks(ranks, _linked, machine, clock, timeout=TIMEOUT)
    return machine


def _alone(clock: Clock | None) -> Machine:
    torch.set_num_threads(1)
    with process_group(timeout_minutes=2) as device:
        return calibrate(trial_config(TRIALS[0]), device, clock)


def _linked(machine: Machine, clock: Clock | None) -> Machine:
    torch.set_num_threads(1)
    with process_group(timeout_minutes=2) as device:
        return add_links(machine, trial_config(TRIALS[0]), device, clock)


class Plans:
    """Planned steps of the trials, with the tokens that they had."""

    def __init__(self, trials: Sequence[Trial], measured: Mapping[str, Measured], busy: bool) -> None:
        self.busy = busy
        self.costs: ModelCosts = model_costs(trial_config(trials[0]))
        self.builds: dict[str, Build] = {t.name: build(trial_config(t), t.ranks) for t in trials}
        self.tokens = {name: round(one.rounds[0].tokens) for name, one in measured.items()}
        self.imbalance = {name: one.rounds[0].imbalance for name, one in measured.items()}

    def step(self, name: str, machine: Machine) -> StepTime:
        made = self.builds[name]
        batch = replace(expected_microbatch(made.config, made.layout), tokens=self.tokens[name])
        return step_time(made, machine, batch, self.imbalance[name], self.costs)

    def seconds(self, name: str, machine: Machine) -> float:
        step = self.step(name, machine)
        return step.work if self.busy else step.seconds


def order_right(names: Sequence[str], measured: Mapping[str, Measured], planned: Mapping[str, float],
                busy: bool) -> tuple[float, int]:  # fmt: skip
    """The share of clear pairs in the right order, and their number."""
    right = []
    for a, b in itertools.combinations(names, 2):
        one, other = measured[a], measured[b]
        apart = one.median(busy) - other.median(busy)
        if abs(apart) > max(one.spread(busy), other.spread(busy)):
            right.append((apart > 0) == (planned[a] > planned[b]))
    return sum(right) / max(1, len(right)), len(right)


def time_part(rounds: int, busy: bool) -> dict[str, object]:
    """Prints the table; the figures for the JSON line."""
    torch.set_num_threads(1)
    prepare()
    trials = TRIALS if prepare_deepspeed() else [t for t in TRIALS if t.parallel.get("engine") != "deepspeed"]
    machine = calibrated(busy)
    measured = measure(trials, rounds, steps=2)
    plans = Plans(trials, measured, busy)
    calibrating = [trial.name for trial in trials if trial.calibrating]
    fitted = fit(
        machine,
        [lambda m, name=name: plans.seconds(name, m) for name in calibrating],  # type: ignore[misc]
        [measured[name].median(busy) for name in calibrating],
    )
    planned = {trial.name: plans.seconds(trial.name, fitted) for trial in trials}
    ratios = {name: seconds / measured[name].median(busy) for name, seconds in planned.items()}
    for link in machine.collectives:
        curve = ", ".join(f"{sent / 1e3:.0f} KB {1e3 * seconds:.2f} ms" for sent, seconds in link.seconds)
        print(f"{link.kind} of {link.ranks}: {curve}")
    print(f"{'layout':<36}{'ms':>9}{'spread':>9}{'plan':>7}")
    for name, one in measured.items():
        mark = " *" if name in calibrating else ""
        print(f"{name:<36}{1e3 * one.median(busy):>9.0f}{1e3 * one.spread(busy):>9.0f}{ratios[name]:>7.2f}{mark}")
    predicted = [trial.name for trial in trials if not trial.calibrating]
    share, pairs = order_right(predicted, measured, planned, busy)
    worst = max(predicted, key=lambda name: abs(ratios[name] - 1))
    return {
        "time_worst": round(abs(ratios[worst] - 1), 3),
        "time_worst_layout": worst,
        "time_within_15_percent": sum(abs(ratios[name] - 1) <= 0.15 for name in predicted),
        "time_layouts": len(predicted),
        "order_right": round(share, 3),
        "order_pairs": pairs,
        "factors": {name: round(fitted.factors[parts[0]], 2) for name, parts in PARTS.items()},
        "clock": "cpu time" if busy else "wall",
    }
