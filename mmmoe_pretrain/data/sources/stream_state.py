"""What a checkpoint holds of a run's streams: for each sub-lane four integers (``LaneState``), whatever was read.

A rank knows how far the sub-lanes that it reads have come (``Stream.delivered``); a save gathers the ranks' states. A
resumed run reads each sub-lane on from there, at any layout and number of workers. The numbers of a batch's samples
follow from its positions alone, so a state needs no list of what its window has served.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from mmmoe_pretrain.data.order.blend import Blend
from mmmoe_pretrain.data.order.positions import Order
from mmmoe_pretrain.data.sources.stream import LaneState, Stream

Table = dict[str, list[LaneState]]  # identity of a stream -> the states of its sub-lanes
MAX_NUMBER = 1 << 56
SEARCHED = 1 << 22  # positions in which a sub-lane has a sample


def table(streams: Iterable[Stream]) -> Table:
    """The states that this process knows."""
    return {stream.identity: list(stream.states) for stream in streams}


def merged(tables: Sequence[Table]) -> Table:
    """Of the tables of all ranks, some of which may read nothing: the latest state of each sub-lane."""
    found: Table = {}
    for states in tables:
        for identity, lanes in states.items():
            known = found.setdefault(identity, lanes)
            found[identity] = [max(pair) for pair in zip(known, lanes, strict=True)]
    return found


def to_json(states: Table) -> dict[str, list[list[int]]]:
    """``{identity: [[number, epoch, shard, sample], ...]}``."""
    return {identity: [list(lane) for lane in lanes] for identity, lanes in states.items()}


def from_json(value: object) -> Table:
    """The inverse of ``to_json``. Raises ValueError for anything else."""
    if isinstance(value, dict) and all(map(_are_states, value.values())):
        return {identity: [LaneState(*lane) for lane in lanes] for identity, lanes in value.items()}
    raise ValueError(
        f"the states of streams must be lists of [number, epoch, shard, sample], not {str(value)[:80]}; the "
        f"checkpoint is damaged or was edited: use another one"
    )


def start(streams: Mapping[int, tuple[Stream, int]], saved: Table, order: Blend | Order, position: int) -> list[str]:
    """Read streams (by source: and the number of sub-lanes that ``order`` has for it) on from ``saved``, for batches
    from the global ``position`` on; warnings.

    A stream that is not among them, since its shards, sub-lanes, window or the seed changed, is read from its first
    epoch on, at the numbers that the order asks for next.
    """
    warnings = []
    for source, (stream, lanes) in streams.items():
        states = saved.get(stream.identity, [])
        if len(states) != lanes:
            numbers = first_numbers(order, source, lanes, position) if position else [0] * lanes
            states = [LaneState(number) for number in numbers]
            if position:
                warnings.append(
                    f"data.train: {stream.name} is read from its first epoch on, so that samples may be repeated: "
                    f"{_change(stream, lanes, saved)}"
                )
        stream.start(states)
    return warnings


def _change(stream: Stream, lanes: int, saved: Table) -> str:
    """Why ``saved`` has no states of ``lanes`` sub-lanes of ``stream``."""
    if stream.identity in saved:
        return f"the checkpoint has {len(saved[stream.identity])} sub-lanes of it, now {lanes}; set data.lanes back"
    names = sorted(identity.rpartition(" ")[0] for identity in saved)
    if stream.name in names:
        return "its other commands, their order, stream_window or the seed have changed since the checkpoint"
    return f"its first command is new; the checkpoint has {'; '.join(names) or 'no stream'}"


def first_numbers(order: Blend | Order, source: int, lanes: int, position: int) -> list[int]:
    """Of each sub-lane of a stream the number of its first sample from the global ``position`` on; 0 where none is
    near: the sub-lane is then read up to it."""
    found = np.full(lanes, -1, dtype=np.int64)
    step = 64 * order.lanes
    for first in range(position, position + max(SEARCHED, step), step):
        places = order.at(np.arange(first, first + step))
        here = places.source == source
        lane, number = places.sub_lane[here], places.number[here]
        new, at = np.unique(lane, return_index=True)  # the first of each, as numbers rise with the position
        unknown = found[new] < 0
        found[new[unknown]] = number[at[unknown]]
        if (found >= 0).all():
            break
    return np.maximum(found, 0).tolist()


def sharing(order: Blend | Order, source: int, lanes: int, global_batch: int, microbatches: int, ranks: int) -> str:
    """A note where several of the data-parallel ranks read one sub-lane, each of them all of it; else empty."""
    positions = np.arange(global_batch)
    places = order.at(positions)
    here = places.source == source
    microbatch = global_batch // microbatches
    rank = (positions % microbatch) * ranks // microbatch
    pairs = np.unique(np.stack([places.sub_lane[here], rank[here]]), axis=1)
    shared = int((np.bincount(pairs[0], minlength=lanes) > 1).sum())
    if not shared:
        return ""
    return (
        f"data.train: {shared} of the {lanes} sub-lanes of source {source} are read by several ranks, each of which "
        f"reads them whole: the samples are right, but it is slower. Name a multiple of {microbatches * ranks} "
        f"shards (train.num_microbatches x ranks), and set data.lanes to train.global_batch_size"
    )


def _are_states(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(state, list) and len(state) == 4 and all(type(n) is int and 0 <= n <= MAX_NUMBER for n in state)
        for state in value
    )
