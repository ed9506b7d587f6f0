"""LIMoE's entropy losses at work: a small model on a stream of images, audio and names."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.loader import Loader
from mmmoe_pretrain.modalities import build_modalities
from mmmoe_pretrain.models.pretraining import PretrainingModel
from tests.moe.routing_inputs import NAMES
from tests.support import tiny_config

EXPERTS, THRESHOLD, STEPS, LAST = 8, 3, 240, 24
CONFIDENT = {"local_entropy": 0.5}
SPREAD = {"global_entropy": 0.5, "min_experts": dict.fromkeys(NAMES.modalities, float(THRESHOLD))}


def config_of(root: Path, losses: dict[str, Any]) -> RunConfig:
    return tiny_config(
        root,
        data={"train": [{"path": str(root / "train")}], "tokenizer": str(root / "tokens.model"), "num_workers": 0},
        moe={"num_experts": EXPERTS, "experts_per_token": 1, "expert_hidden_size": 16, "losses": losses},
        train={"steps": STEPS, "global_batch_size": 16},
    )  # fmt: skip


@pytest.fixture(scope="module")
def batches(tiny_data: Path) -> list[Batch]:
    """Of all steps; they do not depend on the losses."""
    config = config_of(tiny_data, {})
    modalities = build_modalities(config.modalities, config.data.tokenizer)
    return [batch for _, _, (batch,), _ in Loader(config, modalities)]


def train(root: Path, batches: list[Batch], losses: dict[str, Any]) -> tuple[list[float], list[float]]:
    """By modality, in the MoE layer over the last steps: the experts in use (exponential of the
    entropy of its mean routing), and the mean entropy of a token's own routing in nats."""
    model = PretrainingModel(config_of(root, losses))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    probability_ME, entropy_M, tokens_M = torch.zeros(3, EXPERTS), torch.zeros(3), torch.zeros(3)
    for step, batch in enumerate(batches):
        optimizer.zero_grad()
        loss, report = model(batch)
        loss.backward()
        optimizer.step()
        if step >= STEPS - LAST:
            (stats,) = report.routing
            probability_ME += stats.probability_ME.detach()
            entropy_M += stats.entropy_M.detach()
            tokens_M += stats.tokens_M
    used = torch.special.entr(probability_ME / tokens_M[:, None]).sum(1).exp()
    return used.tolist(), (entropy_M / tokens_M).tolist()


def test_without_the_losses_tokens_stay_undecided(tiny_data: Path, batches: list[Batch]) -> None:
    _, uncertainty = train(tiny_data, batches, {})
    assert min(uncertainty) > 1.0, "ln 8 is 2.08"


def test_confidence_alone_collapses_a_modality_onto_one_expert(tiny_data: Path, batches: list[Batch]) -> None:
    used, uncertainty = train(tiny_data, batches, CONFIDENT)
    assert min(used) < 1.2
    assert max(uncertainty) < 0.35


def test_with_the_losses_every_modality_uses_its_threshold_of_experts_and_tokens_are_sure(
    tiny_data: Path, batches: list[Batch]
) -> None:
    used, uncertainty = train(tiny_data, batches, CONFIDENT | SPREAD)
    # The threshold is soft, a hinge against the pull of confidence: single modalities of five seeds
    # ended at 2.2 to 3.4 experts, their means at 2.8 to 3.2; confidence alone ends at 1.0.
    assert min(used) > 2
    assert sum(used) / len(used) > 0.9 * THRESHOLD
    assert max(uncertainty) < 0.35, "an even choice between two experts has 0.69"
