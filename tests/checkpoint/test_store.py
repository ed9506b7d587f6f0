"""Checkpoints: complete or not there, and the same tensors under another layout."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.checkpoint import load_model, store
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.engines.apply import build_engine
from mmmoe_pretrain.parallel.mesh import build_groups, destroy_groups
from mmmoe_pretrain.parallel.runtime import process_group
from tests.distributed import run_ranks
from tests.support import random_batch, tiny_config

VOCAB = 48
META = {"vocab_size": VOCAB, "tokenizer_fingerprint": "none"}


def with_experts_on(config: RunConfig, ranks: int) -> RunConfig:
    return config.model_copy(update={
        "parallel": config.parallel.model_copy(update={"expert_parallel_size": ranks})})  # fmt: skip


def save(config: RunConfig, steps: tuple[int, ...] = (2,), keep: int = 2) -> None:
    with process_group(timeout_minutes=0.5) as device:
        groups = build_groups(config.parallel, config.moe.num_experts)
        engine = build_engine(config, VOCAB, groups, device)
        for step in range(max(steps)):
            engine.step([random_batch(config, ["iat", "it"], seed=10 * step + groups.data_rank)], 1e-2)
            if step + 1 in steps:
                store.save(config.run_dir, step + 1, engine.export_state(), groups, META, keep)
        destroy_groups()


def load(config: RunConfig) -> dict[str, Any]:
    """Each parameter's value and moments, and the loss of the next step."""
    with process_group(timeout_minutes=0.5) as device:
        groups = build_groups(config.parallel, config.moe.num_experts)
        engine = build_engine(config, VOCAB, groups, device)
        checkpoint = store.find_latest(config.run_dir)
        assert checkpoint is not None
        state = store.load(checkpoint, engine.export_state(), groups)
        engine.import_state(state, steps_done=2)
        tensors = {name: (s.value.numpy(), s.exp_avg.numpy(), s.exp_avg_sq.numpy(), s.expert_axis)
                   for name, s in state.items()}  # fmt: skip
        loss = engine.step([random_batch(config, ["iat", "it"], seed=99)], 1e-2).losses["total"]
        destroy_groups()
    return {"tensors": tensors, "loss": loss}


@pytest.mark.parametrize("ranks_then", [1, 2])
def test_a_checkpoint_of_two_expert_ranks_loads_exactly_elsewhere(tmp_path: Path, ranks_then: int) -> None:
    config = tiny_config(tmp_path)
    run_ranks(2, save, with_experts_on(config, 2))
    same = run_ranks(2, load, with_experts_on(config, 2))
    other = run_ranks(ranks_then, load, with_experts_on(config, 1))
    for name, (*arrays, expert_axis) in other[0]["tensors"].items():
        for k, array in enumerate(arrays):
            parts = [rank["tensors"][name][k] for rank in same]
            np.testing.assert_array_equal(np.concatenate(parts) if expert_axis else parts[0], array, err_msg=name)
    if ranks_then == 2:  # the same data on both: the next loss agrees too, up to the order of sums
        assert other[0]["loss"] == pytest.approx(same[0]["loss"], rel=1e-5)


def test_the_last_checkpoints_are_kept_and_the_newest_is_found(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    run_ranks(1, save, config, (1, 2, 3), 2)
    folders = sorted(path.name for path in (config.run_dir / "checkpoints").glob("step_*"))
    assert folders == ["step_00000002", "step_00000003"]
    newest = store.find_latest(config.run_dir)
    assert newest is not None and store.read_meta(newest)["step"] == 3


def test_a_torn_checkpoint_is_never_found(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    run_ranks(1, save, config, (1, 2), 2)
    root = config.run_dir / "checkpoints"
    (root / "step_00000002" / ".metadata").unlink()  # as if killed before the last file
    (root / "step_00000009.tmp").mkdir()  # as if killed before the rename
    found = store.find_latest(config.run_dir)
    assert found is not None and found.name == "step_00000001"


def test_a_model_loads_whole_in_one_process(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    run_ranks(2, save, with_experts_on(config, 2))
    config.run_dir.mkdir(parents=True, exist_ok=True)
    run_config.dump(config, config.run_dir / "config.yaml")
    model, loaded, step = load_model(config.run_dir)
    assert (loaded, step) == (config, 2)
    single = run_ranks(1, load, with_experts_on(config, 1))[0]["tensors"]
    for name, parameter in model.named_parameters():
        np.testing.assert_array_equal(parameter.detach().numpy(), single[f"mmmoe.{name}"][0], err_msg=name)


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    run_ranks(1, save, config)
    checkpoint = store.find_latest(config.run_dir)
    assert checkpoint is not None
    with pytest.raises(ValueError, match=r"lacks model/mmmoe\.trunk\.unheard_of"):
        store.load_weights(checkpoint, {"mmmoe.trunk.unheard_of": torch.zeros(1)})


def test_an_empty_run_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no finished checkpoint"):
        load_model(tmp_path)
