"""The contrastive loss by hand, with missing modalities, and over ranks."""

import math

import pytest
import torch
from torch import Tensor

from mmmoe_pretrain.config import ContrastiveConfig, ParallelConfig
from mmmoe_pretrain.objectives.contrastive import ContrastiveObjective
from mmmoe_pretrain.parallel.groups import SINGLE, Groups
from mmmoe_pretrain.parallel.mesh import build_groups
from mmmoe_pretrain.parallel.runtime import process_group
from tests.distributed import run_ranks

CONFIG = ContrastiveConfig(pairs={"image-text": 1.0}, initial_temperature=1.0)
EYE = torch.eye(2)
ALL = torch.ones(3, 2, dtype=torch.bool)


def loss(image: Tensor, text: Tensor, present: Tensor = ALL, group_ids: tuple[int, ...] = (1, 2)) -> float:
    """The mean over the samples that have both."""
    features = {"image": image, "text": text, "audio": torch.zeros_like(image)}
    objective = ContrastiveObjective(CONFIG)
    total = objective(features, present, torch.tensor(group_ids), SINGLE)["image-text"].item()
    return total / int((present[0] & present[2]).sum())


def test_two_orthogonal_pairs_cost_what_a_softmax_over_one_and_zero_costs() -> None:
    assert loss(EYE, EYE) == pytest.approx(-math.log(math.e / (math.e + 1)), rel=1e-6)


def test_swapped_pairs_cost_one_nat_more() -> None:
    assert loss(EYE, EYE.flip(0)) - loss(EYE, EYE) == pytest.approx(1.0, rel=1e-6)


def test_a_sample_without_text_takes_no_part() -> None:
    present = ALL.clone()
    present[2, 1] = False
    text = EYE.clone()
    text[1] = 0
    # Of two queries one is left. Its text stands alone; its image has one rival among the images.
    assert loss(EYE, text, present) == pytest.approx(0.5 * -math.log(math.e / (math.e + 1)), rel=1e-6)


def test_samples_of_one_group_are_no_negatives() -> None:
    assert loss(EYE, EYE, group_ids=(7, 7)) == pytest.approx(0.0, abs=1e-6)


def test_no_pair_at_all_costs_nothing_and_has_finite_gradients() -> None:
    image = EYE.clone().requires_grad_()
    objective = ContrastiveObjective(CONFIG)
    features = {"image": image, "text": torch.zeros(2, 2), "audio": torch.zeros(2, 2)}
    present = torch.tensor([[True, True], [False, False], [False, False]])
    value = objective(features, present, torch.tensor([1, 2]), SINGLE)["image-text"]
    value.sum().backward()
    assert value.item() == 0
    assert not image.grad.any()
    assert objective.log_scale["image-text"].grad.item() == 0


def global_batch() -> tuple[dict[str, Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = {m: torch.nn.functional.normalize(torch.randn(8, 4, generator=generator), dim=-1)
                for m in ("image", "audio", "text")}  # fmt: skip
    present = torch.rand(3, 8, generator=generator) < 0.7
    present[0, :2] = present[2, :2] = True
    return features, present, torch.tensor([0, 1, 2, 3, 3, 5, 6, 7])


def losses_of_rank(groups: Groups) -> tuple[dict[str, float], Tensor]:
    """Each pair's sum of this rank's samples, and the gradient of all ranks' for this rank's features."""
    features, present, group_ids = global_batch()
    size = 8 // groups.data_size
    mine = slice(groups.data_rank * size, (groups.data_rank + 1) * size)
    local = {m: f[mine].clone().requires_grad_() for m, f in features.items()}
    losses = ContrastiveObjective(ContrastiveConfig())(local, present[:, mine], group_ids[mine], groups)
    sum(losses.values()).sum().backward()
    gradient = torch.stack([local[m].grad for m in ("image", "audio", "text")])
    return {k: v.item() for k, v in losses.items()}, gradient


def rank_losses() -> tuple[dict[str, float], object]:
    with process_group(timeout_minutes=0.5):
        pairs, gradient = losses_of_rank(build_groups(ParallelConfig(), 2))
        return pairs, gradient.numpy()


def test_two_ranks_give_the_losses_and_gradients_of_one() -> None:
    whole_pairs, whole_gradient = losses_of_rank(SINGLE)
    ranks = run_ranks(2, rank_losses)
    for pair, value in whole_pairs.items():
        assert sum(rank[0][pair] for rank in ranks) == pytest.approx(value, rel=1e-5)
    gradient = torch.cat([torch.from_numpy(rank[1]) for rank in ranks], dim=1)
    torch.testing.assert_close(gradient, whole_gradient, rtol=1e-4, atol=1e-6)
