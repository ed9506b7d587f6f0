"""Expert groups whose size is auto: by the tokens of the training data, as the run's config has them from then on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.checkpoint import store
from mmmoe_pretrain.checkpoint.model import CONFIG
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.loader import MicrobatchDataset
from mmmoe_pretrain.modalities import build_modalities
from mmmoe_pretrain.parallel.groups import HostGroups
from mmmoe_pretrain.train import budgets
from tests.support import tiny_values

STEPS = 3  # of two microbatches of 8 samples
GROUPS = [{"modalities": ["image"], "num_experts": "auto"}, {"modalities": ["audio", "text"], "num_experts": "auto"},
          {"num_experts": 2}]  # fmt: skip
MOE = {"num_experts": 16, "expert_hidden_size": 8, "expert_groups": GROUPS, "group_multiple": 2, "every": 1,
       "layers": {1: {"num_experts": 6, "expert_groups": GROUPS[:2]}}}  # fmt: skip


def config_in(root: Path, data: Path, **more: Any) -> RunConfig:
    values = tiny_values(root, **more)
    values["train"]["steps"] = STEPS
    values["data"] |= {"train": [{"path": str(data / "train")}], "tokenizer": str(data / "tokens.model")}
    return run_config.parse({**values, "moe": more.get("moe", MOE)})


def settle(config: RunConfig, overwrite: bool = False) -> list[list[int]]:
    """Sizes of the groups of both layers."""
    modalities = build_modalities(config.modalities, config.data.tokenizer)
    moe = budgets.settle(config, modalities, HostGroups(), overwrite).moe
    assert not moe.auto_layers
    return [[group.num_experts for group in moe.for_layer(i).groups] for i in range(2)]


def test_experts_follow_the_tokens_of_the_data_and_stay(tmp_path: Path, tiny_data: Path) -> None:
    config = config_in(tmp_path, tiny_data)
    modalities = build_modalities(config.modalities, config.data.tokenizer)
    dataset, expected = MicrobatchDataset(config, modalities), Counter[str]()
    counted = budgets.count_tokens(config, modalities)
    for number in range(2 * STEPS):  # all of the run, fewer than 512
        batch, _ = dataset.pack(number, list(dataset.samples(number, range(8))))
        for name, rows in batch.rows.items():
            expected[name] += len(rows)
    assert counted == expected
    sizes = settle(config)
    image, others = counted["image"], counted["audio"] + counted["text"]
    # 14 experts in pairs: of all ways to divide 7 pairs, the one whose ratio is nearest to that of the tokens.
    nearest = min(range(1, 7), key=lambda pairs: abs(pairs / 7 - image / (image + others)))
    assert sizes[0] == [2 * nearest, 14 - 2 * nearest, 2] and sum(sizes[1]) == 6
    resolved = budgets.settle(config, modalities, HostGroups(), False)
    config.run_dir.mkdir(parents=True)
    run_config.dump(resolved, config.run_dir / CONFIG)
    assert run_config.load(config.run_dir / CONFIG).moe == resolved.moe
    saved = config.model_copy(update={"moe": config.moe.with_budgets({"image": 1.0, "audio": 9.0, "text": 0.0})})
    run_config.dump(saved, config.run_dir / CONFIG)
    assert settle(config) == [[2, 12, 2], [2, 4]] != sizes
    assert settle(config, overwrite=True) == sizes
    assert budgets.settle(saved, modalities, HostGroups(), False) is saved


def test_a_run_whose_folder_is_on_another_disk_keeps_the_sizes_of_its_checkpoint(
    tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_in(tmp_path, tiny_data)
    saved = config.model_copy(update={"moe": config.moe.with_budgets({"image": 1.0, "audio": 9.0, "text": 0.0})})
    monkeypatch.setattr(store, "find_latest", lambda root: "step_00000003")
    monkeypatch.setattr(store, "read_meta", lambda checkpoint: {"config": saved.model_dump(mode="json")})
    assert settle(config) == [[2, 12, 2], [2, 4]] != settle(config, overwrite=True)


def test_sizes_that_are_not_known_before_the_start_are_refused(tmp_path: Path, tiny_data: Path) -> None:
    config = config_in(tmp_path, tiny_data)
    stream = [config.data.train[0].model_copy(update={"path": "pipe:cat x.tar"})]
    streamed = config.model_copy(update={"data": config.data.model_copy(update={"train": tuple(stream)})})
    with pytest.raises(
        ValueError, match=r"the samples of a stream \(pipe:cat \.\.\.\) are not known .* give numbers"
    ):
        settle(streamed)
    losses = {"min_experts": {"image": 11}, "global_entropy": 0.1}
    with pytest.raises(ValueError, match="min_experts of image is 11, and its tokens reach"):
        settle(config_in(tmp_path, tiny_data, moe={**MOE, "layers": {}, "losses": losses}))
