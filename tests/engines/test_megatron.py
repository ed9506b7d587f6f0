"""What the engine does beside reducing: decay groups, clipping, and state in and out."""

import copy
from typing import Any

import pytest
import torch

from mmmoe_pretrain.checkpoint.state import model_key
from mmmoe_pretrain.engines.apply import build_engine
from mmmoe_pretrain.engines.base import Progress
from mmmoe_pretrain.models.pretraining import PretrainingModel
from mmmoe_pretrain.parallel.mesh import destroy_groups
from mmmoe_pretrain.parallel.runtime import process_group
from tests.distributed import groups_of, run_ranks
from tests.support import objectives, random_batch, tiny_config


def one_step_against_torch(root: Any) -> dict[str, float]:
    """The largest difference from torch's AdamW, for matrices and for vectors."""
    config = tiny_config(root, optimizer={"weight_decay": 0.5, "clip_norm": 0.1, "warmup_steps": 0})
    batch = random_batch(config, ["iat", "it", "at", "ia"])
    reference = PretrainingModel(config)
    before = copy.deepcopy(dict(reference.named_parameters()))
    decayed = [p for p in reference.parameters() if p.ndim >= 2]
    plain = [p for p in reference.parameters() if p.ndim < 2]
    settings = config.optimizer
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.5}, {"params": plain, "weight_decay": 0.0}],
                                  lr=1e-2, betas=(settings.beta1, settings.beta2), eps=settings.eps)  # fmt: skip
    reference(batch)[0].backward()
    norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), settings.clip_norm)
    optimizer.step()
    with process_group(timeout_minutes=0.5) as device:
        engine = build_engine(config, groups_of(config.parallel, 4), device)
        result = engine.step([batch], learning_rate=1e-2)
        state = engine.export_state()
        destroy_groups()
    held = {name: next(iter(state[model_key(name)].pieces.values())) for name in before}
    difference = {name: float((held[name] - p).abs().max()) for name, p in reference.named_parameters()}
    moved = max(float((before[name] - p).abs().max()) for name, p in reference.named_parameters())
    return {"largest": max(difference.values()), "moved": moved, "norm": result.grad_norm - float(norm),
            "clipped": float(norm) > settings.clip_norm}  # fmt: skip


def test_a_step_is_that_of_adamw_with_clipping_and_no_decay_of_vectors(tmp_path: Any) -> None:
    found = run_ranks(1, one_step_against_torch, tmp_path)[0]
    assert found["clipped"]
    assert found["moved"] > 1e-3
    # Adam's first step divides a gradient by its own size: rounding of tiny gradients shows.
    assert found["largest"] < 2e-5
    assert found["norm"] == pytest.approx(0, abs=1e-4)


def losses_without_contrastive(root: Any) -> list[dict[str, float]]:
    found = []
    with process_group(timeout_minutes=0.5) as device:
        for contrastive in (
            {"weight": 0},
            {"weight": 0, "cached": True},
            {"pairs": {"image-text": 0}, "cached": True},
        ):
            config = tiny_config(root, objectives=objectives(contrastive))
            engine = build_engine(config, groups_of(config.parallel, 4), device)
            found.append(engine.step([random_batch(config, ["iat", "it"], seed) for seed in range(2)], 1e-2).losses)
            destroy_groups()
    return found


def test_a_cached_objective_that_is_off_changes_nothing(tmp_path: Any) -> None:
    plain, *cached = run_ranks(1, losses_without_contrastive, tmp_path)[0]
    assert plain["captioning"] > 0 and cached == [plain, plain]


def step_after_state_round_trip(root: Any, precision: str, kind: str) -> tuple[float, float]:
    config = tiny_config(root, optimizer={"kind": kind})
    config = config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})})
    batches = [random_batch(config, ["iat", "it"], seed) for seed in range(4)]
    with process_group(timeout_minutes=0.5) as device:
        groups = groups_of(config.parallel, 4)
        first = build_engine(config, groups, device)
        for batch in batches[:3]:
            first.step([batch], 1e-2)
        second = build_engine(config, groups, device)
        second.import_state({name: s.clone() for name, s in first.export_state().items()}, Progress(3, 3))
        losses = [engine.step([batch], 1e-2).losses["total"] for batch in batches[2:] for engine in (first, second)]
        destroy_groups()
    return losses[0] - losses[1], losses[2] - losses[3]


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_imported_state_continues_bit_for_bit(tmp_path: Any, precision: str, kind: str) -> None:
    assert run_ranks(1, step_after_state_round_trip, tmp_path, precision, kind)[0] == (0.0, 0.0)
