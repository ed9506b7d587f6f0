"""What compiled functions hold, by hand; benchmarks/plan.py compares whole compiled steps."""

from __future__ import annotations

import gc
from pathlib import Path

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from mmmoe_pretrain.models.block import RMSNorm
from mmmoe_pretrain.parallel.layout import resolve_layout
from mmmoe_pretrain.parallel.stages import Stage
from mmmoe_pretrain.plan.activations import stage_memory
from mmmoe_pretrain.plan.build import pretended_groups
from mmmoe_pretrain.plan.compiled import hold_as_compiled
from mmmoe_pretrain.plan.live import LiveTensors
from mmmoe_pretrain.plan.workload import full_batch
from tests.support import tiny_config

ROWS, WIDTH = 8, 16
X, ROOTS = ROWS * WIDTH * 4, ROWS * 4


def test_a_compiled_norm_keeps_one_number_a_row(tmp_path: Path) -> None:
    """Beside its input and output; by itself it keeps normalised rows, too."""
    live = LiveTensors()
    with FakeTensorMode():
        norm = RMSNorm(WIDTH)
        hold_as_compiled(norm, live)
        with live:
            x = torch.empty(ROWS, WIDTH, requires_grad=True)
            y = norm(x)
            assert live.live == 2 * X + ROOTS
            y.backward(torch.empty_like(y))
            gc.collect()
            assert live.live == 3 * X + WIDTH * 4  # x, y, the gradients of x and of the weight
            del x, y
            gc.collect()
            assert live.live == WIDTH * 4  # nothing holds what it was traced with


def test_recomputed_functions_hold_their_input_alone(tmp_path: Path) -> None:
    live = LiveTensors()
    with FakeTensorMode():
        block = nn.Sequential(RMSNorm(WIDTH), RMSNorm(WIDTH))
        hold_as_compiled(block, live)
        with live:
            x = torch.empty(ROWS, WIDTH, requires_grad=True)
            y = checkpoint(block, x, use_reentrant=False)
            gc.collect()
            assert live.live == 2 * X
            y.backward(torch.empty_like(y))


def test_compiled_blocks_keep_less(tmp_path: Path) -> None:
    kept = []
    for compiling in ("none", "blocks"):
        config = tiny_config(tmp_path, train={"compile": compiling})
        with pretended_groups(resolve_layout(config, 1)) as groups:
            stage = Stage(0, config.model.num_layers)
            kept.append(stage_memory(config, groups, stage, full_batch(config, 2), device="cpu").memory.kept)
    assert kept[1] < kept[0]
