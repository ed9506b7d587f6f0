"""Seconds that a save stops training, and the rate at which it writes, beside torch.save and the disk itself.

A state as a model has it (large expert weights, matrices, many small vectors; fp32 weights and Adam's two
moments) is cut over forked gloo ranks. In turns that rotate, in the same processes and on the same disk: the copy
to host memory, by itself and in a thread beside matrix products; dd of as many bytes (one dd a rank,
conv=fdatasync); an asynchronous save, with matrix products between it and the wait for its copy, in place of the
forward and backward passes before an update, and until it is committed; a synchronous save, the same code; and
torch.save of each rank's part to a file of its own, synced. Every file is deleted before the next turn. Medians
over repeats, of the slowest rank; a first round warms up.

The passes between are ``PASSES`` times as long as the copy by itself. Those of a model are longer: they take six
operations a parameter and token, and the copy 12 bytes a parameter.

Legend. captured: seconds in ``save``. waited: in ``wait_for_copy``. stopped: both. slowed: seconds that products
lost while a copy ran beside them. whole: until the checkpoint is committed. products: their rate from the end of the
copy until then, over that alone.

Prints a table and, as its last line, one JSON object, of the worst number of ranks: ``blocking_vs_sync``, stopped
by an asynchronous save over a synchronous one whole (lower is better; the aim is at most 0.05); ``cost_vs_sync``, the
same of stopped and slowed together (lower is better); ``copy_vs_sync``, the same of the copy by itself, as long as a
save would stop without passes beside its copy; ``vs_disk``, bytes a second of the synchronous save, copying, hashing
and committing included, over dd's (higher is better; the aim is at least 0.7); ``vs_torch_save``, stopped by an
asynchronous save over torch.save (lower is better); ``sync_vs_torch_save``, a synchronous save whole over torch.save
(lower is better); and ``points``, what is behind.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, its folder alone is there

from benchmarks.common.forked import on_ranks, over_ranks, slowest_rank
from mmmoe_pretrain.checkpoint.folders import Retention
from mmmoe_pretrain.checkpoint.saver import Saver, SaveReport
from mmmoe_pretrain.checkpoint.staging import Staging
from mmmoe_pretrain.checkpoint.state import ShardedState, ShardedTensor, model_key, optimizer_key
from mmmoe_pretrain.parallel.mesh import build_host_groups
from mmmoe_pretrain.parallel.runtime import process_group

RANKS, TIMEOUT = (1, 2), 1800.0  # seconds for all repeats of a number of ranks
BLOCK = 16 << 20  # bytes that dd writes at once
SHAPES = ((16, 512, 512), *[(512, 512)] * 4, *[(512,)] * 8)  # of a layer: experts, matrices, vectors; 21 MB
PRODUCT = 384  # rows and columns of a matrix product beside a save
ALONE = 0.5  # seconds of products by themselves
PASSES = 5.0  # seconds of products between a save and the next update, by those of the copy by itself


@dataclass(frozen=True)
class Point:
    """Of one number of ranks; medians, seconds."""

    ranks: int
    nbytes: int  # of the checkpoint's tensors, all ranks
    copy: float  # by itself
    slowed: float  # products beside a copy
    dd: float
    captured: float  # by an asynchronous save
    waited: float  # for its copy
    whole: float  # an asynchronous save, until it is committed
    sync: float
    torch_save: float
    products: float

    @property
    def stopped(self) -> float:
        """Seconds that an asynchronous save stops training."""
        return self.captured + self.waited


def state_of(nbytes: int, rank: int, ranks: int) -> ShardedState:
    """Layers of together ``nbytes`` or up to a layer more; every parameter is cut over the ranks."""
    layer = 3 * 4 * sum(torch.Size(shape).numel() for shape in SHAPES)
    state = {}
    for index in range(-(-nbytes // layer)):
        for place, shape in enumerate(SHAPES):
            rows = shape[0] // ranks
            offset = (rank * rows, *[0] * (len(shape) - 1))
            name = f"layers.{index}.{place}"
            for key in (model_key(name), optimizer_key(name, "exp_avg"), optimizer_key(name, "exp_avg_sq")):
                state[key] = ShardedTensor(shape, {offset: torch.rand(rows, *shape[1:])})
    return state


def bytes_of(state: ShardedState) -> int:
    """Of this rank's tensors."""
    return sum(piece.nbytes for tensor in state.values() for piece in tensor.pieces.values())


class Turns:
    """What takes turns on one rank. Each returns seconds, and leaves no file."""

    def __init__(self, folder: Path, state: ShardedState) -> None:
        self.rank = dist.get_rank()
        self.folder, self.state, self.nbytes = folder, state, bytes_of(state)
        group, keep = build_host_groups(timeout_minutes=5).storage, Retention(last=1, every=0, best=0)
        self.later = Saver(folder / "later", group, keep)
        self.at_once = Saver(folder / "at_once", group, keep, asynchronous=False)
        self.matrix = torch.rand(PRODUCT, PRODUCT)
        self.tensors = [piece for tensor in state.values() for piece in tensor.pieces.values()]
        self.staging = Staging(self.tensors)
        self.passes = 0.0  # seconds

    def copy(self) -> tuple[float, float]:
        """Seconds of the copy by itself, and those that products lose beside it."""
        steady = [True] * len(self.tensors)
        copying = self.staging.start(self.tensors, steady)
        began = settled()
        copying.run()
        seconds = time.perf_counter() - began
        self.passes = PASSES * slowest_rank(seconds)
        alone = self._products(lambda seconds: seconds >= ALONE)
        thread = threading.Thread(target=self.staging.start(self.tensors, steady).run)
        began, done = settled(), 0
        thread.start()
        while thread.is_alive():
            torch.mm(self.matrix, self.matrix)
            done += 1
        return seconds, time.perf_counter() - began - done / alone

    def dd(self) -> float:
        path = self.folder / f"dd_{self.rank}"
        seconds = timed(lambda: write_zeros(path, self.nbytes))
        path.unlink()
        return seconds

    def torch_save(self) -> float:
        path = self.folder / f"torch_{self.rank}"

        def work() -> None:
            tensors = {key: list(tensor.pieces.values()) for key, tensor in self.state.items()}
            with path.open("wb") as file:
                torch.save(tensors, file)
                file.flush()
                os.fsync(file.fileno())

        seconds = timed(work)
        path.unlink()
        return seconds

    def synchronous(self) -> float:
        began = settled()
        self.at_once.save(1, self.state, {})
        seconds = time.perf_counter() - began
        succeeded(self.at_once)
        self._delete("at_once")
        return seconds

    def asynchronous(self) -> tuple[float, float, float, float]:
        """Seconds captured, waited and whole, and the rate of products beside it over that alone."""
        alone = self._products(lambda seconds: seconds >= ALONE)
        begin = settled()
        self.later.save(1, self.state, {})
        captured = time.perf_counter() - begin
        for _ in range(round(alone * self.passes)):
            torch.mm(self.matrix, self.matrix)
        begin = time.perf_counter()
        self.later.wait_for_copy()
        waited = time.perf_counter() - begin
        reports: list[SaveReport] = []

        def committed(_: float) -> bool:
            reports.extend(self.later.poll())
            return bool(reports)

        beside = self._products(committed)
        succeeded(self.later, reports)
        self._delete("later")
        in_save = reports[0].seconds_blocked - reports[0].seconds_before_update
        return captured, waited, in_save + reports[0].seconds_writing, beside / alone

    def _products(self, enough: Callable[[float], bool]) -> float:
        """Their rate until it is enough."""
        began, count = time.perf_counter(), 0
        while True:
            torch.mm(self.matrix, self.matrix)
            count += 1
            seconds = time.perf_counter() - began
            if enough(seconds):
                return count / seconds

    def _delete(self, name: str) -> None:
        dist.barrier()
        if self.rank == 0:
            shutil.rmtree(self.folder / name)


def settled() -> float:
    """The time from which all ranks work, when nothing is left to write from before."""
    os.sync()
    dist.barrier()
    return time.perf_counter()


def timed(work: Callable[[], None]) -> float:
    began = settled()
    work()
    return time.perf_counter() - began


def succeeded(saver: Saver, reports: list[SaveReport] | None = None) -> None:
    """Raises RuntimeError for what a save reports, that it failed for example."""
    for report in saver.poll() if reports is None else reports:
        if report.error or report.warning:
            raise RuntimeError(report.error or report.warning)


def write_zeros(path: Path, nbytes: int) -> None:
    """One file, in order and synced, by dd if there is one."""
    if shutil.which("dd"):
        command = ["dd", "if=/dev/zero", f"of={path}", f"bs={BLOCK}", f"count={nbytes}", "iflag=count_bytes",
                   "conv=fdatasync", "status=none"]  # fmt: skip
        subprocess.run(command, check=True)
        return
    zeros = memoryview(bytes(BLOCK))
    with path.open("wb", buffering=0) as file:
        for start in range(0, nbytes, BLOCK):
            file.write(zeros[: nbytes - start])
        os.fdatasync(file.fileno())


def measure(nbytes: int, repeats: int, folder: Path) -> Point:
    """On every rank."""
    rows = []
    with process_group(timeout_minutes=10):
        turns = Turns(folder, state_of(nbytes, dist.get_rank(), dist.get_world_size()))
        work = [
            turns.copy,
            lambda: (turns.dd(),),
            turns.asynchronous,
            lambda: (turns.synchronous(),),
            lambda: (turns.torch_save(),),
        ]
        for turn in range(1 + repeats):
            seconds: dict[int, tuple[float, ...]] = {}
            for place in range(len(work)):  # rotated: a disk and the page cache remember the turn before
                index = (place + turn) % len(work)
                seconds[index] = work[index]()
            rows.append([slowest_rank(value) for index in range(len(work)) for value in seconds[index]])
        total = int(over_ranks(turns.nbytes))
        ranks = dist.get_world_size()
    copy, slowed, dd, *asynchronous, sync, torch_save = map(statistics.median, zip(*rows[1:], strict=True))
    captured, waited, whole, products = asynchronous
    return Point(ranks, total, copy, slowed, dd, captured, waited, whole, sync, torch_save, products)


def summary(points: list[Point]) -> dict[str, object]:
    """Of the worst point each."""
    return {
        "blocking_vs_sync": round(max(p.stopped / p.sync for p in points), 4),
        "cost_vs_sync": round(max((p.stopped + p.slowed) / p.sync for p in points), 4),
        "copy_vs_sync": round(max(p.copy / p.sync for p in points), 4),
        "vs_disk": round(min(p.dd / p.sync for p in points), 3),
        "vs_torch_save": round(max(p.stopped / p.torch_save for p in points), 4),
        "sync_vs_torch_save": round(max(p.sync / p.torch_save for p in points), 3),
        "points": [{k: round(v, 4) for k, v in dataclasses.asdict(p).items()} for p in points],
    }


def print_points(points: list[Point]) -> None:
    print(f"{'ranks':>5} {'MB':>6}  {'':<18}{'seconds':>9}{'MB/s':>8}{'of dd':>8}{'stopped s':>11}"
          f"{'captured':>10}{'waited':>8}{'slowed':>8}{'products':>10}")  # fmt: skip
    for p in points:
        rows = [("dd", p.dd, p.dd), ("copy alone", p.copy, p.copy), ("asynchronous save", p.whole, p.stopped),
                ("synchronous save", p.sync, p.sync), ("torch.save", p.torch_save, p.torch_save)]  # fmt: skip
        for name, whole, stopped in rows:
            columns = f"{stopped:>11.3f}" if name != "dd" else ""
            if whole is p.whole:
                columns += f"{p.captured:>10.3f}{p.waited:>8.3f}{p.slowed:>8.3f}{p.products:>10.2f}"
            print(f"{p.ranks:>5} {p.nbytes / 1e6:>6.0f}  {name:<18}{whole:>9.3f}{p.nbytes / 1e6 / whole:>8.0f}"
                  f"{p.dd / whole:>8.2f}{columns}")  # fmt: skip


def main() -> None:
    """Measure on one and two ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the bytes, few repeats")
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk to measure (default: here)")
    args = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the copy is of host memory
    torch.set_num_threads(1)
    nbytes, repeats = (10**8, 3) if args.quick else (10**9, 5)
    points = []
    for ranks in RANKS:
        with tempfile.TemporaryDirectory(prefix=".checkpoint-benchmark-", dir=args.folder) as folder:
            points.append(on_ranks(ranks, measure, nbytes, repeats, Path(folder), timeout=TIMEOUT))
    print_points(points)
    print(json.dumps(summary(points)))


if __name__ == "__main__":
    main()
