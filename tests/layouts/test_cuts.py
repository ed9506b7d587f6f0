"""However a step is cut into microbatches and ranks, it is the step of one batch: losses, and every gradient.

Held against plain torch on one batch of all samples. The first four have no text: with four microbatches the first
has neither a caption nor two of the three pairs. Captions have 2 to 8 targets.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.pack import pack
from mmmoe_pretrain.engines import deepspeed
from mmmoe_pretrain.engines.apply import build_engine
from mmmoe_pretrain.models.pretraining import PretrainingModel
from mmmoe_pretrain.parallel.mesh import destroy_groups
from mmmoe_pretrain.parallel.runtime import process_group
from tests.distributed import groups_of, run_ranks
from tests.layouts.cases import LAYOUTS, Case
from tests.layouts.train import Held, assemble, held_by_name
from tests.support import pack_settings, random_sample

SAMPLES = ("ia", "i", "ia", "a", "iat", "it", "at", "iat", "t", "iat", "at", "it", "iat", "iat", "it", "at")
ONE_RANK = [(engine, stage, "one process", cut) for engine, stage in (("megatron", 1), ("deepspeed", 0))
            for cut in (1, 2, 4)]  # fmt: skip
TWO_RANKS = [("megatron", 0, "DP2", 1), ("megatron", 1, "EP2", 4), ("megatron", 0, "PP2 x VPP2", 4),
             ("megatron", 0, "TP2 + SP", 2), ("deepspeed", 1, "DP2", 2), ("deepspeed", 3, "EP2", 4)]  # fmt: skip
# Sums of some hundred fp32 terms in another order; the largest of these gradients are near 1.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def config_for(root: Path, engine: str, stage: int, layout: str, cut: int) -> RunConfig:
    """Captioning, contrastive loss over the step, and the z-loss, a mean over tokens; nothing is clipped."""
    degrees = LAYOUTS.get(layout, (1, {}))[1]
    values = Case(layout, 0, engine, stage, degrees, cached="beside all").config(root).model_dump(mode="json")
    values["moe"] |= {"losses": {"z": 0.1, "local_entropy": 0, "global_entropy": 0}, "bias_balancing": {}}
    values["optimizer"]["clip_norm"] = 0.0
    values["train"] |= {"num_microbatches": cut, "global_batch_size": len(SAMPLES)}
    return run_config.parse(values)


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


def one_step(
    root: Path, case: tuple[Any, ...], device: torch.device
) -> tuple[dict[str, float], dict[str, int], Held]:
    """The losses that an engine reports, their counts, and what this rank holds of the gradients, which are a fixed
    part of Adam's first moment after its first step."""
    config = config_for(root, *case)
    groups = groups_of(config.parallel, config.moe.group_sizes)
    engine = build_engine(config, groups, device)
    size = len(SAMPLES) // case[-1] // groups.data_size
    firsts = [(a * groups.data_size + groups.data_rank) * size for a in range(case[-1])]
    result = engine.step([packed(config, range(first, first + size)) for first in firsts], 1e-3)
    share = 1 - config.optimizer.beta1
    gradients = {name: (shape, [(offset, numbers / share) for offset, numbers in pieces])
                 for name, (shape, pieces) in held_by_name(engine, "exp_avg").items()}  # fmt: skip
    destroy_groups()
    return result.losses, result.counts.terms, gradients


def steps(root: Path, cases: list[tuple[Any, ...]]) -> list[Any]:
    with process_group(timeout_minutes=1) as device:
        return [one_step(root, case, device) for case in cases]


@pytest.mark.parametrize("ranks,cases", [(1, ONE_RANK), (2, TWO_RANKS)], ids=["one rank", "two ranks"])
def test_the_cut_of_a_step_changes_neither_losses_nor_gradients(
    tmp_path: Path, ranks: int, cases: list[tuple[Any, ...]]
) -> None:
    plain = config_for(tmp_path, *ONE_RANK[0])
    losses, gradients = run_ranks(1, one_batch, plain)[0]
    assert all(value > 0 for value in losses.values())
    first = packed(plain, range(4))
    assert not len(first.targets["captioning"]) and (first.pooled["text"] < 0).all()
    deepspeed.prepare()  # before the fork: its import takes seconds
    found = run_ranks(ranks, steps, tmp_path, cases, timeout=200)
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
