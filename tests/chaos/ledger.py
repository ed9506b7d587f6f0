"""What every rank trained on, step by step, over all starts of a run.

A rank appends a line once a step is done and before it can be saved. A step that was done again after a
restart counts as done by the last start that did it: that is the history that the final weights come from.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.engines.base import StepResult
from mmmoe_pretrain.engines.megatron import MegatronEngine

History = dict[int, Counter[int]]  # step (the first is 1) -> samples by id, over all ranks


def keep_ledger(folder: Path, start: int, rank: int, on_step: Callable[[int], None]) -> None:
    """In a rank's process, before it trains: write down the samples of every step that its engine does, and call
    ``on_step`` with how many it has done."""
    path = folder / f"ledger_{rank}.jsonl"
    done = 0

    def recorded(step: Callable[..., StepResult]) -> Callable[..., StepResult]:
        @functools.wraps(step)
        def wrapper(engine: MegatronEngine, microbatches: list[Batch], rate: float) -> StepResult:
            nonlocal done
            samples = [int(group) for batch in microbatches for group in batch.group_ids]
            result = step(engine, microbatches, rate)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"start": start, "step": engine.steps_done, "samples": samples}) + "\n")
            done += 1
            on_step(done)
            return result

        return wrapper

    MegatronEngine.step = recorded(MegatronEngine.step)  # type: ignore[method-assign]


def history(folder: Path) -> History:
    """The samples of each step in the last start that did it."""
    last: dict[int, int] = {}
    lines = list(_lines(folder))
    for line in lines:
        last[line["step"]] = max(last.get(line["step"], 0), line["start"])
    steps: History = {step: Counter() for step in last}
    for line in lines:
        if line["start"] == last[line["step"]]:
            steps[line["step"]].update(line["samples"])
    return steps


def compare(found: History, wanted: History) -> tuple[int, int]:
    """Samples that ``found`` lacks, and samples that it has too often."""
    lost = repeated = 0
    for step in found.keys() | wanted.keys():
        mine, theirs = found.get(step, Counter()), wanted.get(step, Counter())
        lost += (theirs - mine).total()
        repeated += (mine - theirs).total()
    return lost, repeated


def _lines(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("ledger_*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except ValueError:  # the rank was killed while it wrote; nothing of this step can have been saved
                continue
