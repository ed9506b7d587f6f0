"""``mmmoe-data preview``: what a run would read, without training it.

Reads microbatches spread evenly over the run's steps (its first ones where a source is a stream), exactly as training
reads them, and reports shares by source, modality and language, the epochs of each source, tokens and padding, how
level the ranks are, and the seconds of reading and decoding, from which follow the workers that a step time needs.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Column, Table

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.batch import Batch, Sample
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.decode import BadSample, keep_slot
from mmmoe_pretrain.data.loader import Made, MicrobatchDataset
from mmmoe_pretrain.data.order.assign import Assignment
from mmmoe_pretrain.data.order.blend import most_dividing
from mmmoe_pretrain.data.pack import origins
from mmmoe_pretrain.data.sources import stream_state
from mmmoe_pretrain.data_prep.console import printable, say, say_json, stdout
from mmmoe_pretrain.modalities import Modalities, build_modalities
from mmmoe_pretrain.progress import counted, track

log = logging.getLogger(__name__)
KEYS_NAMED = 5
MOST_RANKS = 8
MOST_STEPS = 8  # whose shares are shown
DRAWS = 20_000  # positions of the run whose sources are looked up for its epochs


@dataclass
class Share:
    """Of a source, a modality or a language."""

    samples: int = 0
    tokens: int = 0


@dataclass
class Preview:
    """Sums over the microbatches that were read. A source with ``split_by`` counts as its parts."""

    sources: dict[str, Share] = field(default_factory=lambda: defaultdict(Share))
    modalities: dict[str, Share] = field(default_factory=lambda: defaultdict(Share))
    languages: dict[str, Share] = field(default_factory=lambda: defaultdict(Share))
    epochs: dict[str, float | None] = field(default_factory=dict)  # over the whole run; None: of a stream, not known
    shares: dict[int, list[float]] = field(default_factory=dict)  # of each source in the samples of a step
    tokens: list[int] = field(default_factory=list)  # of each global microbatch
    rows: int = 0  # of their streams, padding included
    longest: list[float] = field(default_factory=list)  # tokens of the longest rank over the mean
    samples: int = 0
    seconds: Counter[str] = field(default_factory=Counter)  # by stage
    cut: Counter[str] = field(default_factory=Counter)
    bad: list[BadSample] = field(default_factory=list)


def run(
    config_path: Path,
    overrides: Sequence[str],
    samples: int,
    data_parallel_size: int | None = None,
    as_json: bool = False,
) -> None:
    """The command: read at least ``samples`` samples and print what they are. ``data_parallel_size``: of the ranks
    that are compared; None: the most up to MOST_RANKS that divide a microbatch."""
    config = run_config.load(config_path, list(overrides))
    train = config.train
    data_parallel_size = data_parallel_size or most_dividing(
        max(1, train.global_batch_size // train.num_microbatches), MOST_RANKS
    )
    modalities = build_modalities(config.modalities, config.data.tokenizer)
    found = preview(config, modalities, samples, data_parallel_size)
    if as_json:
        say_json(_values(found, data_parallel_size))
    else:
        _print(found, config, data_parallel_size)


def preview(config: RunConfig, modalities: Modalities, samples: int, data_parallel_size: int) -> Preview:
    """What microbatches with together ``samples`` samples or more, spread over the run, hold."""
    dataset = MicrobatchDataset(config, modalities)
    for note in dataset.notes():
        log.warning("%s", note)
    stream_state.start(dataset.streams, {}, dataset.assignment.blend, 0)
    try:
        return _read(dataset, config, modalities, samples, data_parallel_size)
    finally:
        for stream, _ in dataset.streams.values():
            stream.close()


def _read(
    dataset: MicrobatchDataset, config: RunConfig, modalities: Modalities, samples: int, data_parallel_size: int
) -> Preview:
    ranks = Assignment(config, dataset.sources, modalities, data_parallel_size)
    found = Preview()
    parts = config.train.num_microbatches
    each = config.train.global_batch_size // parts
    whole = config.train.steps * parts
    count = min(whole, -(-samples // each))
    last = count if dataset.streams else whole
    numbers = np.unique(np.linspace(0, last - 1, count).astype(int)).tolist()
    _count_epochs(found, config, dataset)
    for number in track(numbers, "reading microbatches", len(numbers), "microbatches"):
        made = list(dataset.samples(number, range(each)))
        batch, stats = dataset.pack(number, made)
        found.seconds += stats.seconds
        tokens = _add(found, config, dataset, number, made, batch)
        mine = [ranks.of_rank(number, r).positions - number * each for r in range(data_parallel_size)]
        held = [int(tokens[rows].sum()) for rows in mine]
        found.longest.append(max(held) / max(1e-9, sum(held) / len(held)))
    return found


def _count_epochs(found: Preview, config: RunConfig, dataset: MicrobatchDataset) -> None:
    whole, blend = config.train.steps * config.train.global_batch_size, dataset.assignment.blend
    positions = np.unique(np.linspace(0, whole - 1, min(whole, DRAWS)).astype(int))
    drawn = np.bincount(blend.part_of(positions), minlength=len(blend.parts))
    for label, part, share in zip(_labels(config, dataset), blend.parts, drawn / len(positions), strict=True):
        found.sources[label] = Share()  # of a part that is not drawn in what is read, too
        found.epochs[label] = share * whole / part.samples if part.samples else None
    found.shares = {step: blend.shares(step) for step in _steps(config)}


def _labels(config: RunConfig, dataset: MicrobatchDataset) -> list[str]:
    """The name of each part of the blend: its source's path, what it is split by, and a number where the path is
    named again."""
    named = [(config.data.train[part.source].path, part.name) for part in dataset.assignment.blend.parts]
    labels = [path if name is None else f"{path} [{name or '(none)'}]" for path, name in named]
    before = Counter[str]()
    for number, label in enumerate(labels):
        before[label] += 1
        labels[number] = f"{label} ({before[label]})" if before[label] > 1 else label
    return labels


def _steps(config: RunConfig) -> list[int]:
    """Where the schedules of the weights change; the first step, one in the middle and the last one."""
    last = config.train.steps - 1
    knots = {step for source in config.data.train for step, _ in source.schedule if step < last}
    ends = {0, last // 2, last}
    return sorted(knots | ends if len(knots | ends) <= MOST_STEPS else ends)


def _add(
    found: Preview, config: RunConfig, dataset: MicrobatchDataset, number: int, made: Sequence[Made], batch: Batch
) -> np.ndarray:
    """Count a microbatch; the tokens of its samples [n]."""
    share = dataset.assignment.of_rank(number, 0)
    samples = [keep_slot(sample.item) for sample in made]
    tokens = np.bincount(origins(samples, dataset.settings, share.positions).sample_n, minlength=len(made))
    parts, labels = dataset.assignment.blend.part_of(share.positions), list(found.epochs)
    for sample, part, count in zip(made, parts.tolist(), tokens.tolist(), strict=True):
        groups = [found.sources[labels[part]]]
        if isinstance(sample.item, Sample):
            groups.append(found.languages[sample.item.meta.language or "(none)"])
            for name in {item.modality for item in sample.item.items}:
                found.modalities[name].samples += 1
        else:
            found.bad.append(sample.item)
        for group in groups:
            group.samples += 1
            group.tokens += count
        found.cut += sample.cut
    for m, name in enumerate(config.modalities):
        found.modalities[name].tokens += int((batch.modality_ids[batch.valid] == m).sum())
    found.samples += len(made)
    found.tokens.append(int(batch.valid.sum()))
    found.rows += len(batch.valid)
    return tokens


def _print(found: Preview, config: RunConfig, ranks: int) -> None:
    console = stdout()
    total = max(1, sum(found.tokens))
    for title, groups in (("source", found.sources), ("modality", found.modalities), ("language", found.languages)):
        table = Table(Column(title, overflow="fold"), "samples", "tokens", "tokens a sample")
        if title == "source":
            table.add_column("epochs in the run")
        for name, share in sorted(groups.items(), key=lambda pair: -pair[1].tokens):
            cells = [printable(name), f"{share.samples / found.samples:.1%}", f"{share.tokens / total:.1%}",
                     f"{share.tokens / max(1, share.samples):.1f}"]  # fmt: skip
            if title == "source":
                epochs = found.epochs[name]
                cells.append("not known" if epochs is None else f"{epochs:.2f}")
            table.add_row(*cells)
        console.print(table)
    if len({tuple(shares) for shares in found.shares.values()}) > 1:
        table = Table(
            Column("share of the samples at step", overflow="fold"), *(f"{step:,}" for step in found.shares)
        )
        for name, shares in zip(found.epochs, zip(*found.shares.values(), strict=True), strict=True):
            table.add_row(name, *(f"{share:.1%}" for share in shares))
        console.print(table)
    for line in _lines(found, config, ranks):
        say(line)


def _values(found: Preview, ranks: int) -> dict[str, Any]:
    groups = {"sources": found.sources, "modalities": found.modalities, "languages": found.languages}
    return {
        "samples": found.samples,
        "data_parallel_size": ranks,
        "tokens": found.tokens,
        "padding": 1 - sum(found.tokens) / found.rows,
        "longest_over_mean": float(np.mean(found.longest)),
        **{name: {key: asdict(share) for key, share in shares.items()} for name, shares in groups.items()},
        "epochs": found.epochs,
        "seconds": dict(found.seconds),
        "cut": dict(found.cut),
        "bad": [str(bad) for bad in found.bad],
    }


def _lines(found: Preview, config: RunConfig, ranks: int) -> list[str]:
    mean = sum(found.tokens) / len(found.tokens)
    stages = ", ".join(f"{1e3 * seconds / found.samples:.2f} to {stage}" for stage, seconds in found.seconds.items())
    per_sample, batch_size = found.seconds.total() / found.samples, config.train.global_batch_size
    lines = [
        f"read: {counted(found.samples, 'sample')} of {counted(len(found.tokens), 'microbatch', 'es')}",
        f"tokens of a global microbatch: mean {mean:,.0f}, longest {max(found.tokens):,}; of a step: "
        f"{mean * config.train.num_microbatches:,.0f}; padding {1 - sum(found.tokens) / found.rows:.1%}",
        f"tokens of the longest of {counted(ranks, 'data-parallel rank')} over the mean rank: "
        f"{np.mean(found.longest):.3f}",
        f"a sample takes, in ms, {stages}",
        f"one worker loads {1 / per_sample:,.0f} samples a second; a step of {counted(batch_size, 'sample')} takes "
        f"{batch_size * per_sample:.2f} worker-seconds",
    ]
    if found.cut:
        lines.append("too long, cut: " + ", ".join(f"{name} {count:,}" for name, count in found.cut.items()))
    if found.bad:
        named = "; ".join(map(str, found.bad[:KEYS_NAMED]))
        lines.append(f"bad samples: {len(found.bad):,} ({len(found.bad) / found.samples:.2%}): {named}")
    return lines
