"""However a step is cut into microbatches and ranks, it is the step of one batch: losses, and every gradient.

Compared with plain torch on one batch of all samples. The first four have no text: with four microbatches the first
has neither a caption nor two of the three pairs. Captions have 2 to 8 targets.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.pack import pack
from mmmoe_pretrain.engines import deepspeed
from mmmoe_pretrain.models.pretraining import PretrainingModel
from mmmoe_pretrain.parallel.mesh import destroy_groups
from mmmoe_pretrain.parallel.runtime import process_group
from tests.distributed import run_ranks
from tests.layouts.cases import LAYOUTS, Case
from tests.layouts.train import Held, assemble, build, held_by_name
from tests.support import pack_settings, random_sample

SAMPLES = ("ia", "i", "ia", "a", "iat", "it", "at", "iat", "t", "iat", "at", "it", "iat", "iat", "it", "at")
# The z-loss is a mean over tokens; nothing is clipped.
MOE = {"losses": {"z": 0.1, "local_entropy": 0, "global_entropy": 0}, "bias_balancing": {}}


def case(engine: str, stage: int, layout: str, cut: int) -> Case:
    ranks, degrees = LAYOUTS.get(layout, (1, {}))
    train = {"num_microbatches": cut, "global_batch_size": len(SAMPLES)}
    more = {"contrastive": {"cached": True}, "moe": MOE, "optimizer": {"clip_norm": 0.0}}
    return Case(layout, ranks, engine, stage, degrees, "fp32", train, **more)


ONE_RANK = [case(engine, stage, "one process", cut) for engine, stage in (("megatron", 1), ("deepspeed", 0))
            for cut in (1, 2, 4)]  # fmt: skip
TWO_RANKS = [case("megatron", 0, "DP2", 1), case("megatron", 1, "EP2", 4), case("megatron", 0, "PP2 x VPP2", 4),
             case("megatron", 0, "TP2 + SP", 2), case("deepspeed", 1, "DP2", 2),
             case("deepspeed", 3, "EP2", 4)]  # fmt: skip
# Sums of some hundred fp32 terms in another order; the largest of these gradients are near 1.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def packed(config: RunConfig, positions: range) -> Batch:
    samples = [random_sample(i, SAMPLES[i], config) for i in positions]
    return pack(samples, pack_settings(config), positions)


def one_batch(config: RunConfig) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Losses and gradients of one process and one batch of all samples."""
    model, batch = PretrainingModel(config), packed(config, range(len(SAMPLES)))
    loss, report = model(batch)
    loss.backward()
    losses = {name: value.item() for name, value in report.losses.items()}
    nll = model.mmmoe(batch)[0].token_nll["captioning"]
    assert losses["captioning"] == pytest.approx(0.5 * nll.mean().item(), rel=1e-6)
    return losses, {name: p.grad.numpy() for name, p in model.named_parameters()}


def one_step(case: Case, device: torch.device) -> tuple[dict[str, float], dict[str, int], Held]:
    """The losses that an engine reports, their counts, and what this rank holds of the gradients, which are a fixed
    part of Adam's first moment after its first step."""
    engine = build(case, device)
    config, groups = engine.config, engine.groups
    cut = config.train.num_microbatches
    size = len(SAMPLES) // cut // groups.data_size
    firsts = [(a * groups.data_size + groups.data_rank) * size for a in range(cut)]
    result = engine.step([packed(config, range(first, first + size)) for first in firsts], 1e-3)
    share = 1 - config.optimizer.beta1
    gradients = {name: (shape, [(offset, numbers / share) for offset, numbers in pieces])
                 for name, (shape, pieces) in held_by_name(engine, "exp_avg").items()}  # fmt: skip
    destroy_groups()
    return result.losses, result.counts.terms, gradients


def steps(cases: list[Case]) -> list[tuple[dict[str, float], dict[str, int], Held]]:
    with process_group(timeout_minutes=1) as device:
        return [one_step(case, device) for case in cases]


@pytest.mark.parametrize("cases", [ONE_RANK, TWO_RANKS], ids=["one rank", "two ranks"])
def test_the_cut_of_a_step_changes_neither_losses_nor_gradients(cases: list[Case]) -> None:
    plain = ONE_RANK[0].config()
    losses, gradients = one_batch(plain)
    assert all(value > 0 for value in losses.values())
    first = packed(plain, range(4))
    assert not len(first.targets["captioning"]) and (first.pooled["text"] < 0).all()
    deepspeed.prepare()  # before the fork: its import takes seconds
    found = run_ranks(cases[0].ranks, steps, cases, timeout=200)
    captions = sum(len(random_sample(i, has, plain).items[-1].value) - 1 for i, has in enumerate(SAMPLES)
                   if "t" in has and has != "t")  # fmt: skip
    for i, case in enumerate(cases):
        for reported, counts, _ in (rank[i] for rank in found):
            assert counts == {"captioning": captions, "contrastive/audio-text": 8, "contrastive/image-audio": 7,
                              "contrastive/image-text": 8}  # fmt: skip
            assert {name: reported[name] for name in losses} == pytest.approx(losses, rel=1e-5), case
        held = [rank[i][2] for rank in found]
        for name, gradient in gradients.items():
            np.testing.assert_allclose(assemble(held, name), gradient, **CLOSE, err_msg=f"{case} {name}")
