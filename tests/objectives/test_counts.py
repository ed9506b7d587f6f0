"""What the losses of a step are divided by, and their values by hand over unequal microbatches."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mmmoe_pretrain.batch import Batch, Item
from mmmoe_pretrain.config import ParallelConfig, RunConfig
from mmmoe_pretrain.data.pack import pack
from mmmoe_pretrain.models.pretraining import PretrainingModel
from mmmoe_pretrain.objectives import StepCounts, step_counts
from mmmoe_pretrain.parallel.runtime import process_group
from tests.distributed import groups_of, run_ranks
from tests.support import BEGIN, END, objectives, pack_settings, random_batch, random_sample, tiny_config

CPU = torch.device("cpu")


def captions(config: RunConfig, *texts: list[int]) -> Batch:
    """An image with each of ``texts``, all captioned."""
    samples = []
    for i, text in enumerate(texts):
        image = random_sample(i, "i", config)
        caption = Item("text", np.array([BEGIN, *text, END]))
        samples.append(dataclasses.replace(image, items=(*image.items, caption)))
    return pack(samples, pack_settings(config))


def of_config(root: Path, contrastive: float, captioning: float, **losses: float) -> RunConfig:
    none = {"local_entropy": 0, "global_entropy": 0}
    return tiny_config(
        root,
        objectives=objectives({"weight": contrastive}, {"weight": captioning}),
        moe={"num_experts": 4, "expert_hidden_size": 8, "losses": {**none, **losses}},
    )


class Unigram(nn.Module):
    """In a language head's place: token 5 has probability 1/2, token 6 and the end mark (2) 1/4 each."""

    def forward(self, x_ND: Tensor) -> Tensor:
        logits_V = torch.full((48,), -1e9)
        logits_V[[5, 6, 2]] = torch.tensor([0.5, 0.25, 0.25]).log()
        return logits_V.expand(x_ND.shape[0], 48)


def test_a_step_is_the_mean_over_its_targets(tmp_path: Path) -> None:
    """[6 end], [5 5 5 5 end] and [5 end], and a microbatch without captions: of 9 targets 5 have probability 1/2 and
    4 have 1/4. The mean of the microbatches' means would be (log 4 + (9 / 7) log 2 + 0) / 3.
    """
    config = of_config(tmp_path, 0.0, 0.5)
    model = PretrainingModel(config)
    model.mmmoe.language_head = Unigram()
    batches = [captions(config, [6]), captions(config, [5, 5, 5, 5], [5]), random_batch(config, ["ia", "t"])]
    counts = step_counts(batches, model.objectives, None, CPU)
    assert counts == StepCounts(sum(batch.num_valid for batch in batches), {"captioning": 2 + 5 + 2})
    model.begin_step(0, counts)
    losses = [model(batch)[1].losses["captioning"].item() for batch in batches]
    assert losses[2] == 0
    assert sum(losses) == pytest.approx(0.5 * (5 * math.log(2) + 4 * math.log(4)) / 9, rel=1e-6)


def test_microbatches_weigh_by_their_pairs_and_tokens(tmp_path: Path) -> None:
    """Three samples with image and text, two, and none. Means of a microbatch are those of a step of its own."""
    config = of_config(tmp_path, 1.0, 0.0, z=0.1)
    model = PretrainingModel(config)
    batches = [
        random_batch(config, has, seed) for seed, has in enumerate((["it", "it", "iat", "a"], ["it", "it"], "a"))
    ]
    tokens = [batch.num_valid for batch in batches]
    alone = [model(batch)[1].losses for batch in batches]
    assert alone[0]["contrastive/image-text"] > 0 and alone[1]["contrastive/image-text"] > 0
    counts = step_counts(batches, model.objectives, None, CPU)
    assert counts.terms == {"contrastive/audio-text": 1, "contrastive/image-audio": 1, "contrastive/image-text": 5}
    model.begin_step(0, counts)
    found = [model(batch)[1].losses for batch in batches]
    for name, weights in (
        ("contrastive/image-text", (3 / 5, 2 / 5, 0)),
        ("aux/z", [n / sum(tokens) for n in tokens]),
    ):
        expected = sum(w * own[name].item() for w, own in zip(weights, alone, strict=True))
        assert sum(losses[name].item() for losses in found) == pytest.approx(expected, rel=1e-5)


def test_a_microbatch_without_a_pair_takes_nothing_from_the_gradient(tmp_path: Path) -> None:
    config = of_config(tmp_path, 1.0, 0.0)
    pairs, lacking = random_batch(config, ["it", "it", "it"]), random_batch(config, ["i", "i", "i"], seed=1)
    gradients = []
    for batches in ([pairs], [pairs, lacking]):
        model = PretrainingModel(config)
        model.begin_step(0, step_counts(batches, model.objectives, None, CPU))
        for batch in batches:
            model(batch)[0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert gradients[0].norm() > 0.1
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def counts_of_rank(root: Path) -> StepCounts:
    config = of_config(root, 1.0, 0.5)
    with process_group(timeout_minutes=0.5):
        groups = groups_of(ParallelConfig(), 4)
        batches = [captions(config, [5, 6, 7], [8]), captions(config, [9])] if groups.data_rank else [
            random_batch(config, ["a", "i"]), captions(config, [5], [6])]  # fmt: skip
        return step_counts(batches, pack_settings(config).objectives, groups.data, CPU)


def test_counts_are_those_of_all_ranks(tmp_path: Path) -> None:
    """Captions of 4 + 2 + 2 targets on one rank, 2 + 2 on the other; five samples with image and text."""
    first, second = run_ranks(2, counts_of_rank, tmp_path)
    assert first == second
    assert first.terms == {"contrastive/audio-text": 0, "contrastive/image-audio": 0, "contrastive/image-text": 5,
                           "captioning": 12}  # fmt: skip
