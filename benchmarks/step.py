"""Tokens a second of whole training steps: the mixture beside the dense model of equal active FLOPs.

One process, the demo's model, random samples of the demo's sizes; both models step in turn in one
run, medians over repeats. It measures compute (forward, backward, optimizer), not data loading.
Prints a table and, as its last line, one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, its folder alone is there

from launch.compare import dense_overrides
from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.batch import Batch, Sample, SampleMeta
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.pack import PackSettings, pack
from mmmoe_pretrain.engines.apply import build_engine
from mmmoe_pretrain.engines.base import Engine
from mmmoe_pretrain.parallel.mesh import build_groups
from mmmoe_pretrain.parallel.runtime import process_group

VOCAB_SIZE, BOS, EOS = 1024, 1, 2
ROOT = Path(__file__).resolve().parents[1]


def random_batch(config: RunConfig, samples: int, seed: int) -> Batch:
    """Picture, about 1.4 s of sound and about ten pieces of text a sample, as in the demo's data."""
    rng = np.random.default_rng(seed)
    side, audio = config.modalities.image.size, config.modalities.audio
    made = [
        Sample(
            SampleMeta(f"s{i}"),
            image=rng.integers(0, 256, (3, side, side), dtype=np.uint8),
            audio=rng.normal(size=(audio.n_mels, audio.patch * int(rng.integers(10, 26)))).astype(np.float32),
            text=rng.integers(4, VOCAB_SIZE, int(rng.integers(4, 17))),
        )
        for i in range(samples)
    ]
    return pack(made, PackSettings(config.modalities, BOS, EOS, config.objectives.captioning, config.seed))


def seconds_a_step(engine: Engine, batch: Batch) -> float:
    began = time.perf_counter()
    engine.step([batch], 1e-4)
    return time.perf_counter() - began


def main() -> None:
    """Measure at one or several microbatch sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one size, few repeats")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "demo.yaml")
    args = parser.parse_args()
    sizes, repeats = ([16], 3) if args.quick else ([16, 64, 128], 9)
    torch.set_num_threads(1)
    mixture = run_config.load(args.config)
    configs = {"mixture": mixture, "dense": run_config.load(args.config, dense_overrides(mixture))}
    print(f"{'samples':>8}{'tokens':>8}{'mixture tok/s':>16}{'dense tok/s':>14}{'ratio':>8}")
    ratios = []
    with process_group(timeout_minutes=5) as device:
        groups = build_groups(mixture.parallel, mixture.moe.num_experts)
        engines = {name: build_engine(config, VOCAB_SIZE, groups, device) for name, config in configs.items()}
        for size in sizes:
            batch = random_batch(mixture, size, seed=size)
            times: dict[str, list[float]] = {name: [] for name in engines}
            for _ in range(repeats + 1):  # the first warms up
                for name, engine in engines.items():
                    times[name].append(seconds_a_step(engine, batch))
            median = {name: statistics.median(values[1:]) for name, values in times.items()}
            tokens = sum(rows.shape[0] for rows in batch.rows)
            ratios.append(median["dense"] / median["mixture"])
            print(f"{size:>8}{tokens:>8}{tokens / median['mixture']:>16,.0f}{tokens / median['dense']:>14,.0f}"
                  f"{ratios[-1]:>8.2f}")  # fmt: skip
    print(json.dumps({"vs_dense": round(statistics.geometric_mean(ratios), 3), "device": device.type}))


if __name__ == "__main__":
    main()
