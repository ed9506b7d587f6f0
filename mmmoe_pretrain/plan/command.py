"""What ``mmmoe plan`` answers: one plan, a ranking of layouts, or two plans side by side, as values and as text."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.modalities import build_modalities
from mmmoe_pretrain.modalities.tokenizer import Tokenizer
from mmmoe_pretrain.paths import make_folder
from mmmoe_pretrain.plan.build import without_lending
from mmmoe_pretrain.plan.machines import save
from mmmoe_pretrain.plan.report import Asked, assumed_lending, hidden_gpus, values_of
from mmmoe_pretrain.plan.search import search
from mmmoe_pretrain.plan.tables import ranking_of, side_by_side, text_of

log = logging.getLogger(__name__)
DEFAULT_VOCABULARY = 32_000  # as LIMoE's (arXiv 2206.02770) and Llama 2's
Answer = tuple[dict[str, Any], str]


def planned(asked: Asked, config: RunConfig) -> Answer:
    """The plan of ``config``."""
    with hidden_gpus():
        values = values_of(asked, *with_vocabulary(config))
    return values, text_of(values)


def compared(asked: Asked, first: RunConfig, second: RunConfig, names: tuple[str, str]) -> Answer:
    """Two plans, differences first."""
    a, b = planned(asked, first)[0], planned(asked, second)[0]
    return {"a": a, "b": b}, side_by_side(a, b, names)


def with_vocabulary(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """The config with the size of its vocabulary, and what was assumed: the tokenizer's file need not be there."""
    named = config.data.tokenizer
    if not any(its.needs_tokenizer for its in build_modalities(config.modalities, decoding=False).values()):
        return config.with_vocabulary(0), []
    if named is not None and Path(named).is_file():
        return config.with_vocabulary(Tokenizer(named).vocab_size), []
    if config.model.vocab_size:
        return config, []
    what = f"a vocabulary of {DEFAULT_VOCABULARY:,}, as there is no tokenizer at {named}; set model.vocab_size=N"
    return config.with_vocabulary(DEFAULT_VOCABULARY), [what]


def searched(asked: Asked, config: RunConfig) -> Answer:
    """The fastest layouts that fit."""
    with hidden_gpus():
        known, assumed = with_vocabulary(config)
        values = search(asked, without_lending(known), [*assumed, *assumed_lending(asked, config)])
    return values, ranking_of(values)


def calibrated(config: RunConfig, out: Path | None) -> str:
    """Measure this machine, as ``config`` uses it, into the file ``out``; under torchrun its links, which are added
    to what the file has. Says what it wrote, on rank 0."""
    from mmmoe_pretrain.parallel.runtime import process_group
    from mmmoe_pretrain.plan.calibrate import calibrate_ranks

    if out is None:
        raise ValueError("--calibrate writes a file; name it: --machine machine.json")
    make_folder(out.parent)  # before minutes of measuring
    if out.is_dir():
        raise ValueError(
            f"--machine {out} is a folder, and --calibrate writes a file; name one: {out / 'machine.json'}"
        )
    cores, busy = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    if busy > cores / 2:
        log.warning("this machine is busy (load %.1f on %d cores): what is measured will be slow", busy, cores)
    config = without_lending(with_vocabulary(config)[0])
    with process_group(timeout_minutes=5) as device:
        machine = calibrate_ranks(config, device, out)
        if dist.get_rank() != 0:
            return ""
        save(machine, out)
    ranks = sorted({one.ranks for one in machine.collectives})
    linked = f"; collectives of {', '.join(map(str, ranks))} ranks" if ranks else ""
    return f"wrote {out}: {machine.source}{linked}"
