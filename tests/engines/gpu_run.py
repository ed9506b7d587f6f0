"""Tiny runs on the GPU that this process sees, or else on the CPU: their losses and norms, printed as JSON.

    python -m tests.engines.gpu_run ENGINE ZERO_STAGE:PRECISION ...

``run_apart`` starts it, because pytest's process forks ranks, and what has used a GPU cannot be forked. One process
makes all runs of an engine: on a GPU its start takes 20 seconds and a run takes one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mmmoe_pretrain.parallel.runtime import process_group
from tests.layouts.cases import FIXED_ROUTING, STEPS, Case, in_fp16
from tests.layouts.train import train_case

ROOT = Path(__file__).parents[2]


def run_apart(engine: str, kinds: Sequence[tuple[int, str]], gpu: str) -> list[dict[str, Any]]:
    """``runs`` in a new process, where CUDA_VISIBLE_DEVICES is ``gpu``."""
    launcher = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR"}
    kept = {key: value for key, value in os.environ.items() if key not in launcher}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.engines.gpu_run", engine,
         *(f"{zero_stage}:{precision}" for zero_stage, precision in kinds)],
        cwd=ROOT, env={**kept, "CUDA_VISIBLE_DEVICES": gpu, "PYTHONPATH": path}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


def runs(engine: str, kinds: Sequence[tuple[int, str]]) -> list[dict[str, Any]]:
    """In this process: a run of each (ZeRO stage, precision)."""
    found = []
    with process_group(timeout_minutes=1) as device:
        for zero_stage, precision in kinds:
            moe = FIXED_ROUTING if precision == "bf16" else {}
            case = Case("one process", 1, engine, zero_stage, {}, precision, moe=moe)
            if precision == "fp16":
                case = in_fp16("one process", zero_stage, engine)
            outcome = train_case(case, STEPS, device)
            where = {"device": device.type, "backend": torch.distributed.get_backend()}
            found.append({**where, "losses": outcome.losses, "norms": outcome.norms})
    return found


def main() -> None:
    """Run, and print one line."""
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # of the stems' convolutions; matrix products have none by default
    kinds = [(int(kind.partition(":")[0]), kind.partition(":")[2]) for kind in sys.argv[2:]]
    print(json.dumps(runs(sys.argv[1], kinds)))


if __name__ == "__main__":
    main()
