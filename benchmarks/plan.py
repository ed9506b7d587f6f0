"""What ``mmmoe plan`` says beside what a run does: memory and time of steps of both engines on gloo ranks.

Prints a table for each part (memory: planned, measured, ratio, by layout and pipeline rank; time: the legend is in
planning/time.py) and, as its last line, one JSON object: ``memory_worst`` and ``time_worst``, the largest relative
errors; ``memory_layouts``; ``order_right``; ``seconds_1024``, of planning the largest config on 1,024 GPUs. Of memory
tensors are counted, not an allocator's pages; nothing here runs on a GPU.

    python benchmarks/plan.py                       ten minutes on two idle cores
    python benchmarks/plan.py --part memory         two minutes; --quick: two layouts
    python benchmarks/plan.py --part time --busy    CPU time: for a machine that others use
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, its folder alone is there

from benchmarks.common.start_deepspeed import prepare_deepspeed
from benchmarks.planning import memory
from benchmarks.planning.layouts import CASES, MEMORY_QUICK
from benchmarks.planning.time import time_part
from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.engines.megatron import prepare
from mmmoe_pretrain.plan.machines import find_machine
from mmmoe_pretrain.plan.report import Asked, values_of


def memory_part(quick: bool, only: str | None) -> dict[str, object]:
    """Prints the table; the figures for the JSON line."""
    prepare()
    able = prepare_deepspeed()
    cases = [case for case in CASES if able or not case.name.startswith("DeepSpeed")]
    if quick:
        cases = [case for case in cases if case.name in MEMORY_QUICK]
    if only:
        cases = [case for case in cases if only in case.name]
    print(f"{'layout':<46}{'stage':>6}{'planned MB':>12}{'measured MB':>12}{'ratio':>8}")
    found = memory.compare(cases)
    for row in found:
        print(
            f"{row.case:<46}{row.pipeline_rank:>6}{row.planned / 1e6:>12.2f}{row.measured / 1e6:>12.2f}"
            f"{row.planned / row.measured:>8.4f}"
        )
    return {
        "memory_worst": round(max(row.error for row in found), 4),
        "memory_layouts": len({row.case for row in found}),
    }


def seconds_1024() -> float:
    """Seconds to plan the largest config on 1,024 GPUs."""
    config = run_config.load(Path(__file__).resolve().parents[1] / "configs" / "mmmoe_200b_a20b.yaml")
    began = time.perf_counter()
    values_of(Asked(1024, find_machine("h100")), config)
    return time.perf_counter() - began


def main() -> None:
    """Measure, plan, and print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("memory", "time"), help="default: both")
    parser.add_argument("--quick", action="store_true", help="two layouts of memory, one round of time")
    parser.add_argument("--only", help="layouts of memory whose names contain this")
    parser.add_argument("--rounds", type=int, default=5, help="of time over all layouts")
    parser.add_argument("--busy", action="store_true", help="CPU time: for a machine that others use")
    args = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    found: dict[str, object] = {}
    if args.part != "memory":  # first: its ranks are forks of a process that has not computed much
        found |= time_part(1 if args.quick else args.rounds, args.busy)
    if args.part != "time":
        found |= memory_part(args.quick, args.only)
        found["seconds_1024"] = round(seconds_1024(), 1)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
