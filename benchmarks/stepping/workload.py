"""The sizes at which whole steps are timed, and their data: random samples of the demo's kind."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.batch import Batch, Sample, SampleMeta
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.pack import PackSettings, pack

VOCAB_SIZE, BOS, EOS = 1024, 1, 2
BALANCE = 0.01  # weight of the balance loss, the one auxiliary loss that everybody has


@dataclass(frozen=True)
class Size:
    """A model, and how many samples (of about 50 tokens) a rank takes a step. K = 2 experts a token."""

    hidden_size: int
    num_layers: int
    every: int  # each every-th block is a mixture
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


def step_config(size: Size, balance: float = BALANCE, clip_norm: float = 1.0) -> RunConfig:
    """The demo's model at ``size``: three embedders, contrastive pairs and captioning, fp32, no drops."""
    return run_config.parse(
        {
            "name": "step",
            "seed": 1,
            "data": {"train": [{"path": "nowhere"}], "tokenizer": "none.model"},
            "modalities": {"image": {"size": 64, "patch": 16}},
            "model": {
                "hidden_size": size.hidden_size,
                "num_layers": size.num_layers,
                "num_heads": size.hidden_size // 32,
                "ffn_hidden_size": 2 * size.expert_hidden_size,
            },
            "moe": {
                "every": size.every,
                "num_experts": size.num_experts,
                "experts_per_token": 2,
                "expert_hidden_size": size.expert_hidden_size,
                "losses": {"local_entropy": 0, "global_entropy": 0, "z": 0, "balance": balance},
            },
            "objectives": {"captioning": {"weight": 0.25, "fraction": 0.25}},
            "optimizer": {"clip_norm": clip_norm},
        }
    )


def random_samples(config: RunConfig, count: int, seed: int) -> list[Sample]:
    """Picture, about 1.4 s of sound and about ten pieces of text a sample, as in the demo's data."""
    rng = np.random.default_rng(seed)
    side, audio = config.modalities.image.size, config.modalities.audio
    return [
        Sample(
            SampleMeta(f"s{seed}-{i}", group=f"g{seed}-{i}"),
            image=rng.integers(0, 256, (3, side, side), dtype=np.uint8),
            audio=rng.normal(size=(audio.n_mels, audio.patch * int(rng.integers(10, 26)))).astype(np.float32),
            text=rng.integers(4, VOCAB_SIZE, int(rng.integers(4, 17))),
        )
        for i in range(count)
    ]


def random_batch(config: RunConfig, samples: int, seed: int) -> Batch:
    """That many random samples, packed."""
    made = random_samples(config, samples, seed)
    return pack(made, PackSettings(config.modalities, BOS, EOS, config.objectives.captioning, config.seed))


def valid_tokens(batch: Batch) -> int:
    """Without padding."""
    return batch.num_valid
