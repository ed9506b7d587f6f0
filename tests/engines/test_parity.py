"""Every layout of the Megatron engine trains like one process: losses, norms and parameters.

Tolerance: fp32 sums in another order differ by about 1e-7 relative a step; ten steps of AdamW,
which divides by the root of small second moments, let that grow to some 1e-4 in the loss, and to
some 1e-3 in the gradient's norm, which answers more steeply to a change of the parameters. Two
layouts that differ in substance (a lost gradient, a wrong scale) differ by 1e-2 after a few steps.
"""

from typing import Any

import numpy as np
import pytest

from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.pack import pack
from mmmoe_pretrain.engines.apply import build_engine
from mmmoe_pretrain.parallel.mesh import destroy_groups
from mmmoe_pretrain.parallel.runtime import process_group
from tests.distributed import groups_of, run_ranks
from tests.layouts.train import assemble, held_by_name
from tests.support import objectives, pack_settings, random_sample, tiny_config

STEPS = 10
LOSSES, NORM, TOKENS = slice(-2), -2, -1  # columns of a history
GLOBAL = ["iat", "it", "ia", "iat", "t", "at", "a", "t"]  # of a global microbatch; its second half has no image


def config_for(root: Any, expert_parallel_size: int = 1, precision: str = "fp32", num_experts: int = 4,
               clip_norm: float = 1.0) -> RunConfig:  # fmt: skip
    config = tiny_config(
        root,
        parallel={"expert_parallel_size": expert_parallel_size},
        objectives=objectives(),
        optimizer={"learning_rate": 3e-3, "warmup_steps": 0, "clip_norm": clip_norm},
    )
    train = config.train.model_copy(update={"precision": precision})
    moe = config.moe.model_copy(
        update={"num_experts": num_experts, "experts_per_token": min(2, num_experts)})  # fmt: skip
    return config.model_copy(update={"train": train, "moe": moe})


def global_microbatch(config: RunConfig, number: int, rank: int, ranks: int) -> Batch:
    """This rank's share of global microbatch ``number``; with two ranks or four, the later ones see no image."""
    share = len(GLOBAL) // ranks
    positions = range(rank * share, (rank + 1) * share)
    samples = [random_sample(100 * number + i, GLOBAL[i], config) for i in positions]
    return pack(samples, pack_settings(config), [100 * number + i for i in positions])


def train(config: RunConfig, microbatches: int) -> dict[str, Any]:
    """Losses and norms of each step, and the parameters at the end, as this rank holds them."""
    with process_group(timeout_minutes=0.5) as device:
        groups = groups_of(config.parallel, config.moe.num_experts)
        engine = build_engine(config, groups, device)
        history = []
        for step in range(STEPS):
            batches = [global_microbatch(config, step * microbatches + a, groups.data_rank, groups.data_size)
                       for a in range(microbatches)]  # fmt: skip
            result = engine.step(batches, 3e-3)
            history.append([*result.losses.values(), result.grad_norm, result.tokens])
        parameters = held_by_name(engine)
        destroy_groups()
    return {"history": np.array(history), "parameters": parameters}


def assert_equal(ranks: list[dict[str, Any]], single: dict[str, Any], rtol: float) -> None:
    for rank in ranks:
        np.testing.assert_allclose(rank["history"][:, LOSSES], single["history"][:, LOSSES], rtol=rtol, atol=rtol)
        np.testing.assert_allclose(rank["history"][:, NORM], single["history"][:, NORM], rtol=4 * rtol)
        np.testing.assert_array_equal(rank["history"][:, TOKENS], single["history"][:, TOKENS])
    for name in single["parameters"]:
        ours, alone = (assemble([rank["parameters"] for rank in some], name) for some in (ranks, [single]))
        np.testing.assert_allclose(ours, alone, rtol=0, atol=10 * rtol, err_msg=name)


@pytest.fixture(scope="module")
def singles(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """One process, by microbatches."""
    root = tmp_path_factory.mktemp("single")
    return {count: run_ranks(1, train, config_for(root), count)[0] for count in (1, 2)}


@pytest.mark.parametrize("ranks,expert_parallel_size,microbatches", [(2, 2, 1), (2, 1, 2), (4, 2, 1), (4, 4, 2)])
def test_layouts_equal_one_process(tmp_path: Any, singles: dict[int, dict[str, Any]], ranks: int,
                                   expert_parallel_size: int, microbatches: int) -> None:  # fmt: skip
    single = singles[microbatches]
    many = run_ranks(ranks, train, config_for(tmp_path, expert_parallel_size), microbatches)
    assert single["history"][-1, 0] < 0.8 * single["history"][0, 0]  # it learns, so there is something to compare
    assert_equal(many, single, rtol=5e-4)


def test_dense_data_parallelism_equals_one_process(tmp_path: Any) -> None:
    single = run_ranks(1, train, config_for(tmp_path, num_experts=1), 1)[0]
    many = run_ranks(2, train, config_for(tmp_path, num_experts=1), 1)
    assert_equal(many, single, rtol=5e-4)


def test_bf16_stays_near_fp32_and_its_layouts_agree(tmp_path: Any, singles: dict[int, dict[str, Any]]) -> None:
    """bf16 keeps 8 bits of each activation: losses stay within 5% of fp32 over ten steps. The layouts
    differ only in the order of fp32 sums over bf16 products: 1% in the first step's loss and norm."""
    fp32 = singles[1]["history"]
    one, two = (run_ranks(ranks, train, config_for(tmp_path, ranks, "bf16"), 1)[0]["history"] for ranks in (1, 2))
    np.testing.assert_allclose(one[:, 0], fp32[:, 0], rtol=0.05)
    np.testing.assert_allclose(two[:, 0], fp32[:, 0], rtol=0.05)
    np.testing.assert_allclose(two[0, [0, NORM]], one[0, [0, NORM]], rtol=0.01)
