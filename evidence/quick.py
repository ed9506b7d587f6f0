"""All studies in small: tiny models, a few steps, the small corpus of the repository, no network. It shows that the
studies run, from the data to the page; its figures mean nothing.

Runs are forks of this process instead of processes of their own, which would import torch for most of their time.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import torch

from evidence.runs import ENVIRONMENT, Call, Runner
from evidence.study import ROOT, Study, Variant
from mmmoe_pretrain import exit_codes
from mmmoe_pretrain.engines.megatron import prepare

OUT = ROOT / "runs" / "evidence-quick"
CORPUS = "mini"  # of evidence/data.sh
SEEDS = 2
SIZES = ("model.hidden_size=32", "model.num_layers=2", "model.num_heads=2", "model.ffn_hidden_size=32",
         "moe.expert_hidden_size=16", "train.steps=6", "train.global_batch_size=8", "train.log_every=2",
         "optimizer.warmup_steps=2", "checkpoint.every=6", "evaluate.every=2", "evaluate.samples=16",
         "data.num_workers=0")  # fmt: skip
HEAD = """# {} in small

A trial by `python -m evidence --quick`: tiny models, a few steps, the small corpus of the repository. Its figures
mean nothing.
"""
IMPORTED = ("mmmoe_pretrain.train.loop", "matplotlib.figure", "matplotlib.backends.backend_agg")  # by each run


def check_folder(out: Path) -> None:
    """Raises ValueError for a folder whose files are those of all studies in full."""
    for kept in (ROOT / "docs", ROOT / "evidence"):
        if out.resolve().is_relative_to(kept):
            raise ValueError(f"--out {out} is in {kept}, the place of full runs; name another folder")


def studies_of(studies: Sequence[Study]) -> tuple[Study, ...]:
    """Its corpus has one language, so each stage of a sequence is scored on all of it."""
    return tuple(replace(study, seeds=study.seeds[:SEEDS], groups=((),) * len(study.groups)) for study in studies)


def small(variant: Variant, data: Path) -> tuple[str, ...]:
    """Overrides of its runs, after those of all; ``data`` as there."""
    return tuple(override.replace("{data}", str(data)) for override in variant.small)


def overrides(data: Path) -> tuple[str, ...]:
    """Of all runs; ``data``: where evidence/data.sh put the corpus."""
    return (
        f"data.train=[{{path: {data / 'shards' / 'train'}}}]",
        f"data.tokenizer={data / 'tokens.model'}",
        f"evaluate.validation=[{data / 'shards' / 'test'}]",
        f"evaluate.test=[{data / 'shards' / 'test'}]",
        "evaluate.rows={}",
        *SIZES,
    )


class ForkingRunner(Runner):
    """Its runs have what this process has imported."""

    def _start(self, call: Call, log: BinaryIO) -> int:
        if process := os.fork():
            return process
        code: object = exit_codes.FAULT
        try:
            for stop in (signal.SIGINT, signal.SIGTERM):  # the parent's handler would let this run go on
                signal.signal(stop, signal.SIG_DFL)
            os.setsid()
            exit_codes.end_with_parent()
            for number, name in ((1, "stdout"), (2, "stderr")):
                os.dup2(log.fileno(), number)
                setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False, buffering=1))  # noqa: SIM115
            sys.argv = ["mmmoe", *call.arguments]
            os.environ |= ENVIRONMENT
            os.chdir(ROOT)
            importlib.import_module(call.program).main()
        except SystemExit as ended:
            code = exit_codes.DONE if ended.code is None else ended.code
        except BaseException:  # noqa: BLE001 - no error may leave a fork
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code if isinstance(code, int) else exit_codes.FAULT)


def import_once() -> None:
    """What the runs would each import."""
    torch.set_num_threads(1)
    prepare()
    for name in IMPORTED:
        importlib.import_module(name)
