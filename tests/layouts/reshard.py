"""A run saved under one layout and engine resumes under another: `make reshard`.

python -m tests.layouts.reshard                        all ordered pairs; the last line is "N passed, N failed"
python -m tests.layouts.reshard --only "PP2" "ZeRO-3"  pairs in whose names one of these stands

Each layout trains two steps, saves, and takes two more. Each other layout of the same optimizer loads that
checkpoint: every weight, optimizer tensor and count must be what was saved, bit for bit, and the next two steps must
have the same losses (bound of tests/layouts/matrix.py: layouts add up in another order). The second of them shows the
optimizer state that the first one's update was made with.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mmmoe_pretrain.checkpoint import store
from mmmoe_pretrain.checkpoint.state import ShardedState, WholeState
from mmmoe_pretrain.engines import deepspeed
from mmmoe_pretrain.engines.base import Engine, Progress
from mmmoe_pretrain.parallel.mesh import destroy_groups
from mmmoe_pretrain.parallel.runtime import process_group
from tests.checkpoint.support import save
from tests.distributed import run_ranks
from tests.layouts.cases import GLOBAL, HOLD, LAYOUTS, LEARNING_RATE, SGD, Case
from tests.layouts.matrix import LOSS, chunks
from tests.layouts.train import build, microbatches_of

STEPS_SAVED, STEPS_AFTER = 2, 2
SECONDS_A_LOAD = 30.0
TRAIN = {"num_microbatches": 2, "global_batch_size": 2 * len(GLOBAL)}


def _case(layout: str, engine: str, zero_stage: int, optimizer: dict[str, Any] | None = None) -> Case:
    ranks, degrees = LAYOUTS.get(layout, (1, {}))
    return Case(layout, ranks, engine, zero_stage, degrees, train=TRAIN, optimizer=optimizer or {})


CASES = (
    _case("one process", "megatron", 0),
    _case("DP2", "deepspeed", 2),
    _case("EP2", "megatron", 1),
    _case("EP2", "deepspeed", 3),
    _case("TP2 + SP", "megatron", 0),
    _case("PP2 x VPP2", "megatron", 1),
    _case("EP2 x EDP2", "megatron", 1),
    _case("TP2 x EP2", "deepspeed", 1),
    _case("PP4", "megatron", 0),
    _case("TP2 + SP x PP2 x EP2", "megatron", 1),
    _case("one process", "megatron", 0, SGD),
    _case("DP2", "deepspeed", 2, SGD),
    _case("EP2", "deepspeed", 0, SGD),
    _case("EP2", "deepspeed", 3, SGD),
    _case("TP2 + SP", "megatron", 0, SGD),
    _case("PP2 x VPP2", "megatron", 0, SGD),
    _case("EP2", "deepspeed", 3, HOLD),
    _case("PP2 x VPP2", "megatron", 1, HOLD),
)
Pair = tuple[Case, Case]  # saved under, loaded under


@dataclass(frozen=True)
class Comparison:
    """``loss``: the largest relative difference of a loss of the next steps."""

    pair: Pair
    loss: float
    problem: str = ""

    @property
    def passed(self) -> bool:
        return not self.problem and self.loss <= LOSS["fp32"]


def all_pairs() -> list[Pair]:
    """Of layouts with the same optimizer."""
    return [pair for pair in itertools.permutations(CASES, 2) if pair[0].optimizer == pair[1].optimizer]


def run(pairs: Sequence[Pair], root: Path) -> Iterator[Comparison]:
    """Each layout that a pair saves under trains once."""
    if any(case.engine == "deepspeed" for pair in pairs for case in pair):
        deepspeed.prepare()  # before the fork: its import takes seconds
    wanted: dict[Case, dict[str, float]] = {}
    savers = sorted({before for before, _ in pairs}, key=lambda case: case.ranks)
    for ranks, alike in itertools.groupby(savers, key=lambda case: case.ranks):
        for cases in chunks(list(alike)):
            found = run_ranks(ranks, save_all, cases, root, timeout=SECONDS_A_LOAD * (1 + len(cases)))
            wanted |= dict(zip(cases, found[0], strict=True))
    loads = sorted(pairs, key=lambda pair: pair[1].ranks)
    for number, alike in itertools.groupby(loads, key=lambda pair: pair[1].ranks):
        for some in chunks(list(alike)):
            ranks = run_ranks(number, load_all, some, root, timeout=SECONDS_A_LOAD * (1 + len(some)))
            for i, pair in enumerate(some):
                yield _compare(pair, [rank[i] for rank in ranks], wanted[pair[0]])


def _compare(pair: Pair, ranks: Sequence[tuple[str, dict[str, float]]], wanted: dict[str, float]) -> Comparison:
    problem = next((problem for problem, _ in ranks if problem), "")
    difference = max(
        abs(losses[name] - value) / max(1.0, abs(value)) for _, losses in ranks for name, value in wanted.items()
    )
    return Comparison(pair, difference, problem)


def root_of(root: Path, case: Case) -> Path:
    return root / case.name.replace(" ", "_")


def save_all(cases: Sequence[Case], root: Path) -> list[dict[str, float]]:
    """On one rank of many: train, save, and the losses of the steps after."""
    found = []
    with process_group(timeout_minutes=1) as device:
        for case in cases:
            engine = build(case, device)
            for number in range(STEPS_SAVED):
                engine.step(microbatches_of(engine, number), LEARNING_RATE)
            meta = {"progress": engine.progress().to_json()}
            save(root_of(root, case), STEPS_SAVED, engine.export_state(), meta, all_ranks())
            found.append(next_losses(engine))
            destroy_groups()
    return found


def load_all(pairs: Sequence[Pair], root: Path) -> list[tuple[str, dict[str, float]]]:
    """On one rank of many: of each pair, what is wrong after loading, and the losses of the next steps."""
    found = []
    with process_group(timeout_minutes=1) as device:
        for source, case in pairs:
            engine = build(case, device)
            checkpoint = store.find_latest(root_of(root, source))
            assert checkpoint is not None
            progress = Progress.from_json(store.read_meta(checkpoint)["progress"])
            engine.import_state(store.load(checkpoint, engine.export_state(), all_ranks()), progress)
            problem = differences(engine.export_state(), store.read_state(checkpoint))
            if engine.progress() != progress:
                problem = problem or f"progress is {engine.progress()}, saved was {progress}"
            found.append((problem, next_losses(engine)))
            destroy_groups()
    return found


def differences(held: ShardedState, saved: WholeState) -> str:
    """The first tensor of which this rank holds something else than was saved, or nothing."""
    for key, tensor in held.items():
        for offset, piece in tensor.pieces.items():
            here = tuple(slice(o, o + n) for o, n in zip(offset, piece.shape, strict=True))
            if not torch.equal(piece.cpu(), saved[key][here]):
                return f"{key} at {offset} is not what was saved"
    return ""


def all_ranks() -> dist.ProcessGroup | None:
    return dist.group.WORLD if dist.get_world_size() > 1 else None


def next_losses(engine: Engine) -> dict[str, float]:
    """Of the steps behind the checkpoint, by number and name."""
    return {
        f"{number} {name}": value
        for number in range(STEPS_SAVED, STEPS_SAVED + STEPS_AFTER)
        for name, value in engine.step(microbatches_of(engine, number), LEARNING_RATE).losses.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""])
    args = parser.parse_args()
    pairs = [pair for pair in all_pairs() if any(part in f"{pair[0].name} {pair[1].name}" for part in args.only)]
    passed = []
    with tempfile.TemporaryDirectory() as folder:
        for comparison in run(pairs, Path(folder)):
            before, after = comparison.pair
            state = "equal" if comparison.passed else f"DIFFERS {comparison.problem}"
            print(f"{before.name:<42} -> {after.name:<42} next loss {comparison.loss:.0e}  {state}", flush=True)
            passed.append(comparison.passed)
    print(f"{sum(passed)} passed, {len(passed) - sum(passed)} failed")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
