"""Training a case over its ranks, and the same run by plain torch in one process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmmoe_pretrain.checkpoint.state import persistent_buffers, split_key
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.engines import deepspeed
from mmmoe_pretrain.engines.apply import build_engine
from mmmoe_pretrain.engines.base import Engine, Progress
from mmmoe_pretrain.models.pretraining import PretrainingModel
from mmmoe_pretrain.objectives import step_counts
from mmmoe_pretrain.parallel.mesh import destroy_groups
from mmmoe_pretrain.parallel.runtime import process_group
from tests.distributed import groups_of, run_ranks
from tests.layouts.cases import GLOBAL, LEARNING_RATE, STEPS, Case, global_microbatch

BEATS_ANY_SCORE = 10.0  # a bias on sigmoid scores, which are below 1
Held = dict[str, tuple[tuple[int, ...], list[tuple[tuple[int, ...], np.ndarray]]]]


@dataclass(frozen=True)
class Outcome:
    """Losses by step and name, gradient norms by step, parameters by name at the end, and what the optimizer averages
    of the gradient after the first step: for Adam the clipped gradient times 1 - beta1. On a rank of many, parameters
    and moments are pieces with their shape."""

    losses: list[dict[str, float]]
    norms: list[float]
    tokens: list[int]
    parameters: Held
    moments: Held


def start_ranks(ranks: int, cases: Sequence[Case], root: Path, steps: int, timeout: float) -> list[list[Outcome]]:
    """``train_cases`` on forked ranks: of each rank, the outcome of each case."""
    if any(case.engine == "deepspeed" for case in cases):
        deepspeed.prepare()  # before the fork: its import takes seconds
    return run_ranks(ranks, train_cases, cases, root, steps, timeout=timeout)


def train_cases(cases: Sequence[Case], root: Path, steps: int = STEPS) -> list[Outcome]:
    """On one rank of many: each case in turn, in one process group."""
    with process_group(timeout_minutes=1) as device:
        return [train_case(case, root, steps, device) for case in cases]


def train_case(case: Case, root: Path, steps: int, device: torch.device) -> Outcome:
    """On this rank; builds its groups and takes them down again."""
    config = case.config(root)
    groups = groups_of(config.parallel, config.moe.group_sizes)
    engine = build_engine(config, groups, device)
    if case.one_expert:
        state = {name: held.clone() for name, held in engine.export_state().items()}
        for name, held in state.items():
            if name.endswith("router.bias.all"):
                held.pieces[0, 0][:, :2] = BEATS_ANY_SCORE
        engine.import_state(state, Progress(0, 0))
    losses, norms, tokens, moments = [], [], [], {}
    for step in range(steps):
        batches = [global_microbatch(config, number, groups.data_rank, groups.data_size, case.samples)
                   for number in microbatches_of(config, step)]  # fmt: skip
        result = engine.step(batches, LEARNING_RATE)
        losses.append(result.losses)
        norms.append(result.grad_norm)
        tokens.append(result.tokens)
        moments = moments or held_by_name(engine, config.optimizer.state[0])
    parameters = held_by_name(engine)
    destroy_groups()
    return Outcome(losses, norms, tokens, parameters, moments)


def microbatches_of(config: RunConfig, step: int) -> range:
    """Their numbers."""
    count = config.train.num_microbatches
    return range(step * count, (step + 1) * count)


def held_by_name(engine: Engine, kind: str | None = None) -> Held:
    """The weights that this rank holds, or the optimizer's tensors ``kind``: their shape, and pieces of them."""
    return {
        split_key(key)[0]: (held.shape, [(at, p.float().cpu().numpy().copy()) for at, p in held.pieces.items()])
        for key, held in engine.export_state().items()
        if split_key(key)[1] == kind
    }


def train_alone(
    root: Path,
    steps: int = STEPS,
    samples: Sequence[str] = GLOBAL,
    one_expert: bool = False,
    moe: dict[str, Any] | None = None,
    kind: dict[str, Any] | None = None,
    train: dict[str, Any] | None = None,
) -> Outcome:
    """The same run without engine or process group: torch's optimizer on the whole model."""
    config = Case("alone", 1, "megatron", 0, moe=moe or {}, train=train or {}, optimizer=kind or {}).config(root)
    model = PretrainingModel(config)
    if one_expert:
        for name, bias in persistent_buffers(model).items():
            if name.endswith("router.bias.all"):
                bias[:, :2] = BEATS_ANY_SCORE
    optimizer = torch_optimizer(model, config)
    losses, norms, tokens, moments = [], [], [], {}
    for step in range(steps):
        batches = [global_microbatch(config, number, 0, 1, samples) for number in microbatches_of(config, step)]
        model.begin_step(step, step_counts(batches, model.objectives, None, torch.device("cpu")))
        reports = []
        for batch in batches:
            loss, report = model(batch)
            loss.backward()
            reports.append(report)
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)))
        optimizer.step()
        moments = moments or first_moments(model, optimizer, config.optimizer.state[0])
        optimizer.zero_grad()
        parts = {name: sum(float(r.losses[name]) for r in reports) for name in reports[0].losses}
        losses.append({"total": sum(parts.values()), **parts})
        tokens.append(sum(rows.shape[0] for batch in batches for rows in batch.rows.values()))
        summed = [r.routing for r in reports]
        model.end_step(tuple(sum(layer[1:], layer[0]) for layer in zip(*summed, strict=True)))
    return Outcome(losses, norms, tokens, whole_state(model), moments)


def first_moments(model: PretrainingModel, optimizer: torch.optim.Optimizer, kept: str) -> Held:
    """Of an uncut model, as ``held_by_name`` gives them."""
    return {name: _whole(optimizer.state[p][kept]) for name, p in model.named_parameters()}


def whole_state(model: PretrainingModel) -> Held:
    """All weights of an uncut model, as ``held_by_name`` gives them."""
    state = {**dict(model.named_parameters()), **persistent_buffers(model)}
    return {name: _whole(t) for name, t in state.items()}


def _whole(tensor: torch.Tensor) -> tuple[tuple[int, ...], list[tuple[tuple[int, ...], np.ndarray]]]:
    return tuple(tensor.shape), [((0,) * tensor.ndim, tensor.detach().numpy().copy())]


def torch_optimizer(model: PretrainingModel, config: RunConfig) -> torch.optim.Optimizer:
    """As the engines are set: vectors do not decay."""
    settings = config.optimizer
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    if settings.kind == "sgd":
        return torch.optim.SGD(groups, lr=LEARNING_RATE, momentum=settings.momentum)
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(settings.beta1, settings.beta2), eps=settings.eps)


def assemble(ranks: Sequence[Held], name: str) -> np.ndarray:
    """A logical parameter from the pieces of all ranks. Replicas must agree bit for bit, and nothing be missing."""
    shapes = {rank[name][0] for rank in ranks if name in rank}
    assert len(shapes) == 1, (name, shapes)
    whole = np.full(next(iter(shapes)), np.nan, dtype=np.float32)
    for rank in ranks:
        for offset, numbers in rank.get(name, ((), []))[1]:
            here = tuple(slice(o, o + n) for o, n in zip(offset, numbers.shape, strict=True))
            before = whole[here]
            known = ~np.isnan(before)
            np.testing.assert_array_equal(before[known], numbers[known], err_msg=f"replicas of {name} differ")
            whole[here] = numbers
    assert not np.isnan(whole).any(), f"{name}: part of it is on no rank"
    return whole
