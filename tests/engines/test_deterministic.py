"""train.deterministic: on CPUs by training, on GPUs by the operations that a step uses there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mmmoe_pretrain.parallel.runtime import deterministic_operations, process_group
from mmmoe_pretrain.plan import activations
from mmmoe_pretrain.plan.build import build
from mmmoe_pretrain.plan.live import LiveTensors
from mmmoe_pretrain.plan.peak import rank_memories
from tests.distributed import run_ranks
from tests.layouts.cases import STEPS, Case
from tests.layouts.train import train_case
from tests.support import objectives, tiny_config

# Operators that raise on CUDA once deterministic ones are asked for, by how their names begin: the second list of
# torch.use_deterministic_algorithms's documentation, without EmbeddingBag, which is there for its mode max alone.
REFUSED = (
    "_adaptive_avg_pool", "adaptive_max_pool", "avg_pool3d_backward", "fractional_max_pool", "grid_sampler",
    "max_pool3d_with_indices_backward", "max_unpool", "reflection_pad", "replication_pad", "upsample_", "nll_loss2d",
    "_ctc_loss_backward", "histc", "kthvalue", "median", "nanmedian", "put_", "scatter_reduce", "cumsum",
)  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "convolutions": {},
    "linear stems, recomputed blocks, cached losses": {
        "modalities": {"image": {"kind": "image", "size": 16, "stem": "linear"},
                       "audio": {"kind": "audio", "max_seconds": 0.4, "stem": "linear"},
                       "text": {"kind": "text", "max_tokens": 16, "positions": "learned"}},
        "objectives": objectives({"cached": True}),
        "train": {"recompute": "blocks", "global_batch_size": 16},
    },
    "batch priority with a capacity": {"moe": {"num_experts": 4, "expert_hidden_size": 8, "capacity_factor": 1.0,
                                               "batch_priority": True, "losses": {"balance": 0.01}}},
    "expert choice": {"moe": {"num_experts": 4, "expert_hidden_size": 8, "router": "expert_choice"},
                      "objectives": objectives(captioning=None)},
    "sigmoid with a bias": {"moe": {"num_experts": 4, "expert_hidden_size": 8, "router": "sigmoid_top_k",
                                    "bias_balancing": {}}},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_no_operation_of_a_step_on_a_gpu_refuses_to_be_deterministic(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: set[str] = set()

    class Recorded(LiveTensors):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.name().partition("::")[2]
            if not (name.startswith("cumsum") and not args[0].is_floating_point()):
                used.add(name)
            return super().__torch_dispatch__(func, types, args, kwargs)

    monkeypatch.setattr(activations, "LiveTensors", Recorded)
    train = {"precision": "bf16", **KINDS[kind].get("train", {"global_batch_size": 16})}
    rank_memories(build(tiny_config(Path("unused"), **{**KINDS[kind], "train": train}), 1), device="cuda")
    assert {"index_select", "mm"} <= {name.partition(".")[0] for name in used}
    assert {name for name in used if name.startswith(REFUSED)} == set()


@pytest.mark.parametrize("engine", ["megatron", "deepspeed"])
def test_engines_train_with_deterministic_operations_as_they_do_without(engine: str) -> None:
    def trained() -> list[tuple[bool, list[dict[str, float]]]]:
        found = []
        for wanted in (False, True):
            with deterministic_operations(wanted), process_group(timeout_minutes=1) as device:
                on = torch.are_deterministic_algorithms_enabled()
                found.append((on, train_case(Case("one process", 1, engine, 1), STEPS, device).losses))
        return [*found, (torch.are_deterministic_algorithms_enabled(), [])]

    without, with_, after = run_ranks(1, trained)[0]
    assert (without[0], with_[0], after[0]) == (False, True, False)
    assert with_[1] == without[1]


def test_a_workspace_of_cublas_that_is_not_deterministic_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(ValueError, match="CUBLAS_WORKSPACE_CONFIG is :0:0"), deterministic_operations(wanted=True):
        pass
    assert not torch.are_deterministic_algorithms_enabled()
