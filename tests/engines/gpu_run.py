"""One tiny run on the GPU that this process sees, or else on the CPU: its losses and norms, printed as JSON.

    python -m tests.engines.gpu_run ENGINE ZERO_STAGE PRECISION

``run_apart`` starts it, because pytest's process forks ranks, and what has used a GPU cannot be forked.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from mmmoe_pretrain.parallel.runtime import process_group
from tests.layouts.cases import STEPS, Case, in_fp16
from tests.layouts.train import train_case

ROOT = Path(__file__).parents[2]


def run_apart(engine: str, zero_stage: int, precision: str, gpu: str) -> dict[str, Any]:
    """``one_run`` in a new process, where CUDA_VISIBLE_DEVICES is ``gpu``."""
    launcher = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR"}
    kept = {key: value for key, value in os.environ.items() if key not in launcher}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.engines.gpu_run", engine, str(zero_stage), precision],
        cwd=ROOT, env={**kept, "CUDA_VISIBLE_DEVICES": gpu, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


def one_run(engine: str, zero_stage: int, precision: str) -> dict[str, Any]:
    """In this process."""
    case = Case("one process", 1, engine, zero_stage, {}, precision)
    if precision == "fp16":
        case = in_fp16("one process", zero_stage, engine)
    with tempfile.TemporaryDirectory() as folder, process_group(timeout_minutes=1) as device:
        found = train_case(case, Path(folder), STEPS, device)
        backend = torch.distributed.get_backend()
    return {"device": device.type, "backend": backend, "losses": found.losses, "norms": found.norms}


def main() -> None:
    """Run, and print one line."""
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # of the stems' convolutions; matrix products have none by default
    print(json.dumps(one_run(sys.argv[1], int(sys.argv[2]), sys.argv[3])))


if __name__ == "__main__":
    main()
