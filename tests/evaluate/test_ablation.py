"""Masked experts, of a model whose routers send each modality to experts of its own."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from mmmoe_pretrain.evaluate.routing.ablation import Ablation, Mask, masks_of, measure, without_expert
from mmmoe_pretrain.models.pretraining import PretrainingModel
from tests.support import random_batch, tiny_config

USERS = {"image": (0, 1), "audio": (1, 2), "text": (2, 3)}  # two experts a token; expert 4 serves none
NEVER, ALWAYS = -1e4, 1e4


def make(root: Path, **moe: object) -> tuple[PretrainingModel, Ablation]:
    """Random weights; balancing biases decide which two of the five experts the tokens of a modality choose."""
    settings = {"num_experts": 5, "expert_hidden_size": 8, "every": 1, "losses": {}, **moe}
    config = tiny_config(root, moe={**settings, "bias_balancing": {"rate": 0.0, "per_modality": True}})
    whole = PretrainingModel(config.with_vocabulary(48)).eval()
    for router in whole.mmmoe.routers:
        for name, users in USERS.items():
            router.bias.get_buffer(name)[0, list(users)] = ALWAYS
    batches = [random_batch(config, ["iat", "it", "a", "t", "iat", "at"], seed) for seed in (1, 2)]
    return whole, Ablation(whole.mmmoe, dict(whole.tasks.items()), batches)


def losses_of(whole: PretrainingModel, ablation: Ablation) -> dict[str, float]:
    """Each batch a step of its own, from the model's own reports, which are means over the batch's terms."""
    total, terms = dict[str, float](), dict[str, int]()
    weights = whole.objectives.weights(0)
    for batch in ablation.batches:
        with torch.no_grad():
            report = whole(batch)[1]
        for objective in whole.objectives.values():
            for loss, count in objective.counts(batch).items():
                total[loss] = total.get(loss, 0.0) + float(report.losses[loss]) / weights[loss] * count
                terms[loss] = terms.get(loss, 0) + count
    return {loss: total[loss] / count for loss, count in terms.items()}


def test_losses_are_means_over_the_terms_of_all_batches(tmp_path: Path) -> None:
    whole, ablation = make(tmp_path)
    assert ablation.losses() == pytest.approx(losses_of(whole, ablation), rel=1e-5)


def test_only_reached_experts_are_tried_and_for_the_modalities_that_reach_them(tmp_path: Path) -> None:
    whole, ablation = make(tmp_path)
    routing = whole.mmmoe(ablation.batches[0])[1]
    found = [(mask.router.layer, mask.expert, mask.modality) for mask in masks_of(whole.mmmoe, routing)]
    of_layer = [(0, None), (0, 0), (1, None), (1, 0), (1, 1), (2, None), (2, 1), (2, 2), (3, None), (3, 2)]
    assert found == [(layer, expert, m) for layer in (0, 1) for expert, m in of_layer]


@pytest.mark.parametrize("block", [0, 1])
def test_an_expert_that_images_alone_use_is_lost_for_what_reads_images(block: int, tmp_path: Path) -> None:
    """Captions attend to their image, so they lose in the first block; behind the last no token reads another."""
    whole, ablation = make(tmp_path)
    base = ablation.losses()
    reads_images = {loss for loss in base if "image" in loss or (loss == "captioning" and block == 0)}
    assert reads_images and len(reads_images) < len(base)
    for m, name in enumerate(USERS):
        with without_expert(Mask(whole.mmmoe.routers[block], 0, m)):
            now = ablation.losses()
        # The others' probabilities have another sum, which the weights are divided by: a rounding of fp32.
        changed = {loss for loss, value in now.items() if abs(value - base[loss]) > 1e-5}
        assert changed == (reads_images if name == "image" else set()), name
    assert ablation.losses() == base  # as before


@pytest.mark.parametrize("router", ["softmax_top_k", "sigmoid_top_k", "noisy_top_k"])
def test_a_masked_expert_is_one_that_a_bias_forbids(router: str, tmp_path: Path) -> None:
    """With weights that are divided by their sum, the bias of the choice says the same by other means."""
    whole, ablation = make(tmp_path, router=router)
    routing = whole.mmmoe(ablation.batches[0])[1]
    base = losses_of(whole, ablation)
    for layer, found in enumerate(measure(ablation, routing)):
        assert found["loss"] == pytest.approx(base, rel=1e-5)
        for mask, expert, names in [("all", 1, list(USERS)), ("audio", 1, ["audio"]), ("text", 3, ["text"])]:
            other = copy.deepcopy(whole)
            for name in names:
                other.mmmoe.routers[layer].bias.get_buffer(name)[0, expert] = NEVER
            rise = {loss: value - base[loss] for loss, value in losses_of(other, ablation).items()}
            assert found["without"][expert][mask] == pytest.approx(rise, abs=1e-5)  # fp32 losses near 3
        assert found["without"][4] == {}
