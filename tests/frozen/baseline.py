"""What the code computed before sequences, modalities and objectives became open: samples, packed batches, weights,
losses and gradients of five batches, on record in ``tests/assets/frozen.npz``.

Whatever is rebuilt has to give the same from the same samples; names may be mapped. Each batch is a step of its own
at the same weights, with every objective, every auxiliary loss, shared and identity experts and balancing biases on.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.batch import IGNORE, Batch, Item, Sample, SampleMeta
from mmmoe_pretrain.checkpoint.state import persistent_buffers
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.config.upgrade import upgraded
from mmmoe_pretrain.data.order.permute import fold
from mmmoe_pretrain.data.pack import pack
from mmmoe_pretrain.models.pretraining import PretrainingModel
from tests.support import BEGIN, END, pack_settings

RECORD = Path(__file__).resolve().parents[1] / "assets" / "frozen.npz"
STEPS = 5
PARTS = ("image", "audio", "text")

Arrays = dict[str, np.ndarray]


def recorded() -> Arrays:
    """Everything on record, by path."""
    with np.load(RECORD, allow_pickle=False) as found:
        return dict(found)


def config_on_record(record: Arrays) -> RunConfig:
    """It was written in the spelling of before."""
    return run_config.parse(upgraded(json.loads(str(record["config"])))).with_vocabulary(48)


def samples_on_record(record: Arrays, step: int) -> list[Sample]:
    """The samples of a batch, in order; a text was recorded without its marks."""
    count = len({path.split("/")[2] for path in record if path.startswith(f"samples/{step}/")})
    made = []
    for i in range(count):
        values = {name: record.get(f"samples/{step}/{i}/{name}") for name in PARTS}
        if values["text"] is not None:
            values["text"] = np.asarray([BEGIN, *values["text"], END])
        items = tuple(Item(name, value) for name, value in values.items() if value is not None)
        group = str(record[f"samples/{step}/{i}/group"])
        made.append(Sample(SampleMeta(f"sample-{step}-{i}", group=group), items))
    return made


class RecordedDraw(np.random.Generator):
    """Chooses the part before a caption as the packer of that time did: by the low bits of a hash of seed and
    position. Every sample is drawn (the fraction is 1)."""

    def __init__(self, seed: int, position: int) -> None:
        super().__init__(np.random.PCG64(0))
        bits = int(fold(seed + 2, np.asarray([position]))[0]) & 0xFFFFFFFF
        self._values = iter((0.0, (bits % 2 + 0.5) / 2))  # of one option or two

    def random(self, *args: Any, **kwargs: Any) -> Any:
        return next(self._values)


def pack_samples(config: RunConfig, samples: list[Sample], step: int) -> Batch:
    settings = dataclasses.replace(
        pack_settings(config), generator=lambda position, purpose: RecordedDraw(config.seed, position)
    )
    return pack(samples, settings, [100 * step + i for i in range(len(samples))])


def packed(batch: Batch) -> Arrays:
    """What identifies a packed batch, in the names and shapes of the record. ``text_ids`` are those of the stream in
    its order, where a text that stands there twice is listed twice, as it was embedded then."""
    targets = np.full(batch.num_tokens, IGNORE)
    targets[batch.targets["captioning"].rows.numpy()] = batch.targets["captioning"].ids.numpy()
    lengths, full = np.asarray([batch.attention.lengths, batch.attention.full])
    return {
        "modality_ids": batch.modality_ids.numpy(),
        "segment_ids": batch.segment_ids.numpy(),
        "positions": batch.positions.numpy(),
        "targets": targets,
        "text_ids": batch.inputs["text"]["ids"][batch.source["text"]].numpy(),
        "audio_frames": batch.inputs["audio"]["frames_valid"].numpy(),
        "present_MB": np.stack([batch.pooled[name].numpy() >= 0 for name in PARTS]),
        "group_ids": batch.group_ids.numpy(),
        "segments": np.stack([lengths, np.where(full == lengths, 0, full)]),
    }


def load_weights(model: PretrainingModel, record: Arrays) -> None:
    """All of them, or a KeyError."""
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *persistent_buffers(model).items()):
            tensor.copy_(torch.from_numpy(recorded_as(name, record, "weights")))


def recorded_as(name: str, record: Arrays, part: str) -> np.ndarray:
    """What is on record for the parameter or buffer ``name``: one tensor a name was one row of a tensor then."""
    if name.startswith("mmmoe.modality_embedding."):
        row = PARTS.index(name.rpartition(".")[2])
        return record[f"{part}/mmmoe.modality_embedding.weight"][row : row + 1]
    name = name.replace("tasks.contrastive.", "contrastive.").replace("router.bias.all", "router.bias")
    return record[f"{part}/{name}"]


def compute(model: PretrainingModel, batch: Batch, step: int) -> tuple[dict[str, float], Arrays]:
    """Losses and gradients by name, of a step that this batch is alone in."""
    model.zero_grad()
    model.begin_step(step)
    loss, report = model(batch)
    loss.backward()
    losses = {"total": float(loss), **{name: float(value) for name, value in report.losses.items()}}
    return losses, {name: p.grad.numpy().copy() for name, p in model.named_parameters() if p.grad is not None}
