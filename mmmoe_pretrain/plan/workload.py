"""A microbatch to plan by: samples with every modality at its full length, packed as those of the data are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mmmoe_pretrain.batch import Batch, Item, Sample, SampleMeta
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.pack import PackSettings, pack
from mmmoe_pretrain.modalities import build_modalities


@dataclass(frozen=True)
class Workload:
    """``samples`` of a microbatch of one data-parallel rank."""

    samples: int

    @classmethod
    def of(cls, config: RunConfig, data_ranks: int) -> Workload:
        """What the config says, for the rank with most samples."""
        train = config.train
        return cls(-(-train.global_batch_size // (train.num_microbatches * data_ranks)))


class _Longest(np.random.Generator):
    """Draws the highest of every single number, so that ``Modality.example`` gives its longest value."""

    def integers(self, low: Any, high: Any = None, size: Any = None, **options: Any) -> Any:  # type: ignore[override]
        if size is None:
            return (low if high is None else high) - 1
        return super().integers(low, high, size, **options)


def full_batch(config: RunConfig, samples: int, first: int = 0) -> Batch:
    """``samples`` of noise at global positions ``first``, ``first`` + 1 and so on, by which objectives draw."""
    modalities = build_modalities(config.modalities, decoding=False)
    rng, made = _Longest(np.random.PCG64(first)), []
    for i in range(first, first + samples):
        items = tuple(Item(name, m.example(rng, config.model.vocab_size)) for name, m in modalities.items())
        made.append(Sample(SampleMeta(f"s{i}", group=f"g{i}"), items))
    settings = PackSettings.from_config(config, modalities)
    return pack(made, settings, range(first, first + samples))
