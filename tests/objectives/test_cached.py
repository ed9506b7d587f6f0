"""The cached contrastive loss against the plain one on all samples at once, over microbatches and ranks."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mmmoe_pretrain.batch import MODALITIES
from mmmoe_pretrain.config import ContrastiveConfig, ParallelConfig
from mmmoe_pretrain.objectives.cached import ContrastiveCache
from mmmoe_pretrain.objectives.contrastive import ContrastiveObjective
from mmmoe_pretrain.parallel.groups import SINGLE, Groups
from mmmoe_pretrain.parallel.mesh import build_groups
from mmmoe_pretrain.parallel.runtime import process_group
from tests.distributed import run_ranks

CONFIG = ContrastiveConfig(weight=0.7, pairs={"image-text": 1.0, "audio-text": 2.0, "image-audio": 0.5})
SAMPLES, WIDTH, JOINT = 12, 5, 4
# Sums of tens of fp32 terms near 1, in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@dataclass
class World:
    """Towers whose features are ``normalize(inputs @ weight)``, and the samples of one optimizer step:
    some lack modalities, and samples 3, 4 and 9 are of one group."""

    inputs: dict[str, Tensor]
    present_MB: Tensor
    group_ids: Tensor
    weights: dict[str, Tensor]
    objective: ContrastiveObjective

    @classmethod
    def make(cls) -> World:
        generator = torch.Generator().manual_seed(0)
        inputs = {m: torch.randn(SAMPLES, WIDTH, generator=generator) for m in MODALITIES}
        weights = {m: torch.randn(WIDTH, JOINT, generator=generator).requires_grad_() for m in MODALITIES}
        present = torch.rand(len(MODALITIES), SAMPLES, generator=generator) < 0.7
        present[:, [0, 7]] = True
        groups = torch.arange(SAMPLES)
        groups[[4, 9]] = 3
        objective = ContrastiveObjective(CONFIG)
        for i, log_scale in enumerate(objective.log_scale.values()):
            log_scale.data.fill_(1.0 + 0.3 * i)
        return cls(inputs, present, groups, weights, objective)

    def features(self, rows: slice) -> dict[str, Tensor]:
        return {
            name: F.normalize(self.inputs[name][rows] @ self.weights[name], dim=-1) * self.present_MB[m, rows, None]
            for m, name in enumerate(MODALITIES)
        }

    def gradients(self) -> dict[str, Tensor]:
        named = {**self.weights, **dict(self.objective.log_scale.items())}
        found = {name: leaf.grad for name, leaf in named.items()}
        assert all(gradient is not None for gradient in found.values())
        return found


FACTORS = {"image-text": 0.3, "audio-text": 0.2, "image-audio": 0.1}  # weights over numbers of samples


def whole_batch() -> tuple[dict[str, float], dict[str, Tensor]]:
    """Sums by pair and gradients of the loss, of one process and one batch."""
    world = World.make()
    sums = world.objective(world.features(slice(None)), world.present_MB, world.group_ids, SINGLE)
    sum(FACTORS[pair] * value for pair, value in sums.items()).backward()
    return {pair: value.item() for pair, value in sums.items()}, world.gradients()


def slices(first: int, sizes: tuple[int, ...]) -> list[slice]:
    return [slice(a, b) for a, b in pairwise(accumulate(sizes, initial=first))]


def cached_step(groups: Groups, first: int, sizes: tuple[int, ...]) -> tuple[dict[str, float], dict[str, Tensor]]:
    """A step as an engine takes it: sums over microbatches, and gradients over ranks, too."""
    world, cache = World.make(), ContrastiveCache()
    with torch.no_grad():
        for rows in slices(first, sizes):
            cache.collect(world.features(rows), world.present_MB[:, rows], world.group_ids[rows])
    sums = cache.finish(world.objective, groups, FACTORS)
    leaves = (*world.weights.values(), *world.objective.parameters())
    assert all(leaf.grad is None for leaf in leaves), "an engine's hooks would take it for a microbatch's"
    for i, rows in enumerate(slices(first, sizes)):
        surrogate = cache.surrogate(i, world.features(rows))
        assert surrogate.item() == 0
        surrogate.backward()
    gradients = world.gradients()
    if groups.data_size > 1:
        for gradient in gradients.values():
            dist.all_reduce(gradient, group=groups.data)
    return {pair: len(sizes) * value.item() for pair, value in sums.items()}, gradients


def assert_same_gradients(ours: dict[str, Tensor], whole: dict[str, Tensor]) -> None:
    assert ours.keys() == whole.keys()
    for name, gradient in whole.items():
        assert gradient.abs().max() > 1e-4, f"{name} would show nothing"
        torch.testing.assert_close(ours[name], gradient, **CLOSE)


@pytest.mark.parametrize("sizes", [(12,), (4, 4, 4), (3, 8, 1)])
def test_microbatches_together_give_the_loss_and_gradients_of_one_batch(sizes: tuple[int, ...]) -> None:
    whole_losses, whole_gradients = whole_batch()
    losses, gradients = cached_step(SINGLE, 0, sizes)
    assert losses == pytest.approx(whole_losses, rel=1e-6)
    assert_same_gradients(gradients, whole_gradients)


SPLITS = (((6,), (6,)), ((2, 2, 2), (2, 2, 2)), ((1, 3, 2), (4, 1, 1)))  # microbatches of rank 0, of rank 1


def steps_of_rank() -> list[tuple[dict[str, float], dict[str, object]]]:
    with process_group(timeout_minutes=0.5):
        groups = build_groups(ParallelConfig(), 2)
        found = []
        for split in SPLITS:
            losses, gradients = cached_step(groups, 6 * groups.data_rank, split[groups.data_rank])
            found.append((losses, {name: gradient.numpy() for name, gradient in gradients.items()}))
        return found


def test_two_ranks_give_the_loss_and_gradients_of_one_batch() -> None:
    whole_losses, whole_gradients = whole_batch()
    ranks = run_ranks(2, steps_of_rank)
    for case in range(len(SPLITS)):
        (losses, gradients), (other_losses, _) = (rank[case] for rank in ranks)
        total = {pair: loss + other_losses[pair] for pair, loss in losses.items()}
        assert total == pytest.approx(whole_losses, rel=1e-6)
        assert_same_gradients({name: torch.from_numpy(g) for name, g in gradients.items()}, whole_gradients)


def test_a_step_without_any_pair_costs_nothing() -> None:
    world, cache = World.make(), ContrastiveCache()
    world.present_MB[1:] = False  # pictures alone
    cache.collect(world.features(slice(0, 6)), world.present_MB[:, :6], world.group_ids[:6])
    assert [loss.item() for loss in cache.finish(world.objective, SINGLE, FACTORS).values()] == [0, 0, 0]
    cache.surrogate(0, world.features(slice(0, 6))).backward()
    assert not any(gradient.any() for gradient in world.gradients().values())


def test_plain_microbatches_are_another_loss() -> None:
    """What the cache is for: with the negatives of each microbatch alone the sum is smaller."""
    whole_losses, _ = whole_batch()
    world = World.make()
    parts = [world.objective(world.features(rows), world.present_MB[:, rows], world.group_ids[rows], SINGLE)
             for rows in slices(0, (4, 4, 4))]  # fmt: skip
    total = {pair: sum(part[pair].item() for part in parts) for pair in whole_losses}
    assert all(total[pair] < 0.8 * whole for pair, whole in whole_losses.items())
