"""DeepSpeed on a machine without a compiler, and without its notes in the output."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import warnings

import torch


def prepare_deepspeed() -> bool:
    """Import DeepSpeed once, before ranks are forked; False, with a message, where it is not installed."""
    if importlib.util.find_spec("deepspeed") is None:
        print("deepspeed is skipped: it is not installed (pip install -e '.[bench]')")
        return False
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    warnings.filterwarnings("ignore", "(?s).*(deprecated|all_gather_single)", FutureWarning)  # what it calls
    with warnings.catch_warnings(), contextlib.redirect_stdout(None):
        warnings.simplefilter("ignore")
        importlib.import_module("deepspeed.moe.layer")
        ops = importlib.import_module("deepspeed.ops")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or its first use compiles for minutes
    return True


def start_deepspeed() -> None:
    """On each rank, once the process group is there."""
    importlib.import_module("deepspeed").init_distributed("gloo")
