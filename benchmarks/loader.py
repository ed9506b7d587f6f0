"""Samples a CPU-second of the loader, beside webdataset, Megatron-Energon and litdata, on the same shards.

Photographs of 1 to 12 megapixels (JPEG), the same at 256 pixels, and speech of 5 to 10 s (FLAC), each with a text
(benchmarks/loading/shards.py). All do the same work: decode, shorter side to 224 and the centre, or log-mel; tokens;
batches of 64 (benchmarks/loading/peers.py, as their users run them). Each runs in a process of its own with one
worker process, and they take turns; while one is timed the others are stopped (SIGSTOP). Medians over repeats.
Energon and litdata get an environment of their own under the work folder; one that cannot be made is named with its
error.

Prints a table and, as its last line, one JSON object. ``vs_NAME``: our samples a CPU-second over theirs, on
photographs (higher is better). ``vs_webdataset_same_decoder``: over webdataset that calls our decoders.
``..._small``, ``..._audio``: on the other shards. ``scaling_2``: samples a second of two workers
over one. ``stall``: share of its time that a consumer at 90% of the measured rate waits. ``stages``: shares of the
workers' time in read, decode (texts into tokens, too), transform (resize and crop), pack and transfer.
``index_1m_seconds``, ``rss_per_million`` (MB): opening an index of a million samples. ``failed``: peers that could
not be run.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import signal
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, its folder alone is there

from benchmarks import index
from benchmarks.common.environments import environment_of
from benchmarks.loading import shards

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENTS = ("energon", "litdata")
SPARE = 0.9  # of the measured rate, for the stall


@dataclass
class Contender:
    """A process that answers with what it measured."""

    name: str
    kind: str
    workers: int
    process: subprocess.Popen[str]
    measured: list[dict[str, Any]] = field(default_factory=list)

    def ask(self, line: str) -> dict[str, Any]:
        """Continue it, let it measure, and stop it again with all its processes."""
        os.killpg(self.process.pid, signal.SIGCONT)
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.name} on {self.kind} ended; what it printed is above")
        os.killpg(self.process.pid, signal.SIGSTOP)
        return dict(json.loads(answer))

    def measure(self, batches: int) -> None:
        self.measured.append(self.ask(str(batches)))

    def rate(self, per: str) -> float:
        """Median samples a second of ``per``: cpu or seconds."""
        return statistics.median(found["samples"] / found[per] for found in self.measured)

    def end(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def start(name: str, kind: str, python: str, folder: Path, tokenizer: Path, workers: int) -> Contender:
    script = "ours" if name in ("ours", "same_decoder") else "peers"
    arguments = [str(folder), kind, str(tokenizer), str(workers)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [python, str(ROOT / f"benchmarks/loading/{script}.py"), name, *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True, env=environment,
    )  # fmt: skip
    assert process.stdout
    if process.stdout.readline().strip() != "ready":
        process.kill()
        raise RuntimeError(f"{name} on {kind} did not start; what it printed is above")
    os.killpg(process.pid, signal.SIGSTOP)
    return Contender(name, kind, workers, process)


def prepared(name: str, python: str, folder: Path) -> Path:
    """The folder that the peer reads, with its own index or chunks."""
    if name == "energon":
        if not (folder / ".nv-meta" / "dataset.yaml").is_file():
            energon = str(Path(python).parent / "energon")
            kinds = ["--split-ratio", "1,0,0", "--sample-type", "CrudeWebdataset"]
            command = [energon, "prepare", str(folder), "--non-interactive", *kinds]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return folder
    if name == "litdata":
        chunks = folder.with_name(f"{folder.name}_litdata")
        if not (chunks / "index.json").is_file():
            script = str(ROOT / "benchmarks/loading/peers.py")
            subprocess.run([python, script, "make_litdata", str(folder), str(chunks), "-", "0"], check=True,
                           stdout=subprocess.DEVNULL)  # fmt: skip
        return chunks
    return folder


def contest(
    kind: str, names: list[str], work: Path, folder: Path, repeats: int, batches: int
) -> dict[str, Contender]:
    """The contenders that ran, measured in turns; the others are printed with their errors."""
    running: dict[str, Contender] = {}
    for name in names:
        try:
            python = environment_of(name, work) if name in ENVIRONMENTS else sys.executable
            read = prepared(name, python, folder)
            running[name] = start(name, kind, python, read, work / "tokenizer.model", 1)
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            print(f"{name} cannot be run on {kind}: {error}", flush=True)
    try:
        for turn in range(repeats):
            order = list(running.values())
            for contender in order[turn % len(order) :] + order[: turn % len(order)]:
                contender.measure(batches)
    finally:
        for contender in running.values():
            contender.end()
    for name, contender in running.items():
        print(
            f"{kind:6} {name:13} {contender.rate('cpu'):8.1f} samples/CPU-s, {contender.rate('seconds'):.1f} a second"
        )
    return running


def scaling_and_stall(work: Path, folder: Path, kind: str, repeats: int, batches: int) -> dict[str, Any]:
    """One and two workers in turns, and a consumer at 90% of the rate of one."""
    tokenizer = work / "tokenizer.model"
    one, two = (start("ours", kind, sys.executable, folder, tokenizer, workers) for workers in (1, 2))
    try:
        for _ in range(repeats):
            one.measure(batches)
            two.measure(batches)
        pace = one.measured[0]["samples"] / batches / (SPARE * one.rate("seconds"))
        paced = [one.ask(f"{pace} {batches}") for _ in range(repeats)]
        stages = one.measured[-1]["stages"]
    finally:
        one.end()
        two.end()
    total = sum(stages.values()) or 1.0
    return {
        "scaling_2": round(two.rate("seconds") / one.rate("seconds"), 3),
        "stall": round(statistics.median(found["wait"] / found["seconds"] for found in paced), 4),
        "stages": {name: round(seconds / total, 3) for name, seconds in stages.items()},
    }


def index_of_a_million(work: Path) -> dict[str, float]:
    """Opening it in a fresh process, every row checked; and that process's own memory after 40,000 look-ups."""
    context = multiprocessing.get_context("spawn")
    index.synthetic(work / "index_1m", 10**6)
    results = context.Queue()
    process = context.Process(target=index.opened, args=(str(work / "index_1m"), results))
    process.start()
    found = results.get(timeout=600)
    process.join()
    memory = found["anon_mb_after_reads"] + found["file_mb_after_reads"]
    return {"index_1m_seconds": found["open_seconds"], "rss_per_million": round(memory, 1)}


def model_of_cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=Path("data/bench_loader"), help="folder for shards and environments"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--quick", action="store_true", help="fewer samples and repeats, without environments of peers"
    )
    options = parser.parse_args()
    repeats = 2 if options.quick else options.repeats
    counts = {"photo": 64, "small": 128, "audio": 64} if options.quick else {"photo": 210, "small": 256, "audio": 256}
    work = options.work.resolve()
    shards.make(work, counts)
    folders = {kind: work / f"{kind}_{count}" for kind, count in counts.items()}
    peers = ["webdataset", "same_decoder", *([] if options.quick else ENVIRONMENTS)]
    photo = contest("photo", ["ours", *peers], work, folders["photo"], repeats, 2)
    small = contest("small", ["ours", "webdataset", "same_decoder"], work, folders["small"], repeats, 10)
    audio = contest("audio", ["ours", "webdataset", "same_decoder"], work, folders["audio"], repeats, 8)

    def ratio(found: dict[str, Contender], name: str) -> float | None:
        return round(found["ours"].rate("cpu") / found[name].rate("cpu"), 3) if name in found else None

    result = {
        "vs_webdataset": ratio(photo, "webdataset"),
        "vs_webdataset_same_decoder": ratio(photo, "same_decoder"),
        "vs_webdataset_same_decoder_small": ratio(small, "same_decoder"),
        "vs_webdataset_same_decoder_audio": ratio(audio, "same_decoder"),
        "vs_webdataset_small": ratio(small, "webdataset"),
        "vs_webdataset_audio": ratio(audio, "webdataset"),
        "vs_energon": ratio(photo, "energon"),
        "vs_litdata": ratio(photo, "litdata"),
        **scaling_and_stall(work, folders["photo"], "photo", repeats, 2),
        **index_of_a_million(work),
        "failed": [name for name in peers if name not in photo],
        "cpu": model_of_cpu(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
