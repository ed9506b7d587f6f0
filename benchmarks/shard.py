"""What `mmmoe-data shard` takes, beside img2dataset and tar, on the same files.

Photographs of 1 megapixel (JPEG of quality 90), each with a text, on the local disk: of 128 different ones, hard
links make the others. Each command runs alone with one process that works, they take turns, and figures are medians
over repeats. Starting a process is excluded: a rate is (more samples - fewer samples) / (difference of their CPU
seconds).

``encode``: to at most 256 pixels as JPEG of quality 95. img2dataset reads ``file://`` URLs and does the same work, by
``--resize_mode keep_ratio_largest --resize_only_if_bigger --encode_quality 95``, with its users' ``--thread_count
64`` and its defaults else, in an environment of its own under the work folder; where that cannot be made, it is named
with its error. ``copy``: the bytes stay as they are, and each photograph is decoded once to check it; tar copies the
same files and their texts unread. ``text``: samples of a text alone, which are synthetic and small, by two workers.

Prints a table and, as its last line, one JSON object. ``NAME_samples`` and ``NAME_mb``: samples and MB of input a
CPU-second, of one core. ``vs_img2dataset``, ``vs_tar``: our samples a CPU-second over theirs (higher is better);
``..._clock``: over the clock, which only a machine without other work tells. ``output_vs_img2dataset``: bytes of our
shards over those of its shards. ``memory``: peak MB of the command, of each worker and of Python's resource tracker,
by the number of samples (``text``; 10^6 without --quick); ``memory_growth``: MB of the largest process at the most
samples over that at the fewest. ``failed``: peers that could not be run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, its folder alone is there

from benchmarks.common.environments import environment_of
from benchmarks.loader import model_of_cpu
from benchmarks.loading.shards import photographs
from benchmarks.sharding.measured import Used, measure

DIFFERENT = 128  # photographs
SIZE, QUALITY, THREADS = 256, 95, 64
ENCODE = ("--image-size", str(SIZE), "--image-format", "jpeg", "--image-quality", str(QUALITY))


@dataclass
class Contender:
    """A command that is run on fewer and on more samples."""

    name: str
    kind: str
    fewer: list[Used] = field(default_factory=list)
    more: list[Used] = field(default_factory=list)
    bytes: int = 0  # of its tars, of more samples

    def rate(self, samples: int, per: str = "cpu") -> float:
        """Median samples a second of ``per``: cpu or seconds; ``samples``: how many more."""
        pairs = zip(self.fewer, self.more, strict=True)
        return statistics.median(samples / (getattr(more, per) - getattr(fewer, per)) for fewer, more in pairs)


class Files:
    """The folder of photographs, texts and lists of them, by how many samples they name."""

    def __init__(self, work: Path) -> None:
        self.work, self.folder = work, work / "photographs"

    def make(self, most: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        first = [self.folder / f"{i:06d}.jpg" for i in range(DIFFERENT)]
        if not first[-1].is_file():
            for path, data in zip(first, photographs(self.work, DIFFERENT, (1,)), strict=True):
                path.write_bytes(data)
        for i in range(most):
            if not (path := self.folder / f"{i:06d}.jpg").exists():
                os.link(first[i % DIFFERENT], path)
            path.with_suffix(".txt").write_text(_text(i))

    def rows(self, count: int) -> list[tuple[str, str]]:
        return [(f"{i:06d}.jpg", _text(i)) for i in range(count)]

    def megabytes(self, count: int) -> float:
        return sum((self.folder / name).stat().st_size for name, _ in self.rows(count)) / 1e6

    def command(self, name: str, kind: str, count: int, out: Path) -> list[str]:
        """What makes shards, or a tar, of ``count`` samples."""
        if name == "tar":
            names = self.work / f"names_{count}.txt"
            lines = [line for image, _ in self.rows(count) for line in (image, image.replace(".jpg", ".txt"))]
            names.write_text("\n".join(lines))
            return ["tar", "-cf", str(out), "-C", str(self.folder), "-T", str(names)]
        if name == "img2dataset":
            table = self.work / f"urls_{count}.csv"
            lines = [f"file://{self.folder / image},{text}" for image, text in self.rows(count)]
            table.write_text("\n".join(["url,caption", *lines]) + "\n")
            return _img2dataset(environment_of(name, self.work), table, out)
        manifest = self.folder / f"{kind}_{count}.jsonl"
        rows = ({"key": image[:6], "text": text, "image": image} for image, text in self.rows(count))
        manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return ours(manifest, out, 1, *(ENCODE if kind == "encode" else ()))


def ours(manifest: Path, out: Path, workers: int, *options: str) -> list[str]:
    command = [sys.executable, "-m", "mmmoe_pretrain.data_prep.cli", "shard", str(manifest), "--out", str(out)]
    return [*command, "--workers", str(workers), *options]


def _img2dataset(python: str, table: Path, out: Path) -> list[str]:
    options = {
        "url_list": table, "input_format": "csv", "url_col": "url", "caption_col": "caption",
        "output_format": "webdataset", "output_folder": out, "processes_count": 1, "thread_count": THREADS,
        "image_size": SIZE, "resize_mode": "keep_ratio_largest", "resize_only_if_bigger": True,
        "encode_quality": QUALITY, "enable_wandb": False,
    }  # fmt: skip
    return [str(Path(python).with_name("img2dataset")), *(f"--{name}={value}" for name, value in options.items())]


def _text(i: int) -> str:
    return f"A photograph of the benchmark with the number {i} and a few more words."


def contest(files: Files, kind: str, names: list[str], counts: tuple[int, int], repeats: int) -> dict[str, Contender]:
    """The contenders that ran, in turns; the others are printed with their errors."""
    running = {name: Contender(name, kind) for name in names}
    out, log = files.work / "out", files.work / "log.txt"
    for turn in range(repeats):
        order = list(running)
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            for count, found in zip(counts, (running[name].fewer, running[name].more), strict=True):
                remove(out)
                try:
                    found.append(measure(files.command(name, kind, count, out), log))
                    running[name].bytes = sum(
                        path.stat().st_size for path in (out, *out.rglob("*.tar")) if path.is_file()
                    )
                except (RuntimeError, OSError, subprocess.SubprocessError) as error:
                    if name == "ours":
                        raise
                    print(f"{name} cannot be run on {kind}: {error}", flush=True)
                    del running[name]
                    break
    remove(out)
    for name, contender in running.items():
        rates = [contender.rate(counts[1] - counts[0], per) for per in ("cpu", "seconds")]
        print(f"{kind:7} {name:12} {rates[0]:8.1f} samples/CPU-s, {rates[1]:.1f} a second", flush=True)
    return running


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def texts(work: Path, counts: list[int]) -> dict[int, Used]:
    """What samples of a text alone take, by their number; two workers."""
    found = {}
    for count in counts:
        manifest, out = work / f"texts_{count}.jsonl", work / "out"
        with manifest.open("w") as file:
            file.writelines(json.dumps({"key": f"{i:08d}", "text": _text(i)}) + "\n" for i in range(count))
        remove(out)
        used = measure(ours(manifest, out, 2), work / "log.txt")
        remove(out)
        manifest.unlink()
        found[count] = used
        peaks = ", ".join(f"{peak:.0f}" for peak in used.peaks)
        print(
            f"text    {count:9,} samples: {used.cpu:.0f} CPU-s, {used.seconds:.0f} s; peaks of {peaks} MB", flush=True
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=Path("data/bench_shard"), help="folder for files and environments"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="fewer samples and repeats, without img2dataset")
    options = parser.parse_args()
    counts, repeats = ((32, 160), 2) if options.quick else ((256, 1024), options.repeats)
    files = Files(options.work.resolve())
    files.make(counts[1])
    more = counts[1] - counts[0]
    peers = [] if options.quick else ["img2dataset"]
    found = {
        "encode": contest(files, "encode", ["ours", *peers], counts, repeats),
        "copy": contest(files, "copy", ["ours", "tar"], counts, repeats),
    }
    used = texts(files.work, [10**4, 10**5] if options.quick else [10**4, 10**5, 10**6])
    few, many = min(used), max(used)

    def ratio(kind: str, name: str, per: str = "cpu") -> float | None:
        its = found[kind]
        return round(its["ours"].rate(more, per) / its[name].rate(more, per), 3) if name in its else None

    a_sample = (files.megabytes(counts[1]) - files.megabytes(counts[0])) / more
    result: dict[str, Any] = {
        "vs_img2dataset": ratio("encode", "img2dataset"),
        "vs_img2dataset_clock": ratio("encode", "img2dataset", "seconds"),
        "vs_tar": ratio("copy", "tar"),
        "output_vs_img2dataset": round(encode["ours"].bytes / encode["img2dataset"].bytes, 3)
        if "img2dataset" in (encode := found["encode"])
        else None,
    }
    for kind, its in found.items():
        rate = its["ours"].rate(more)
        result |= {f"{kind}_samples": round(rate, 1), f"{kind}_mb": round(rate * a_sample, 1)}
    result |= {
        "text_samples": round((many - few) / (used[many].cpu - used[few].cpu)),
        "memory": {str(count): [round(peak) for peak in its.peaks] for count, its in used.items()},
        "memory_growth": round(max(used[many].peaks) - max(used[few].peaks)),
        "failed": [name for name in peers if name not in found["encode"]],
        "cpu": model_of_cpu(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
