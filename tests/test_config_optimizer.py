"""Settings of one kind of optimizer are filled in, kept in the saved config, and refused under another kind."""

from pathlib import Path
from typing import Any

import pytest

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.config.optimizer import OptimizerConfig
from tests.support import tiny_config


@pytest.mark.parametrize(("given", "own", "state"), [
    ({}, {"beta1": 0.9, "beta2": 0.98, "eps": 1e-8}, ("exp_avg", "exp_avg_sq")),
    ({"beta1": 0.8, "eps": None}, {"beta1": 0.8, "beta2": 0.98, "eps": 1e-8}, ("exp_avg", "exp_avg_sq")),
    ({"kind": "sgd"}, {"momentum": 0.9}, ("momentum_buffer",)),
    ({"kind": "sgd", "momentum": 0.0}, {"momentum": 0.0}, ()),
])  # fmt: skip
def test_each_kind_has_its_own_settings_and_state(
    tmp_path: Path, given: dict[str, Any], own: dict[str, float], state: tuple[str, ...]
) -> None:
    config = tiny_config(tmp_path, optimizer=given)
    assert config.optimizer.own == own and config.optimizer.state == state
    run_config.dump(config, tmp_path / "config.yaml")
    assert run_config.load(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(("given", "message"), [
    ({"kind": "sgd", "beta1": 0.9}, "optimizer.beta1 0.9 .*kind adamw, .* sgd; remove beta1, or set kind: adamw"),
    ({"momentum": 0.9}, "optimizer.momentum 0.9 .*kind sgd, .* adamw; remove momentum, or set kind: sgd"),
    ({"kind": "adagrad"}, "optimizer.kind: .*'adamw' or 'sgd'.*adagrad"),
    ({"kind": "sgd", "momentum": 1.0}, "optimizer.momentum: .*less than 1"),
])  # fmt: skip
def test_a_setting_of_another_kind_is_refused_with_what_would_work(
    tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(tmp_path, optimizer=given)


def test_configs_from_before_the_kinds_are_of_adamw() -> None:
    before = {"learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-6, "clip_norm": 1.0}
    assert OptimizerConfig(**before).own == {"beta1": 0.9, "beta2": 0.95, "eps": 1e-6}
