"""Triton kernels against the PyTorch functions that they replace: on a GPU, else in Triton's interpreter (chosen in
``tests/conftest.py``). All compute in fp32; the interpreter then cuts bfloat16 off where a GPU rounds it."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmmoe_pretrain import kernels
from mmmoe_pretrain.models import attention, block
from mmmoe_pretrain.moe import activation
from mmmoe_pretrain.moe.plan import plan_of_slots

pytest.importorskip("triton", reason="triton is not installed; pip install triton")
heads, rms_norm, sum_rows, swiglu = (
    importlib.import_module(f"mmmoe_pretrain.kernels.{name}") for name in ("heads", "rms_norm", "sum_rows", "swiglu")
)
ON_GPU = torch.cuda.is_available()
pytestmark = [pytest.mark.gpu] if ON_GPU else []
DEVICE = "cuda" if ON_GPU else "cpu"
TYPES = [torch.float32, torch.bfloat16, torch.float16]
# fp32: sums in another order. Half: one rounding at the end against the reference's in fp64 (8 and 11 bits), in which
# a number cut off is up to 2^-7 of itself away.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions that are compared with do not choose the kernels themselves."""
    monkeypatch.setattr(kernels, "usable", lambda x: False)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def outputs_and_gradients(function: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    outs = out if isinstance(out, tuple) else (out,)
    grads = [draw(i, *o.shape).to(o) for i, o in enumerate(outs)]
    return [*outs, *torch.autograd.grad(outs, leaves, grads)]


def compare(ours: Callable[..., Any], reference: Callable[..., Any], inputs: Sequence[Tensor], dtype: Any) -> None:
    """``inputs`` that are matrices come in ``dtype``, vectors in fp32; the reference computes in fp64."""
    given = [x.to(DEVICE, dtype if x.ndim > 1 else torch.float32) for x in inputs]
    found = outputs_and_gradients(ours, given)
    expected = outputs_and_gradients(reference, [x.double() for x in given])
    for mine, theirs, like in zip(found, expected, [*found[: len(found) - len(given)], *given], strict=True):
        assert (mine.shape, mine.dtype) == (theirs.shape, like.dtype)
        scale = theirs.abs().max().item() if theirs.numel() else 1.0
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=TOLERANCE[dtype] * scale)


def norm_in_fp64(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + block.EPS) * weight


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("rows", "size"), [(0, 48), (1, 8), (5, 48), (70, 32), (3, 1500)])
def test_rms_norm(rows: int, size: int, dtype: torch.dtype) -> None:
    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm.rms_norm(x, weight, block.EPS)

    compare(ours, norm_in_fp64, [draw(1, rows, size), 1 + draw(2, size)], dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("rows", "size"), [(0, 48), (5, 48), (70, 32), (3, 1500)])
@pytest.mark.parametrize("has_branch", [True, False])
def test_a_residual_sum_and_its_norm(has_branch: bool, rows: int, size: int, dtype: torch.dtype) -> None:
    """Both outputs have a gradient."""

    def ours(x: Tensor, weight: Tensor, *branch: Tensor) -> tuple[Tensor, Tensor]:
        return rms_norm.add_rms_norm(x, branch[0] if branch else None, weight, block.EPS)

    def in_fp64(x: Tensor, weight: Tensor, *branch: Tensor) -> tuple[Tensor, Tensor]:
        total = x + branch[0] if branch else x * 1.0
        return total, norm_in_fp64(total, weight)

    inputs = [draw(1, rows, size), 1 + draw(2, size), draw(3, rows, size)]
    compare(ours, in_fp64, inputs if has_branch else inputs[:2], dtype)


@pytest.mark.parametrize("unused", [0, 1])
def test_an_output_that_nobody_uses_has_no_gradient(unused: int) -> None:
    x, branch = (draw(seed, 5, 48).to(DEVICE).requires_grad_() for seed in (1, 3))
    weight = (1 + draw(2, 48)).to(DEVICE).requires_grad_()
    found = rms_norm.add_rms_norm(x, branch, weight, block.EPS)
    expected = x + branch, norm_in_fp64(x + branch, weight)
    grad = draw(4, 5, 48).to(DEVICE)
    for mine, theirs in zip(*(torch.autograd.grad(outs[1 - unused], [x, branch, weight], grad, materialize_grads=True)
                              for outs in (found, expected)), strict=True):  # fmt: skip
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-6 * max(1.0, theirs.abs().max().item()))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("tokens", "num_heads", "num_kv_heads", "size"),
    [(0, 2, 2, 8), (7, 3, 3, 12), (2, 16, 16, 128), (9, 1, 1, 2), (5, 6, 2, 12), (3, 5, 1, 8)],
)
def test_prepare_heads(tokens: int, num_heads: int, num_kv_heads: int, size: int, dtype: torch.dtype) -> None:
    angle = draw(3, tokens, size // 2).to(DEVICE)
    cos, sin = angle.cos(), angle.sin()

    def ours(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return heads.prepare_heads(qkv, num_kv_heads, cos, sin, attention.EPS)

    def in_fp64(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return attention.prepare_heads(qkv, num_kv_heads, cos.double(), sin.double())

    compare(ours, in_fp64, [draw(4, tokens, num_heads + 2 * num_kv_heads, size)], dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("rows", "size"), [(0, 8), (5, 40), (3, 1500)])
@pytest.mark.parametrize("is_weighted", [True, False])
def test_swiglu(rows: int, size: int, is_weighted: bool, dtype: torch.dtype) -> None:
    def in_fp64(up: Tensor, *weights: Tensor) -> Tensor:
        gate, value = up.chunk(2, dim=-1)
        h = gate / (1 + torch.exp(-gate)) * value
        return h * weights[0][:, None] if weights else h

    inputs = [draw(5, rows, 2 * size), draw(6, rows)]
    compare(swiglu.swiglu, in_fp64, inputs if is_weighted else inputs[:1], dtype)


def test_swiglu_writes_again_what_it_returned() -> None:
    """Over the gradient that it reads, too."""
    up, weights, again = (draw(*of).to(DEVICE) for of in ((5, 3, 2 * 1500), (6, 3), (7, 3, 1500)))
    expected = swiglu.backward(again, up, weights)
    torch.testing.assert_close(swiglu.backward(again, up, weights, again), expected, rtol=0, atol=0)
    torch.testing.assert_close(again, swiglu.forward(up, weights), rtol=1e-6, atol=1e-6)  # products in another order


NOWHERE = 4
SLOTS = {
    "some rows without assignments": torch.tensor([[2, 1, NOWHERE], [NOWHERE] * 3, [0, NOWHERE, 2], [NOWHERE] * 3]),
    "one row": torch.tensor([[0, 1, 2]]),
    "no assignment": torch.full((2, 2), NOWHERE),
    "no row": torch.zeros(0, 2, dtype=torch.int64),
}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("is_weighted", [True, False])
def test_sum_rows(slots: str, is_weighted: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "usable", lambda x: True)
    plan, _ = plan_of_slots(SLOTS[slots].to(DEVICE), NOWHERE)
    y = draw(8, plan.num_assignments, 1500).to(DEVICE, dtype)
    weights = draw(9, plan.num_assignments).to(DEVICE) if is_weighted else None
    found = plan.sum_by_row(y, weights)
    scaled = y.double() if weights is None else y.double() * weights[:, None]
    expected = torch.zeros(plan.num_rows, 1500, dtype=torch.float64, device=DEVICE).index_add_(0, plan.rows_A, scaled)
    assert found.dtype == dtype
    scale = expected.abs().max().item() if expected.numel() else 1.0
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=TOLERANCE[dtype] * scale)


def test_what_is_not_finite_stays_in_its_row() -> None:
    plan, _ = plan_of_slots(SLOTS["some rows without assignments"].to(DEVICE), NOWHERE)
    y = draw(8, plan.num_assignments, 40).to(DEVICE)
    y[plan.rows_A == 2] = torch.nan
    found = sum_rows.sum_rows(y, plan.place_A, plan.offsets_m)
    assert found.isnan().any(1).tolist() == [False, False, True, False]
    assert not found[[1, 3]].any()


@pytest.mark.skipif(ON_GPU, reason="the kernels have been compiled and run")
def test_kernels_compile_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.kernels.compile_ahead"],
        env={**kept, "TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(done.stdout.splitlines()) == 11  # of norms four, of heads and of sums two, of SwiGLU three


@pytest.mark.gpu
def test_a_gpu_takes_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    x = torch.randn(4, 64, device="cuda", dtype=torch.bfloat16)
    assert kernels.usable(x)
    assert not kernels.usable(x.cpu())
    up, weights = draw(1, 4, 128).to(x), draw(2, 4).to(x.device)
    rounded_between = activation.swiglu(up.cpu()) * weights.cpu()[:, None].bfloat16()
    torch.testing.assert_close(
        activation.weighted("swiglu", up, weights).cpu(), rounded_between, rtol=0.02, atol=0.02
    )


@pytest.mark.parametrize("lacking", ["", "compiler", "headers"])
def test_without_what_triton_builds_with_pytorch_computes(
    lacking: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiler, include = tmp_path / "bin/gcc", tmp_path / "include"
    for path in (compiler, include / "Python.h"):
        path.parent.mkdir()
        path.touch(mode=0o755)
    (compiler if lacking == "compiler" else include / "Python.h" if lacking else tmp_path / "none").unlink(True)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(compiler.parent))
    monkeypatch.setattr("sysconfig.get_path", lambda name, scheme: str(include))
    assert kernels.triton_works.__wrapped__() is not bool(lacking)
    message = {"": "", "compiler": "a C compiler", "headers": f"Python's headers ({include / 'Python.h'})"}
    assert message[lacking] in caplog.text and bool(caplog.text) is bool(lacking)
