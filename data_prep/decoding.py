"""Which samples of shards the loader cannot decode, and why. Each is decoded as in training, by several processes."""

from __future__ import annotations

import functools
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import NamedTuple

from mmmoe_pretrain.data.decode import PARTS, BadSampleError, contents, document, read_row
from mmmoe_pretrain.data.sources.members import RawSample, members_to_read
from mmmoe_pretrain.data.sources.rows import read_rows
from mmmoe_pretrain.data.storage.files import Files
from mmmoe_pretrain.data_prep.pool import map_in_order
from mmmoe_pretrain.modalities import Modalities, default_modalities, format_of
from mmmoe_pretrain.urls import redacted

SAMPLES_A_TASK = 32
MOST_REASONS = 1000
OTHER = "other reasons"
_OWN = re.compile(r"b?'[^']*'|b?\"[^\"]*\"|\d[\d,.]*")  # what a reason says of one file alone


class Task(NamedTuple):
    """Samples of the shard ``url``: their keys, and (offset, size) of their members by extension."""

    url: str
    samples: Sequence[tuple[str, dict[str, tuple[int, int]]]]


Bad = tuple[str, str]  # key and reason


def undecodable(urls: Sequence[str], workers: int) -> Iterator[tuple[Task, list[Bad]]]:
    """What cannot be decoded of these shards, task by task."""
    _files.cache_clear()  # of an earlier call in this process, since when shards may have been replaced
    with closing(map_in_order(_bad_samples, _tasks(urls), workers)) as results:
        yield from results


def count_reason(counts: Counter[str], reason: str) -> None:
    """Count it under what it shares with others: without numbers and names."""
    reason = _OWN.sub("…", reason)
    counts[reason if reason in counts or len(counts) < MOST_REASONS else OTHER] += 1


def _tasks(urls: Sequence[str]) -> Iterator[Task]:
    for url in urls:
        samples = read_rows(url)[1].samples()
        while some := list(itertools.islice(samples, SAMPLES_A_TASK)):
            yield Task(url, some)


def _bad_samples(task: Task) -> tuple[Task, list[Bad]]:
    known, found = default_modalities(), list[Bad]()
    for key, places in task.samples:
        wanted = members_to_read(tuple(places), known)
        members = {name: _files().read(task.url, *places[name]) for name in places if name in wanted}
        unread = tuple(name for name in places if name not in wanted)
        try:
            values = _values(RawSample(key, members, redacted(task.url), unread), known)
        except BadSampleError:  # of its JSON, which is checked without decoding
            continue
        try:
            for kind, data in values:
                decode(kind, data, known)
        except BadSampleError as error:
            found.append((key, str(error)))
    return task, found


def _values(raw: RawSample, known: Modalities) -> list[tuple[str, bytes]]:
    """The bytes of a sample with the kind of each."""
    row = read_row(raw)
    if PARTS not in row:
        return list(contents(raw, row, known).items())
    files = [part.member for part in document(row, raw.members, known, any_kind=True) if part.string is None]
    return [(format_of(name) or "", raw.members[name]) for name in files]


def decode(kind: str, data: bytes, known: Modalities) -> None:
    """Raise BadSampleError where training would. A text is read without a tokenizer; a kind that needs a run's
    settings is not decoded."""
    if kind not in known:
        return
    if known[kind].needs_tokenizer:
        known[kind].raw(data)
    else:
        known[kind].decode(data)


@functools.cache
def _files() -> Files:
    """Of a process: it keeps connections."""
    return Files()
