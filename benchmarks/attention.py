"""Attention over packed blocks of tokens, forward and backward, compared with plain calls of torch.

  ours     ``models.attend``: ``varlen_attn`` on a GPU in half precision, buckets of like length elsewhere
  buckets  the same by buckets, wherever it runs
  each     one call of scaled_dot_product_attention (SDPA) a block
  masked   one call of SDPA for all tokens with a mask [n, n]; skipped beyond 8,192 tokens

First 8,192 causal tokens as one block and as eight, with the peak of memory beyond the inputs; there ``each`` is one
call, since the blocks have one length: plain SDPA on the same tensors. Then mixes of lengths whose blocks are
bidirectional, or half a prefix and the rest causal (these have no plain calls beside them). FLOPs count the pairs of
tokens that may attend. Times are wall-clock, with --busy CPU time on CPUs. Prints a table and, as its last line, one
JSON object.

    python benchmarks/attention.py [--quick] [--busy] [--device cuda]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, its folder alone is there

from benchmarks.common.forked import on_ranks
from benchmarks.layer.timing import Clock, clock_for
from mmmoe_pretrain.batch import AttentionBlocks
from mmmoe_pretrain.models.attend import AttentionPlan, attend, attend_buckets

LONG = {"1 x 8192": [8192], "8 x 1024": [1024] * 8}
MIXES = {
    "pairs": [51, 66, 196] * 32,
    "256": [256] * 64,
    "1024": [1024] * 16,
    "4096": [4096] * 4,
    "32768": [32768],
}
ON_CPU = {"pairs": [51, 66, 196] * 4, "1024": [1024] * 2}
PREFIX = {"bidirectional": 1.0, "prefixed": 0.5, "causal": 0.0}  # share of a block that attends in both directions
MOST_MASKED = 8192  # tokens
PASSES = 3.5  # of the forward pass's products, backward included

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def blocks_of(lengths: list[int], kind: str) -> AttentionBlocks:
    return AttentionBlocks(tuple(lengths), tuple(int(PREFIX[kind] * length) for length in lengths))


def contenders(lengths: list[int], kind: str, device: torch.device) -> dict[str, Attend]:
    """By name; each takes queries, keys and values [n, H, d]."""
    plan = AttentionPlan(blocks_of(lengths, kind), device)
    found: dict[str, Attend] = {
        "ours": lambda q, k, v: attend(q, k, v, plan),
        "buckets": lambda q, k, v: attend_buckets(q, k, v, plan.buckets),
    }
    if kind == "prefixed":
        return found
    causal = kind == "causal"
    if len(set(lengths)) == 1:
        found["each"] = lambda q, k, v: _sdpa(q, k, v, len(lengths), is_causal=causal)
    else:
        found["each"] = lambda q, k, v: torch.cat([
            _sdpa(*parts, is_causal=causal)
            for parts in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
        ])  # fmt: skip
    if sum(lengths) <= MOST_MASKED:
        found["masked"] = lambda q, k, v: _sdpa(q, k, v, attn_mask=_mask(lengths, causal, device))
    return found


def _mask(lengths: list[int], causal: bool, device: torch.device) -> Tensor:
    block_n = torch.arange(len(lengths), device=device).repeat_interleave(torch.tensor(lengths, device=device))
    mask = block_n[:, None] == block_n
    return mask.tril_() if causal else mask


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, blocks: int = 1, is_causal: bool = False, attn_mask: Tensor | None = None
) -> Tensor:
    q, k, v = (x.unflatten(0, (blocks, -1)).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal)
    return out.transpose(1, 2).flatten(0, 1).flatten(1)


class Problem:
    """Tensors of one size on one device, and both passes over them."""

    def __init__(self, tokens: int, device: torch.device) -> None:
        self.heads, self.size, dtype = (4, 64, torch.float32) if device.type == "cpu" else (16, 128, torch.bfloat16)
        shape = tokens, self.heads, self.size
        self.tensors = [torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(3)]
        self.grad = torch.randn(shape, device=device).to(dtype).flatten(1)

    def run(self, function: Attend) -> None:
        torch.autograd.grad(function(*self.tensors), self.tensors, self.grad)

    def flops(self, blocks: AttentionBlocks) -> float:
        pairs = sum(full**2 + (n**2 - full**2) / 2 for n, full in zip(blocks.lengths, blocks.full, strict=True))
        return PASSES * 4 * self.heads * self.size * pairs

    def seconds(self, function: Attend, repeats: int, clock: Clock) -> float:
        """Median of both passes."""
        self.run(function)
        return statistics.median(clock(lambda: self.run(function)) for _ in range(repeats))


def peak_bytes(lengths: list[int], kind: str, name: str, device: torch.device) -> int:
    """Of both passes, beyond inputs and the gradient of the output."""
    if device.type == "cpu":
        return int(on_ranks(1, _grown, lengths, kind, name, timeout=600))
    problem, function = Problem(sum(lengths), device), contenders(lengths, kind, device)[name]
    problem.run(function)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    problem.run(function)
    return torch.cuda.max_memory_allocated(device) - before


def _grown(lengths: list[int], kind: str, name: str) -> int:
    """In a separate process without memory freed by other measurements (Linux: proc(5), clear_refs)."""
    torch.set_num_threads(1)
    device = torch.device("cpu")
    warm, problem = Problem(len(lengths), device), Problem(sum(lengths), device)
    warm.run(contenders([1] * len(lengths), kind, device)[name])
    function = contenders(lengths, kind, device)[name]
    Path("/proc/self/clear_refs").write_text("5")
    before = _high_water()
    problem.run(function)
    return _high_water() - before


def _high_water() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) << 10
    raise RuntimeError("/proc/self/status has no VmHWM")


def cpu_name() -> str:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    """Measure every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.device_count() else "cpu")
    parser.add_argument("--quick", action="store_true", help="fewer repeats, and nothing of 8,192 tokens")
    parser.add_argument("--busy", action="store_true", help="CPU time: for a machine that others use")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.backends.cuda.enable_cudnn_sdp(False)  # as in training: it plans by shape
    kind_of_device = cpu_name() if args.device == "cpu" else torch.cuda.get_device_name(device)
    cases = [] if args.quick else [(lengths, "causal", name) for name, lengths in LONG.items()]
    peaks = {
        (name, contender): peak_bytes(lengths, kind, contender, device)
        for lengths, kind, name in cases
        for contender in contenders(lengths, kind, device)
        if contender != "buckets"
    }
    if args.device == "cpu":
        torch.set_num_threads(1)
    mixes = ON_CPU if args.device == "cpu" else MIXES
    cases += [(lengths, kind, name) for name, lengths in mixes.items() for kind in ("bidirectional", "prefixed")]
    clock, result = clock_for(device, args.busy), dict[str, object]()
    print(f"{kind_of_device}, {torch.get_num_threads()} thread(s)" if args.device == "cpu" else kind_of_device)
    for lengths, kind, name in cases:
        problem = Problem(sum(lengths), device)
        for contender, function in contenders(lengths, kind, device).items():
            seconds = problem.seconds(function, 3 if args.quick or name in LONG else 10, clock)
            rate = problem.flops(blocks_of(lengths, kind)) / seconds / 1e12
            row, peak = f"{name} {kind}", peaks.get((name, contender))
            memory = "" if peak is None else f"{peak / 2**20:>8.0f} MiB"
            print(f"{row:<20}{contender:<8}{1e3 * seconds:>10.2f} ms{rate:>8.3f} TFLOP/s{memory}", flush=True)
            result[f"{row} {contender} ms"] = round(1e3 * seconds, 3)
            if peak is not None:
                result[f"{row} {contender} MiB"] = round(peak / 2**20, 1)
    print(json.dumps({**result, "device": kind_of_device, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
