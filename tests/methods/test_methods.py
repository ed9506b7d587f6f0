"""Two steps of every config of configs/methods, small, on one rank and on two; ``make methods-walk`` does more."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from evidence.methods import METHODS
from evidence.pages import methods_of
from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.engines.apply import build_engine
from mmmoe_pretrain.parallel.mesh import destroy_groups
from mmmoe_pretrain.parallel.runtime import process_group
from tests.distributed import groups_of, run_ranks
from tests.layouts.train import microbatches_of
from tests.methods import walk
from tests.support import VECTORS

STEPS, LEARNING_RATE = 2, 3e-3
NOWHERE = Path("nowhere")
DATA = VECTORS.parent  # samples are made up; word vectors are there


def random_config(path: Path, *more: str) -> RunConfig:
    return run_config.load(path, walk.small(path, DATA, NOWHERE, "model.vocab_size=48", *more))


def train(configs: list[RunConfig]) -> list[list[dict[str, float]]]:
    """On this rank of one or two, the losses of each config's first steps, on samples of noise."""
    found = []
    with process_group(timeout_minutes=1) as device:
        for config in configs:
            engine = build_engine(config, groups_of(config.parallel, config.moe.group_sizes), device)
            steps = [microbatches_of(engine, number, samples_of(config)) for number in range(STEPS)]
            found.append([engine.step(batches, LEARNING_RATE).losses for batches in steps])
            destroy_groups()
    return found


def samples_of(config: RunConfig) -> list[str]:
    """First letters of the modalities of a step's samples: half of them have all, each of the others lacks one."""
    letters = [name[0] for name in config.modalities]
    number = config.train.global_batch_size
    lacking = [letters[i % len(letters)] if i % 2 else "" for i in range(number)]
    return ["".join(letter for letter in letters if letter != lack) or letters[0] for lack in lacking]


def test_every_config_has_an_entry_and_every_entry_a_config() -> None:
    assert {path.stem for path in walk.configs()} == walk.entries().keys()
    for study in METHODS:
        assert all(study.path_of(method).is_file() for method in methods_of(study))


@pytest.mark.timeout(240)
def test_every_method_trains_on_two_ranks_as_on_one() -> None:
    paths = walk.configs()
    alone = run_ranks(1, train, [random_config(path) for path in paths])[0]
    ranks = run_ranks(2, train, [random_config(path, walk.EP2) for path in paths], timeout=200.0)
    for number, path in enumerate(paths):
        one, *two = [list(enumerate(rank[number], start=1)) for rank in (alone, *ranks)]
        for found in two:
            assert all(math.isfinite(value) for _, losses in found for value in losses.values()), path.stem
            if not walk.entries()[path.stem].local:
                assert walk.differing(one, found, STEPS) == "", path.stem


def test_the_walk_tells_losses_that_differ_and_a_config_without_an_entry(tmp_path: Path) -> None:
    def losses(*values: float) -> list[tuple[int, dict[str, float]]]:
        return [(step, {"total": value}) for step, value in enumerate(values, start=1)]

    # The bound is 2e-5, of values above 1 relative.
    assert walk.differing(losses(10.0, 0.5), losses(10.0001, 0.50001), steps=2) == ""
    assert walk.differing(losses(10.0, 0.5), losses(10.0003, 0.5), steps=2).startswith("step 1: total is 10.0 on")
    assert walk.differing(losses(10.0), losses(math.nan), steps=1).startswith("step 1")
    assert walk.differing(losses(10.0), losses(10.0, 9.0), steps=2) == "1 and 2 steps of 2 have losses"
    assert walk.walk(tmp_path / "unknown.yaml", tmp_path, tmp_path) == (
        [],
        "evidence/methods.py has no method unknown",
    )
