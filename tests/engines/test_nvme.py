"""Optimizer state in files (ZeRO-3, NVMe): it trains like state in memory, and a checkpoint holds it.

Needs DeepSpeed's async_io, which compiles for some minutes where libaio's headers are; is skipped elsewhere.
DeepSpeed leaves sub-groups below 1 MiB in memory, so the experts here are wide.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.engines import deepspeed as deepspeed_engine
from mmmoe_pretrain.engines import deepspeed_setup
from mmmoe_pretrain.engines.apply import build_engine
from mmmoe_pretrain.engines.deepspeed_config import deepspeed_json
from mmmoe_pretrain.parallel.groups import SINGLE
from mmmoe_pretrain.parallel.mesh import destroy_groups
from mmmoe_pretrain.parallel.runtime import process_group
from tests.distributed import groups_of, run_ranks
from tests.engines.test_skipped_steps import InfiniteGradient, difference, held, same, step
from tests.layouts.cases import config_of

deepspeed_engine.prepare()  # before the first fork


@pytest.fixture(scope="module")
def async_io() -> None:
    try:
        deepspeed_setup.need_async_io()
    except ValueError as error:
        pytest.skip(str(error))


def build(root: Path, device: torch.device, target: str, precision: str = "fp32") -> Any:
    offload: dict[str, Any] = {"nvme_path": str(root / "nvme")} if target == "nvme" else {}
    zero = {"param_persistence_threshold": 0, "sub_group_size": 300_000, "offload_optimizer": offload}
    parallel = {"engine": "deepspeed", "zero_stage": 3, "expert_parallel_size": 2, "offload_optimizer": target,
                "deepspeed": {"zero_optimization": zero}}  # fmt: skip
    values = config_of(root, parallel, precision, {"loss_scale": {"initial": 256.0}}).model_dump(mode="json")
    values["model"]["hidden_size"], values["moe"]["expert_hidden_size"] = 32, 2048
    config = run_config.parse(values)
    return build_engine(config, groups_of(config.parallel, config.moe.group_sizes), device)


def numbers(results: list[Any]) -> list[tuple[float, float]]:
    return [(result.losses["total"], result.grad_norm) for result in results]


def train_save_and_resume(root: Path, precision: str) -> dict[str, Any]:
    with process_group(timeout_minutes=1) as device:
        in_memory = build(root, device, "cpu", precision)
        expected = numbers([step(in_memory, i) for i in range(4)])
        weights = held(in_memory)
        destroy_groups()

        engine = build(root, device, "nvme", precision)
        files = [path.stat().st_size for path in (root / "nvme" / "tiny").rglob("*.swp")]
        gradient = InfiniteGradient(engine)
        found = [step(engine, 0), step(engine, 1)]
        before, gradient.on = held(engine), True
        skipped = step(engine, 7).skipped
        gradient.on = False
        untouched = same(before, held(engine))
        state, progress = {name: s.clone() for name, s in engine.export_state().items()}, engine.progress()
        destroy_groups()

        resumed = build(root, device, "nvme", precision)
        resumed.import_state(state, progress)
        complete = same(before, held(resumed))
        found += [step(resumed, 2), step(resumed, 3)]
        after = held(resumed)
        destroy_groups()
    return {
        "files": sum(files), "expected": expected, "found": numbers(found), "skipped": skipped,
        "untouched": untouched, "complete": complete, "difference": difference(weights, after),
    }  # fmt: skip


@pytest.mark.timeout(900)  # the operator may have to be compiled
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_state_in_files_trains_like_state_in_memory_and_is_saved(
    tmp_path: Path, async_io: None, precision: str
) -> None:
    """Four steps, one of them skipped, with a new engine in between."""
    for rank in run_ranks(2, train_save_and_resume, tmp_path, precision):
        assert rank["files"] > 2**20
        assert rank["skipped"] and rank["untouched"] and rank["complete"]
        np.testing.assert_allclose(rank["found"], rank["expected"], rtol=1e-6 if precision == "fp32" else 1e-3)
        assert rank["difference"] <= (1e-7 if precision == "fp32" else 1e-4)


def settings(**parallel: Any) -> dict[str, Any]:
    return deepspeed_json(config_of(Path(), {"engine": "deepspeed", "zero_stage": 3, **parallel}), SINGLE, 1001)


def test_files_lie_in_a_folder_of_the_run() -> None:
    own = {"zero_optimization": {"offload_optimizer": {"nvme_path": "/disk"}}}
    offload = settings(offload_optimizer="nvme", deepspeed=own)["zero_optimization"]["offload_optimizer"]
    assert offload == {"device": "nvme", "pin_memory": False, "nvme_path": "/disk/tiny"}
    with pytest.raises(ValueError, match=r"nvme_path: /local/nvme"):
        settings(offload_optimizer="nvme")


def test_without_libaio_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import deepspeed.ops.op_builder as builders

    class NotThere:
        def is_compatible(self, verbose: bool) -> bool:
            return False

    monkeypatch.setattr(builders, "AsyncIOBuilder", NotThere)
    with pytest.raises(ValueError, match=r"apt-get install libaio-dev.*offload_optimizer: cpu"):
        deepspeed_setup.need_async_io()
