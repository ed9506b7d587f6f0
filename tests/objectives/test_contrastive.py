"""Contrastive losses by hand, with missing modalities, and over ranks; and cached, where the loss of all samples
of a step comes from its microbatches."""

from __future__ import annotations

import dataclasses
import math
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mmmoe_pretrain.batch import Batch, SampleMeta
from mmmoe_pretrain.config import ParallelConfig
from mmmoe_pretrain.config.base import StepSizes
from mmmoe_pretrain.data.pack import PackSettings, pack
from mmmoe_pretrain.objectives import Outputs
from mmmoe_pretrain.objectives.pairs import MAX_LOG_SCALE, PairModule
from mmmoe_pretrain.parallel.groups import SINGLE, Groups
from mmmoe_pretrain.parallel.runtime import process_group
from tests.distributed import groups_of, run_ranks
from tests.support import pack_settings, tiny_config

NAMES = ("image", "audio", "text")
PAIRS = {"image-text": 1.0, "audio-text": 2.0, "image-audio": 0.5}


KINDS = ("contrastive", "sigmoid_contrastive")


def settings_of(pairs: dict[str, float] = PAIRS, kind: str = "contrastive", **more: Any) -> PackSettings:
    values = {"kind": kind, "pairs": pairs, "initial_temperature": 1.0, **more}
    return pack_settings(tiny_config(Path("unused"), objectives={"match": values}))


def module_of(settings: PackSettings, joint: int = 2) -> PairModule:
    module = settings.objectives["match"].module(joint)
    assert isinstance(module, PairModule)
    return module


EMPTY = pack([], settings_of())


def batch_of(present: dict[str, Tensor], group_ids: Tensor) -> Batch:
    """A batch of which nothing is known but which samples have what."""
    pooled = {name: torch.where(has, torch.arange(len(has)), -1) for name, has in present.items()}
    metas = tuple(SampleMeta(str(i)) for i in range(len(group_ids)))
    return dataclasses.replace(EMPTY, pooled=pooled, group_ids=group_ids, metas=metas)


def outputs_of(features: dict[str, Tensor]) -> Outputs:
    return Outputs(torch.zeros(0, 16), features, {}, {}, {})


EYE = torch.eye(2)
ALL = dict.fromkeys(NAMES, torch.ones(2, dtype=torch.bool))


def loss(
    image: Tensor, text: Tensor, present: dict[str, Tensor], group_ids: tuple[int, ...], **settings: Any
) -> float:
    """The mean over the samples that have both."""
    module = module_of(settings_of({"image-text": 1.0}, **settings))
    batch = batch_of(present, torch.tensor(group_ids))
    total = module(outputs_of({"image": image, "text": text}), batch, SINGLE)["match/image-text"].item()
    return total / int((present["image"] & present["text"]).sum())


ONE_OF_TWO = math.log(math.e + 1) - 1  # cross-entropy of a softmax over 1 and 0 whose target is the 1


@pytest.mark.parametrize(
    ("text", "has_text", "group_ids", "expected"),
    [
        (EYE, [True, True], (1, 2), ONE_OF_TWO),
        (EYE.flip(0), [True, True], (1, 2), ONE_OF_TWO + 1),  # the target is the 0
        # Of two queries one is left. Its text stands alone; its image has one rival among the images.
        (torch.tensor([[1.0, 0], [0, 0]]), [True, False], (1, 2), 0.5 * ONE_OF_TWO),
        (EYE, [True, True], (7, 7), 0.0),  # samples of one group are no negatives
    ],
    ids=["orthogonal", "swapped", "without a text", "one group"],
)
def test_the_loss_by_hand(text: Tensor, has_text: list[bool], group_ids: tuple[int, int], expected: float) -> None:
    present = {**ALL, "text": torch.tensor(has_text)}
    assert loss(EYE, text, present, group_ids) == pytest.approx(expected, rel=1e-6, abs=1e-6)


BELONG, DO_NOT = (
    math.log1p(math.exp(-1)),
    math.log(2),
)  # -log sigmoid(1) of what does, -log sigmoid(-0) of what does not


@pytest.mark.parametrize(
    ("has_text", "group_ids", "expected"),
    [
        ([True, True], (1, 2), BELONG + DO_NOT),
        # Of two queries one is left. Its text stands alone; its image has one rival among the images.
        ([True, False], (1, 2), BELONG + 0.5 * DO_NOT),
        ([True, True], (7, 7), BELONG),  # samples of one group are no negatives
    ],
    ids=["orthogonal", "without a text", "one group"],
)
def test_the_sigmoid_loss_by_hand(has_text: list[bool], group_ids: tuple[int, int], expected: float) -> None:
    present = {**ALL, "text": torch.tensor(has_text)}
    text = EYE * present["text"][:, None]
    found = loss(EYE, text, present, group_ids, kind="sigmoid_contrastive", initial_bias=0.0)
    assert found == pytest.approx(expected, rel=1e-6)


def test_the_sigmoid_loss_is_that_of_the_paper() -> None:
    """Algorithm 1 of SigLIP in numpy and float64, at its initial temperature and bias."""
    made = np.random.default_rng(0).normal(size=(2, 6, 3))
    image, text = made / np.linalg.norm(made, axis=-1, keepdims=True)
    labels = 2 * np.eye(6) - 1
    expected = np.logaddexp(0, -labels * (10 * image @ text.T - 10)).sum() / 6
    sides = (torch.tensor(side, dtype=torch.float32) for side in (image, text))
    everyone = dict.fromkeys(NAMES, torch.ones(6, dtype=torch.bool))
    found = loss(*sides, everyone, tuple(range(6)), kind="sigmoid_contrastive", initial_temperature=0.1)
    assert found == pytest.approx(expected, rel=1e-5)  # fp32


@pytest.mark.parametrize("kind", KINDS)
def test_no_pair_at_all_costs_nothing_and_has_finite_gradients(kind: str) -> None:
    image = EYE.clone().requires_grad_()
    module = module_of(settings_of({"image-text": 1.0}, kind))
    batch = batch_of({"image": ALL["image"], "text": ~ALL["text"]}, torch.tensor([1, 2]))
    value = module(outputs_of({"image": image, "text": torch.zeros(2, 2)}), batch, SINGLE)["match/image-text"]
    value.sum().backward()
    assert value.item() == 0
    assert image.grad is not None and not image.grad.any()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in module.parameters())


def test_a_temperature_is_brought_back_to_its_bound_and_keeps_its_gradient() -> None:
    module = module_of(settings_of({"image-text": 1.0}))
    scale = module.log_scale["image-text"]
    scale.data.fill_(99.0)
    batch = batch_of(ALL, torch.tensor([1, 2]))
    module(outputs_of({"image": EYE, "text": EYE.flip(0)}), batch, SINGLE)["match/image-text"].backward()
    assert scale.item() == pytest.approx(MAX_LOG_SCALE)
    assert scale.grad is not None and scale.grad.item() > 0
    assert [(its is scale, bound) for its, bound in module.upper_bounds()] == [(True, MAX_LOG_SCALE)]


def test_a_pair_is_of_any_two_representations() -> None:
    """A fused representation is one side like a modality; its loss is that of the features under its name."""
    values = {"kind": "contrastive", "pairs": {"scene-text": 1.0}, "initial_temperature": 1.0}
    config = tiny_config(
        Path("unused"), objectives={"match": values}, representations={"scene": ["image", "audio"], "other": ["text"]}
    )
    objective = pack_settings(config).objectives["match"]
    assert objective.representations == ("text", "scene")
    assert objective.needs() == {"match scene-text": {"image", "audio", "text"}}
    batch = batch_of({"scene": ALL["image"], "text": ALL["text"]}, torch.tensor([1, 2]))
    found = objective.module(2)(outputs_of({"scene": EYE, "text": EYE.flip(0)}), batch, SINGLE)
    assert found["match/scene-text"].item() / 2 == pytest.approx(ONE_OF_TWO + 1, rel=1e-6)


def test_where_parts_may_be_missing_samples_with_any_of_them_serve_a_pair() -> None:
    pairs = {"kind": "contrastive", "pairs": {"scene-text": 1.0, "image-text": 1.0}}
    scene = {"kind": "late", "parts": ["image", "audio"], "missing": "allow"}
    config = tiny_config(Path("unused"), objectives={"match": pairs}, representations={"scene": scene})
    objective = pack_settings(config).objectives["match"]
    assert objective.needs() == {
        "match scene-text of image and text": {"image", "text"},
        "match scene-text of audio and text": {"audio", "text"},
        "match image-text": {"image", "text"},
    }
    assert sorted(segment.tokens[0][0] for segment in objective.expected()) == ["audio", "image", "text"], "each once"


SAMPLES, WIDTH, JOINT = 12, 5, 4
FACTORS = {"match/image-text": 0.3, "match/audio-text": 0.2, "match/image-audio": 0.1}  # weights over numbers
# Sums of tens of fp32 terms near 1, in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@dataclasses.dataclass
class World:
    """Towers whose features are ``normalize(inputs @ weight)``, and the samples of one optimizer step:
    some lack modalities, and samples 3, 4 and 9 are of one group."""

    inputs: dict[str, Tensor]
    present: dict[str, Tensor]
    group_ids: Tensor
    weights: dict[str, Tensor]
    module: PairModule

    @classmethod
    def make(cls, **settings: Any) -> World:
        generator = torch.Generator().manual_seed(0)
        inputs = {m: torch.randn(SAMPLES, WIDTH, generator=generator) for m in NAMES}
        weights = {m: torch.randn(WIDTH, JOINT, generator=generator).requires_grad_() for m in NAMES}
        present = torch.rand(len(NAMES), SAMPLES, generator=generator) < 0.7
        present[:, [0, 7]] = True
        groups = torch.arange(SAMPLES)
        groups[[4, 9]] = 3
        module = module_of(settings_of(**settings), JOINT)
        for i, log_scale in enumerate(module.log_scale.values()):
            log_scale.data.fill_(1.0 + 0.3 * i)
        return cls(inputs, dict(zip(NAMES, present, strict=True)), groups, weights, module)

    def batch(self, rows: slice) -> Batch:
        return batch_of({name: has[rows] for name, has in self.present.items()}, self.group_ids[rows])

    def outputs(self, rows: slice) -> Outputs:
        return outputs_of(
            {
                name: F.normalize(self.inputs[name][rows] @ self.weights[name], dim=-1)
                * self.present[name][rows, None]
                for name in NAMES
            }
        )

    def sums(self, rows: slice, groups: Groups = SINGLE) -> dict[str, Tensor]:
        found: dict[str, Tensor] = self.module(self.outputs(rows), self.batch(rows), groups)
        return found

    def gradients(self) -> dict[str, Tensor]:
        named = {**self.weights, **dict(self.module.named_parameters())}
        found = {name: leaf.grad for name, leaf in named.items() if leaf.grad is not None}
        assert found.keys() == named.keys()
        return found


def backward(sums: dict[str, Tensor]) -> None:
    torch.stack([FACTORS[loss] * value for loss, value in sums.items()]).sum().backward()


def whole_batch(kind: str) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Sums by pair and gradients of the loss, of one process and one batch."""
    world = World.make(kind=kind)
    sums = world.sums(slice(None))
    backward(sums)
    return {pair: value.item() for pair, value in sums.items()}, world.gradients()


def slices(first: int, sizes: tuple[int, ...]) -> list[slice]:
    return [slice(a, b) for a, b in pairwise(accumulate(sizes, initial=first))]


def plain_step(kind: str, groups: Groups, first: int, size: int) -> tuple[dict[str, float], dict[str, Tensor]]:
    """This rank's sums of one microbatch, and gradients over all ranks."""
    world = World.make(kind=kind)
    sums = world.sums(slice(first, first + size), groups)
    backward(sums)
    return {pair: value.item() for pair, value in sums.items()}, over_ranks(world, groups)


def cached_step(
    kind: str, groups: Groups, first: int, sizes: tuple[int, ...]
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """A step as an engine takes it: sums over microbatches, and gradients over ranks, too."""
    world = World.make(kind=kind, cached=True)
    with torch.no_grad():
        for rows in slices(first, sizes):
            world.module.collect(world.outputs(rows), world.batch(rows))
        world.module.finish(groups, FACTORS)
    leaves = (*world.weights.values(), *world.module.parameters())
    assert all(leaf.grad is None for leaf in leaves), "an engine's hooks would take it for a microbatch's"
    total = dict.fromkeys(FACTORS, 0.0)
    for rows in slices(first, sizes):
        values = world.sums(rows, groups)
        assert not any(value.requires_grad for value in values.values()), "the surrogate has the gradient"
        total = {loss: total[loss] + value.item() for loss, value in values.items()}
        surrogate = world.module.surrogate(world.outputs(rows))
        assert surrogate.item() == 0
        surrogate.backward()
    world.module.after_step(committed=True)
    assert world.sums(slice(0, 2))["match/image-text"].requires_grad, "a later step begins as a new one"
    return total, over_ranks(world, groups)


def over_ranks(world: World, groups: Groups) -> dict[str, Tensor]:
    gradients = world.gradients()
    if groups.data_size > 1:
        for gradient in gradients.values():
            dist.all_reduce(gradient, group=groups.data)
    return gradients


def assert_same_gradients(ours: dict[str, Tensor], whole: dict[str, Tensor]) -> None:
    assert ours.keys() == whole.keys()
    for name, gradient in whole.items():
        assert gradient.abs().max() > 1e-4, f"{name} would show nothing"
        torch.testing.assert_close(ours[name], gradient, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(12,), (4, 4, 4), (3, 8, 1)])
def test_microbatches_together_give_the_loss_and_gradients_of_one_batch(sizes: tuple[int, ...], kind: str) -> None:
    whole_losses, whole_gradients = whole_batch(kind)
    losses, gradients = cached_step(kind, SINGLE, 0, sizes)
    assert losses == pytest.approx(whole_losses, rel=1e-6)
    assert_same_gradients(gradients, whole_gradients)


SPLITS = (((6,), (6,)), ((2, 2, 2), (2, 2, 2)), ((1, 3, 2), (4, 1, 1)))  # microbatches of rank 0, of rank 1


def steps_of_rank() -> list[tuple[dict[str, float], dict[str, object]]]:
    """Of each kind a plain step, and a cached one for each split."""
    with process_group(timeout_minutes=0.5):
        groups = groups_of(ParallelConfig(), 2)
        first, made = 6 * groups.data_rank, []
        for kind in KINDS:
            made.append(plain_step(kind, groups, first, 6))
            made += [cached_step(kind, groups, first, split[groups.data_rank]) for split in SPLITS]
        return [(losses, {name: gradient.numpy() for name, gradient in grads.items()}) for losses, grads in made]


def test_two_ranks_give_the_loss_and_gradients_of_one_batch() -> None:
    ranks = run_ranks(2, steps_of_rank)
    for case, kind in enumerate(kind for kind in KINDS for _ in range(1 + len(SPLITS))):
        whole_losses, whole_gradients = whole_batch(kind)
        (losses, gradients), (other_losses, _) = (rank[case] for rank in ranks)
        total = {pair: value + other_losses[pair] for pair, value in losses.items()}
        assert total == pytest.approx(whole_losses, rel=1e-6)
        assert_same_gradients({name: torch.from_numpy(g) for name, g in gradients.items()}, whole_gradients)


def test_a_step_without_any_pair_costs_nothing() -> None:
    world = World.make(cached=True)
    world.present = {**world.present, "audio": torch.zeros(12).bool(), "text": torch.zeros(12).bool()}
    rows = slice(0, 6)
    world.module.collect(world.outputs(rows), world.batch(rows))
    world.module.finish(SINGLE, FACTORS)
    assert [value.item() for value in world.sums(rows).values()] == [0, 0, 0]
    world.module.surrogate(world.outputs(rows)).backward()
    assert not any(gradient.any() for gradient in world.gradients().values())


@pytest.mark.parametrize(
    ("cached", "sizes", "problem"),
    [
        (False, (8, 8, 1), "train.global_batch_size 16 or more, num_microbatches"),
        (False, (8, 8, 1), "objectives.match.cached: true"),
        (False, (8, 4, 1), None),
        (True, (8, 8, 1), None),
        (True, (1, 1, 1), "train.global_batch_size 2 or more, or objectives.match.weight: 0"),
    ],
)
def test_a_batch_without_negatives_is_refused(cached: bool, sizes: tuple[int, int, int], problem: str | None) -> None:
    found = settings_of(cached=cached).objectives["match"].settings.batch_problem("match", StepSizes(*sizes, 2))
    assert (found is None) == (problem is None)
    assert problem is None or problem in found


def test_one_sample_a_microbatch_has_the_negatives_of_a_queue() -> None:
    settings = settings_of(queue_size=8).objectives["match"].settings
    assert settings.batch_problem("match", StepSizes(8, 8, 1, 2)) is None
    world = World.make(queue_size=1)
    found = []
    for rows in (slice(0, 1), slice(7, 8)):  # these two have all modalities
        found.append(world.sums(rows)["match/image-text"].item())
        world.module.after_step(committed=True)
    assert found[0] == 0 and found[1] > 0.01


def from_queue(kind: str, world: World, rows: slice, queued: slice) -> Tensor:
    """The loss of image-text over ``rows``, with the samples ``queued`` as negatives, query by query."""
    scale = world.module.log_scale["image-text"].exp().item()
    outputs, earlier = world.outputs(slice(None)), range(SAMPLES)[queued]
    total = torch.zeros(())
    for query, key in (("image", "text"), ("text", "image")):
        for i in range(SAMPLES)[rows]:
            if not (world.present["image"][i] and world.present["text"][i]):
                continue
            rivals = [j for j in (*range(SAMPLES)[rows], *earlier)
                      if world.present[key][j] and world.group_ids[j] != world.group_ids[i]]  # fmt: skip
            own = scale * outputs.features[query][i] @ outputs.features[key][i]
            others = scale * outputs.features[query][i] @ outputs.features[key][rivals].T
            if kind == "contrastive":
                loss = torch.logsumexp(torch.cat([own[None], others]), 0) - own
            else:
                loss = F.softplus(-(own - 10)) + F.softplus(others - 10).sum()
            total = total + 0.5 * loss
    return total


@pytest.mark.parametrize("kind", KINDS)
def test_samples_of_earlier_steps_are_negatives(kind: str) -> None:
    """A queue of two steps of four samples. Samples 3 and 4 are of one group, and 9 too."""
    world = World.make(kind=kind, queue_size=8)
    steps = [slice(0, 4), slice(4, 8), slice(8, 12)]
    for number, rows in enumerate(steps):
        found = world.sums(rows)["match/image-text"].squeeze()
        expected = from_queue(kind, world, rows, slice(0, rows.start))
        assert found.item() == pytest.approx(expected.item(), rel=1e-5), number
        world.module.after_step(committed=True)
    world.module.eval()  # held-out samples meet no queue, and do not enter it
    alone = from_queue(kind, world, steps[0], slice(0))
    assert world.sums(steps[0])["match/image-text"].item() == pytest.approx(alone.item(), rel=1e-5)
    world.module.after_step(committed=False)
    world.module.train()
    world.sums(steps[0])
    world.module.after_step(committed=False)  # skipped
    latest = from_queue(kind, world, steps[0], slice(4, 12))
    assert world.sums(steps[0])["match/image-text"].item() == pytest.approx(latest.item(), rel=1e-5)


def test_features_of_the_queue_have_no_gradient() -> None:
    world = World.make(queue_size=4)
    world.sums(slice(0, 4))
    world.module.after_step(committed=True)
    before = world.module.queue_rows.clone()
    backward(world.sums(slice(4, 8)))
    assert not world.module.queue_rows.requires_grad and world.module.queue_rows.equal(before)


def test_all_pairs_share_one_copy_of_the_queue_until_the_backward_pass() -> None:
    world = World.make(queue_size=64)
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        sums = world.sums(slice(0, 4))
    copies = [size for size in kept.values() if size >= world.module.queue_rows.nbytes]
    assert len(sums) == 3 and len(copies) == 1


def test_a_queue_of_half_a_step_is_refused() -> None:
    settings = settings_of(queue_size=12).objectives["match"].settings
    assert settings.batch_problem("match", StepSizes(4, 1, 1, 2)) is None
    problem = settings.batch_problem("match", StepSizes(8, 1, 1, 2))
    assert problem is not None and problem.endswith("the queue holds whole steps; use 8 or 16")


def test_a_queue_begins_at_its_step() -> None:
    world = World.make(queue_size=8, queue_start=3)
    for step in range(5):
        world.module.begin_step(step)
        world.sums(slice(0, 4))
        world.module.after_step(committed=True)
        assert bool(world.module.queue_present.any()) is (step >= 3)


def test_settings_of_a_queue_need_a_queue() -> None:
    for key in ("queue_from_average", "queue_start"):
        with pytest.raises(ValueError, match=f"{key} without a queue; set queue_size"):
            settings_of(**{key: 1})
