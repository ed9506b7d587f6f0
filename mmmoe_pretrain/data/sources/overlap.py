"""Samples that two sets of sources share, byte by byte: those of equal sizes by the indices are read and compared."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mmmoe_pretrain.data.sources.source import Indexed

log = logging.getLogger(__name__)
MOST_ROWS = 4_000_000  # of the indices of sources that are compared: seconds
MOST_READ = 256  # samples that are read, of the larger set
LEAST_BYTES = 128  # of a sample: shorter ones, such as one word, may well be said twice
CHUNK = 1 << 18


@dataclass(frozen=True)
class Overlap:
    """``count`` of ``compared`` samples are in both, at least; ``first`` is ``second``."""

    count: int
    compared: int
    first: str
    second: str


def overlap(samples: Sequence[tuple[Indexed, int]], others: Sequence[Indexed]) -> Overlap | None:
    """Which of ``samples`` are in ``others``, too; None if none is found. What counts are the bytes that are read as
    some modality, and not the JSON."""
    sizes = [_sizes(source, np.array([index]))[0] for source, index in samples]
    by_size: dict[bytes, list[int]] = defaultdict(list)
    for number, row in enumerate(sizes):
        if row.sum() >= LEAST_BYTES:
            by_size[row.tobytes()].append(number)
    pairs: dict[int, tuple[Indexed, int]] = {}
    for count, (source, index, row) in enumerate(_of_sizes(others, np.array([*map(_row, by_size)]))):
        if count == MOST_READ:
            log.warning(
                "evaluate.validation: of the training samples that have sizes of validation samples only %d were "
                "read, and others may be the same; mmmoe-data dedup --against compares them all",
                MOST_READ,
            )
            break
        content = _content(source, index)
        for number in by_size.get(row.tobytes(), ()):
            if number not in pairs and _content(*samples[number]) == content:
                pairs[number] = (source, index)
    if not pairs:
        return None
    number, other = next(iter(pairs.items()))
    return Overlap(len(pairs), len(samples), _name(*samples[number]), _name(*other))


def _row(size: bytes) -> np.ndarray:
    return np.frombuffer(size, dtype=np.int64)


def _of_sizes(sources: Sequence[Indexed], wanted: np.ndarray) -> Iterator[tuple[Indexed, int, np.ndarray]]:
    """The samples whose members have the sizes of a row of ``wanted``."""
    if not len(wanted):
        return
    left, factors = MOST_ROWS, np.random.default_rng(0).integers(1 << 62, size=wanted.shape[1]) | 1
    keys = wanted @ factors  # modulo 2^64; what is equal by chance is read, and differs
    for source in sources:
        for start in range(0, min(len(source), left), CHUNK):
            rows = _sizes(source, np.arange(start, min(start + CHUNK, len(source), left)))
            for place in np.flatnonzero(np.isin(rows @ factors, keys)).tolist():
                yield source, start + place, rows[place]
        left -= min(len(source), left)


def _sizes(source: Indexed, indices: np.ndarray) -> np.ndarray:
    """int64 [n, M]."""
    return np.stack([source.sizes_of(indices, name) for name in source.modalities], axis=1)


def _content(source: Indexed, index: int) -> dict[str, bytes]:
    raw = source.read(index)
    return {name: raw.members[member] for name, member in source.modalities.members_read(tuple(raw.members)).items()}


def _name(source: Indexed, index: int) -> str:
    return f"{source.key(index)} of {source.places(index)[0].rpartition('/')[2]}"
