"""Kill ranks of a run at random until it ends, and compare it with an uninterrupted one: `make chaos`.

python -m tests.chaos.run --kills 50 --steps 200 --ranks 4 --seed 0 [--streams] [--remote]

A supervisor forks the ranks, as torchrun would start them; when one dies it ends the others and starts all of them
again, and they resume from the newest checkpoint. The last line is one JSON object: kills, lost and repeated samples,
partial checkpoints that were loaded, and whether all logged losses equal those of the undisturbed run.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmmoe_pretrain.checkpoint import store
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.train.loop import train
from tests.chaos import ledger
from tests.chaos.kills import Kill
from tests.data.servers import every, http_server
from tests.distributed import free_port
from tests.support import things, tiny_config, write_shards, write_tokenizer

SECONDS_A_START = 120.0  # after which ranks that neither train nor end count as a hang
SHARDS = 8  # that are read by commands, or from a server
GRACE = 5.0  # seconds between SIGTERM and SIGKILL


@dataclass
class Report:
    kills: int = 0
    starts: int = 0
    lost: int = 0
    repeated: int = 0
    partial_accepted: int = 0
    loss_equal: bool = False

    @property
    def passed(self) -> bool:
        return self.loss_equal and not (self.lost or self.repeated or self.partial_accepted)


def chaos(
    folder: Path, kills: int, steps: int, ranks: int, seed: int, streams: bool = False, remote: bool = False
) -> Report:
    """Train a run undisturbed and a run that is killed ``kills`` times; compare. ``streams``: half of the samples
    come from commands. ``remote``: other shards lie behind an HTTP server of which one request in ten fails, and a
    cache that is lost before every second start."""
    rows = things(48)
    write_shards(folder / "train", rows)
    for shard in range(SHARDS):
        write_shards(folder / f"shard-{shard}", rows[shard::SHARDS])
    write_tokenizer(folder / "tokens.model")
    with http_server(folder) if remote else nullcontext() as server:
        url = ""
        if server is not None:
            server.faults, url = every(10, "error", "reset", "short"), server.url
        calm, disturbed = (config_of(folder, name, steps, streams, url) for name in ("calm", "disturbed"))
        assert start(calm, ranks, None) == "done"
        report = kill_until_done(disturbed, kills, ranks, seed)
        assert server is None or {*server.failed} == {"error", "reset", "short"}, server.failed
    for config in (calm, disturbed) if streams else ():
        assert all(lane[0] > 0 for lanes in states_saved(config).values() for lane in lanes), states_saved(config)
    found, wanted = (ledger.history(ledger_of(config)) for config in (disturbed, calm))
    report.lost, report.repeated = ledger.compare(found, wanted)
    report.loss_equal = logged(disturbed) == logged(calm) and len(logged(calm)) == steps
    return report


def kill_until_done(config: RunConfig, kills: int, ranks: int, seed: int) -> Report:
    report, rng, steps = Report(), random.Random(seed), config.train.steps
    while True:
        report.starts += 1
        kill = None
        if report.kills < kills:
            left = steps - steps_saved(config)
            kill = Kill.draw(rng, ranks, max(1, left // (kills - report.kills)), left)
        if config.data.cache and report.starts % 2:
            shutil.rmtree(config.data.cache.folder, ignore_errors=True)
        end = start(config, ranks, kill)
        report.kills += end == "killed"
        report.partial_accepted += count_partial(config)
        print(f"start {report.starts}: {end}, {kill}; saved {steps_saved(config)}", flush=True)
        if end == "done":
            return report


def config_of(folder: Path, name: str, steps: int, streams: bool, url: str) -> RunConfig:
    """Two ranks of experts beside data-parallel replicas; saves often, logs every step. ``url``: of remote shards."""
    shards = f"shard-{{0..{SHARDS - 1}}}/00000.tar"
    sources = [f"{url}/{shards}" if url else str(folder / "train")]
    if streams:
        sources.append(f"pipe:cat {folder}/{shards}")
    return tiny_config(
        folder,
        name=name,
        data={
            "train": [{"path": source, "stream_window": 2} for source in sources],
            "tokenizer": str(folder / "tokens.model"),
            "num_workers": 1,
            "cache": {"folder": str(folder / f"{name}.cache"), "block_mb": 1} if url else None,
        },
        parallel={"expert_parallel_size": 2, "timeout_minutes": 1},
        train={"steps": steps, "global_batch_size": 16, "num_microbatches": 2, "log_every": 1},
        checkpoint={"every": 3, "keep_last": 2, "keep_every": 12},
    )


def ledger_of(config: RunConfig) -> Path:
    """Beside the run's folder, which a start may clear."""
    return config.run_dir.with_name(f"{config.name}.ledger")


def start(config: RunConfig, ranks: int, kill: Kill | None) -> str:
    """One start of all ranks: "done", "killed" (by ``kill``), or an AssertionError for any other end."""
    context = multiprocessing.get_context("fork")
    folder = ledger_of(config)
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    processes = [
        context.Process(target=run_rank, args=(config, rank, ranks, port, folder, kill)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    try:
        return supervise(processes, folder, kill)
    finally:
        for process in processes:
            process.kill()
            process.join()


def run_rank(config: RunConfig, rank: int, ranks: int, port: int, folder: Path, kill: Kill | None) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                      MMMOE_CACHE=str(config.run_dir.with_name("indices")))  # fmt: skip
    torch.set_num_threads(1)
    out = os.open(folder / f"output_{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    armed = kill.arm() if kill is not None and kill.victim == rank else lambda done: None
    ledger.keep_ledger(folder, rank, armed)
    train(config)


def supervise(processes: list[Any], folder: Path, kill: Kill | None) -> str:
    deadline = time.monotonic() + SECONDS_A_START
    while True:
        codes = [process.exitcode for process in processes]
        if all(code == 0 for code in codes):
            return "done"
        if kill is not None and codes[kill.victim] == -signal.SIGKILL:
            end_others(processes, kill.politely)
            return "killed"
        failed = [i for i, code in enumerate(codes) if code not in (None, 0)]
        if failed and kill is not None:  # other ranks may notice before the supervisor does
            processes[kill.victim].join(timeout=1.0)
            if processes[kill.victim].exitcode == -signal.SIGKILL:
                continue
        assert not failed, f"ranks ended with {codes}: {tail(folder, failed[0])}"
        assert time.monotonic() < deadline, f"ranks hang: {codes}; {tail(folder, 0)}"
        time.sleep(0.02)


def end_others(processes: list[Any], politely: bool) -> None:
    if politely:
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + GRACE
        for process in processes:
            process.join(timeout=max(0.0, deadline - time.monotonic()))
    for process in processes:
        process.kill()


def steps_saved(config: RunConfig) -> int:
    latest = store.find_latest(config.checkpoint_root)
    return 0 if latest is None else latest.step


def states_saved(config: RunConfig) -> dict[str, list[list[int]]]:
    """Of the streams, in the last checkpoint."""
    latest = store.find_latest(config.checkpoint_root)
    assert latest is not None
    states = store.read_meta(latest)["streams"]
    assert states
    return states


def count_partial(config: RunConfig) -> int:
    """Checkpoints that pass for complete and are not what was written."""
    partial = 0
    for checkpoint in store.checkpoints(config.checkpoint_root):
        try:
            store.verify(checkpoint, None)
            store.read_state(checkpoint)
        except ValueError as error:
            print(f"partial: {error}", flush=True)
            partial += 1
    return partial


def logged(config: RunConfig) -> list[tuple[int, dict[str, float]]]:
    lines = (config.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [(record["step"], record["losses"]) for record in map(json.loads, lines)]


def tail(folder: Path, rank: int) -> str:
    return (folder / f"output_{rank}.txt").read_text(encoding="utf-8")[-2000:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--streams", action="store_true", help="half of the samples come from commands (pipe:)")
    parser.add_argument(
        "--remote", action="store_true", help="the shards lie behind a server of which one request in ten fails"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = chaos(Path(folder), **vars(args))
    print(json.dumps(vars(report)))
    return 0 if report.passed and report.kills >= args.kills else 1


if __name__ == "__main__":
    sys.exit(main())
