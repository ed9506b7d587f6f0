"""The tests and benchmarks that need a GPU, one after another, and their figures as a page (``make gpu``).

    python -m benchmarks.common.gpu_report --write benchmarks/GPU.md

writes the page and, beside it, the same figures as JSON. Exit status 1 where a part failed; the page then says so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
TESTS = ("tests/moe/test_gpu.py", "tests/engines/test_gpu.py", "tests/kernels", "tests/models/test_attend.py")
PARTS: dict[str, tuple[str, ...]] = {
    "GPU tests: both engines, the MoE layer, attention and kernels against the CPU": (
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *TESTS,
    ),
    "A training step of a model with 1.1 billion active parameters": ("benchmarks/gpu.py",),
    "The MoE layer: bf16, D = 4,096, F = 1,536, E = 64, K = 8, 16,384 tokens": (
        "benchmarks/moe_layer.py", "--device", "cuda",
    ),
    "Attention over packed segments": ("benchmarks/attention.py", "--device", "cuda"),
    "A run with loader, checkpoints, resume and evaluation": ("benchmarks/training.py",),
}  # fmt: skip
SECONDS = 240  # at most, for a part


@dataclass(frozen=True)
class Outcome:
    """What a part printed, and how it ended."""

    name: str
    status: int
    seconds: float
    output: str

    @property
    def figures(self) -> dict[str, Any]:
        """The JSON object in its last line, if there is one."""
        last = self.output.strip().rpartition("\n")[2]
        try:
            found = json.loads(last)
        except json.JSONDecodeError:
            return {}
        return found if isinstance(found, dict) else {}


def run_part(name: str, arguments: tuple[str, ...]) -> Outcome:
    """Run one part in a separate process with only the first GPU."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {"CUDA_VISIBLE_DEVICES": "0", **os.environ, "PYTHONPATH": path}
    began = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", *arguments], cwd=ROOT, env=environment, text=True, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=SECONDS,
        )  # fmt: skip
        status, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as expired:
        said = expired.stdout or b""
        output = (said.decode() if isinstance(said, bytes) else said) + f"\nstopped after {SECONDS} seconds"
        status = 124
    return Outcome(name, status, time.monotonic() - began, output)


def page(outcomes: list[Outcome]) -> str:
    """Markdown: of each part the command, its end, and the lines that it printed before its figures."""
    device = next((o.figures["device"] for o in outcomes if "device" in o.figures), "unknown")
    torch_version = next((o.figures["torch"] for o in outcomes if "torch" in o.figures), "unknown")
    lines = ["# On a GPU", "", f"Written by `make gpu` on {date.today()}: {device}, torch {torch_version}.", ""]
    for outcome in outcomes:
        printed = outcome.output.strip().split("\n")
        shown = printed[:-1] if outcome.figures else printed[-3:]
        lines += [f"## {outcome.name}", ""]
        if outcome.status:
            lines += [f"**Failed with status {outcome.status}.**", ""]
        lines += [f"`python {' '.join(PARTS.get(outcome.name, ()))}`, {outcome.seconds:.0f} s", ""]
        lines += ["```", *shown, "```", ""]
    return "\n".join(lines)


def report(parts: Mapping[str, tuple[str, ...]], target: Path) -> int:
    """Run ``parts``, write the page and the JSON; the exit status."""
    outcomes = []
    for name, arguments in parts.items():
        outcome = run_part(name, arguments)
        print(f"== {name}\n{outcome.output.strip()}\n-- status {outcome.status}, {outcome.seconds:.0f} s", flush=True)
        outcomes.append(outcome)
        target.write_text(page(outcomes), encoding="utf-8")
        figures = {o.name: {"status": o.status, "seconds": round(o.seconds), **o.figures} for o in outcomes}
        target.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return int(any(outcome.status for outcome in outcomes))


def main() -> None:
    """Run all parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, default=Path("benchmarks/GPU.md"))
    parser.add_argument("--only", help="a word in the name of the parts to run")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(f"make gpu needs a GPU, and torch {torch.__version__} finds none; a CPU can run make test")
    chosen = {name: command for name, command in PARTS.items() if not args.only or args.only in name}
    sys.exit(report(chosen, args.write))


if __name__ == "__main__":
    main()
