"""What a point must cost at least on this machine, from rates that are measured in the same run.

Legend of the bounds, forward and backward together:
- arithmetic: 18 T K D F operations (three products forward, twice that backward) at the rate of a
  large product, by the faster of torch's libraries (for fp32 on a CPU torch.mm takes MKL, which on
  some CPUs is half as fast as oneDNN; so arithmetic may be less than the dense layer needs);
- small products: what the same operations take longer at the rate of a product of as many rows as
  each expert has, its weights in the cache;
- weight traffic: every weight read forward, read backward, and its gradient written;
- permutation: rows moved between tokens and experts, and the first product's result kept for the
  backward pass: 7 A D + 4 A F + 2 T D elements for A = T K (read x, write and read y, read the
  gradient and x again, write and read the gradient of the rows: 7 A D; write and read [A, 2F]; write
  the output and the gradient of x).
The roofline is the larger of arithmetic and all traffic: it supposes that they overlap perfectly.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.layer.timing import clock_for
from benchmarks.layer.workload import Point

LARGE = 2048  # rows and columns of a product that runs at full rate
TRAFFIC_BYTES = 256 << 20  # of the buffer copied; well beyond the caches
WEIGHT_PASSES = 3


def layer_flops(point: Point) -> int:
    """Forward and backward of the experts; a dense layer of hidden size K F has as many."""
    return 18 * point.assignments * point.hidden_size * point.expert_hidden_size


def weight_bytes(point: Point) -> int:
    """Weights read twice, gradients written once."""
    weights = 3 * point.experts * point.hidden_size * point.expert_hidden_size
    return WEIGHT_PASSES * weights * point.dtype.itemsize


def row_bytes(point: Point) -> int:
    """See the legend: permutation."""
    moved = 7 * point.assignments * point.hidden_size + 2 * point.tokens * point.hidden_size
    kept = 4 * point.assignments * point.expert_hidden_size
    return (moved + kept) * point.dtype.itemsize


@dataclass(frozen=True)
class Bound:
    """Seconds that a point takes at least for each reason."""

    arithmetic: float
    small_products: float
    weights: float
    permutation: float

    @property
    def roofline(self) -> float:
        return max(self.arithmetic, self.weights + self.permutation)

    @property
    def reason(self) -> str:
        """The largest term; small products count where they cost more than the arithmetic itself."""
        terms = {
            "arithmetic": self.arithmetic,
            "small products": self.small_products,
            "weight traffic": self.weights,
            "permutation": self.permutation,
        }
        return max(terms, key=lambda name: terms[name])


@dataclass
class Machine:
    """Rates of this machine, each measured at its first use and then cached."""

    device: torch.device
    busy: bool = False  # shared with others: see timing.clock_for
    rates: dict[tuple[object, ...], float] = field(default_factory=dict)

    def bound(self, point: Point, counts_E: list[int]) -> Bound:
        """Call it with the point's number of threads in force."""
        flops, full = layer_flops(point), self.matmul_rate(point.dtype)
        arithmetic = flops / full
        each = flops / max(1, sum(counts_E))
        products = sum(each * n / min(full, self.product_rate(point, n)) for n in counts_E if n)
        bandwidth = self.bandwidth()
        traffic = weight_bytes(point) / bandwidth, row_bytes(point) / bandwidth
        return Bound(arithmetic, products - arithmetic, *traffic)

    def matmul_rate(self, dtype: torch.dtype, size: int = LARGE) -> float:
        """Operations a second of a large square product."""
        key = "matmul", dtype, size, torch.get_num_threads()
        return self._kept(key, lambda: self._matmul(size, size, size, dtype))

    def product_rate(self, point: Point, rows: int) -> float:
        """Operations a second of ``rows`` (rounded down to a power of two) times one expert; on several
        threads the better of all at one product and one product on each."""
        rows = min(1 << (rows.bit_length() - 1), LARGE)
        sizes = rows, point.hidden_size, 2 * point.expert_hidden_size
        threads = torch.get_num_threads()

        def measure() -> float:
            together = self._matmul(*sizes, point.dtype)
            if threads == 1:
                return together
            torch.set_num_threads(1)
            try:
                return max(together, threads * self._matmul(*sizes, point.dtype))
            finally:
                torch.set_num_threads(threads)

        return self._kept(("product", point.dtype, sizes, threads), measure)

    def bandwidth(self) -> float:
        """Bytes a second of a copy, read and written bytes both counted."""
        return self._kept(("bandwidth", torch.get_num_threads()), self._bandwidth)

    def _kept(self, key: tuple[object, ...], measure: Callable[[], float]) -> float:
        if key not in self.rates:
            self.rates[key] = measure()
        return self.rates[key]

    def _matmul(self, rows: int, inner: int, columns: int, dtype: torch.dtype) -> float:
        a = torch.randn(rows, inner, device=self.device).to(dtype)
        b = torch.randn(inner, columns, device=self.device).to(dtype)
        out = torch.empty(rows, columns, device=self.device, dtype=dtype)
        seconds = self._seconds(lambda: torch.mm(a, b, out=out))
        if self.device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available():
            one_dnn, b_T = torch.ops.mkldnn._linear_pointwise, b.t().contiguous()
            seconds = min(seconds, self._seconds(lambda: one_dnn(a, b_T, None, "none", [], "")))
        return 2 * rows * inner * columns / seconds

    def _bandwidth(self) -> float:
        source = torch.ones(TRAFFIC_BYTES // 4, device=self.device)
        target = torch.zeros_like(source)
        return 2 * TRAFFIC_BYTES / self._seconds(lambda: target.copy_(source))

    def _seconds(self, work: Callable[[], Tensor]) -> float:
        """The median of several spells, each long enough for the clock."""
        repeat = 1
        while (seconds := self._spell(work, repeat)) < 0.01:
            repeat *= 4
        return statistics.median([seconds, *(self._spell(work, repeat) for _ in range(4))]) / repeat

    def _spell(self, work: Callable[[], Tensor], repeat: int) -> float:
        def all_of_it() -> None:
            for _ in range(repeat):
                work()

        return clock_for(self.device, self.busy)(all_of_it)
