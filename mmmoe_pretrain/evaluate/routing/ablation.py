"""Expert ablation: what is lost on held-out samples where tokens may not choose one expert.

One expert of one layer at a time is masked in the router, for all tokens and for those of one modality, as an expert
group of other modalities would be: tokens go to the best of the others, and softmax probabilities are of the others.
So the loss of each task with an expert masked for all is the loss after ``mmmoe experts prune`` of it. An expert that
no token of a modality reaches is not tried for it: its loss is 0.

Each batch of held-out samples is a step of its own (``rows.BATCH_SIZE`` samples), and losses are means over the terms
of all batches, without their weights. Auxiliary losses are left out.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.checkpoint import trained_module
from mmmoe_pretrain.evaluate.features import device_of
from mmmoe_pretrain.evaluate.rows import HeldOutRows
from mmmoe_pretrain.models.mmmoe import MMMoE
from mmmoe_pretrain.moe.router import Router
from mmmoe_pretrain.moe.stats import RoutingStats
from mmmoe_pretrain.objectives import ObjectiveModule, step_counts
from mmmoe_pretrain.parallel.groups import SINGLE
from mmmoe_pretrain.progress import track

Losses = dict[str, float]  # by name


@dataclass(frozen=True)
class Mask:
    """Of ``router``: ``expert`` is masked for tokens of ``modality`` (its number), or of all."""

    router: Router
    expert: int
    modality: int | None = None


@dataclass(frozen=True)
class Ablation:
    """What is measured: ``modules`` of the objectives whose losses are, by name, on ``batches``."""

    model: MMMoE
    modules: dict[str, ObjectiveModule]
    batches: Sequence[Batch]

    def losses(self) -> Losses:
        """Those that have terms, with the masks that are set."""
        sums, terms = defaultdict[str, float](float), Counter[str]()
        with torch.inference_mode():
            for batch in self.batches:
                outputs, _ = self.model(batch)
                counts = step_counts([batch], self.model.objectives, None, batch.modality_ids.device).terms
                for name, module in self.modules.items():
                    if self.model.objectives[name].whole_step:
                        module.collect(outputs, batch)
                        module.finish(SINGLE, dict.fromkeys(self.model.objectives[name].losses, 1.0))
                    for loss, value in module(outputs, batch, SINGLE).items():
                        sums[loss] += float(value)
                        terms[loss] += counts[loss]
                    module.after_step(committed=False)
        return {loss: sums[loss] / count for loss, count in terms.items() if count}


def masks_of(model: MMMoE, routing: Sequence[RoutingStats]) -> list[Mask]:
    """Those to try, of experts that tokens reach: with one modality alone, its mask is the one for all."""
    found = []
    for router, stats in zip(model.routers, routing, strict=True):
        reached_ME = stats.counts_ME > 0
        for expert in torch.nonzero(reached_ME.any(0)).flatten().tolist():
            found.append(Mask(router, expert))
            found += [Mask(router, expert, m) for m in torch.nonzero(reached_ME[:, expert]).flatten().tolist()]
    return found


@contextmanager
def without_expert(mask: Mask) -> Iterator[None]:
    """While it is entered."""
    router, config = mask.router, mask.router.config
    allowed_ME = router.get_buffer("allowed_ME")
    before_ME = allowed_ME.clone()
    router.config = config.model_copy(update={"expert_groups": config.groups})  # a router without groups has no mask
    allowed_ME[slice(None) if mask.modality is None else mask.modality, mask.expert] = False
    try:
        yield
    finally:
        allowed_ME.copy_(before_ME)
        router.config = config


def open_ablation(model: MMMoE, rows: HeldOutRows, run_dir: Path, samples: int) -> tuple[Ablation, list[str]]:
    """Of the first ``samples`` rows or so, in whole batches; and notes. ValueError for routers without logits."""
    if samples < 1:
        raise ValueError(f"--ablate {samples}: give the number of held-out samples to measure on, e.g. 256")
    fixed = [router.layer for router in model.routers if router.config.router == "hash"]
    if fixed:
        raise ValueError(
            f"--ablate masks experts in the router, and block {fixed[0]} has moe.router hash, which chooses by a "
            f"token's identity alone; leave --ablate out"
        )
    batches, count = [], 0
    for batch, kept in rows.batches():
        batches.append(batch.to(device_of(model)))
        count += len(kept)
        if count >= samples:
            break
    taught = [name for name, its in model.objectives.items() if its.settings.taught]
    modules = {
        name: trained_module(run_dir, rows.config, its).eval().to(device_of(model))
        for name, its in model.objectives.items()
        if name not in taught
    }
    notes = [f"experts were masked one by one on {count:,} held-out samples"]
    if taught:
        notes.append(f"no loss of {', '.join(taught)} with a masked expert: it needs the pass of a teacher")
    return Ablation(model, modules, batches), notes


def measure(ablation: Ablation, routing: Sequence[RoutingStats]) -> list[dict[str, Any]]:
    """By layer: ``loss`` by name, and ``without``, by expert how much each loss rises: ``all``, and by modality."""
    masks, names = masks_of(ablation.model, routing), ablation.model.names.modalities
    passes, batches = 1 + len(masks), len(ablation.batches)
    print(
        f"expert ablation: {passes:,} passes over {batches:,} batches, {passes * batches:,} runs of the whole model"
    )
    base = ablation.losses()
    rises: dict[int, dict[int, dict[str, Losses]]] = {router.layer: {} for router in ablation.model.routers}
    for mask in track(masks, "masking experts", len(masks), "masks"):
        with without_expert(mask):
            now = ablation.losses()
        of_expert = rises[mask.router.layer].setdefault(mask.expert, {})
        whose = "all" if mask.modality is None else names[mask.modality]
        of_expert[whose] = {loss: now[loss] - value for loss, value in base.items()}
    return [
        {"loss": base, "without": [of_layer.get(e, {}) for e in range(router.config.router_outputs)]}
        for router, of_layer in zip(ablation.model.routers, rises.values(), strict=True)
    ]
