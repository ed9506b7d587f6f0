"""Opening and reading an index of many samples, and making one: ``python benchmarks/index.py``.

Indices of 10^5, 10^6 and 10^7 samples of three members are written from numbers; each is opened in a process of its
own. Tars of tiny members are indexed by their headers. The last line is JSON.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import resource
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from mmmoe_pretrain.data.sources.index import Index, Rows, Writer
from mmmoe_pretrain.data.sources.indexing import CHECKED_AT_ONCE
from mmmoe_pretrain.data.sources.rows import read_rows

KIND = ("jpg", "txt", "json")
LOOKED_UP = 20_000


def synthetic(path: Path, samples: int, per_shard: int = 1000) -> None:
    """An index of samples with an image, a text and a JSON each."""
    names = "".join(f"{i:09d}" for i in range(per_shard)).encode()
    rows = Rows(
        names, np.arange(1, per_shard + 1) * 9, (KIND,), np.zeros(per_shard, dtype=np.int32),
        512 + 1024 * np.arange(3 * per_shard), np.full(3 * per_shard, 400),
    )  # fmt: skip
    with Writer(path) as writer:
        for shard in range(samples // per_shard):
            writer.add(f"{shard:06d}.tar", "1", 1024 * 3 * per_shard + 10240, rows)


def memory(field: str) -> float:
    """MB of this process: RssAnon, RssFile."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def opened(path: str, results: Any) -> None:
    """What opening the index and looking samples up takes."""
    anon, file, began = memory("RssAnon"), memory("RssFile"), time.perf_counter()
    index = Index(Path(path))
    if len(index) <= CHECKED_AT_ONCE[0]:
        index.check()
    seconds = time.perf_counter() - began
    after = memory("RssAnon") - anon, memory("RssFile") - file
    rng = np.random.default_rng(0)
    near = rng.integers(0, len(index), LOOKED_UP // 1000)[:, None] + np.arange(1000)
    timings = []
    for places in (np.minimum(near, len(index) - 1).ravel(), rng.integers(0, len(index), LOOKED_UP)):
        began = time.perf_counter()
        for i in places.tolist():
            index.places(i), index.key(i)
        timings.append(1e6 * (time.perf_counter() - began) / LOOKED_UP)
    results.put({
        "samples": len(index), "bytes_a_sample": round(Path(path).stat().st_size / len(index), 1),
        "open_seconds": round(seconds, 3), "anon_mb": round(after[0], 1), "file_mb": round(after[1], 1),
        "anon_mb_after_reads": round(memory("RssAnon") - anon, 1),
        "file_mb_after_reads": round(memory("RssFile") - file, 1),
        "us_a_sample_in_order": round(timings[0], 1), "us_a_sample_at_random": round(timings[1], 1),
    })  # fmt: skip


def walked(folder: Path, samples: int) -> float:
    """CPU seconds a million samples of two members to index a tar by its headers."""
    path = folder / "x.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for i in range(samples):
            for extension in ("txt", "cls"):
                info = tarfile.TarInfo(f"{i:09d}.{extension}")
                info.size = 5
                tar.addfile(info, io.BytesIO(b"hello"))
    began = time.process_time()
    read_rows(str(path))
    return (time.process_time() - began) * 1e6 / samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, nargs="+", default=[10**5, 10**6, 10**7])
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    found: dict[str, Any] = {"indices": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for samples in arguments.samples:
            began = time.process_time()
            synthetic(folder / "index", samples)
            written, results = time.process_time() - began, context.Queue()
            process = context.Process(target=opened, args=(str(folder / "index"), results))
            process.start()
            found["indices"].append({**results.get(timeout=600), "write_cpu_seconds": round(written, 2)})
            process.join()
            print(found["indices"][-1])
        found["header_walk_cpu_seconds_a_million"] = round(walked(folder, 20_000), 1)
    found["builder_peak_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
