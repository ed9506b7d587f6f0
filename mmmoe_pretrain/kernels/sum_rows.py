"""The sum of each row's assignments, weighted or not; replaces the ``embedding_bag`` of ``moe.plan.ExpertPlan``.

It brings experts' outputs back to their tokens, and is the backward pass of the gather before the experts. A program
adds one row's assignments in their order, in fp32, and rounds once: no atomics, so the result is always the same, and
what is not finite stays in the rows that it belongs to.

Shapes: A assignments of m rows, D their width.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # columns of a program


@triton.jit
def forward_kernel(
    y, place, offsets, weights, out, rows, assignments, size, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    begin = tl.load(offsets + row)
    end = tl.load(offsets + row + 1, mask=row + 1 < rows, other=assignments)
    for i in range(begin, end):
        assignment = tl.load(place + i)
        values = tl.load(y + assignment * size + columns, mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            values *= tl.load(weights + assignment).to(tl.float32)
        total += values
    tl.store(out + row * size + columns, total, mask=inside)


def sum_rows(y_AD: Tensor, place_A: Tensor, offsets_m: Tensor, weights_A: Tensor | None = None) -> Tensor:
    """[A, D] -> [m, D] in the type of ``y_AD``. ``place_A``, ``offsets_m``: see ``ExpertPlan``. No gradient."""
    (assignments, size), rows = y_AD.shape, offsets_m.shape[0]
    out_mD = y_AD.new_empty(rows, size)
    if rows:
        forward_kernel[(rows, triton.cdiv(size, BLOCK))](
            y_AD.contiguous(), place_A.contiguous(), offsets_m.contiguous(),  # a column in ``plan_of_slots``
            None if weights_A is None else weights_A.contiguous(), out_mD, rows, assignments, size,
            WEIGHTED=weights_A is not None, BLOCK=BLOCK,
        )  # fmt: skip
    return out_mD
