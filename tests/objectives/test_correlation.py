"""Deep CCA and deep generalised CCA by hand, against closed forms, with missing modalities, over ranks and cached."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmmoe_pretrain.batch import Batch, SampleMeta
from mmmoe_pretrain.config import ParallelConfig
from mmmoe_pretrain.config.base import StepSizes
from mmmoe_pretrain.data.pack import PackSettings, pack
from mmmoe_pretrain.evaluate import cca
from mmmoe_pretrain.objectives import Outputs
from mmmoe_pretrain.objectives.correlation import sum_of_largest_eigenvalues, sum_of_singular_values, whitened
from mmmoe_pretrain.objectives.pooled import PooledModule
from mmmoe_pretrain.parallel.groups import SINGLE, Groups
from mmmoe_pretrain.parallel.runtime import process_group
from tests.distributed import groups_of, run_ranks
from tests.support import pack_settings, tiny_config

NAMES = ("image", "audio", "text")
CCA: dict[str, Any] = {"kind": "deep_cca", "pairs": {"image-text": 1.0, "audio-text": 1.0}}
GCCA: dict[str, Any] = {"kind": "deep_gcca", "representations": ["text", "image", "audio"]}
BOTH = {"cca": CCA, "gcca": GCCA}
ALL = torch.ones(4, dtype=torch.bool)
CROSS = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])  # without a mean; the same variance in every direction


def settings_of(**objectives: dict[str, Any]) -> PackSettings:
    return pack_settings(tiny_config(Path("unused"), objectives=objectives))


EMPTY = pack([], settings_of(**BOTH))


def batch_of(present: dict[str, Tensor]) -> Batch:
    pooled = {name: torch.where(has, torch.arange(len(has)), -1) for name, has in present.items()}
    count = len(next(iter(present.values())))
    metas = tuple(SampleMeta(str(i)) for i in range(count))
    return dataclasses.replace(EMPTY, pooled=pooled, group_ids=torch.arange(count), metas=metas)


def losses(values: dict[str, Any], projected: dict[str, Tensor], present: dict[str, Tensor]) -> dict[str, float]:
    """The means of the losses over their terms."""
    objective = settings_of(its=values).objectives["its"]
    batch, size = batch_of(present), next(iter(projected.values())).shape[1]
    sums = objective.module(size)(Outputs(torch.zeros(0, 16), {}, {}, {}, projected), batch, SINGLE)
    return {name: value.item() / max(1, objective.counts(batch)[name]) for name, value in sums.items()}


def pair_loss(x: Tensor, y: Tensor, **more: Any) -> float:
    values = {**CCA, "pairs": {"image-text": 1.0}, **more}
    every = dict.fromkeys(("image", "text"), torch.ones(len(x), dtype=torch.bool))
    return losses(values, {"image": x, "text": y}, every)["its/image-text"]


def joint_loss(views: dict[str, Tensor], present: dict[str, Tensor] | None = None, **more: Any) -> float:
    has = present or dict.fromkeys(views, torch.ones(len(next(iter(views.values()))), dtype=torch.bool))
    return losses({**GCCA, "representations": list(views), **more}, views, has)["its"]


def test_the_loss_by_hand() -> None:
    """With X'X = 2 I and the ridge r every correlation of X with a rotation of it is 2 / (2 + 2 r)."""
    turned = torch.stack([3 * CROSS[:, 1] + 5, -3 * CROSS[:, 0] - 1], dim=1)
    for ridge in (1e-3, 0.5):
        assert pair_loss(CROSS, turned, ridge=ridge) == pytest.approx(2 - 2 / (1 + ridge), rel=1e-5)
        views = {"image": CROSS, "audio": turned, "text": 0.1 * CROSS}
        assert joint_loss(views, ridge=ridge) == pytest.approx(2 - 2 / (1 + ridge), rel=1e-5)
    one, other = torch.tensor([[1.0], [-1], [1], [-1]]), torch.tensor([[1.0], [1], [-1], [-1]])
    assert pair_loss(one, other) == pytest.approx(1)  # no correlation
    assert joint_loss({"image": one, "text": other}, ridge=1e-8) == pytest.approx(0.5)  # G is one of the two


def related(samples: int, size: int) -> dict[str, Tensor]:
    """Views of one thing, each with noise, its own scale and its own mean."""
    random = np.random.default_rng(0)
    common = random.normal(size=(samples, size))
    found = {}
    for i, name in enumerate(NAMES):
        rows = common @ random.normal(size=(size, size)) + 0.7 * random.normal(size=(samples, size))
        found[name] = torch.tensor(rows * 10.0 ** (1 - i) + i, dtype=torch.float32)
    return found


def some(samples: int) -> dict[str, Tensor]:
    rows = torch.from_numpy(np.random.default_rng(1).random((len(NAMES), samples)) < 0.7)
    return dict(zip(NAMES, rows, strict=True))


def test_the_loss_is_the_closed_form() -> None:
    """The closed form is by singular values in numpy (evaluate/cca.py), the loss by Cholesky."""
    views, present, ridges = related(40, 4), some(40), {"image": 0.02, "text": 0.3, "audio": 1e-3}
    found = losses({**CCA, "ridge": ridges}, views, present)
    for pair in CCA["pairs"]:
        a, b = pair.split("-")
        both = present[a] & present[b]
        assert 10 < both.sum() < 40
        rows = (views[side][both].numpy() for side in (a, b))
        correlations_C = cca.fit(*rows, ridges=(ridges[a], ridges[b])).correlations_C
        assert found[f"its/{pair}"] == pytest.approx(4 - correlations_C.sum(), rel=1e-6)


def test_the_generalised_loss_is_that_of_the_definition() -> None:
    """The N x N matrix of the docstring in numpy; samples with one view alone are left out by hand."""
    views, present, ridge = related(30, 3), some(30), 0.05
    has = np.stack([present[name].numpy() for name in NAMES], axis=1)
    kept = has.sum(axis=1) >= 2
    assert 15 < kept.sum() < 30
    matrix, weights = np.zeros((kept.sum(), kept.sum())), has[kept].sum(axis=1) ** -0.5
    for i, name in enumerate(NAMES):
        rows, mask = views[name].numpy()[kept].astype(np.float64), has[kept, i]
        rows = (rows - rows[mask].mean(axis=0)) * mask[:, None]
        square = rows.T @ rows
        matrix += rows @ np.linalg.inv(square + ridge * np.trace(square) / 3 * np.eye(3)) @ rows.T
    expected = 3 - np.linalg.eigvalsh(weights[:, None] * matrix * weights)[-3:].sum()
    assert joint_loss(views, present, ridge=ridge) == pytest.approx(expected, rel=1e-6)


def test_two_views_agree_half_as_far_as_they_correlate() -> None:
    views = related(40, 4)
    pair = {name: views[name] for name in ("image", "text")}
    half = 0.5 * pair_loss(*pair.values(), ridge=1e-8)
    assert joint_loss(pair, ridge=1e-8) == pytest.approx(half, rel=1e-5)  # the ridge, over the least variance


def test_a_linear_map_changes_no_loss() -> None:
    """So there is nothing to win by the length or the direction of a vector."""
    views = related(40, 4)
    mapped = {**views, "text": views["text"] @ torch.randn(4, 4, generator=torch.Generator().manual_seed(1)) - 3}
    assert pair_loss(views["image"], mapped["text"], ridge=1e-8) == pytest.approx(
        pair_loss(views["image"], views["text"], ridge=1e-8), rel=1e-4
    )
    assert joint_loss(mapped, ridge=1e-8) == pytest.approx(joint_loss(views, ridge=1e-8), rel=1e-4)
    longer = {name: 1e3 * rows for name, rows in views.items()}  # also with a ridge
    assert joint_loss(longer, ridge=0.3) == pytest.approx(joint_loss(views, ridge=0.3), rel=1e-5)


def total(x: Tensor, y: Tensor, counted: Tensor, ridge: float) -> Tensor:
    return sum_of_singular_values(whitened(x, counted, ridge).t() @ whitened(y, counted, ridge))


def agreement(x: Tensor, y: Tensor, counted: Tensor, ridge: float) -> Tensor:
    return sum_of_largest_eigenvalues(torch.cat([whitened(its, counted, ridge) for its in (x, y)], dim=1), x.shape[1])


ROTATED = CROSS.double() @ torch.tensor([[0.6, 0.8], [-0.8, 0.6]], dtype=torch.float64)
MADE = torch.randn(2, 9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("function", [total, agreement])
@pytest.mark.parametrize(
    ("x", "y", "counted"),
    [
        (MADE[0], MADE[1], torch.ones(9, dtype=torch.bool)),
        (MADE[0], MADE[1], torch.arange(9) < 6),
        (MADE[0, :3], MADE[1, :3], torch.ones(3, dtype=torch.bool)),  # fewer samples than dimensions
        (CROSS.double(), ROTATED, ALL),  # equal singular values, and equal eigenvalues
    ],
    ids=["all", "some", "few", "equal values"],
)
def test_gradients_are_those_of_finite_differences(function: Any, x: Tensor, y: Tensor, counted: Tensor) -> None:
    leaves = (x.clone().requires_grad_(), y.clone().requires_grad_())
    assert torch.autograd.gradcheck(lambda x, y: function(x, y, counted, 0.1), leaves)


def gradients(values: dict[str, Any], projected: dict[str, Tensor], present: dict[str, Tensor]) -> list[Tensor]:
    leaves = {name: rows.clone().requires_grad_() for name, rows in projected.items()}
    module = settings_of(its=values).objectives["its"].module(next(iter(projected.values())).shape[1])
    sums = module(Outputs(torch.zeros(0, 16), {}, {}, {}, leaves), batch_of(present), SINGLE)
    torch.stack(list(sums.values())).sum().backward()
    return [leaf.grad for leaf in leaves.values() if leaf.grad is not None]


@pytest.mark.parametrize("values", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_samples_cost_nothing_and_have_no_gradient(values: dict[str, Any], count: int) -> None:
    views = related(6, 4)
    present = dict.fromkeys(NAMES, torch.arange(6) < count)
    assert set(losses(values, views, present).values()) == {0.0}
    found = gradients(values, views, present)
    assert len(found) == 3 and not any(gradient.any() for gradient in found)


@pytest.mark.parametrize("values", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize("case", ["few samples", "constant", "equal"])
def test_losses_and_gradients_stay_finite(values: dict[str, Any], case: str) -> None:
    views, present = related(6, 8), dict.fromkeys(NAMES, torch.arange(6) < 3)
    if case != "few samples":
        present = dict.fromkeys(NAMES, torch.arange(6) < 6)
        alike = torch.ones(6, 8) * 0.1 if case == "constant" else views["text"]
        views = {**views, "image": alike, "text": alike}
    assert all(0 <= loss <= 8 for loss in losses(values, views, present).values())
    found = gradients(values, views, present)
    assert all(torch.isfinite(gradient).all() and gradient.abs().max() < 1e3 for gradient in found)


@pytest.mark.parametrize("values", BOTH.values(), ids=BOTH)
def test_vectors_that_are_not_finite_give_a_loss_that_is_not(values: dict[str, Any]) -> None:
    """An engine then skips the step; an error would end the run."""
    views = related(6, 4)
    views["text"][2, 1] = float("nan")
    found = losses(values, views, dict.fromkeys(NAMES, torch.arange(6) < 6))
    assert all(np.isnan(loss) for loss in found.values())


SAMPLES, WIDTH, JOINT = 16, 5, 3
# Sums of fp32 projections in another order, of which the whitening divides the least by 1 / sqrt(ridge) = 5.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@dataclasses.dataclass
class World:
    """Linear towers, the samples of one step, of which some lack modalities, and the modules."""

    inputs: dict[str, Tensor]
    present: dict[str, Tensor]
    weights: dict[str, Tensor]
    modules: list[PooledModule]

    @classmethod
    def make(cls, cached: bool = False) -> World:
        generator = torch.Generator().manual_seed(0)
        inputs = {m: torch.randn(SAMPLES, WIDTH, generator=generator) for m in NAMES}
        weights = {m: torch.randn(WIDTH, JOINT, generator=generator).requires_grad_() for m in NAMES}
        present = torch.rand(len(NAMES), SAMPLES, generator=generator) < 0.7
        values = {name: {**its, "cached": cached, "ridge": 0.04} for name, its in BOTH.items()}
        modules = [objective.module(JOINT) for objective in settings_of(**values).objectives.values()]
        assert all(isinstance(module, PooledModule) for module in modules)
        return cls(inputs, dict(zip(NAMES, present, strict=True)), weights, modules)  # type: ignore[arg-type]

    def given(self, rows: slice) -> tuple[Outputs, Batch]:
        present = {name: has[rows] for name, has in self.present.items()}
        projected = {name: self.inputs[name][rows] @ self.weights[name] * present[name][:, None] for name in NAMES}
        return Outputs(torch.zeros(0, 16), {}, {}, {}, projected), batch_of(present)

    def sums(self, rows: slice, groups: Groups) -> dict[str, Tensor]:
        return {k: v for module in self.modules for k, v in module(*self.given(rows), groups).items()}

    def step(self, microbatches: list[slice], groups: Groups = SINGLE) -> tuple[dict[str, float], dict[str, Any]]:
        """Sums of this rank, and gradients over all; ``cached`` as an engine takes it."""
        cached = len(microbatches) > 1
        if cached:
            for module in self.modules:
                with torch.no_grad():
                    for rows in microbatches:
                        module.collect(*self.given(rows))
                    module.finish(groups, {"cca/image-text": 1.0, "cca/audio-text": 1.0, "gcca": 1.0})
        found: dict[str, float] = {}
        for rows in microbatches:
            sums = self.sums(rows, groups)
            found = {name: found.get(name, 0.0) + value.item() for name, value in sums.items()}
            outputs = self.given(rows)[0]
            parts = [module.surrogate(outputs) for module in self.modules] if cached else list(sums.values())
            torch.stack(parts).sum().backward()
        gradients = {name: weight.grad for name, weight in self.weights.items()}
        for gradient in gradients.values():
            if groups.data_size > 1:
                torch.distributed.all_reduce(gradient, group=groups.data)
        return found, {name: gradient.numpy() for name, gradient in gradients.items() if gradient is not None}


def of_one_batch() -> tuple[dict[str, float], dict[str, Any]]:
    return World.make().step([slice(0, SAMPLES)])


def assert_same(ours: tuple[dict[str, float], dict[str, Any]]) -> None:
    whole_losses, whole_gradients = of_one_batch()
    assert ours[0] == pytest.approx(whole_losses, rel=1e-5)
    assert ours[1].keys() == whole_gradients.keys() == set(NAMES)
    for name, gradient in whole_gradients.items():
        assert np.abs(gradient).max() > 0.1
        np.testing.assert_allclose(ours[1][name], gradient, **CLOSE)


def test_cached_microbatches_are_one_batch() -> None:
    assert_same(World.make(cached=True).step([slice(0, 3), slice(3, 12), slice(12, 16)]))


def steps_of_rank() -> list[tuple[dict[str, float], dict[str, Any]]]:
    with process_group(timeout_minutes=0.5):
        groups = groups_of(ParallelConfig(), 2)
        first, middle = 8 * groups.data_rank, (1, 5)[groups.data_rank]
        cuts = [slice(first, first + middle), slice(first + middle, first + 8)]
        return [World.make().step([slice(first, first + 8)], groups), World.make(cached=True).step(cuts, groups)]


def test_two_ranks_are_one_process() -> None:
    for (losses, gradients), (others, _) in zip(*run_ranks(2, steps_of_rank), strict=True):
        assert_same(({name: value + others[name] for name, value in losses.items()}, gradients))


@pytest.mark.parametrize(
    ("cached", "sizes", "problem"),
    [
        (False, StepSizes(64, 4, 2, 32), "objectives.its correlates 32 dimensions (model.embedding_size) over 16 "
         "samples, which any vectors do perfectly: it needs 33 or more; use train.global_batch_size 132 or more, "
         "objectives.its.cached: true (correlations of the whole step), train.num_microbatches [1], "
         "model.embedding_size 15 or less, or objectives.its.weight: 0"),
        (True, StepSizes(64, 4, 2, 32), None),
        (True, StepSizes(32, 4, 2, 32), "use train.global_batch_size 33 or more, model.embedding_size 31 or less"),
        (False, StepSizes(33, 1, 1, 32), None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("values", BOTH.values(), ids=BOTH)
def test_fewer_samples_than_dimensions_are_refused(
    values: dict[str, Any], cached: bool, sizes: StepSizes, problem: str | None
) -> None:
    objective = settings_of(its={**values, "cached": cached}).objectives["its"]
    found = objective.settings.batch_problem("its", sizes)
    assert (found is None) == (problem is None)
    assert problem is None or problem in found
    off = objective.settings.model_copy(update={"weight": 0.0})
    assert off.batch_problem("its", sizes) is None


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({**CCA, "pairs": {"image-sound": 1}}, "objectives.its.pairs 'image-sound' is not two of image, audio, text"),
        ({**CCA, "ridge": 0}, "objectives.its.ridge"),
        ({**CCA, "ridge": {"image": 0.1, "txt": 0.1}}, "objectives.its.ridge 'txt': did you mean text?"),
        (
            {**CCA, "ridge": {"image": 0.1, "text": 0.1}},
            "objectives.its.ridge has none of audio; add it, or give",
        ),
        ({**CCA, "queue_size": 8}, "unknown key 'objectives.its.queue_size'"),
        ({**GCCA, "representations": ["image"]}, "objectives.its.representations"),
        (
            {**GCCA, "representations": ["image", "tekst"]},
            "objectives.its.representations 'tekst': did you mean text",
        ),
        ({**GCCA, "representations": ["text", "image", "text"]}, "name each of them once"),
    ],
)
def test_bad_settings_are_refused(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError) as error:
        settings_of(its=values)
    assert problem in str(error.value)
