"""The model of a GPU's step: kernels by hand, products of a whole step by closed forms, and sums."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._subclasses import FakeTensorMode

from benchmarks import gpu, gpu_model
from benchmarks.modelling.trace import Kernel, Recorder, grouped_product, product
from benchmarks.modelling.variants import BEFORE, NOW
from mmmoe_pretrain.models.costs import model_costs

SAMPLES = 4


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    recorder = Recorder(pairs=1.0)
    with FakeTensorMode(), recorder, recorder.running("embedders"):
        yield recorder


def test_a_product_has_its_flops_and_bytes(recorder: Recorder) -> None:
    """[30, 40] x [40, 50] and a bias of 50."""
    a, b, bias = (torch.empty(*shape, dtype=torch.bfloat16) for shape in ((30, 40), (50, 40), (50,)))
    torch.nn.functional.linear(a, b, bias)
    assert recorder.kernels == [
        Kernel("embedders", "addmm", "forward", 2 * (30 * 40 + 40 * 50 + 30 * 50 + 50), 2 * 30 * 40 * 50, 30, "bf16")
    ]
    assert product(torch.empty(3, 4, 5), torch.empty(3, 5, 6)) == (2 * 3 * 4 * 5 * 6, 4)


def test_grouped_products_are_as_small_as_one_group() -> None:
    """16 rows in 8 groups; of the gradient of the weights the rows are what is summed over."""
    ends = torch.empty(8, dtype=torch.int32)
    assert grouped_product(torch.empty(16, 32), torch.empty(8, 32, 64), ends) == (2 * 16 * 32 * 64, 2)
    assert grouped_product(torch.empty(32, 16), torch.empty(16, 64), ends) == (2 * 16 * 32 * 64, 2)


def test_bytes_are_of_what_is_read_and_written(recorder: Recorder) -> None:
    x, y, rows = torch.empty(100, 10), torch.empty(100, 10), torch.empty(7, dtype=torch.int64)
    x.view(1000), torch.empty_like(x)  # nothing moves
    x + y  # two read, one written
    x.mul_(y)  # the same
    x.copy_(y)  # one read, one written
    x.index_select(0, rows)  # seven rows read and written, and their numbers
    x + y[:1].expand(100, 10)  # which has ten numbers
    found = [kernel.bytes for kernel in recorder.kernels]
    assert found == [12_000, 12_000, 8_000, 2 * 280 + 56, 8_040]


@pytest.fixture(scope="module")
def steps() -> dict[str, gpu_model.Step]:
    found = {"before": gpu_model.step_of(BEFORE, SAMPLES, "none", gpu.ON_CPU)}
    return found | {mode: gpu_model.step_of(NOW, SAMPLES, mode, gpu.ON_CPU) for mode in ("none", "blocks")}


def test_items_sum_to_parts_and_parts_to_the_step(steps: dict[str, gpu_model.Step]) -> None:
    for step in steps.values():
        assert {part for part, _ in step.items} == set(step.parts)
        assert sum(row.seconds for row in step.parts.values()) == pytest.approx(step.seconds)
        assert step.mfu == pytest.approx(step.useful / step.seconds / 989.4e12)
        assert step.parts["other"].seconds < 1e-3 * step.seconds  # all else belongs to a part


def test_products_of_a_step_are_those_of_closed_forms(steps: dict[str, gpu_model.Step]) -> None:
    """models/costs.py; the backward pass has twice those of the forward pass."""
    config = gpu.config_of(gpu.ON_CPU, "megatron")
    costs = model_costs(config)
    passes = config.train.num_microbatches * steps["none"].tokens
    dense = passes * sum(block.projections + block.dense for block in costs.blocks)
    experts = passes * sum(block.experts for block in costs.blocks)
    scores = passes * sum(block.scores for block in costs.blocks)
    for name in ("before", "none", "blocks"):
        parts = steps[name].parts
        assert parts["dense products"].flops == pytest.approx(3 * dense)
        assert parts["expert products"].flops == pytest.approx(3 * experts)
        assert parts["attention"].flops == pytest.approx(3.5 * scores)  # FlashAttention computes scores again


def test_kernels_move_less_and_recomputation_runs_forward_again(steps: dict[str, gpu_model.Step]) -> None:
    for part in ("norms", "head preparation", "activation"):
        assert steps["none"].parts[part].bytes < 0.6 * steps["before"].parts[part].bytes, part
    assert "recomputation" not in steps["none"].items
    assert steps["none"].parts["recomputation"].kernels == 0
    assert steps["blocks"].parts["recomputation"].flops > 0
    assert steps["blocks"].peak < steps["none"].peak < steps["before"].peak
    plain = {part: row for part, row in steps["none"].parts.items() if part != "recomputation"}
    assert {part: steps["blocks"].parts[part] for part in plain} == plain


def test_norms_read_and_write_their_rows_once(steps: dict[str, gpu_model.Step]) -> None:
    """Forward: 9 norms, of 4 blocks and the end, read and write [n, 64] in bf16, read their weights and write n
    numbers; the second of a block also reads the branch and writes the sum."""
    row = steps["none"].items["norms", "rms_norm forward"]
    tokens, microbatches = steps["none"].tokens, 2
    assert row.kernels == 9 * microbatches
    assert row.bytes == microbatches * ((9 * 2 + 4 * 2) * 2 * 64 * tokens + 9 * (4 * 64 + 4 * tokens))
    assert row.seconds == pytest.approx(row.bytes / (0.76 * 3350e9))
