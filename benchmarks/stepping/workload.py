"""The sizes at which whole steps are timed, and their data: random samples of the demo's kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.batch import Batch, Item, Sample, SampleMeta
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.pack import PackSettings, pack
from mmmoe_pretrain.modalities import build_modalities

VOCAB_SIZE, BOS, EOS = 1024, 1, 2
BALANCE = 0.01  # weight of the balance loss, the only auxiliary loss that every implementation has


@dataclass(frozen=True)
class Size:
    """A model, and how many samples (of about 50 tokens) a rank takes a step. K = 2 experts a token."""

    hidden_size: int
    num_layers: int
    every: int  # each every-th block is an MoE layer
    num_experts: int
    expert_hidden_size: int
    samples: int

    @property
    def name(self) -> str:
        return f"D{self.hidden_size}-L{self.num_layers}/{self.every}-E{self.num_experts}-F{self.expert_hidden_size}"


SIZES = (
    Size(128, 4, 2, 8, 512, 64),
    Size(256, 4, 1, 16, 512, 48),
    Size(256, 4, 1, 64, 256, 48),
    Size(512, 4, 1, 16, 1024, 32),
)


# A model that trains in milliseconds: four blocks, every other one an MoE layer of 8 experts.
SMALL_MODEL = {
    "hidden_size": 64,
    "num_layers": 4,
    "num_heads": 4,
    "ffn_hidden_size": 128,
    "embedding_size": 32,
    "vocab_size": VOCAB_SIZE,
}
SMALL_MOE = {
    "every": 2,
    "num_experts": 8,
    "experts_per_token": 2,
    "expert_hidden_size": 64,
    "losses": {"local_entropy": 0.01, "global_entropy": 0.01, "balance": 0.01, "z": 0.001},
}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "pairs": {"kind": "contrastive", "pairs": {"image-text": 1.0, "audio-text": 1.0, "image-audio": 0.5}},
    "captions": {"kind": "next_token", "parts": [["image", "audio"], "text"], "weight": 0.25, "fraction": 0.25},
}


def step_config(size: Size, balance: float = BALANCE, clip_norm: float = 1.0) -> RunConfig:
    """The demo's model at ``size``: three embedders, contrastive pairs and captioning, fp32, no drops."""
    return run_config.parse(
        {
            "name": "step",
            "seed": 1,
            "data": {"train": [{"path": "nowhere"}], "tokenizer": "none.model"},
            "modalities": {
                "image": {"kind": "image", "size": 64, "patch": 16},
                "audio": {"kind": "audio"},
                "text": {"kind": "text"},
            },
            "model": {
                "hidden_size": size.hidden_size,
                "num_layers": size.num_layers,
                "num_heads": size.hidden_size // 32,
                "vocab_size": VOCAB_SIZE,
                "ffn_hidden_size": 2 * size.expert_hidden_size,
            },
            "moe": {
                "every": size.every,
                "num_experts": size.num_experts,
                "experts_per_token": 2,
                "expert_hidden_size": size.expert_hidden_size,
                "losses": {"local_entropy": 0, "global_entropy": 0, "z": 0, "balance": balance},
            },
            "objectives": OBJECTIVES,
            "optimizer": {"clip_norm": clip_norm},
        }
    )


def random_samples(config: RunConfig, count: int, seed: int) -> list[Sample]:
    """Image, about 1.4 s of audio and about ten pieces of text a sample, as in the demo's data."""
    rng, settings = np.random.default_rng(seed), config.modalities
    image: Any = settings["image"]
    audio: Any = settings["audio"]
    made = []
    for i in range(count):
        pixels = rng.integers(0, 256, (3, image.size, image.size), dtype=np.uint8)
        log_mel = rng.normal(size=(audio.n_mels, audio.patch * int(rng.integers(10, 26)))).astype(np.float32)
        ids = np.asarray([BOS, *rng.integers(4, VOCAB_SIZE, int(rng.integers(4, 17))), EOS])
        items = Item("image", pixels), Item("audio", log_mel), Item("text", ids)
        made.append(Sample(SampleMeta(f"s{seed}-{i}", group=f"g{seed}-{i}"), items))
    return made


def random_batch(config: RunConfig, samples: int, seed: int) -> Batch:
    """That many random samples, packed."""
    return pack(random_samples(config, samples, seed), pack_settings(config))


def pack_settings(config: RunConfig) -> PackSettings:
    """For samples that are decoded already: no tokenizer is read."""
    return PackSettings.from_config(config, build_modalities(config.modalities, decoding=False))


def valid_tokens(batch: Batch) -> int:
    """Without padding."""
    return batch.num_valid
