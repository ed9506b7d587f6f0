"""Samples -> one packed microbatch (the contract is batch.Batch).

The layout of the stream: the segments that each objective asks for, objective by objective, then padding. What no
objective asks for is neither packed nor embedded. Everything is numpy until the last step.

Shapes: B samples, T tokens, S segments, R runs (one for each part of a segment).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import xxhash

from mmmoe_pretrain.batch import (
    IGNORE,
    OF_TOKENIZER,
    Anchors,
    AttentionBlocks,
    Batch,
    Contents,
    LeftOut,
    Originals,
    Part,
    Sample,
    Seen,
    Segment,
    Spans,
    Targets,
)
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.decode import Draws
from mmmoe_pretrain.modalities import Modalities, Modality
from mmmoe_pretrain.modalities.base import Collated
from mmmoe_pretrain.objectives import Objective, Objectives, Representation, build_objectives

TOKEN_MULTIPLE = 64


@dataclass(frozen=True)
class PackSettings:
    """What packing depends on, except the samples. ``generator``: of (position, purpose), the random numbers that an
    objective chooses segments by. ``combinations``: of modalities, as ``StreamNames`` has them."""

    modalities: Modalities
    objectives: Objectives
    generator: Callable[[int, str], np.random.Generator]
    combinations: tuple[tuple[str, ...], ...] = ()

    @classmethod
    def from_config(cls, config: RunConfig, modalities: Modalities) -> PackSettings:
        objectives = build_objectives(config.objectives, modalities, config.representations)
        combinations = config.stream_names.combinations
        return cls(modalities, objectives, functools.partial(_generator, config.seed), combinations)


def _generator(seed: int, position: int, purpose: str) -> np.random.Generator:
    return Draws(seed, position).generator(purpose)


@dataclass
class _Runs:
    """Runs [R] and segments [S] in the order of the stream, as they are added."""

    modality: list[int] = field(default_factory=list)
    segment: list[int] = field(default_factory=list)
    length: list[int] = field(default_factory=list)
    source_start: list[int] = field(default_factory=list)  # first row of the embedder's output
    first_position: list[int] = field(default_factory=list)
    keys: list[np.ndarray] = field(default_factory=list)
    hidden: list[np.ndarray] = field(default_factory=list)  # rows of the stream
    task: list[int] = field(default_factory=list)  # [S]
    sample: list[int] = field(default_factory=list)  # [S]
    blocks: list[tuple[int, int]] = field(default_factory=list)  # of attention: lengths, and of them full
    tokens: int = 0


_Pairs = list[tuple[np.ndarray, np.ndarray]]


@dataclass
class _Predicted:
    """What is to be predicted, in the order of the stream: rows of it with ids, by task, and rows with contents, by
    loss."""

    ids: dict[str, _Pairs]
    modalities: dict[str, list[tuple[str, int]]]  # by task, of the runs of targets, each with its length
    contents: dict[str, _Pairs]
    # Of contents that follow each other: their number, and the start and length of their segment.
    seen: dict[str, list[tuple[int, int, int]]]

    @classmethod
    def nothing(cls, settings: PackSettings) -> _Predicted:
        sizes = {loss: settings.modalities[name].content_size for loss, name in settings.objectives.contents.items()}
        return cls(
            {task: [(_int64([]), _int64([]))] for task in settings.objectives.predicting},
            {task: [] for task in settings.objectives.predicting},
            {loss: [(_int64([]), np.zeros((0, size), dtype=np.float32))] for loss, size in sizes.items()},
            {loss: [] for objective in settings.objectives.values() if objective.decoder_layers
             for loss in objective.contents},
        )  # fmt: skip

    def add(self, part: Part, task: str, modality: str, first_row: int) -> None:
        """Of ``part``, whose tokens begin at row ``first_row``."""
        if part.targets is not None:
            within = np.flatnonzero(part.targets != IGNORE)
            self.ids[task].append((first_row + within, part.targets[within]))
            self.modalities[task].append((modality, len(within)))
        if part.contents is not None:
            assert part.hidden is not None
            rows = first_row + np.flatnonzero(part.hidden)
            self.contents[f"{task}/{modality}"].append((rows, part.contents))

    def add_left_out(self, left: LeftOut, task: str, modality: str, span: tuple[int, int]) -> None:
        """``span``: start and length of its segment."""
        self.contents[f"{task}/{modality}"].append((left.numbers, left.contents))
        self.seen[f"{task}/{modality}"].append((len(left.numbers), *span))

    def targets_of(self, task: str, objective: Objective) -> Targets:
        rows, ids = _joined(self.ids[task])
        if objective.vocabularies in ((), (OF_TOKENIZER,)):
            return Targets(rows, ids)
        numbers = {name: number for number, name in enumerate(objective.vocabularies)}
        which = [numbers[name if name in numbers else OF_TOKENIZER] for name, _ in self.modalities[task]]
        vocabulary_N = np.repeat(_int64(which), _int64([length for _, length in self.modalities[task]]))
        of = {name: np.flatnonzero(vocabulary_N == number) for name, number in numbers.items()}
        return Targets(rows, ids, _tensors(of))

    def contents_of(self, loss: str) -> Contents:
        seen = None
        if loss in self.seen:
            counts, starts, lengths = zip(*self.seen[loss], strict=True) if self.seen[loss] else ((), (), ())
            seen = Seen(counts, Spans(starts, lengths))
        rows, values = _joined(self.contents[loss])
        return Contents(rows, values, seen)


def _joined(pairs: _Pairs) -> list[torch.Tensor]:
    return [torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*pairs, strict=True)]


def pack(
    samples: Sequence[Sample],
    settings: PackSettings,
    positions: Sequence[int] | np.ndarray | None = None,
    multiple: int = TOKEN_MULTIPLE,
    step: int | None = None,
) -> Batch:
    """Lay ``samples`` out as one stream, padded to a multiple of ``multiple`` rows.

    ``positions`` are the samples' global positions, by which objectives draw (default: 0, 1, ...). A sample without
    any item keeps its slot and takes no row. ``step``: the optimizer step that trains on them, in which some
    objectives may have no weight and get no segments; None: all get theirs.
    """
    places = _places(samples, positions)
    segments = _segments(samples, settings, places, step)
    collated, start_of = _collate(samples, segments, settings.modalities)
    runs, pooled, predicted = _lay_out(samples, segments, start_of, settings)
    total = max(1, -(-runs.tokens // multiple)) * multiple
    modality, position, source, keys = _tokens(runs)
    rows = {name: np.flatnonzero(modality == m) for m, name in enumerate(settings.modalities)}
    return Batch(
        inputs={name: _tensors(c.arrays) for name, c in collated.items()},
        rows=_tensors(rows),
        source=_tensors({name: source[row] for name, row in rows.items()}),
        modality_ids=_padded(modality, total, 0),
        segment_ids=_padded(np.repeat(_int64(runs.segment), runs.length), total, -1),
        positions=_padded(position, total, 0),
        keys=_padded(keys, total, 0),
        valid=torch.from_numpy(np.arange(total) < runs.tokens),
        hidden=_marked(_concatenated(runs.hidden), total),
        task_ids=torch.from_numpy(_int64(runs.task)),
        sample_ids=torch.from_numpy(_int64(runs.sample)),
        attention=AttentionBlocks(tuple(length for length, _ in runs.blocks), tuple(full for _, full in runs.blocks)),
        targets={task: predicted.targets_of(task, settings.objectives[task]) for task in predicted.ids},
        contents={loss: predicted.contents_of(loss) for loss in predicted.contents},
        anchors={name: _anchors(samples, its) for name, its in settings.objectives.items() if its.anchor_size},
        pooled=_tensors(pooled),
        group_ids=torch.from_numpy(_group_ids(samples)),
        metas=tuple(sample.meta for sample in samples),
        spans={rep: _spans(runs, pooled[rep]) for rep in settings.objectives.read_by_token},
        combination_ids=_combination_ids(samples, segments, runs, settings, total) if settings.combinations else None,
        originals={
            name: _originals(samples, name, settings.modalities[name]) for name in settings.objectives.reconstructed
        },
        noise={name: _noise(places, name, settings) for name, its in settings.objectives.items() if its.noise_size},
    )


@dataclass(frozen=True)
class Origins:
    """Of each valid token of a batch: its sample, its item there, and its number in the item; -1 of a view that is
    not the item with some content hidden: its tokens are of no place in the item."""

    sample_n: np.ndarray
    item_n: np.ndarray
    token_n: np.ndarray


def origins(
    samples: Sequence[Sample], settings: PackSettings, positions: Sequence[int] | np.ndarray | None = None
) -> Origins:
    """Of the batch that ``pack`` makes of the same arguments."""
    segments = _segments(samples, settings, _places(samples, positions))
    parts = [(b, part) for b, segment in segments for part in segment.parts]
    length = _int64([len(part) for _, part in parts])
    first = np.repeat(np.cumsum(length) - length - _int64([part.start for _, part in parts]), length)
    sample_n, item_n = (np.repeat(_int64(its), length) for its in ([b for b, _ in parts], [p.item for _, p in parts]))
    moved = np.repeat(np.asarray([p.view is not None and p.hidden is None for _, p in parts], dtype=bool), length)
    return Origins(sample_n, item_n, np.where(moved, -1, np.arange(len(first)) - first))


def _places(samples: Sequence[Sample], positions: Sequence[int] | np.ndarray | None) -> np.ndarray:
    return np.arange(len(samples)) if positions is None else np.asarray(positions, dtype=np.int64)


def _segments(
    samples: Sequence[Sample], settings: PackSettings, places: np.ndarray, step: int | None = None
) -> list[tuple[int, Segment]]:
    """What objectives ask for, each with its sample; a representation that several ask for once."""
    found: list[tuple[int, Segment]] = []
    pooled: set[tuple[int, str]] = set()
    for name, objective in settings.objectives.items():
        if step is not None and objective.settings.idle_at(step):
            continue
        stream = f"objective/{settings.objectives.streams[name]}"
        for b, (sample, position) in enumerate(zip(samples, places.tolist(), strict=True)):
            if not sample.items:
                continue
            for segment in objective.segments(sample, settings.generator(position, stream)):
                if segment.representation and (b, segment.representation) in pooled:
                    continue
                pooled.add((b, segment.representation))
                found.append((b, segment))
    return found


def _collate(
    samples: Sequence[Sample], segments: Sequence[tuple[int, Segment]], modalities: Modalities
) -> tuple[dict[str, Collated], dict[int, int]]:
    """By modality, the embedder's input of the values that some segment uses: items, then views of them; and of each
    value, by its ``id``, the first row of the embedder's output."""
    parts = [(b, part) for b, segment in segments for part in segment.parts]
    items = sorted({(b, part.item) for b, part in parts if part.view is None})
    values = [(samples[b].items[i].modality, samples[b].items[i].value) for b, i in items]
    views = {id(part.view): (samples[b].items[part.item].modality, part.view) for b, part in parts}
    values += [(name, view) for name, view in views.values() if view is not None]
    collated: dict[str, Collated] = {}
    start_of: dict[int, int] = {}
    for name, modality in modalities.items():
        own = [value for of, value in values if of == name]
        collated[name] = modality.collate(own)
        start_of.update(zip(map(id, own), collated[name].starts.tolist(), strict=True))
    return collated, start_of


def _lay_out(
    samples: Sequence[Sample],
    segments: Sequence[tuple[int, Segment]],
    start_of: dict[int, int],
    settings: PackSettings,
) -> tuple[_Runs, dict[str, np.ndarray], _Predicted]:
    """The runs; by representation the segment of each sample, or -1; and what is to be predicted."""
    runs, objectives, predicted = _Runs(), settings.objectives, _Predicted.nothing(settings)
    pooled = {rep: np.full(len(samples), -1, dtype=np.int64) for rep in objectives.pooled}
    ids = {name: m for m, name in enumerate(settings.modalities)}
    tasks = {name: x for x, name in enumerate(objectives)}
    for number, (b, segment) in enumerate(segments):
        runs.task.append(tasks[segment.task])
        runs.sample.append(b)
        runs.blocks += attention_blocks(segment)
        if segment.representation:
            pooled[segment.representation][b] = number
        start = runs.tokens
        for part in segment.parts:
            item = samples[b].items[part.item]
            value = item.value if part.view is None else part.view
            runs.modality.append(ids[item.modality])
            runs.segment.append(number)
            runs.length.append(len(part))
            runs.source_start.append(start_of[id(value)] + part.start)
            runs.first_position.append(part.first_position)
            runs.keys.append(settings.modalities[item.modality].keys(value)[part.start : part.stop])
            if part.hidden is not None:
                runs.hidden.append(runs.tokens + np.flatnonzero(part.hidden))
            predicted.add(part, segment.task, item.modality, runs.tokens)
            runs.tokens += len(part)
        for left in segment.left_out:
            modality = samples[b].items[left.item].modality
            predicted.add_left_out(left, segment.task, modality, (start, runs.tokens - start))
    for rep in objectives.representations.values():
        if not rep.settings.joined:
            pooled[rep.name] = _first_segments(rep, samples, pooled)
    return runs, pooled, predicted


def _first_segments(rep: Representation, samples: Sequence[Sample], pooled: dict[str, np.ndarray]) -> np.ndarray:
    """[B]: the first of the segments that ``rep`` is made of, or -1. Some may not be packed, if an objective wanted
    only others of the sample; then the sample has no such vector."""
    found = np.full(len(samples), -1, dtype=np.int64)
    for b, sample in enumerate(samples):
        segments = [int(pooled[name][b]) for name in rep.items(sample)]
        if segments and min(segments) >= 0:
            found[b] = segments[0]
    return found


def _spans(runs: _Runs, segment_B: np.ndarray) -> Spans:
    length_S = np.zeros(len(runs.task), dtype=np.int64)
    np.add.at(length_S, _int64(runs.segment), _int64(runs.length))
    start_S = np.cumsum(length_S) - length_S
    here_B = segment_B >= 0
    starts, lengths = (np.zeros(len(segment_B), dtype=np.int64) for _ in range(2))
    starts[here_B], lengths[here_B] = start_S[segment_B[here_B]], length_S[segment_B[here_B]]
    return Spans(tuple(starts.tolist()), tuple(lengths.tolist()))


def _combination_ids(
    samples: Sequence[Sample],
    segments: Sequence[tuple[int, Segment]],
    runs: _Runs,
    settings: PackSettings,
    total: int,
) -> torch.Tensor:
    number_of = {frozenset(its): number for number, its in enumerate(settings.combinations)}
    taking_part = frozenset().union(*number_of)
    held = [taking_part.intersection(item.modality for item in sample.items) for sample in samples]
    of_segment = [number_of.get(held[b], -1) for b, _ in segments]
    takes_part = [name in taking_part for name in settings.modalities]
    of_run = [of_segment[s] if takes_part[m] else -1 for s, m in zip(runs.segment, runs.modality, strict=True)]
    return _padded(np.repeat(_int64(of_run), runs.length), total, -1)


def attention_blocks(segment: Segment) -> list[tuple[int, int]]:
    """Lengths of the segment's attention blocks, and how many tokens of each attend in both directions."""
    alone = [(len(part), len(part)) for part in segment.parts if part.attention == "alone"]
    together: list[Part] = [part for part in segment.parts if part.attention != "alone"]
    if alone and together:
        raise ValueError(f"parts that attend alone and others in one segment: {[p.attention for p in segment.parts]}")
    full = sum(len(part) for part in together if part.attention == "full")
    return alone or [(sum(map(len, together)), full)]


def _tokens(runs: _Runs) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of each token: its modality, its position, its row in the embedder's output, its key."""
    length = _int64(runs.length)
    starts = np.cumsum(length) - length
    within = np.arange(runs.tokens) - np.repeat(starts, length)
    return (
        np.repeat(_int64(runs.modality), length),
        within + np.repeat(_int64(runs.first_position), length),
        within + np.repeat(_int64(runs.source_start), length),
        _concatenated(runs.keys),
    )


def _anchors(samples: Sequence[Sample], objective: Objective) -> Anchors:
    vectors, ids = np.zeros((len(samples), objective.anchor_size), dtype=np.float32), [0] * len(samples)
    for b, sample in enumerate(samples):
        if (vector := objective.anchor(sample)) is not None:
            vectors[b], ids[b] = vector, xxhash.xxh3_64_intdigest(vector.tobytes())
    present, numbers = vectors.any(axis=1), np.asarray(ids, dtype=np.uint64).view(np.int64)
    return Anchors(*map(torch.from_numpy, (vectors, present, numbers)))


def _originals(samples: Sequence[Sample], name: str, modality: Modality) -> Originals:
    kept, content = [], [_nothing(modality)]
    for b, sample in enumerate(samples):
        if (item := sample.first(name)) is not None:
            content.append(modality.keys(item.value)[1:] if modality.predictable else modality.contents(item.value))
            kept.append(b)
    lengths = _int64([len(one) for one in content[1:]])
    places = _concatenated([np.arange(length) for length in lengths.tolist()])
    arrays = (np.repeat(_int64(kept), lengths), places, np.concatenate(content))
    return Originals(*map(torch.from_numpy, arrays))


def _nothing(modality: Modality) -> np.ndarray:
    return _int64([]) if modality.predictable else np.zeros((0, modality.content_size), dtype=np.float32)


def _noise(places: np.ndarray, name: str, settings: PackSettings) -> torch.Tensor:
    size, stream = settings.objectives[name].noise_size, f"noise/{settings.objectives.streams[name]}"
    rows = [settings.generator(place, stream).standard_normal(size, dtype=np.float32) for place in places.tolist()]
    return torch.from_numpy(np.stack([np.zeros(size, dtype=np.float32), *rows])[1:])


def _group_ids(samples: Sequence[Sample]) -> np.ndarray:
    hashes = [xxhash.xxh3_64_intdigest(sample.meta.own_group.encode()) for sample in samples]
    return np.asarray(hashes, dtype=np.uint64).view(np.int64)


def _int64(values: Sequence[int]) -> np.ndarray:
    return np.asarray(values, dtype=np.int64)


def _concatenated(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype=np.int64), *arrays])


def _marked(rows: np.ndarray, total: int) -> torch.Tensor:
    out = np.zeros(total, dtype=bool)
    out[rows] = True
    return torch.from_numpy(out)


def _padded(values: np.ndarray, total: int, fill: int) -> torch.Tensor:
    out = np.full(total, fill, dtype=np.int64)
    out[: values.shape[0]] = values
    return torch.from_numpy(out)


def _tensors(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
