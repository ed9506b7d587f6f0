"""Both libraries give the products of fp64 within rounding, and each is used where it is named."""

import pytest
import torch

from mmmoe_pretrain.moe.cpu.matmul import HAS_ONEDNN, linear, matmul, matmul_into


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("products", ["auto", "torch", "onednn"])
def test_a_linear_layer_and_its_gradients_equal_those_of_fp64(products: str) -> None:
    x, weight, grad = normal(9, 32), normal(24, 32, seed=1), normal(9, 24, seed=2)
    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    y = linear(*leaves, products)
    found = [y, *torch.autograd.grad(y, leaves, grad)]
    wide = [x.double() @ weight.double().t(), grad.double() @ weight.double(), grad.double().t() @ x.double()]
    for ours, exact in zip(found, wide, strict=True):
        # Sums of up to 32 terms near 1: a few units of 6e-8 of the partial sums, which are below 32.
        torch.testing.assert_close(ours, exact.float(), rtol=1e-5, atol=1e-5)


def calls_of(products: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often three products called oneDNN's operator."""
    calls = []

    class Operators:
        @staticmethod
        def _linear_pointwise(a: torch.Tensor, b: torch.Tensor, *_: object) -> torch.Tensor:
            calls.append(products)
            return a @ b.t()

    monkeypatch.setattr(torch.ops, "mkldnn", Operators)
    a, b = normal(3, 4), normal(4, 5, seed=1)
    out = torch.empty(3, 5)
    matmul_into(out, a, b, products)
    torch.testing.assert_close(out, a @ b)
    torch.testing.assert_close(matmul(a, b, products), a @ b)
    torch.testing.assert_close(linear(a, b.t(), products), a @ b)
    return len(calls)


@pytest.mark.skipif(not HAS_ONEDNN, reason="this torch has no oneDNN")
@pytest.mark.parametrize("products, calls", [("auto", 3), ("torch", 0), ("onednn", 3)])
def test_the_library_that_is_named_multiplies(products: str, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert calls_of(products, monkeypatch) == calls
