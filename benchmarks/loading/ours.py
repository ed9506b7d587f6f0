"""The loader of this project, and webdataset with its decoders, in the protocol of peers.py: run as a script.

The same work as the others: images whose shorter side is 224, the centre; the same tokens; the same log-mel
spectrogram; no augmentation. A line ``SECONDS BATCHES`` consumes at a pace, for the stall.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from benchmarks.loading.peers import (
    BATCH,
    HOP,
    MELS,
    N_FFT,
    RATE,
    SIDE,
    WARM_UP,
    Decoder,
    cpu_seconds,
    serve,
    webdataset_batches,
)  # fmt: skip
from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.loader import Loader
from mmmoe_pretrain.modalities import Modalities, build_modalities

READ_AHEAD = 5  # steps that it takes to fill


def config_of(folder: Path, kind: str, tokenizer: str, workers: int) -> RunConfig:
    """A run that trains on nothing but the shards of ``folder``."""
    first: dict[str, Any] = {
        "photo": {"kind": "image", "size": SIDE, "patch": 16, "fit": "crop", "stem": "linear", "augment": False},
        "audio": {"kind": "audio", "sample_rate": RATE, "n_fft": N_FFT, "hop_length": HOP, "n_mels": MELS,
                  "max_seconds": 10.0, "augment": False},
    }["audio" if kind == "audio" else "photo"]  # fmt: skip
    name = first["kind"]
    return run_config.parse(
        {
            "name": "loader",
            "data": {"train": [{"path": str(folder)}], "tokenizer": tokenizer, "num_workers": workers},
            "modalities": {name: first, "text": {"kind": "text", "max_tokens": 128}},
            "objectives": {"pairs": {"kind": "contrastive", "pairs": {f"{name}-text": 1.0}}},
            "train": {"steps": 1_000_000, "global_batch_size": BATCH},
        }
    )


def modalities_of(kind: str, tokenizer: str) -> Modalities:
    return build_modalities(config_of(Path("unused"), kind, tokenizer, 0).modalities, tokenizer)


def timed(loader: Loader, count: int, pace: float = 0.0) -> dict[str, Any]:
    """The next ``count`` batches; with ``pace`` one is asked for every so many seconds, as a training step would
    once the read-ahead is full, as it is after some minutes at that pace."""
    time.sleep(READ_AHEAD * pace)
    began, cpu = time.perf_counter(), cpu_seconds()
    stages, wait, due = Counter[str](), 0.0, began
    for _ in range(count):
        stats = next(loader).stats
        wait += stats.wait_seconds
        stages.update(stats.seconds)
        due = max(due, time.perf_counter() - pace) + pace
        time.sleep(max(0.0, due - time.perf_counter()))
    seconds, cpu = time.perf_counter() - began, cpu_seconds() - cpu
    return {"samples": count * BATCH, "seconds": seconds, "cpu": cpu, "wait": wait, "stages": stages}


def decoder(kind: str, tokenizer: str) -> Decoder:
    """That of the loader, for webdataset."""
    modalities = modalities_of(kind, tokenizer)
    first, text = modalities["audio" if kind == "audio" else "image"], modalities["text"]
    return lambda data, line: (torch.from_numpy(first.decode(data)), torch.from_numpy(text.decode(line.encode())))


def main() -> None:
    name, folder, kind, tokenizer, workers = sys.argv[1:]
    if name == "same_decoder":
        serve(webdataset_batches(Path(folder), kind, tokenizer, int(workers), decoder(kind, tokenizer)))
    torch.set_num_threads(1)
    config = config_of(Path(folder), kind, tokenizer, int(workers))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # messages are no answer
    with Loader(config, modalities_of(kind, tokenizer)) as loader:
        for _ in range(WARM_UP):
            next(loader)
        print("ready", file=answers, flush=True)
        for line in sys.stdin:
            *pace, count = line.split()
            print(json.dumps(timed(loader, int(count), *map(float, pace))), file=answers, flush=True)


if __name__ == "__main__":
    main()
