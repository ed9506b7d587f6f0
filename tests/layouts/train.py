"""Training a case over its ranks, and the same run by plain torch in one process."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.checkpoint.state import persistent_buffers, split_key
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.engines import deepspeed
from mmmoe_pretrain.engines.apply import build_engine
from mmmoe_pretrain.engines.base import Engine, Progress
from mmmoe_pretrain.models.pretraining import PretrainingModel
from mmmoe_pretrain.objectives import objectives_of, step_counts
from mmmoe_pretrain.parallel.mesh import destroy_groups
from mmmoe_pretrain.parallel.runtime import process_group
from tests.distributed import groups_of, run_ranks
from tests.layouts.cases import GLOBAL, LEARNING_RATE, Case, global_microbatch

SECONDS_ALONE = 90.0
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


def start_ranks(ranks: int, runs: Sequence[tuple[Case, int]], timeout: float) -> list[list[Outcome]]:
    """On forked ranks, each case for its number of steps: of each rank, the outcome of each."""
    if any(case.engine == "deepspeed" for case, _ in runs):
        deepspeed.prepare()  # before the fork: its import takes seconds
    return run_ranks(ranks, _train_in_turn, runs, timeout=timeout)


def _train_in_turn(runs: Sequence[tuple[Case, int]]) -> list[Outcome]:
    with process_group(timeout_minutes=1) as device:
        return [train_case(case, steps, device) for case, steps in runs]


def build(case: Case, device: torch.device) -> Engine:
    """The engine of this rank, over groups that it builds; ``destroy_groups`` ends them."""
    config = case.config()
    return build_engine(config, groups_of(config.parallel, config.moe.group_sizes), device)


def microbatches_of(engine: Engine, step: int, samples: Sequence[str] = GLOBAL) -> list[Batch]:
    """Those of this data-parallel rank in a step."""
    count, groups = engine.config.train.num_microbatches, engine.groups
    return [
        global_microbatch(engine.config, number, groups.data_rank, groups.data_size, samples)
        for number in range(step * count, (step + 1) * count)
    ]


def train_case(case: Case, steps: int, device: torch.device) -> Outcome:
    """On this rank; builds its groups and takes them down again."""
    engine = build(case, device)
    if case.one_expert:
        state = {name: held.clone() for name, held in engine.export_state().items()}
        for name, held in state.items():
            if name.endswith("router.bias.all"):
                held.pieces[0, 0][:, :2] = BEATS_ANY_SCORE
        engine.import_state(state, Progress(0, 0))
    results, moments = [], {}
    for step in range(steps):
        results.append(engine.step(microbatches_of(engine, step, case.samples_in(step)), LEARNING_RATE))
        moments = moments or held_by_name(engine, engine.config.optimizer.state[0])
    parameters = held_by_name(engine)
    destroy_groups()
    return Outcome(
        [result.losses for result in results],
        [result.grad_norm for result in results],
        [result.tokens for result in results],
        parameters,
        moments,
    )


def held_by_name(engine: Engine, kind: str | None = None) -> Held:
    """The weights that this rank holds, or the optimizer's tensors ``kind``: their shape, and pieces of them."""
    return {
        split_key(key)[0]: (held.shape, [(at, _numbers(p)) for at, p in held.pieces.items()])
        for key, held in engine.export_state().items()
        if split_key(key)[1] == kind
    }


def _numbers(piece: torch.Tensor) -> np.ndarray:
    """In fp32: numpy knows no bf16."""
    return piece.detach().float().cpu().numpy().copy()


@functools.cache
def reference(alone: Case, steps: int) -> Outcome:
    """What layouts of a case must train like (``Case.alone``): one process, by plain torch in fp32. For half types,
    and for a loss that takes two passes, by the megatron engine; test_cuts.py and test_self_distillation.py compare
    it with plain torch."""
    passes = objectives_of(alone.config()).whole_step or alone.optimizer.get("average")
    if alone.precision == "fp32" and not passes:
        return train_alone(alone, steps)
    return start_ranks(1, [(alone, steps)], SECONDS_ALONE)[0][0]


def train_alone(case: Case, steps: int) -> Outcome:
    """One process without engine or process group: torch's optimizer on the whole model."""
    config = case.config()
    model = PretrainingModel(config)
    if case.one_expert:
        for name, bias in persistent_buffers(model).items():
            if name.endswith("router.bias.all"):
                bias[:, :2] = BEATS_ANY_SCORE
    optimizer, held = torch_optimizer(model, config), HeldByHand(model, config)
    count = config.train.num_microbatches
    losses, norms, tokens, moments = [], [], [], {}
    for step in range(steps):
        numbers = range(step * count, (step + 1) * count)
        batches = [global_microbatch(config, number, 0, 1, case.samples_in(step)) for number in numbers]
        model.begin_step(step, step_counts(batches, model.objectives, None, torch.device("cpu")))
        reports = []
        for batch in batches:
            loss, report = model(batch)
            loss.backward()
            reports.append(report)
        held.clear_gradients()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)))
        held.pull()
        optimizer.step()
        held.restore()
        first = config.optimizer.state[0]
        moments = moments or {name: _whole(optimizer.state[p][first]) for name, p in model.named_parameters()}
        optimizer.zero_grad()
        parts = {name: sum(float(r.losses[name]) for r in reports) for name in reports[0].losses}
        losses.append({"total": sum(parts.values()), **parts})
        tokens.append(sum(rows.shape[0] for batch in batches for rows in batch.rows.values()))
        summed = [r.routing for r in reports]
        model.end_step(tuple(sum(layer[1:], layer[0]) for layer in zip(*summed, strict=True)))
    state = {**dict(model.named_parameters()), **persistent_buffers(model)}
    return Outcome(losses, norms, tokens, {name: _whole(tensor) for name, tensor in state.items()}, moments)


class HeldByHand:
    """What ``optimizer.hold`` does, on whole parameters: an importance of 1, and frozen rows are put back."""

    def __init__(self, model: PretrainingModel, config: RunConfig) -> None:
        hold = config.optimizer.hold
        self.strength = hold.strength if hold else 0.0
        self.anchors = {p: p.detach().clone() for p in model.parameters()} if hold else {}
        self.frozen = []
        for pattern in hold.frozen if hold else ():
            name, _, rows = pattern.partition("[")
            first, _, end = rows.removesuffix("]").partition(":")
            self.frozen += [(p, slice(int(first or 0), int(end) if end else None))
                            for own, p in model.named_parameters() if fnmatch.fnmatch(own, name)]  # fmt: skip

    def clear_gradients(self) -> None:
        for parameter, rows in self.frozen:
            parameter.grad[rows] = 0

    @torch.no_grad()
    def pull(self) -> None:
        c = LEARNING_RATE * self.strength
        for parameter, anchor in self.anchors.items():
            parameter.copy_((parameter + c * anchor) / (1 + c))

    @torch.no_grad()
    def restore(self) -> None:
        for parameter, rows in self.frozen:
            parameter[rows] = self.anchors[parameter][rows]


def _whole(tensor: torch.Tensor) -> tuple[tuple[int, ...], list[tuple[tuple[int, ...], np.ndarray]]]:
    """Of an uncut model, as ``held_by_name`` gives it."""
    return tuple(tensor.shape), [((0,) * tensor.ndim, _numbers(tensor))]


def torch_optimizer(model: PretrainingModel, config: RunConfig) -> torch.optim.Optimizer:
    """As the engines are set: vectors and what is frozen do not decay."""
    settings = config.optimizer
    frozen = {p for p, _ in HeldByHand(model, config).frozen}
    decayed = [p for p in model.parameters() if p.ndim >= 2 and p not in frozen]
    plain = [p for p in model.parameters() if p.ndim < 2 or p in frozen]
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
