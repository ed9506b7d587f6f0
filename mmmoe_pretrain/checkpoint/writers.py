"""Which rank writes which box, on rank 0, from the boxes of all ranks; and the index of the files that they make.

Arrays: a thousand ranks have millions of boxes. Legend: n boxes of all ranks, in the order of the ranks and of each
rank's state; d dimensions of the tensor that has the most (others have 1 in front).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mmmoe_pretrain.checkpoint.boxes import fill, strides, untiled
from mmmoe_pretrain.checkpoint.files import DTYPES, NAMES
from mmmoe_pretrain.checkpoint.index import Index, make_index, refuse_unreadable
from mmmoe_pretrain.checkpoint.names import rank_file
from mmmoe_pretrain.checkpoint.state import Shape, ShardedState

Table = list[tuple[str, Shape]]  # keys and shapes of a state


class Tables:
    """Keys and shapes of all ranks. Raises ValueError for those that readers would refuse."""

    def __init__(self, tables: Sequence[Table], which: Sequence[int]) -> None:
        """``tables``: the different ones; ``which``: of each rank the number of its own."""
        self._which = which
        shapes: dict[str, set[Shape]] = defaultdict(set)
        for key, shape in dict.fromkeys(its for table in tables for its in table):
            refuse_unreadable(key, shape)
            shapes[key].add(shape)
        self.keys = sorted(shapes)
        self.all_shapes = [shapes[key] for key in self.keys]
        self.shapes = [next(iter(its)) for its in self.all_shapes]
        self.dims = max(map(len, self.shapes), default=0)
        number = {key: i for i, key in enumerate(self.keys)}
        self._numbers = [np.asarray([number[key] for key, _ in table], dtype=np.int64) for table in tables]

    def numbers(self, rank: int) -> np.ndarray:
        """Of each key of the rank's state, in ``keys``."""
        return self._numbers[self._which[rank]]


@dataclass(frozen=True)
class Offer:
    """The boxes that a rank holds, for rank 0. A weight and what the optimizer keeps for it have the same boxes, as a
    rule, so each different list of boxes is sent once.

    ``keys`` [k, 2]: of each key that has boxes its number in the state, and that of its list. ``ends`` [m]: where
    each list ends in ``rows`` [., 1 + 2d]: number in ``dtypes``, offset, size.
    """

    dtypes: tuple[torch.dtype, ...]
    keys: np.ndarray
    ends: np.ndarray
    rows: np.ndarray

    @classmethod
    def of(cls, state: ShardedState) -> Offer:
        """What this rank holds."""
        dims = max((len(tensor.shape) for tensor in state.values()), default=0)
        dtypes: dict[torch.dtype, int] = {}
        lists: dict[tuple[tuple[int, ...], ...], int] = {}
        keys = []
        for number, tensor in enumerate(state.values()):
            more = dims - len(tensor.shape)
            held = tuple(
                (dtypes.setdefault(dtype, len(dtypes)), *(0,) * more, *box.offset, *(1,) * more, *box.size)
                for box, dtype in tensor.boxes()
            )
            if held:
                keys.append((number, lists.setdefault(held, len(lists))))
        return cls(
            tuple(dtypes),
            _narrow(np.asarray(keys, dtype=np.int64).reshape(-1, 2)),
            _narrow(np.cumsum([len(held) for held in lists], dtype=np.int64)),
            _narrow(np.asarray([row for held in lists for row in held], dtype=np.int64).reshape(-1, 1 + 2 * dims)),
        )

    def boxes(self) -> tuple[np.ndarray, np.ndarray]:
        """All in the order of the state: the number of the key [n], and the rows [n, 1 + 2d]."""
        bounds = np.append(0, self.ends)
        begins, counts = bounds[self.keys[:, 1]], np.diff(bounds)[self.keys[:, 1]]
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.repeat(self.keys[:, 0], counts), self.rows[np.repeat(begins, counts) + within]


def _narrow(numbers: np.ndarray) -> np.ndarray:
    """In 4 bytes each where they fit."""
    return numbers.astype(np.int32) if numbers.max(initial=0) < 1 << 31 else numbers


class Writers:
    """The rank that writes each box: those of one holder first, then the largest first, to the holder with the fewest
    bytes so far.

    Raises ValueError where the ranks do not cover every tensor, or differ about its shape or type.
    """

    def __init__(self, tables: Tables, offers: Sequence[Offer]) -> None:
        self._tables, self._ranks = tables, len(offers)
        self._dtypes = list(dict.fromkeys(dtype for offer in offers for dtype in offer.dtypes))
        held = [self._of_rank(rank, offer) for rank, offer in enumerate(offers)]
        rank = np.repeat(np.arange(len(offers)), [len(keys) for keys, *_ in held])
        key, dtype, offset, size = (np.concatenate(its, dtype=np.int64) for its in zip(*held, strict=True))
        shapes = np.asarray([(1,) * (tables.dims - len(shape)) + shape for shape in tables.shapes], dtype=np.int64)
        start = np.einsum("nd,nd->n", offset, strides(shapes.reshape(len(tables.shapes), tables.dims))[key])
        order = np.lexsort((start, key))  # stable: of equal boxes the first rank's comes first
        self._place = order  # that each box had; from here on they are in the order of keys and starts
        self._rank, self._key, self._dtype = rank[order], key[order], dtype[order]
        self._offset, self._size = offset[order], size[order]
        self._first = self._different(start[order])
        self._refuse_holes()
        self._itemsize = np.asarray([dtype.itemsize for dtype in self._dtypes], dtype=np.int64)[self._dtype]
        self._nbytes = self._size.prod(axis=1) * self._itemsize
        self._written = self._choose()

    @property
    def chosen(self) -> list[np.ndarray]:
        """Of each rank a bit for each of its boxes."""
        mask = np.zeros(len(self._place), dtype=bool)
        mask[self._place[self._written]] = True
        ends = np.cumsum(np.bincount(self._rank, minlength=self._ranks))[:-1]
        return [np.packbits(part) for part in np.split(mask, ends)]

    def index(self, heads: Sequence[int]) -> Index:
        """``heads``: bytes of the header of each rank's file."""
        row, rank = self._written, self._rank[self._written]
        order = np.lexsort((self._place[row], -self._itemsize[row], rank))  # that of the files
        ends = np.cumsum(self._nbytes[row][order])
        first = np.searchsorted(rank[order], np.arange(self._ranks))  # of each rank
        before = np.concatenate([[0], ends])[first]
        at = np.empty(len(row), dtype=np.int64)
        at[order] = ends - self._nbytes[row][order] + (np.asarray(heads, dtype=np.int64) - before)[rank[order]]
        bounds = np.searchsorted(self._key[row], np.arange(len(self._tables.keys) + 1))
        found = {}
        for number, (key, shape) in enumerate(zip(self._tables.keys, self._tables.shapes, strict=True)):
            part = slice(bounds[number], bounds[number + 1])
            own, skip = row[part], self._tables.dims - len(shape)
            place = (rank[part, None], at[part, None], self._offset[own, skip:], self._size[own, skip:])
            found[key] = shape, self._dtypes[int(self._dtype[own[0]])], np.concatenate(place, axis=1)
        return make_index(found, [rank_file(number) for number in range(self._ranks)])

    def _of_rank(self, rank: int, offer: Offer) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Of its boxes the key, the type, and offset and size with the dimensions of all ranks' tensors."""
        keys, rows = offer.boxes()
        dims = (rows.shape[1] - 1) // 2
        more = ((0, 0), (self._tables.dims - dims, 0))
        dtypes = np.asarray([self._dtypes.index(dtype) for dtype in offer.dtypes], dtype=np.int64)
        offset, size = np.pad(rows[:, 1 : 1 + dims], more), np.pad(rows[:, 1 + dims :], more, constant_values=1)
        return self._tables.numbers(rank)[keys], dtypes[rows[:, 0]], offset, size

    def _different(self, start: np.ndarray) -> np.ndarray:
        """Places of boxes that are not the one before."""
        other = np.ones(len(start), dtype=bool)
        other[1:] = (np.diff(self._key) != 0) | (np.diff(start) != 0) | (np.diff(self._size, axis=0) != 0).any(axis=1)
        return np.flatnonzero(other)

    def _refuse_holes(self) -> None:
        unique = self._first
        uncovered = self._uncovered(unique)
        least, most = np.full(len(self._tables.keys), len(self._dtypes)), np.full(len(self._tables.keys), -1)
        np.minimum.at(least, self._key, self._dtype)
        np.maximum.at(most, self._key, self._dtype)
        unknown = [number for number, dtype in enumerate(self._dtypes) if dtype not in NAMES]
        problems = []
        for number, key in enumerate(self._tables.keys):
            shapes, own = self._tables.all_shapes[number], None
            if len(shapes) > 1 or least[number] < most[number]:
                own = {str(self._dtypes[i]) for i in self._dtype[self._key == number].tolist()}
                values = [*sorted(shapes), *sorted(own)]
                problems.append(f"disagree on the shape or type of {key}: {', '.join(map(str, values))}")
            elif number in uncovered:
                held = unique[self._key[unique] == number]
                said = fill(
                    self._size[held, self._tables.dims - len(self._tables.shapes[number]) :],
                    self._tables.shapes[number],
                )
                problems.append(f"hold {said} of {key}")
            elif least[number] in unknown:
                problems.append(f"hold {key} as {self._dtypes[least[number]]}; files have {', '.join(DTYPES)}")
        if problems:
            raise ValueError(
                f"no checkpoint is written: the ranks {'; '.join(problems[:3])} ({len(problems)} such in all); "
                f"earlier checkpoints are unchanged"
            )

    def _uncovered(self, unique: np.ndarray) -> set[int]:
        """Keys of which the boxes ``unique`` do not make up the whole. What the optimizer keeps for a weight is cut
        as that, as a rule: of keys in the same boxes one is looked at."""
        offset, size = self._offset, self._size
        if len(unique) < len(self._key):  # a copy of a million rows is not made for nothing
            offset, size = offset[unique], size[unique]
        bounds = np.searchsorted(self._key[unique], np.arange(len(self._tables.keys) + 1)).tolist()
        alike: dict[tuple[Shape, bytes, bytes], list[int]] = defaultdict(list)
        for number, shape in enumerate(self._tables.shapes):
            part = slice(bounds[number], bounds[number + 1])
            alike[shape, offset[part].tobytes(), size[part].tobytes()].append(number)
        by_dims: dict[int, list[list[int]]] = defaultdict(list)
        for (shape, *_), numbers in alike.items():
            by_dims[len(shape)].append(numbers)
        found: set[int] = set()
        for dims, groups in by_dims.items():
            firsts = [numbers[0] for numbers in groups]
            rows = np.concatenate([np.arange(bounds[number], bounds[number + 1]) for number in firsts])
            group = np.repeat(np.arange(len(firsts)), [bounds[number + 1] - bounds[number] for number in firsts])
            skip, shapes = self._tables.dims - dims, [self._tables.shapes[number] for number in firsts]
            for number in untiled(group, offset[rows, skip:], size[rows, skip:], shapes):
                found.update(groups[number])
        return found

    def _choose(self) -> np.ndarray:
        """Of each different box the one that is written, ascending."""
        count = np.diff(np.append(self._first, len(self._key)))
        chosen = self._first.copy()
        alone = chosen[count == 1]
        written = np.bincount(self._rank[alone], self._nbytes[alone], self._ranks).astype(np.int64)
        shared = np.flatnonzero(count > 1)
        for group in shared[np.argsort(-self._nbytes[chosen[shared]], kind="stable")].tolist():
            begin = self._first[group]
            chosen[group] += written[self._rank[begin : begin + count[group]]].argmin()
            written[self._rank[chosen[group]]] += self._nbytes[begin]
        return chosen
