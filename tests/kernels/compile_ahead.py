"""Compile every kernel for GPUs that are not here: ``python -m tests.kernels.compile_ahead`` prints a line each.

In a process of its own, since ``tests/conftest.py`` lets the kernels be interpreted.
"""

from __future__ import annotations

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mmmoe_pretrain.kernels import heads, rms_norm, sum_rows, swiglu

CAPABILITIES = (80, 90, 100)
HALF, FULL, INDEX, INT, FLOAT = "*bf16", "*fp32", "*i64", "i32", "fp32"
# kernel -> the types of its arguments in their order; a number or None is a constant
KERNELS: dict[str, tuple[Any, list[Any]]] = {
    "rms_norm forward": (
        rms_norm.forward_kernel, [HALF, None, FULL, None, HALF, FULL, INT, FLOAT, False, 2048],
    ),
    "rms_norm forward of a sum": (
        rms_norm.forward_kernel, [HALF, HALF, FULL, HALF, HALF, FULL, INT, FLOAT, True, 2048],
    ),
    "rms_norm backward": (
        rms_norm.backward_kernel, [HALF, None, HALF, FULL, FULL, HALF, FULL, INT, INT, False, rms_norm.ROWS, 2048],
    ),
    "rms_norm backward of a sum": (
        rms_norm.backward_kernel, [HALF, HALF, HALF, FULL, FULL, HALF, FULL, INT, INT, True, rms_norm.ROWS, 2048],
    ),
    "heads forward": (heads.forward_kernel, [HALF, FULL, FULL, HALF, HALF, HALF, FULL, INT, INT, INT, FLOAT, 16, 64]),
    "heads backward": (
        heads.backward_kernel, [HALF, HALF, HALF, HALF, HALF, FULL, FULL, FULL, HALF, INT, INT, INT, 16, 64],
    ),
    "sum_rows": (
        sum_rows.forward_kernel, [HALF, INDEX, INDEX, None, HALF, INT, INT, INT, False, sum_rows.BLOCK],
    ),
    "sum_rows weighted": (
        sum_rows.forward_kernel, [HALF, INDEX, INDEX, FULL, HALF, INT, INT, INT, True, sum_rows.BLOCK],
    ),
    "swiglu forward": (swiglu.forward_kernel, [HALF, FULL, HALF, INT, True, swiglu.BLOCK]),
    "swiglu backward": (
        swiglu.backward_kernel, [HALF, HALF, FULL, HALF, FULL, HALF, 5632, True, True, swiglu.BLOCK],
    ),
    "swiglu backward without weights": (
        swiglu.backward_kernel, [HALF, HALF, None, HALF, None, None, 5632, False, False, swiglu.BLOCK],
    ),
}  # fmt: skip


def compile_for(kernel: Any, arguments: list[Any], capability: int) -> int:
    """Bytes of its machine code."""
    named = dict(zip(kernel.arg_names, arguments, strict=True))
    constants = {name: value for name, value in named.items() if not isinstance(value, str)}
    signature = {name: "constexpr" if name in constants else value for name, value in named.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return len(triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"])


def main() -> None:
    """Compile all for each capability."""
    for name, (kernel, arguments) in KERNELS.items():
        sizes = {capability: compile_for(kernel, arguments, capability) for capability in CAPABILITIES}
        print(name, *(f"sm_{capability} {size}" for capability, size in sizes.items()))
        assert min(sizes.values()) > 0
    sys.stdout.flush()


if __name__ == "__main__":
    main()
