"""What every rank trained on, step by step, over all starts of a run.

A rank appends a line once a step is done and before it can be saved. Of a step that was done again after a restart
the last line counts: that is the history that the final weights come from.
"""

from __future__ import annotations

import functools
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.engines.base import StepResult
from mmmoe_pretrain.engines.megatron import MegatronEngine

History = dict[int, Counter[int]]  # step (the first is 1) -> samples by id, over all ranks


def keep_ledger(folder: Path, rank: int, on_step: Callable[[int], None]) -> None:
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
                file.write(json.dumps({"step": engine.steps_done, "samples": samples}) + "\n")
            done += 1
            on_step(done)
            return result

        return wrapper

    MegatronEngine.step = recorded(MegatronEngine.step)  # type: ignore[method-assign]


def history(folder: Path) -> History:
    """The samples of each step, as each rank did it last."""
    steps: History = defaultdict(Counter)
    for path in sorted(folder.glob("ledger_*.jsonl")):
        last = {line["step"]: line["samples"] for line in _lines(path)}
        for step, samples in last.items():
            steps[step].update(samples)
    return steps


def compare(found: History, wanted: History) -> tuple[int, int]:
    """Samples that ``found`` lacks, and samples that it has too often."""
    lost = repeated = 0
    for step in found.keys() | wanted.keys():
        mine, theirs = found.get(step, Counter()), wanted.get(step, Counter())
        lost += (theirs - mine).total()
        repeated += (mine - theirs).total()
    return lost, repeated


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):  # the rank was killed while it wrote; nothing of this step can have been saved
            yield json.loads(line)
