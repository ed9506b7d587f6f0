"""LIMoE's entropy losses at work: a small model on a stream of pictures, sounds and names."""

from pathlib import Path
from typing import Any

import torch

from mmmoe_pretrain.batch import MODALITIES
from mmmoe_pretrain.data.loader import make_loader
from mmmoe_pretrain.modalities import build_codecs
from mmmoe_pretrain.models.pretraining import PretrainingModel
from tests.support import tiny_config

EXPERTS, THRESHOLD, STEPS, LAST = 8, 3, 240, 24
CONFIDENT = {"local_entropy": 0.5}
SPREAD = {"global_entropy": 0.5, "min_experts": dict.fromkeys(MODALITIES, float(THRESHOLD))}


def train(root: Path, losses: dict[str, Any]) -> tuple[list[float], list[float]]:
    """By modality, in the mixture layer over the last steps: the experts in use (exponential of the
    entropy of the shares of its tokens), and the mean entropy of a token's own routing in nats."""
    config = tiny_config(
        root,
        data={"train": [{"path": str(root / "train")}], "tokenizer": str(root / "tokens.model"), "num_workers": 0},
        moe={"num_experts": EXPERTS, "experts_per_token": 1, "expert_hidden_size": 16, "losses": losses},
        train={"steps": STEPS, "global_batch_size": 16},
    )  # fmt: skip
    codecs = build_codecs(config)
    model = PretrainingModel(config, codecs.text.vocab_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    counts_ME, entropy_M, tokens_M = torch.zeros(3, EXPERTS), torch.zeros(3), torch.zeros(3)
    for step, (batch,), _ in make_loader(config, codecs):
        optimizer.zero_grad()
        loss, report = model(batch)
        loss.backward()
        optimizer.step()
        if step >= STEPS - LAST:
            (stats,) = report.routing
            counts_ME += stats.counts_ME
            entropy_M += stats.entropy_M.detach()
            tokens_M += stats.tokens_M
    share_ME = counts_ME / counts_ME.sum(1, keepdim=True)
    used = torch.special.entr(share_ME).sum(1).exp()
    return used.tolist(), (entropy_M / tokens_M).tolist()


def test_without_the_losses_a_modality_crowds_onto_few_experts(tiny_data: Path) -> None:
    used, uncertainty = train(tiny_data, {})
    assert min(used) < THRESHOLD
    assert min(uncertainty) > 1.0, "and tokens stay undecided: ln 8 is 2.08"


def test_confidence_alone_collapses_a_modality_onto_one_expert(tiny_data: Path) -> None:
    used, uncertainty = train(tiny_data, CONFIDENT)
    assert min(used) < 1.2
    assert max(uncertainty) < 0.35


def test_with_the_losses_every_modality_uses_its_threshold_of_experts_and_tokens_are_sure(
    tiny_data: Path,
) -> None:
    used, uncertainty = train(tiny_data, CONFIDENT | SPREAD)
    # The threshold is soft (a hinge on the mean probabilities), so a few percent below it cost little.
    assert min(used) > 0.9 * THRESHOLD
    assert max(uncertainty) < 0.35, "an even choice between two experts has 0.69"
