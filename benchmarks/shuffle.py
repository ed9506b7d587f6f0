"""How well the order shuffles, and how local a rank's reads are, by window and chunk.

Samples of shards that are sorted by an attribute from the first shard to the last (the worst case for an order with
locality), one lane a sample of the batch. By (window, chunk):

- ``spread``: standard deviation over batches of the batch's mean attribute, over that of random batches: 1 is a
  perfect shuffle, below it batches are more even than random ones.
- ``drift``: standard deviation of the mean attribute of DRIFT successive batches, as a share of that of a sample: how
  far the data of a stretch of training may differ from the whole; ``drift_random`` is that of random batches.
- ``neighbour``: how far apart in the batches two neighbours of a shard come, as a share of the mean distance in a
  random order.
- ``one_shard``: the largest share of a batch that is of one shard.
- ``chunks``: from how many chunks of shards a rank (of RANKS) reads at a time, while its lanes go through a window;
  and ``run``: how many samples of each, on average, so that ``run`` x (bytes of a sample) is what a prefetching disk
  or a block cache can make use of.
- ``us``: microseconds to compute a position.

Prints a table and, as its last line, one JSON object by ``WINDOW/CHUNK``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, its folder alone is there

from mmmoe_pretrain.data.order.mix import Stage
from mmmoe_pretrain.data.order.positions import Order

SHARD = 10_000
RANKS = 8
DRIFT = 100
COLUMNS = ("spread", "drift", "drift_random", "neighbour", "one_shard", "chunks", "run", "us")


def measured(samples: int, batch: int, window: int, chunk: int) -> dict[str, float]:
    """The figures of one window and chunk, over one epoch of ``samples``."""
    sizes = np.full(samples // SHARD, SHARD)
    order = Order([sizes], [Stage((1,))], seed=0, lanes=batch, window=window, chunk=chunk)
    whole = samples // batch * batch
    began = time.process_time()
    index = order.at(np.arange(whole)).index
    seconds = time.process_time() - began
    batches = index.reshape(-1, batch)
    random = samples / np.sqrt(12 * batch)  # of the mean of `batch` uniform values
    stretches = batches[: len(batches) // DRIFT * DRIFT].mean(axis=1).reshape(-1, DRIFT).mean(axis=1)
    where = np.full(samples, -1)
    where[index] = np.arange(whole) // batch
    both = (where[:-1] >= 0) & (where[1:] >= 0)
    apart = np.abs(np.diff(where))[both].mean()
    shards = np.sort(batches[:: max(1, len(batches) // 200)] // SHARD, axis=1)
    largest = max(int(np.bincount(row).max()) for row in shards)
    rows = min(len(batches), max(1, window // batch))
    own = batches[:rows, : batch // RANKS].ravel() // chunk
    chunks = len(np.unique(own))
    return {
        "spread": float(batches.mean(axis=1).std() / random),
        "drift": float(stretches.std() / (samples / np.sqrt(12))),
        "drift_random": 1 / np.sqrt(DRIFT * batch),
        "neighbour": float(apart / (len(batches) / 3)),
        "one_shard": largest / batch,
        "chunks": chunks,
        "run": len(own) / chunks,
        "us": 1e6 * seconds / whole,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2_000_000)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--quick", action="store_true", help="a tenth of the samples")
    options = parser.parse_args()
    samples = 200_000 if options.quick else options.samples
    windows = [8 * options.batch, 1 << 16, 1 << 18, samples]
    print(f"{samples:,} samples in shards of {SHARD:,}, batches of {options.batch}, {RANKS} ranks")
    print(f"{'window':>9} {'chunk':>6} " + " ".join(f"{name:>12}" for name in COLUMNS))
    found = {}
    for window in windows:
        for chunk in (32, 64, 128, 256, SHARD) if window < samples else (SHARD,):
            row = measured(samples, options.batch, window, chunk)
            found[f"{window}/{chunk}"] = {name: round(value, 4) for name, value in row.items()}
            print(f"{window:>9} {chunk:>6} " + " ".join(f"{row[name]:>12.4f}" for name in COLUMNS), flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
