"""A modality, a representation, an objective and a router of another package train, are saved, resume, are evaluated
and reported."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain import kinds
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.evaluate.routing.command import routing_command
from mmmoe_pretrain.evaluate.run import evaluate_command
from mmmoe_pretrain.train.loop import train
from tests.distributed import run_ranks
from tests.extension.kinds_outside import write_package
from tests.support import tiny_values, write_tar


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """The package is installed."""
    write_package(tmp_path / "site")
    sys.path.insert(0, str(tmp_path / "site"))
    kinds._installed.cache_clear()
    yield tmp_path
    sys.path.remove(str(tmp_path / "site"))
    sys.modules.pop("outside", None)
    kinds._installed.cache_clear()


def write_points(folder: Path, count: int) -> None:
    """Clouds around a centre; the label is twice its x."""
    rng, members = np.random.default_rng(0), []
    for i in range(count):
        centre = rng.uniform(-1, 1, 2)
        lines = "\n".join(f"{x} {y}" for x, y in centre + 0.05 * rng.standard_normal((5 + i % 7, 2)))
        for extension, text in (("xy", lines), ("json", json.dumps({"label": str(round(2 * centre[0], 3))}))):
            members.append((f"cloud-{i:03d}.{extension}", text.encode()))
    write_tar(folder / "00000.tar", members)


def config_of(root: Path, name: str, steps: int) -> RunConfig:
    values = tiny_values(
        root,
        name=name,
        data={"train": [{"path": str(root / "train")}], "num_workers": 0},
        modalities={"clouds": {"kind": "points"}},
        representations={"shape": {"kind": "rectified", "parts": ["clouds"]}},
        objectives={"labels": {"kind": "label_regression", "reads": "shape"}},
        moe={"num_experts": 4, "expert_hidden_size": 8, "router": "round_robin"},
        train={"steps": steps, "global_batch_size": 16, "log_every": 1},
        checkpoint={"every": 10},
        optimizer={"learning_rate": 1e-2, "warmup_steps": 0},
    )
    return run_config.parse(values)


def losses(config: RunConfig) -> list[float]:
    lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["losses"]["labels"] for line in lines]


def test_kinds_of_another_package_train_resume_and_are_reported(outside: Path) -> None:
    write_points(outside / "train", 48)
    write_points(outside / "test", 8)
    straight = config_of(outside, "straight", steps=30)
    run_ranks(1, train, straight)
    assert np.mean(losses(straight)[-5:]) < 0.7 * np.mean(losses(straight)[:5])
    resumed = config_of(outside, "resumed", steps=30)
    shutil.copytree(straight.run_dir, resumed.run_dir)
    for checkpoint in sorted((resumed.run_dir / "checkpoints").glob("step_*"))[1:]:  # all but the first, of step 10
        shutil.rmtree(checkpoint)
    run_ranks(2, train, resumed)
    assert len(losses(resumed)) == 30
    np.testing.assert_allclose(losses(resumed), losses(straight), rtol=1e-3, atol=1e-4)

    evaluate_command(straight.run_dir, [str(outside / "test")], None, None, [])
    routing_command(straight.run_dir, [str(outside / "test")], None, 2, [])
    layers = json.loads((straight.run_dir / "routing.json").read_text())["layers"]
    assert list(layers[0]["share"]) == ["clouds"]


def test_a_kind_that_nobody_brings_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"modalities\.clouds: .*'points'.*series"):
        config_of(tmp_path, "none", 1)
