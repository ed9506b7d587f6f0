"""Held-out samples: each once, in order, unperturbed; and batches of plain texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mmmoe_pretrain.batch import Batch, Sample, SampleMeta
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.budget import BadBudget
from mmmoe_pretrain.data.decode import BadSample, decode
from mmmoe_pretrain.data.loader import LoadStats, keep_slot
from mmmoe_pretrain.data.pack import PackSettings, pack
from mmmoe_pretrain.data.shards import OpenShards, ShardFolder
from mmmoe_pretrain.modalities import Codecs
from mmmoe_pretrain.progress import Progress


def iterate_eval(
    paths: Sequence[str | Path],
    config: RunConfig,
    codecs: Codecs,
    batch_size: int,
    keep: Callable[[Sample], bool] | None = None,
) -> Iterator[tuple[Batch, list[Sample]]]:
    """Every sample of the folders ``paths`` once, in order, in batches of at most ``batch_size``.

    Where the run trains captioning, every sample that can has a fused segment. A bad sample keeps
    an empty slot and counts against data.max_bad_fraction. Samples that ``keep`` refuses are left out.
    """
    settings = _caption_all(PackSettings.from_config(config, codecs))
    budget = BadBudget(config.data.max_bad_fraction)
    files = OpenShards()
    folders = [ShardFolder(path, files) for path in paths]
    where = [(folder, i) for folder in folders for i in range(len(folder))]
    with Progress("held-out samples", len(where), "samples") as progress:
        for start in range(0, len(where), batch_size):
            decoded = [decode(folder.read(i), codecs) for folder, i in where[start : start + batch_size]]
            bad = tuple(item for item in decoded if isinstance(item, BadSample))
            budget.add(LoadStats(len(decoded), bad))
            budget.judge(budget.bad, budget.read)
            samples = [sample for sample in map(keep_slot, decoded) if keep is None or keep(sample)]
            if samples:
                yield pack(samples, settings, range(start, start + len(samples))), samples
            progress.advance(len(decoded))


def text_batches(texts: Sequence[str], config: RunConfig, codecs: Codecs, batch_size: int) -> Iterator[Batch]:
    """Batches of texts alone, e.g. the class names of a zero-shot score."""
    settings = dataclasses.replace(PackSettings.from_config(config, codecs), captioning=None)
    for start in range(0, len(texts), batch_size):
        part = texts[start : start + batch_size]
        yield pack(
            [
                Sample(SampleMeta(f"text-{start + i}"), text=codecs.text.encode(text), raw_text=text)
                for i, text in enumerate(part)
            ],
            settings,
        )


def _caption_all(settings: PackSettings) -> PackSettings:
    if settings.captioning is None:
        return settings
    everyone = settings.captioning.model_copy(update={"fraction": 1.0})
    return dataclasses.replace(settings, captioning=everyone)
