"""Samples of shards that can only be read on, such as the output of a command: ``Stream``.

The shards are read in a fixed number of sub-lanes. In each epoch they are permuted, and sub-lane k of G reads shards
k, k + G, ... of that order one after the other; each goes on to its next epoch by itself. K consecutive samples of a
sub-lane are a window, whose samples are permuted; an epoch's last window is shorter. So the samples of a sub-lane are
a sequence that depends on the seed and the shards alone, and four integers (``LaneState``) say where a window begins.
A sub-lane of a process keeps one window in memory, and one shard open.
"""

from __future__ import annotations

import logging
import os
import time
import zlib
from collections.abc import Iterable, Sequence
from lzma import LZMAError
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from mmmoe_pretrain.data.order.permute import fold, permute
from mmmoe_pretrain.data.sources.listing import expanded, list_shards
from mmmoe_pretrain.data.sources.members import RawSample
from mmmoe_pretrain.data.sources.pipes import PIPE
from mmmoe_pretrain.data.sources.tar_stream import BadShard, ShardSamples
from mmmoe_pretrain.data.storage.files import Files, StorageError
from mmmoe_pretrain.data.storage.retry import REPORTED, TransientError
from mmmoe_pretrain.modalities import Modalities
from mmmoe_pretrain.urls import redacted_command

logger = logging.getLogger(__name__)
WINDOW = 16  # samples
FIRST_ATTEMPTS = 10  # after the first one, of a sub-lane that has not given a sample yet


class LaneState(NamedTuple):
    """Where a window of a sub-lane begins: the ``number`` of its first sample (from 0 at the start of the run), and
    the epoch, the shard (its place among the sub-lane's shards of this epoch) and the sample of the shard."""

    number: int = 0
    epoch: int = 0
    shard: int = 0
    sample: int = 0


def open_stream(
    spec: str | Path, files: Files, modalities: Modalities, seed: int = 0, window: int = WINDOW
) -> Stream:
    """The shards that ``spec`` names: ``pipe:`` commands, or what ``listing.py`` knows."""
    urls: list[str] = []
    for part in str(spec).split("::"):
        if part.startswith(PIPE):
            urls += expanded(part)
        else:
            urls += [shard.url for shard in list_shards(part, files).shards]
    if len(set(urls)) < len(urls):
        raise ValueError(f"{redacted_command(str(spec))} names a shard more than once; name each once")
    return Stream(urls, files, modalities, seed, window)


class Stream:
    """Samples by sub-lane and number. In a sub-lane numbers are to be read in ascending order, by one process;
    others than the next are passed by reading on."""

    def __init__(
        self, shards: Sequence[str], files: Files, modalities: Modalities, seed: int = 0, window: int = WINDOW
    ) -> None:
        """``window``: samples that are permuted, each sub-lane's by itself."""
        self.shards, self.files, self.modalities = tuple(shards), files, modalities
        self.seed, self.window = seed, window
        self.states = [LaneState()]  # from where each sub-lane is read, as ``start`` and ``delivered`` set it
        self._readers: dict[int, _Lane] = {}
        self._pid = os.getpid()

    @property
    def identity(self) -> str:
        """What the sequences of samples depend on, besides the number of sub-lanes."""
        digest = xxhash.xxh3_64(repr((self.seed, self.window)).encode())
        for url in self.shards:
            digest.update(f"{url}\0".encode())
        return f"{self.name} {digest.hexdigest()}"

    @property
    def name(self) -> str:
        """Its first shard, for messages."""
        return redacted_command(self.shards[0])[:80]

    def start(self, states: Iterable[LaneState]) -> None:
        """Read each of as many sub-lanes on from its state."""
        self.close()
        self.states = list(states)

    def delivered(self, lane: int, state: LaneState) -> None:
        """A sample of the window at ``state`` was trained on: nothing before that window is read again."""
        self.states[lane] = max(self.states[lane], state)

    def read(self, lane: int, number: int) -> tuple[RawSample, LaneState]:
        """Sample ``number`` of sub-lane ``lane``, and the state of its window, for ``delivered``.

        Raises StorageError or BadShard, which name the shard, where it cannot be read.
        """
        if self._pid != os.getpid():  # forked: another process reads on with the old ones
            self._readers, self._pid = {}, os.getpid()
        reader = self._readers.get(lane)
        if reader is None or number < reader.start.number:
            if reader is not None:
                reader.close()
            assert number >= self.states[lane].number, (lane, number, self.states[lane])
            reader = self._readers[lane] = _Lane(self, lane, self.states[lane])
        return reader.take(number), reader.start

    def close(self) -> None:
        """End the commands of this process."""
        for reader in self._readers.values():
            reader.close()
        self._readers = {}

    def shards_of(self, lane: int, epoch: int) -> list[str]:
        """The shards that a sub-lane reads in an epoch, in order."""
        count = len(self.shards)
        order = permute(np.arange(count), count, fold(self.seed, epoch))
        return [self.shards[i] for i in order[lane :: len(self.states)].tolist()]


class _Lane:
    """One sub-lane, read on from a window's state."""

    def __init__(self, stream: Stream, lane: int, state: LaneState) -> None:
        self.start = state  # of the window in memory
        self._next = state  # of the window after it
        self._stream, self._lane = stream, lane
        self._window: list[RawSample] = []
        self._order: list[int] = []
        self._epoch, self._shards = -1, list[str]()
        self._open: tuple[str, ShardSamples] | None = None
        self._last: tuple[LaneState, str] | None = None  # a place and the key there

    def take(self, number: int) -> RawSample:
        """Sample ``number``, which is none before the window in memory."""
        while number >= self._next.number:
            self._advance(keep=number - self._next.number < self._stream.window)
        return self._window[self._order[number - self.start.number]]

    def close(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def _advance(self, keep: bool) -> None:
        """Read the next window; without ``keep`` pass it."""
        self.start, self._window = self._next, []
        number, epoch, shard, sample = self.start
        while len(self._window) < self._stream.window:
            found = self._read(LaneState(0, epoch, shard, sample), keep)
            if found is not None:
                self._window.append(found)
                sample += 1
                continue
            shard, sample = shard + 1, 0
            if shard == len(self._shards):
                epoch, shard = epoch + 1, 0
                if self._window:
                    break
        count = len(self._window)
        self._next = LaneState(number + count, epoch, shard, sample)
        key = fold(self._stream.seed, self._lane, number)
        self._order = permute(np.arange(count), count, key).tolist()

    def _read(self, place: LaneState, keep: bool) -> RawSample | None:
        """The sample at ``place``, None where its shard has ended. What may pass is tried again."""
        if self._epoch != place.epoch:
            self._epoch, self._shards = place.epoch, self._stream.shards_of(self._lane, place.epoch)
        url, limits, failed, waited = self._shards[place.shard], self._stream.files.settings.retries, 0, 0.0
        # A command that has never worked is a wrong one as a rule.
        most = limits.count if self._last is not None else min(limits.count, FIRST_ATTEMPTS)
        while True:
            began = time.monotonic()
            try:
                sample = self._opened(url, place).next(keep)
                break
            except (BadShard, StorageError):
                self.close()
                raise
            except (TransientError, ValueError, EOFError, OSError, zlib.error, LZMAError) as error:
                self.close()
                failed += 1
                pause = limits.pause(failed)
                # Reading on to the sample again may take long, so that no more than the wait for a byte counts.
                waited += min(time.monotonic() - began, limits.request_seconds) + pause
                if not url.startswith(PIPE) or failed > most or waited >= limits.read_seconds:
                    raise StorageError(
                        f"shard {redacted_command(url)} cannot be read beyond sample {place.sample}: {error} "
                        f"({failed} attempts); try its command in a shell, and repair the shard or leave it out"
                    ) from None
                if failed == REPORTED:
                    logger.warning("shard %s cannot be read yet: %s; trying again", redacted_command(url), error)
                time.sleep(pause)
        if sample is None:
            self.close()
        else:
            self._last = place, sample.key
        return sample

    def _opened(self, url: str, place: LaneState) -> ShardSamples:
        """The shard, read up to ``place``."""
        if self._open is None or self._open[0] != url:
            self.close()
            self._open = url, ShardSamples(url, self._stream.files, self._stream.modalities)
        samples = self._open[1]
        while samples.count < place.sample:
            sample = samples.next(keep=False)
            before = LaneState(0, place.epoch, place.shard, samples.count - 1)
            same = self._last is None or self._last[0] != before or sample is None or self._last[1] == sample.key
            if sample is None or not same:
                raise BadShard(
                    f"shard {redacted_command(url)} gives other samples than when it was read before: it was "
                    f"changed; restore it, and resume"
                )
        return samples
