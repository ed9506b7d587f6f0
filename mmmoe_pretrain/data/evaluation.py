"""Held-out samples: each once, in order, not augmented; training samples to fit a baseline on; and batches of plain
texts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from mmmoe_pretrain.batch import Batch, Item, Sample, SampleMeta
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.budget import BadBudget
from mmmoe_pretrain.data.decode import BadSample, decode, keep_slot, without_withheld
from mmmoe_pretrain.data.loader import LoadStats
from mmmoe_pretrain.data.pack import PackSettings, pack
from mmmoe_pretrain.data.sources.source import open_indexed
from mmmoe_pretrain.data.storage.files import Files, read_settings
from mmmoe_pretrain.modalities import Modalities
from mmmoe_pretrain.progress import Progress, track


def iterate_eval(
    paths: Sequence[str | Path],
    config: RunConfig,
    modalities: Modalities,
    batch_size: int,
    keep: Callable[[Sample], bool] | None = None,
) -> Iterator[tuple[Batch, list[Sample]]]:
    """Every sample of the sources ``paths`` once, in order, in batches of at most ``batch_size``, as ``eval_samples``
    reads them."""
    settings = eval_settings(config, modalities)
    for samples, positions in eval_samples(paths, config, modalities, batch_size, keep):
        yield pack(samples, settings, positions), samples


def eval_samples(
    paths: Sequence[str | Path],
    config: RunConfig,
    modalities: Modalities,
    batch_size: int,
    keep: Callable[[Sample], bool] | None = None,
) -> Iterator[tuple[list[Sample], range]]:
    """The samples of each batch, and their positions.

    A bad sample keeps an empty slot and counts against data.max_bad_fraction. Samples that ``keep`` rejects are
    skipped.
    """
    budget, most = BadBudget(config.data.max_bad_fraction), config.data.max_tokens_per_document
    files, start = Files(read_settings(config)), 0
    sources = [open_indexed(path, files, modalities) for path in paths]
    raws = (source.read(i) for source in sources for i in range(len(source)))
    with Progress("held-out samples", sum(map(len, sources)), "samples") as progress:
        while batch := list(itertools.islice(raws, batch_size)):
            decoded = [decode(raw, modalities, most=most) for raw in batch]
            bad = tuple(item for item in decoded if isinstance(item, BadSample))
            budget.add(LoadStats(len(decoded), bad))
            budget.check(budget.bad, budget.read)
            samples = [sample for sample in map(keep_slot, decoded) if keep is None or keep(sample)]
            if samples:
                yield samples, range(start, start + len(samples))
            start += len(decoded)
            progress.advance(len(decoded))


def training_samples(
    config: RunConfig, modalities: Modalities, limit: int, what: str
) -> Iterator[tuple[int, Sample]]:
    """About ``limit`` samples spread evenly over each training folder, of which each gives its share of the mix, and
    the number of each in its folder; those that cannot be decoded are left out, and so is what is withheld from
    training. ``what``: is done, for progress."""
    most, files = config.data.max_tokens_per_document, Files(read_settings(config))
    for source, share in zip(config.data.train, shares_of_mix(config), strict=True):
        folder = open_indexed(source.path, files, modalities)
        places = spread(len(folder), limit * share)
        for i in track(places, f"{what} of {source.path}", len(places), "samples"):
            sample = decode(folder.read(i), modalities, most=most)
            if not isinstance(sample, BadSample):
                yield i, without_withheld(sample, modalities)


def shares_of_mix(config: RunConfig) -> list[float]:
    """The share of each training folder in all samples of a run."""
    weights = [source.mean_weight(config.train.steps) for source in config.data.train]
    return [weight / sum(weights) for weight in weights]


def spread(size: int, wanted: float) -> list[int]:
    """About ``wanted`` of ``size`` places, one at least, spread evenly."""
    return np.linspace(0, size - 1, min(size, max(1, round(wanted)))).astype(int).tolist()


def eval_settings(config: RunConfig, modalities: Modalities) -> PackSettings:
    """How held-out samples are packed: objectives that draw samples take every sample that they can."""
    fixed = {name: settings.of_every_sample() for name, settings in config.objectives.items()}
    return PackSettings.from_config(config.model_copy(update={"objectives": fixed}), modalities)


def text_batches(
    texts: Sequence[str], modality: str, config: RunConfig, modalities: Modalities, batch_size: int
) -> Iterator[Batch]:
    """Batches of texts alone, as values of ``modality``, e.g. the class names of a zero-shot score."""
    settings = PackSettings.from_config(config, modalities)
    for start in range(0, len(texts), batch_size):
        values = [(text, modalities[modality].decode(text.encode())) for text in texts[start : start + batch_size]]
        items = [() if value is None else (Item(modality, value, text),) for text, value in values]
        yield pack([Sample(SampleMeta(f"text-{start + i}"), item) for i, item in enumerate(items)], settings)
