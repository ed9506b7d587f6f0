"""The blend of a run: the sources of data.train and their parts, mixed by weights, temperature, schedules and epochs.

The shares are constant over stages (``mix.Stage``), so that the order stays a pure function of the position: a
schedule's straight lines are cut into PIECES steps, and a source with a number of epochs ends one.

A *part* is what is drawn from by one share: a source, or its samples with one set of modalities or one value of a
field (``split_by``).
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil

import numpy as np
import xxhash

from mmmoe_pretrain.config import DataConfig, RunConfig, SourceConfig
from mmmoe_pretrain.config.schedule import value_at
from mmmoe_pretrain.data.order.fields import MODALITIES, read_field, refuse_unknown
from mmmoe_pretrain.data.order.mix import Stage, apportion, block_counts, longest_block
from mmmoe_pretrain.data.order.positions import Order, Places
from mmmoe_pretrain.data.sources.source import Indexed
from mmmoe_pretrain.data.sources.stream import Stream
from mmmoe_pretrain.urls import redacted

MOST_LANES = 1024  # unless data.lanes says more
MOST_SUB_LANES = 64  # of a stream, unless data.lanes is given: a reader keeps one pipe open for each of its lanes
PIECES = 32  # at most, of a schedule's line between two of its steps
ROWS_OF_PIECE = 8  # at least: in a block of one row all lanes would read the same source
FEW_PIECES = 4  # of a line: with fewer a user is told

MeanTokens = Callable[[int, np.ndarray | None], float]  # of a source's samples, or of those of them


@dataclass(frozen=True)
class Part:
    """Samples of source number ``source``: ``sizes`` of them in its shards (of a stream the number of sub-lanes),
    ``indices`` in the source (None: all, in order). ``share``: of the source's weight. ``name``: the modalities or
    the value of the field, where the source is split."""

    source: int
    sizes: np.ndarray | int
    indices: np.ndarray | None = None
    share: float = 1.0
    name: str | None = None

    @property
    def samples(self) -> int | None:
        """None of a stream, whose samples are not known before they are read."""
        return None if isinstance(self.sizes, int) else int(self.sizes.sum())


class Blend:
    """The training samples of a run by global position. ``notes``: what a user should know about it."""

    def __init__(
        self, config: RunConfig, sources: Sequence[Indexed | Stream], mean_tokens: MeanTokens | None = None
    ) -> None:
        data, batch = config.data, config.train.global_batch_size
        self._batch = batch
        self.lanes = data.lanes or most_dividing(batch, MOST_LANES)
        self.parts = parts_of(data, sources, self.lanes)
        plan = _plan(config, shares_at(data, self.parts, mean_tokens), self.lanes)
        self.stages = build_stages(plan, [_end(data, part, self.lanes) for part in self.parts], self.lanes)
        sizes, window, chunk = [part.sizes for part in self.parts], data.shuffle_window, data.shuffle_chunk
        self._order = Order(sizes, self.stages, config.seed, lanes=self.lanes, window=window, chunk=chunk)
        self.notes = _notes(config, self.parts, self.lanes)
        if self.steps is not None and config.train.steps > self.steps:
            raise ValueError(
                f"data.train ends after {self.steps} steps of {batch} samples, by the epochs of its sources, and "
                f"train.steps is {config.train.steps}; lower it, or raise or leave out the epochs of a source"
            )

    @property
    def steps(self) -> int | None:
        """Whole global batches until all sources have ended; None where one is endless."""
        return None if self._order.rows is None else self._order.rows * self.lanes // self._batch

    def shares(self, step: int) -> list[float]:
        """The share of each part in the samples of global batch ``step``."""
        row, ends = step * self._batch // self.lanes, 0
        for stage in self.stages:
            ends += (stage.blocks or 0) * stage.block
            if stage.blocks is None or row < ends:
                break
        return [count / stage.block for count in stage.counts]

    def part_of(self, positions: np.ndarray) -> np.ndarray:
        """The number of the part that each global position [n] draws from."""
        return self._order.at(positions).source

    def digest(self, batches: int | None = None) -> str:
        """What the order of the first ``batches`` global batches depends on beside the seed, window, chunk and lanes
        (None: of all): the files of ranks may differ, and a run may resume with other ones."""
        rows = None if batches is None else ceil(batches * self._batch / self.lanes)
        return xxhash.xxh3_64_hexdigest(f"{self._shares_until(rows)} {self._digest_of_parts}".encode())

    def _shares_until(self, rows: int | None) -> list[tuple[tuple[int, ...], int | None]]:
        """(places in a block, rows) of the stages before row ``rows``; as far as they go."""
        found: list[tuple[tuple[int, ...], int | None]] = []
        for stage in self.stages:
            if rows is not None and rows <= 0:
                break
            ends = None if stage.blocks is None else stage.blocks * stage.block
            length = ends if rows is None else rows if ends is None else min(rows, ends)
            found.append((stage.counts, length))
            rows = None if rows is None or length is None else rows - length
        return found

    @functools.cached_property
    def _digest_of_parts(self) -> str:
        found = xxhash.xxh3_64()
        for part in self.parts:
            found.update(repr((part.source, part.samples, part.sizes if part.samples is None else None)).encode())
            for array in (part.sizes, part.indices):
                if isinstance(array, np.ndarray):
                    found.update(array.tobytes())
        return found.hexdigest()

    def at(self, positions: np.ndarray) -> Places:
        """The samples at global ``positions`` [n]: source by its number in data.train, index in it."""
        places = self._order.at(positions)
        part, index = places.source, places.index
        for number in np.unique(part).tolist():
            if (indices := self.parts[number].indices) is not None:
                here = part == number
                index[here] = indices[index[here]]
        source = np.asarray([its.source for its in self.parts])[part]
        return replace(places, source=source, index=index)


def most_dividing(number: int, most: int) -> int:
    """The largest divisor of ``number`` that is at most ``most``."""
    return max(d for d in range(1, min(number, most) + 1) if number % d == 0)


def parts_of(data: DataConfig, sources: Sequence[Indexed | Stream], lanes: int) -> list[Part]:
    """The parts of all sources, in their order. Raises ValueError for what a stream cannot have."""
    found: list[Part] = []
    for number, (source, settings) in enumerate(zip(sources, data.train, strict=True)):
        if not isinstance(source, Stream):
            whole = Part(number, np.asarray(source.shard_sizes, dtype=np.int64))
            found += [whole] if settings.split_by is None else _split(number, source, settings)
            continue
        if settings.epochs is not None or settings.split_by or data.temperature or data.weigh_by == "tokens":
            raise ValueError(
                f"data.train: {settings.path} is only read on, so that its size is not known before; epochs, "
                f"split_by, data.temperature and weigh_by: tokens need an index: name the tars, or leave these out"
            )
        shards = len(source.shards) if data.lanes else min(len(source.shards), MOST_SUB_LANES)
        found.append(Part(number, most_dividing(lanes, shards)))
    return found


def _split(number: int, source: Indexed, settings: SourceConfig) -> list[Part]:
    """A part for each set of modalities or value of a field, the largest first."""
    dtype = np.uint32 if len(source) < 1 << 32 else np.int64
    if settings.split_by == MODALITIES:
        held = _by_modalities(source)
    else:
        held = _by_field(source, str(settings.split_by), settings.path)
    ends = np.cumsum(source.shard_sizes)
    total = sum(len(indices) ** (1 / settings.temperature) for indices in held.values())
    return [
        Part(
            number,
            np.diff(np.searchsorted(indices, ends), prepend=0),
            indices.astype(dtype),
            len(indices) ** (1 / settings.temperature) / total,
            name,
        )
        for name, indices in sorted(held.items(), key=lambda item: (-len(item[1]), item[0]))
    ]


def _by_modalities(source: Indexed) -> dict[str, np.ndarray]:
    kinds: dict[str, list[np.ndarray]] = defaultdict(list)
    for extensions in source.contents:
        kind = "+".join(source.modalities.members_read(extensions))
        kinds[kind].append(source.with_contents(extensions))
    return {kind: np.sort(np.concatenate(found)) for kind, found in kinds.items()}


def _by_field(source: Indexed, field: str, path: str) -> dict[str, np.ndarray]:
    known = read_field(source, field)
    if known is None:
        refuse_unknown(source, field)
        raise ValueError(
            f"data.train: the values of split_by: {field} of {redacted(path)} were not read yet; run mmmoe-data "
            f"index CONFIG with this run's config and its key=value, or use split_by: modalities"
        )
    values, ids = known
    ends = np.cumsum(np.bincount(ids, minlength=len(values)))[:-1]
    held = zip(values, np.split(np.argsort(ids, kind="stable"), ends), strict=True)
    return {value: indices for value, indices in held if len(indices)}


def shares_at(
    data: DataConfig, parts: Sequence[Part], mean_tokens: MeanTokens | None
) -> Callable[[float], list[float]]:
    """The weight of each part, by samples, at a step. ``mean_tokens``: needed for weigh_by: tokens."""
    factors = []
    by_tokens = data.weigh_by == "tokens"
    sizes: dict[int, float] = defaultdict(float)  # of sources, in samples or tokens
    for part in parts:
        mean = mean_tokens(part.source, part.indices) if by_tokens and mean_tokens else 1.0
        sizes[part.source] += (part.samples or 0) * mean
        factors.append(part.share / max(mean, 1e-9))
    if data.temperature is not None:
        factors = [f * sizes[part.source] ** (1 / data.temperature) for f, part in zip(factors, parts, strict=True)]
    schedules = [data.train[part.source].schedule for part in parts]
    return lambda step: [value_at(its, step) * factor for its, factor in zip(schedules, factors, strict=True)]


Plan = list[tuple[int, list[float]]]  # (first row, weight of each part from there on)


def _plan(config: RunConfig, weights: Callable[[float], list[float]], lanes: int) -> Plan:
    """Constant weights over intervals of rows, in place of the schedules' lines. The steps are those of the batches'
    numbers, so that skipped batches count."""

    def rows(steps: float) -> int:
        return ceil(steps * config.train.global_batch_size / lanes)

    knots = sorted({0, *(step for source in config.data.train for step, _ in source.schedule)})
    plan: Plan = []
    for first, last in pairwise(knots):
        count = 1 if weights(first) == weights(last - 1e-6) else pieces_of(rows(last - first))
        edges = np.linspace(first, last, 1 + count).tolist()
        plan += [(rows(edge), weights((edge + after) / 2)) for edge, after in pairwise(edges)]
    return [*plan, (rows(knots[-1]), weights(knots[-1]))]


def pieces_of(rows: int) -> int:
    """The number of pieces of a schedule's line of ``rows`` rows."""
    return min(PIECES, max(1, rows // ROWS_OF_PIECE))


def build_stages(plan: Plan, ends: Sequence[int | None], lanes: int) -> list[Stage]:
    """The stages of ``plan``. ``ends``: of each part, how many samples a lane has; None: no end."""
    left, row, stages = list(ends), 0, list[Stage]()
    owed = np.zeros(len(left))  # places, by which each part has had less than its share
    for (_, weights), after in zip(plan, [*(first for first, _ in plan[1:]), None], strict=True):
        while after is None or row < after:
            live = [0.0 if end == 0 else weight for weight, end in zip(weights, left, strict=True)]
            if not any(live):
                if stages and (after is None or not any(left)):
                    return stages
                raise ValueError(
                    f"data.train: from sample {row * lanes:,} on every source has weight 0 or has had its epochs; "
                    f"give one a weight there, or more epochs"
                )
            stage = _next_stage(live, left, owed, None if after is None else after - row, longest_block(lanes))
            stages.append(stage)
            if stage.blocks is None:
                return stages
            given = stage.blocks * np.asarray(stage.counts)
            row += int(given.sum())
            left = [end if end is None else end - count for end, count in zip(left, given.tolist(), strict=True)]
            owed = owed + np.asarray(live) / sum(live) * given.sum() - given
            owed = np.where(np.asarray(live) > 0, owed.clip(-1, 1).round(9), 0)
    return stages


def _next_stage(
    weights: Sequence[float], left: Sequence[int | None], owed: np.ndarray, room: int | None, longest: int
) -> Stage:
    """As many whole blocks as fit the rows until ``room`` ends or a part has none ``left``; where none fits, one of
    just these rows, with the shares rounded to whole places. ``owed``: places each part has had too few so far."""
    counts, shares = block_counts(weights, longest), np.asarray(weights) / sum(weights)
    if room is None and any(weight > 0 and not count for weight, count in zip(weights, counts, strict=True)):
        raise ValueError(
            f"data.train: the smallest of its weights, {min(filter(None, weights)):.3g} of {sum(weights):.3g}, would "
            f"get less than one sample in {longest:,}; raise it, or leave its source out; where it is that of a part "
            f"of split_by, raise the temperature of the source"
        )
    until = [ceil(end / share) for end, share in zip(left, shares, strict=True) if share > 0 and end is not None]
    rows = min([*until, *([] if room is None else [room])], default=None)
    if rows is None:
        return Stage(counts)
    blocks = min(
        [rows // sum(counts), *(end // n for end, n in zip(left, counts, strict=True) if n and end is not None)]
    )
    if blocks:
        return Stage(counts, blocks)
    return Stage(_at_most(left, apportion(shares, min(rows, longest), owed)), 1)


def _at_most(left: Sequence[int | None], counts: Sequence[int]) -> tuple[int, ...]:
    return tuple(count if end is None else min(count, end) for count, end in zip(counts, left, strict=True))


def _end(data: DataConfig, part: Part, lanes: int) -> int | None:
    """Samples of each lane until the part has had its epochs: where they do not divide, fewer than ``lanes`` come
    once more."""
    epochs = data.train[part.source].epochs
    return None if epochs is None or part.samples is None else -(-part.samples * epochs // lanes)


def _notes(config: RunConfig, parts: Sequence[Part], lanes: int) -> list[str]:
    batch, sizes = config.train.global_batch_size, [part.samples for part in parts]
    found, total = [], sum(filter(None, sizes))
    if None not in sizes and total < batch:
        found.append(
            f"train.global_batch_size {batch} exceeds the {total} samples of data.train, so that a batch holds "
            f"samples more than once; lower it, or add data"
        )
    lines = [its for source in config.data.train for its in pairwise(source.schedule) if its[0][1] != its[1][1]]
    steps = min((last - first for (first, _), (last, _) in lines), default=0)
    pieces = pieces_of(rows := ceil(steps * batch / lanes))
    if steps > 1 and pieces < FEW_PIECES:
        found.append(
            f"the shortest change of a weight in data.train takes {steps} steps: it is followed in stages of "
            f"{steps / pieces:.3g} steps, with shares rounded to 1/{rows // pieces}; let it take "
            f"{ceil(FEW_PIECES * ROWS_OF_PIECE * lanes / batch)} steps or more for a smoother one"
        )
    return found
