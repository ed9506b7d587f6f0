"""Which settings may change between two starts of a run."""

from pathlib import Path

import pytest

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.train.resume import check_same_model
from tests.support import tiny_config


def saved(tmp_path: Path, **moe: object) -> Path:
    path = tmp_path / "config.yaml"
    run_config.dump(tiny_config(tmp_path, moe={"num_experts": 4, "expert_hidden_size": 8, **moe}), path)
    return path


def test_how_a_mixture_is_computed_and_its_losses_may_change(tmp_path: Path) -> None:
    path = saved(tmp_path, layers={1: {"num_experts": 8}})
    moe = {"num_experts": 4, "expert_hidden_size": 8, "dispatch_chunks": 3, "losses": {"z": 0.1},
           "layers": {1: {"num_experts": 8, "expert_backend": "grouped_mm"}}}  # fmt: skip
    check_same_model(tiny_config(tmp_path, moe=moe), path)


def test_a_layer_with_another_number_of_experts_is_another_model(tmp_path: Path) -> None:
    path = saved(tmp_path, layers={1: {"num_experts": 8}})
    moe = {"num_experts": 4, "expert_hidden_size": 8, "layers": {1: {"num_experts": 16}}}
    with pytest.raises(ValueError, match=r"moe.layers.1.num_experts was 8 and is 16"):
        check_same_model(tiny_config(tmp_path, moe=moe), path)
