"""What the code computed before sequences, modalities and objectives became open: samples, packed batches, weights,
losses and gradients of five batches, on record in ``tests/assets/frozen.npz``.

Whatever is rebuilt has to give the same from the same samples; names may be mapped. Each batch is a step of its own
at the same weights, with every objective, every auxiliary loss, shared and identity experts and balancing biases on.

    python -m tests.frozen.baseline --record      only where what is computed changes on purpose
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.batch import Batch, Sample, SampleMeta
from mmmoe_pretrain.checkpoint.state import persistent_buffers
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.pack import PackSettings, pack
from mmmoe_pretrain.models.pretraining import PretrainingModel
from tests.layouts.cases import GLOBAL, VOCAB, config_of
from tests.support import random_sample

RECORD = Path(__file__).resolve().parents[1] / "assets" / "frozen.npz"
STEPS = 5
PARTS = ("image", "audio", "text")
PACKED = (
    "modality_ids",
    "segment_ids",
    "positions",
    "targets",
    "text_ids",
    "audio_frames",
    "present_MB",
    "group_ids",
)

Arrays = dict[str, np.ndarray]


def recorded() -> Arrays:
    """Everything on record, by path."""
    with np.load(RECORD, allow_pickle=False) as found:
        return dict(found)


def config_on_record(record: Arrays) -> RunConfig:
    return run_config.parse(json.loads(str(record["config"])))


def samples_on_record(record: Arrays, step: int) -> list[Sample]:
    """The samples of a batch, in order."""
    count = len({path.split("/")[2] for path in record if path.startswith(f"samples/{step}/")})
    made = []
    for i in range(count):
        parts = {name: record.get(f"samples/{step}/{i}/{name}") for name in PARTS}
        group = str(record[f"samples/{step}/{i}/group"])
        made.append(Sample(SampleMeta(f"sample-{step}-{i}", group=group), **parts))
    return made


def pack_samples(config: RunConfig, samples: list[Sample], step: int) -> Batch:
    settings = PackSettings(config.modalities, 1, 2, config.objectives.captioning, config.seed)
    return pack(samples, settings, [100 * step + i for i in range(len(samples))])


def packed(batch: Batch) -> Arrays:
    """What identifies a packed batch; ``segments`` are lengths and prefixes."""
    arrays = {name: getattr(batch, name).numpy() for name in PACKED}
    return {**arrays, "segments": np.asarray([batch.segments.lengths, batch.segments.prefixes])}


def load_weights(model: PretrainingModel, record: Arrays) -> None:
    """All of them, or a KeyError."""
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *persistent_buffers(model).items()):
            tensor.copy_(torch.from_numpy(record[f"weights/{name}"]))


def compute(model: PretrainingModel, batch: Batch, step: int) -> tuple[dict[str, float], Arrays]:
    """Losses and gradients by name, of a step that this batch is alone in."""
    model.zero_grad()
    model.begin_step(step)
    loss, report = model(batch)
    loss.backward()
    losses = {"total": float(loss), **{name: float(value) for name, value in report.losses.items()}}
    return losses, {name: p.grad.numpy().copy() for name, p in model.named_parameters() if p.grad is not None}


def record_all() -> None:
    """Write the record anew."""
    config = config_of(Path("frozen"), {})
    model = PretrainingModel(config, VOCAB)
    generator = torch.Generator().manual_seed(0)
    for buffer in persistent_buffers(model).values():  # balancing biases that decide something
        buffer.copy_(0.05 * torch.randn(buffer.shape, generator=generator))
    state = {**dict(model.named_parameters()), **persistent_buffers(model)}
    found: dict[str, Any] = {"config": json.dumps(config.model_dump(mode="json"))}
    found |= {f"weights/{name}": tensor.detach().numpy() for name, tensor in state.items()}
    for step in range(STEPS):
        samples = [random_sample(100 * step + i, has, config, VOCAB) for i, has in enumerate(GLOBAL)]
        found |= dict(_sample_arrays(samples, step))
        batch = pack_samples(config, samples, step)
        losses, gradients = compute(model, batch, step)
        found |= {f"packed/{step}/{name}": array for name, array in packed(batch).items()}
        found |= {f"gradients/{step}/{name}": array for name, array in gradients.items()}
        found[f"losses/{step}"] = json.dumps(losses)
    np.savez_compressed(RECORD, **found)


def _sample_arrays(samples: list[Sample], step: int) -> Iterator[tuple[str, Any]]:
    for i, sample in enumerate(samples):
        yield f"samples/{step}/{i}/group", sample.meta.group
        for name in PARTS:
            if sample.has(name):
                yield f"samples/{step}/{i}/{name}", getattr(sample, name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", required=True)
    parser.parse_args()
    record_all()
