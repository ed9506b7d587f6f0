"""Checkpoints: complete or not there, and the same tensors under another layout."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.checkpoint import load_model, store
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.engines.apply import build_engine
from mmmoe_pretrain.engines.base import Engine, Progress
from mmmoe_pretrain.parallel.mesh import destroy_groups
from mmmoe_pretrain.parallel.runtime import process_group
from tests.distributed import groups_of, run_ranks
from tests.support import random_batch, tiny_config

META = {"vocab_size": 48, "tokenizer_fingerprint": "none"}


LAYOUTS: dict[str, dict[str, Any]] = {  # of two ranks
    "experts": {"expert_parallel_size": 2},
    "matrices": {"tensor_parallel_size": 2},
    "stages": {"pipeline_parallel_size": 2},
    "moments": {"expert_parallel_size": 1, "zero_stage": 1},
}


def config_of(root: Path, layout: str) -> RunConfig:
    """A run of its own; ``one`` has the degrees of a single process."""
    return tiny_config(root / layout, parallel=LAYOUTS.get(layout, {}))


def save(config: RunConfig, steps: tuple[int, ...] = (2,), keep: int = 2) -> None:
    with process_group(timeout_minutes=0.5) as device:
        train_and_save(config, device, steps, keep)


def train_and_save(config: RunConfig, device: torch.device, steps: tuple[int, ...], keep: int) -> dict[str, Any]:
    """What this rank holds after the last save, and the loss of the step after it."""
    groups = groups_of(config.parallel, config.moe.num_experts)
    engine = build_engine(config, groups, device)
    for step in range(max(steps)):
        engine.step([random_batch(config, ["iat", "it"], seed=10 * step + groups.data_rank)], 1e-2)
        if step + 1 in steps:
            store.save(config.checkpoint_root, step + 1, engine.export_state(), META | progress(engine),
                       dist.group.WORLD, store.Retention(keep))  # fmt: skip
    return pieces_and_next_loss(config, engine, groups.data_size)


def load(config: RunConfig, root: str, device: torch.device) -> dict[str, Any]:
    """What this rank holds of the run under ``root``, and the loss of the next step."""
    groups = groups_of(config.parallel, config.moe.num_experts)
    engine = build_engine(config, groups, device)
    checkpoint = store.find_latest(root)
    assert checkpoint is not None
    state = store.load(checkpoint, engine.export_state(), dist.group.WORLD)
    engine.import_state(state, Progress.from_json(store.read_meta(checkpoint)["progress"]))
    return pieces_and_next_loss(config, engine, groups.data_size)


def progress(engine: Engine) -> dict[str, Any]:
    return {"progress": engine.progress().to_json()}


def pieces_and_next_loss(config: RunConfig, engine: Engine, data_size: int) -> dict[str, Any]:
    pieces = {key: [(offset, piece.numpy().copy()) for offset, piece in held.pieces.items()]
              for key, held in engine.export_state().items()}  # fmt: skip
    loss = engine.step([random_batch(config, ["iat", "it"], seed=99)], 1e-2).losses["total"]
    destroy_groups()
    return {"pieces": pieces, "loss": loss, "data_size": data_size}


def whole(ranks: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """The tensors put together from the pieces of all ranks."""
    found = {}
    for key in {key for rank in ranks for key in rank["pieces"]}:
        pieces = [piece for rank in ranks for piece in rank["pieces"].get(key, [])]
        ends = [np.add(offset, numbers.shape) for offset, numbers in pieces]
        found[key] = np.full(np.max(ends, axis=0), np.nan, dtype=np.float32)
        for offset, numbers in pieces:
            found[key][tuple(slice(o, o + n) for o, n in zip(offset, numbers.shape, strict=True))] = numbers
    return found


def save_all(root: Path) -> dict[str, dict[str, Any]]:
    with process_group(timeout_minutes=0.5) as device:
        return {name: train_and_save(config_of(root, name), device, (2,), 1) for name in LAYOUTS}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, dict[str, Any]]]]:
    """A run of every layout, and what each rank held when it was saved."""
    root = tmp_path_factory.mktemp("runs")
    return root, run_ranks(2, save_all, root)


def load_all(root: Path, pairs: list[tuple[str, str]]) -> dict[tuple[str, str], dict[str, Any]]:
    with process_group(timeout_minutes=0.5) as device:
        roots = {then: config_of(root, then).checkpoint_root for then, _ in pairs}
        return {(then, now): load(config_of(root, now), roots[then], device) for then, now in pairs}


def test_weights_and_moments_of_an_engine_go_to_other_layouts(saved: tuple[Path, list[Any]]) -> None:
    root, ranks_then = saved
    names = list(LAYOUTS)
    one = run_ranks(1, load_all, root, [(name, "one") for name in names])
    two = run_ranks(2, load_all, root, list(zip(names, names[1:] + names[:1], strict=True)))
    for ranks in (one, two):
        for then, now in ranks[0]:
            expected, found = whole([rank[then] for rank in ranks_then]), whole([rank[then, now] for rank in ranks])
            assert found.keys() == expected.keys()
            for key, numbers in expected.items():
                np.testing.assert_array_equal(found[key], numbers, err_msg=f"{then} -> {now}: {key}")
            before, after = ranks_then[0][then], ranks[0][then, now]
            if before["data_size"] == after["data_size"]:  # the same global batch: equal up to the order of sums
                assert after["loss"] == pytest.approx(before["loss"], rel=1e-5), (then, now)


def test_the_last_checkpoints_are_kept_and_the_newest_is_found(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    run_ranks(1, save, config, (1, 2, 3), 2)
    folders = sorted(path.name for path in (config.run_dir / "checkpoints").glob("step_*"))
    assert folders == ["step_00000002", "step_00000003"]
    newest = store.find_latest(config.checkpoint_root)
    assert newest is not None and store.read_meta(newest)["step"] == 3


def test_a_torn_checkpoint_is_never_found(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    run_ranks(1, save, config, (1, 2), 2)
    root = config.run_dir / "checkpoints"
    (root / "step_00000002" / "manifest.json").unlink()  # as if killed before the last file
    (root / "step_00000009.tmp").mkdir()  # as if killed before the rename
    found = store.find_latest(config.checkpoint_root)
    assert found is not None and found.name == "step_00000001"


def test_a_model_loads_whole_in_one_process(saved: tuple[Path, list[Any]]) -> None:
    root, ranks = saved
    for layout in LAYOUTS:
        config = config_of(root, layout)
        run_config.dump(config, config.run_dir / "config.yaml")
        model, loaded, step = load_model(config.run_dir)
        assert (loaded, step) == (config, 2)
        held = whole([rank[layout] for rank in ranks])
        for name, parameter in model.named_parameters():
            np.testing.assert_array_equal(parameter.detach().numpy(), held[f"model/mmmoe.{name}"], err_msg=name)


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    run_ranks(1, save, config)
    checkpoint = store.find_latest(config.checkpoint_root)
    assert checkpoint is not None
    with pytest.raises(ValueError, match=r"lacks model/mmmoe\.trunk\.unheard_of"):
        store.load_weights(checkpoint, {"mmmoe.trunk.unheard_of": torch.zeros(1)})


def test_an_empty_run_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no run in"):
        load_model(tmp_path)
