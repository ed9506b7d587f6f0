"""The operations that the host starts on a GPU's paths, counted, beside those that the table of GPUs assumes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mmmoe_pretrain.parallel.layout import resolve_layout
from mmmoe_pretrain.parallel.stages import whole
from mmmoe_pretrain.plan.activations import stage_memory
from mmmoe_pretrain.plan.build import pretended_groups
from mmmoe_pretrain.plan.gpu_paths import gpu_paths
from mmmoe_pretrain.plan.live import LiveTensors
from mmmoe_pretrain.plan.machines import OPERATIONS
from mmmoe_pretrain.plan.workload import full_batch
from tests.support import tiny_config

# Of torch's operations, those that return a view or new memory, or ask for a property: none starts a kernel.
WITHOUT_KERNEL = {
    "view", "_unsafe_view", "t", "transpose", "expand", "slice", "select", "split", "split_with_sizes", "unsqueeze",
    "squeeze", "detach", "alias", "permute", "as_strided", "unbind", "_reshape_alias", "empty", "empty_like",
    "new_empty", "empty_strided", "new_empty_strided", "lift_fresh", "device", "_local_scalar_dense",
}  # fmt: skip
OF_A_TRITON_KERNEL = 3  # its launcher is Python


class Counted(LiveTensors):
    """``operations``: those that the host has started."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += func._schema.name.split("::")[1] not in WITHOUT_KERNEL
        return super().__torch_dispatch__(func, types, args, kwargs)

    def launched(self, name: str, arguments: tuple[Any, ...]) -> None:
        self.operations += OF_A_TRITON_KERNEL


def started(blocks: int, moe: dict[str, Any], ranks: int) -> int:
    """Operations of one microbatch, forward and backward."""
    config = tiny_config(
        Path("unused"),
        model={"hidden_size": 128, "num_heads": 2, "num_layers": blocks, "ffn_hidden_size": 64},
        moe={"every": 1, "expert_hidden_size": 64, **moe},
        parallel={"expert_parallel_size": ranks},
        train={"precision": "bf16", "global_batch_size": 4 * ranks, "num_microbatches": 1},
    )
    counted = Counted()
    with pretended_groups(resolve_layout(config, ranks)) as groups:
        batch, paths = full_batch(config, 4), partial(gpu_paths, counted.launched)
        stage_memory(config, groups, whole(blocks), batch, live=counted, paths=paths)
    return counted.operations


def test_the_table_of_gpus_has_the_operations_of_a_block() -> None:
    """Within a quarter: the count depends on the modalities, the objectives and the router."""
    dense, sparse = {"num_experts": 1, "experts_per_token": 1}, {"num_experts": 8, "experts_per_token": 2}

    def block(moe: dict[str, Any], ranks: int) -> int:
        return started(2, moe, ranks) - started(1, moe, ranks)

    counted = {"dense_block": block(dense, 1), "moe_block": block(sparse, 1)}
    counted["dispatch"] = block(sparse, 2) - counted["moe_block"]
    counted["microbatch"] = started(1, dense, 1) - counted["dense_block"]
    assert counted == pytest.approx({part: OPERATIONS[part] for part in counted}, rel=0.25)
