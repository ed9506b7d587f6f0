"""Memory of losses over a whole step (``cached`` of contrastive objectives), by running their real modules on fake
tensors; and of what objectives keep from step to step (``queue_size``).

Between the two passes of such a step, all of its features and the loss's logits are there at once; through the second
pass the gradients of the features stay. The modules need no model, only features: [B, P] of each representation.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass

import torch
from torch._subclasses import FakeTensorMode

from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.objectives import Outputs, objectives_of
from mmmoe_pretrain.parallel.groups import Groups
from mmmoe_pretrain.plan.live import LiveTensors


@dataclass(frozen=True)
class WholeStep:
    """Bytes on the last pipeline stage. ``kept``: from the end of the first pass to that of the second one. ``peak``:
    between the passes, features of all microbatches included."""

    kept: int = 0
    peak: int = 0


NONE = WholeStep()


def whole_step(config: RunConfig, groups: Groups, batch: Batch) -> WholeStep:
    """Of a step whose microbatches are all as ``batch``, under ``groups`` (``build.pretended_groups``)."""
    objectives = [each for each in objectives_of(config).values() if each.whole_step]
    if not objectives:
        return NONE
    live, kept, peaks = LiveTensors(), 0, []
    with FakeTensorMode(allow_non_fake_inputs=True):
        modules = [objective.module(config.model.embedding_size) for objective in objectives]
        outputs = _outputs(config, batch, {name for each in objectives for name in each.representations})
        with live:
            with torch.no_grad():
                for _ in range(config.train.num_microbatches):
                    for module in modules:
                        module.collect(outputs, batch)
            for module, objective in zip(modules, objectives, strict=True):
                live.reset_peak()
                module.finish(groups, dict.fromkeys(objective.losses, 1.0))
                peaks.append(live.peak)
                gc.collect()
            kept = live.live
    return WholeStep(kept, max(peaks))


def queue_bytes(config: RunConfig) -> int:
    """Of the buffers of objectives, which each rank of the last pipeline stage holds whole."""
    with torch.device("meta"):
        modules = [objective.module(config.model.embedding_size) for objective in objectives_of(config).values()]
    return sum(buffer.nbytes for module in modules for buffer in module.buffers())


def _outputs(config: RunConfig, batch: Batch, representations: set[str]) -> Outputs:
    shape = (len(batch.group_ids), config.model.embedding_size)
    vectors = {name: torch.empty(shape) for name in sorted(representations)}
    return Outputs(torch.empty(0), vectors, {}, {}, vectors)
