"""The contenders of the attention benchmark compute the same."""

from __future__ import annotations

import pytest
import torch

from benchmarks.attention import contenders


@pytest.mark.parametrize("kind", ["bidirectional", "prefixed", "causal"])
@pytest.mark.parametrize("lengths", [[5, 12, 1, 12], [7, 7, 7]])
def test_contenders_agree(lengths: list[int], kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    qkv = [torch.randn(sum(lengths), 2, 8, generator=generator, dtype=torch.float64) for _ in range(3)]
    functions = contenders(lengths, kind, torch.device("cpu"))
    assert list(functions) == ["ours", "buckets", *([] if kind == "prefixed" else ["each", "masked"])]
    outs = [function(*qkv) for function in functions.values()]
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=1e-10, atol=1e-10)
