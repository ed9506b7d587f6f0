"""Attention over packed segments of unlike lengths, forward and backward, beside plain calls of torch.

  ours      ``models.attend``: ``varlen_attn`` on a GPU in half precision, buckets of like length elsewhere
  buckets   the same by buckets, wherever it runs
  segments  one call of scaled_dot_product_attention (SDPA) a segment
  dense     one call of SDPA for all tokens with a mask [n, n]; left out beyond 8,192 tokens

Each mix is measured with full and with prefixed segments (half of each is its prefix, the rest causal; these have
no plain calls beside them). FLOPs are those of full attention. Prints a table and, as its last line, one JSON object.

    python benchmarks/attention.py [--quick] [--device cuda]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, its folder alone is there

from benchmarks.layer.timing import clock_for
from mmmoe_pretrain.batch import Segments
from mmmoe_pretrain.models.attend import AttentionPlan, attend, attend_buckets

MIXES = {
    "pairs": [51, 66, 196] * 32,
    "256": [256] * 64,
    "1024": [1024] * 16,
    "4096": [4096] * 4,
    "32768": [32768],
}
ON_CPU = {"pairs": [51, 66, 196] * 4, "1024": [1024] * 2}
MOST_DENSE = 8192  # tokens
PASSES = 3.5  # of the forward pass's products, backward included

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def contenders(lengths: list[int], prefixed: bool, device: torch.device) -> dict[str, Attend]:
    """By name; each takes queries, keys and values [n, H, d]."""
    prefixes = tuple(length // 2 if prefixed else 0 for length in lengths)
    plan = AttentionPlan(Segments(tuple(lengths), prefixes), device)
    found: dict[str, Attend] = {"ours": lambda q, k, v: attend(q, k, v, plan)}
    if max(lengths) <= MOST_DENSE:
        found["buckets"] = lambda q, k, v: attend_buckets(q, k, v, *plan.buckets)
    if prefixed:
        return found
    found["segments"] = lambda q, k, v: torch.cat([
        _sdpa(*parts) for parts in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    ])  # fmt: skip
    if sum(lengths) <= MOST_DENSE:
        segment_n = torch.arange(len(lengths), device=device).repeat_interleave(torch.tensor(lengths, device=device))
        mask = segment_n[:, None] == segment_n
        found["dense"] = lambda q, k, v: _sdpa(q, k, v, mask)
    return found


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1).flatten(1)


def seconds_of(function: Attend, tensors: list[Tensor], grad: Tensor, repeats: int) -> float:
    """Median of forward and backward pass."""
    clock = clock_for(tensors[0].device, False)

    def both() -> None:
        torch.autograd.grad(function(*tensors), tensors, grad)

    both()
    return statistics.median(clock(both) for _ in range(repeats))


def main() -> None:
    """Measure every mix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.device_count() else "cpu")
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    args = parser.parse_args()
    device, on_cpu = torch.device(args.device), args.device == "cpu"
    heads, size, dtype = (4, 64, torch.float32) if on_cpu else (16, 128, torch.bfloat16)
    torch.backends.cuda.enable_cudnn_sdp(False)  # as in training: it plans by shape
    if on_cpu:
        torch.set_num_threads(1)
    result: dict[str, object] = {}
    for name, lengths in (ON_CPU if on_cpu else MIXES).items():
        n = sum(lengths)
        tensors = [torch.randn(n, heads, size, device=device).to(dtype).requires_grad_() for _ in range(3)]
        grad = torch.randn(n, heads * size, device=device).to(dtype)
        flops = PASSES * 4 * heads * size * sum(length * length for length in lengths)
        for prefixed in (False, True):
            row = f"{name}{' prefixed' if prefixed else ''}"
            for contender, function in contenders(lengths, prefixed, device).items():
                seconds = seconds_of(function, tensors, grad, 3 if args.quick else 10)
                print(f"{row:<16}{contender:<10}{1e3 * seconds:>9.3f} ms{flops / seconds / 1e12:>8.1f} TFLOP/s")
                result[f"{row} {contender} ms"] = round(1e3 * seconds, 3)
    kind = "cpu" if on_cpu else torch.cuda.get_device_name(device)
    print(json.dumps({**result, "device": kind, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
