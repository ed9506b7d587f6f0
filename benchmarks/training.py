"""A run as a user starts it on one device: loader, training, checkpoints, resume, held-out scores.

The small corpus of the repository (images, speech and texts) is sharded; ``mmmoe train`` runs to the half of its
steps, is started again and resumes; then ``mmmoe evaluate`` scores it. The larger the model, the less the loader
matters: on a GPU this one has 0.3 billion active parameters; on a CPU it is tiny, and its figures say nothing about a
GPU.

Prints a table and, as its last line, one JSON object: ``tokens_per_second``, ``mfu`` and ``data_stall`` (the share of
its time that training waits for data), medians of the records after the first; ``peak_memory`` (bytes) and
``planned`` of the last record; ``save_seconds``, for which a save stops training (median); ``resumed_at``; and the
number of ``scores``.

    python benchmarks/training.py                 two minutes on one GPU
    python benchmarks/training.py --device cpu    a minute
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {"mmmoe": "mmmoe_pretrain.cli", "mmmoe-data": "mmmoe_pretrain.data_prep.cli"}
MODELS: dict[str, dict[str, Any]] = {
    "cuda": {
        "model": {"hidden_size": 1024, "num_layers": 16, "num_heads": 16, "embedding_size": 512},
        "moe": {"every": 2, "num_experts": 16, "experts_per_token": 2, "expert_hidden_size": 2048},
        "train": {"steps": 120, "global_batch_size": 512, "precision": "bf16", "log_every": 10},
    },
    "cpu": {
        "model": {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "embedding_size": 32},
        "moe": {"every": 2, "num_experts": 4, "experts_per_token": 2, "expert_hidden_size": 64},
        "train": {"steps": 8, "global_batch_size": 32, "log_every": 2},
    },
}


def run(work: Path, device: str, command: str, *arguments: str | Path) -> str:
    """What a command of ours printed. Raises RuntimeError with it where the command failed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", COMMANDS[command], *map(str, arguments)], cwd=work, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{command} {arguments[0]} ended with {done.returncode}:\n{done.stdout}")
    return done.stdout


def prepare(work: Path, device: str) -> Path:
    """Shards, a tokenizer and a config; the config."""
    run(work, device, "mmmoe-data", "corpus", "mini", "--out", "mini")
    run(work, device, "mmmoe-data", "shard", "mini", "--out", "shards", "--image-size", "96", "--audio-rate", "16000")
    run(work, device, "mmmoe-data", "tokenizer", "shards", "--vocab-size", "1024", "--out", "tokens.model")
    sections = MODELS[device]
    steps = sections["train"]["steps"]
    config = {
        "name": "run",
        "data": {"train": [{"path": "shards/train"}], "tokenizer": "tokens.model"},
        "modalities": {
            "image": {"kind": "image", "size": 96, "patch": 16},
            "audio": {"kind": "audio", "sample_rate": 16000, "max_seconds": 4.0},
            "text": {"kind": "text", "max_tokens": 48},
        },
        "objectives": {
            "pairs": {"kind": "contrastive", "pairs": {"image-text": 1.0, "audio-text": 1.0}},
            "captions": {"kind": "next_token", "parts": [["image", "audio"], "text"], "fraction": 0.25},
        },
        "optimizer": {"learning_rate": 3e-4, "warmup_steps": steps // 4, "decay_steps": steps},
        "checkpoint": {"every": steps // 4},
        "evaluate": {"test": ["shards/test"]},
        **sections,
    }  # fmt: skip
    path = work / "run.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def measure(work: Path, device: str) -> dict[str, Any]:
    """Of the whole run in the folder ``work``."""
    config, half = prepare(work, device), MODELS[device]["train"]["steps"] // 2
    run(work, device, "mmmoe", "train", config, f"train.steps={half}")
    run(work, device, "mmmoe", "train", config)
    run(work, device, "mmmoe", "evaluate", "runs/run")
    folder = work / "runs" / "run"
    records = read_lines(folder / "metrics.jsonl")
    events = read_lines(folder / "events.jsonl")
    timed = [record for record in records if record["step"] > 1]

    def median(name: str) -> float | None:
        found = [record[name] for record in timed if record.get(name) is not None]
        return statistics.median(found) if found else None

    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "tokens_per_second": median("tokens_per_second"),
        "mfu": median("mfu"),
        "data_stall": median("data_stall"),
        "peak_memory": records[-1]["peak_memory"],
        "planned": records[-1].get("planned"),
        "save_seconds": statistics.median(event["seconds_blocked"] for event in events if event["event"] == "saved"),
        "resumed_at": [event["step"] for event in events if event["event"] == "resumed"],
        "scores": len(json.loads((folder / "report.json").read_text(encoding="utf-8"))["results"]),
    }


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=tuple(MODELS), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="the same; for make bench")
    device = parser.parse_args().device
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), device)
    for name, value in found.items():
        print(f"{name:>20}  {value}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
