"""The machines that a plan can be made for: peak rates of GPUs and their links, each with its source, and how much of
them a run reaches.

Peaks are the vendors'. Shares of them are measured on one H100, cited, or named as an assumption below;
``mmmoe plan --calibrate`` (calibrate.py) measures a machine at hand and writes a file that ``load`` reads. Rates are
of one GPU, or of one rank on a CPU; a link's bandwidth is that of one direction.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field, ValidationError

from mmmoe_pretrain.config.base import StrictModel, explain
from mmmoe_pretrain.parallel import counting
from mmmoe_pretrain.untrusted import brief

GB, TFLOPS, MICRO = 1e9, 1e12, 1e-6
VERSION = 4  # of the file format
EXTREMES = (1e-30, 1e30)  # of numbers in a file: times computed from others would not be finite
PRECISIONS = ("fp32", "bf16", "fp16")  # train.precision
PARTS = {
    "computation": ("products", "experts", "attention", "embedders", "heads", "recomputation"),
    "memory": ("memory bound", "gradient accumulation", "optimizer"),
    "host": ("host",),
    "communication": ("tensor parallel", "all-to-all", "pipeline messages", "gradients", "parameters", "statistics"),
}  # of a step's time, by what limits them
ALL_PARTS = tuple(part for parts in PARTS.values() for part in parts)
KINDS = (counting.ALL_REDUCE, counting.ALL_TO_ALL, counting.ALL_GATHER, counting.REDUCE_SCATTER, counting.BROADCAST,
         counting.POINT_TO_POINT)  # fmt: skip
Positive = Annotated[float, Field(gt=0)]
Curve = tuple[tuple[Positive, Positive], ...]  # (size, value), rising in size


class Link(StrictModel):
    """``bandwidth``: bytes/s that a rank sends. ``latency``: seconds of one message between two ranks."""

    bandwidth: float = Field(gt=0)
    latency: float = Field(ge=0)


class Collective(StrictModel):
    """A measured collective of ``ranks``: ``seconds`` of a call over the bytes that leave a rank in it. ``shared``:
    CPU time, where the ranks of a node outnumber its cores, so that others compute while one waits."""

    kind: str
    ranks: int = Field(ge=2)
    shared: bool = False
    seconds: Curve = Field(min_length=1)

    def taken(self, sent: float) -> float:
        """Seconds of a call: at least those of the least message, and in proportion above the largest."""
        (least, _), (most, longest) = self.seconds[0], self.seconds[-1]
        return longest * sent / most if sent > most else interpolate(self.seconds, max(least, sent))


class Host(StrictModel):
    """Seconds that the host takes to start operations, forward and backward: of a dense and of an MoE block, of what
    an MoE block has more where its experts are on several ranks, of the rest of a microbatch (embedders, heads,
    losses), and once a step for each block (the optimizer of its parameters) and for the rest."""

    dense_block: float = Field(ge=0)
    moe_block: float = Field(ge=0)
    dispatch: float = Field(0.0, ge=0)  # measured on several ranks
    microbatch: float = Field(ge=0)
    step_block: float = Field(ge=0)
    step: float = Field(ge=0)


class Machine(StrictModel):
    """See the module. ``products``: FLOP/s by precision over the smallest of the three dimensions of a product.
    ``grouped``: of the experts over the rows of one, where they were measured. ``attention``: FLOP/s of the scores
    and their mix over the tokens that a token attends to. ``streaming``: bytes/s of operations without products.
    ``optimizer_bytes``: memory traffic of one parameter in the optimizer's step, at that rate. ``asynchronous``: the
    host runs ahead of the device. ``cores``: of a node, where ranks are threads on a CPU; more ranks share them.
    ``crowded``: by part, the time of a rank's work beside others over its time alone, over the ranks of a node.
    ``factors``: measured over planned seconds of a part (``time.py``), from runs."""

    name: str
    source: str
    memory: float = Field(gt=0)
    peak: Mapping[str, Positive]
    power: float = Field(ge=0)  # watts, of the board
    products: Mapping[str, Curve]
    grouped: Mapping[str, Curve] = {}
    attention: Mapping[str, Curve]
    streaming: float = Field(gt=0)
    optimizer_bytes: float = Field(gt=0)
    host: Host
    asynchronous: bool = True
    ranks_per_node: int = Field(ge=1)
    node: Link
    network: Link
    collectives: tuple[Collective, ...] = ()
    cores: int | None = Field(None, ge=1)
    crowded: Mapping[str, Curve] = {}
    factors: Mapping[str, Positive] = {}

    def product_rate(self, precision: str, size: float) -> float:
        """FLOP/s of products whose smallest dimension is ``size``."""
        return interpolate(self.products[precision], max(1.0, size))

    def attention_rate(self, precision: str, attended: float) -> float:
        """FLOP/s of attention where a token attends to ``attended`` tokens."""
        return interpolate(self.attention[precision], max(1.0, attended))

    def shares_cores(self, ranks: int) -> bool:
        """Whether ``ranks`` are more than a CPU node has cores."""
        return self.cores is not None and min(ranks, self.ranks_per_node) > self.cores

    def slowed(self, part: str, ranks: int) -> float:
        """How many times as long a part takes beside the others of a node, in a job of ``ranks``: straight lines
        between what was measured, from 1 for a rank alone."""
        numbers, times = zip((1.0, 1.0), *self.crowded.get(part, ()), strict=True)
        return float(np.interp(min(ranks, self.ranks_per_node), numbers, times))

    def expert_rate(self, precision: str, rows: float, width: float) -> float:
        """FLOP/s of experts with ``rows`` each, whose smallest other dimension is ``width``."""
        curve = self.grouped.get(precision)
        return interpolate(curve, max(1.0, rows)) if curve else self.product_rate(precision, min(rows, width))


def interpolate(curve: Curve, size: float) -> float:
    """Straight lines in the logarithms of both. Below the first point in proportion to the size, as a product of few
    rows is bound by reading its weights; above the last point constant."""
    first, last = curve[0], curve[-1]
    if size <= first[0]:
        return first[1] * size / first[0]
    for (low, a), (high, b) in pairwise(curve):
        if size <= high:
            share = math.log(size / low) / math.log(high / low)
            return a * (b / a) ** share
    return last[1]


# Shares of the peak that products reach, by their smallest dimension. Sources: (o) measured by this project on one
# H100 (benchmarks/RESULTS.md, "On a GPU"); (s) measured tables of SimuMax, configs/system/a100_pcie.json and
# b200_bf16_ceperm.json at 4dcaae5, medians; (m) the best of all shapes, stas00/ml-engineering, compute/accelerator.
ON_H100 = ((128, 0.185), (256, 0.247), (512, 0.52), (1024, 0.615), (2048, 0.74), (8192, 0.80))  # s: B200, B200, means
ON_A100 = ((512, 0.594), (1024, 0.645), (2048, 0.702), (4096, 0.734), (8192, 0.859))  # s; the last m
ON_B200 = ((128, 0.185), (256, 0.247), (512, 0.453), (1024, 0.585), (2048, 0.485))  # s; m: 0.776
ON_MI300X = tuple((size, share * 0.60 / 0.80) for size, share in ON_H100)  # m over that of an H100
# The same of ``varlen_attn`` forward and backward over segments of 51 to 196 tokens, 1,024 and 4,096 (o). An A100
# reaches twice the share: FlashAttention-2's best there is 73%, on an H100 35% (arXiv 2307.08691, 2407.08608).
ATTENTION, ATTENTION_ON_A100 = ((145, 0.037), (1024, 0.25), (4096, 0.31)), 2.0
# Measured over planned seconds of computation in three steps on the H100 (o): small operations and gaps between those
# that were timed alone.
IN_A_STEP = dict.fromkeys(PARTS["computation"], 1.45)
# Of the memory's bandwidth: fused AdamW moves 28 bytes a parameter at 2.55 TB/s on the H100 (o); s, s.
STREAMING, STREAMING_A100, STREAMING_B200 = 0.76, 0.91, 0.67
# Bytes a parameter: AdamW reads four numbers and writes three; norm 4, scaling 8, clipping 8, zeroing 4, the weight's
# half copy 6.
OPTIMIZER = 28.0 + 30.0
# Seconds to start an operation, forward or backward: in narrow models on one core of an AMD EPYC 7.6 us (dense blocks
# of 149 operations) and 9.3 us (MoE blocks of 469). pytorch/pytorch#41383 reports 7 us for a product with a scalar.
OPERATION = 8 * MICRO
# Operations of a block and a microbatch on a GPU's paths (tests/plan/test_host_time.py counts them); a Triton kernel
# is launched from Python and counts as three, which is assumed. Once a step: as measured with those narrow models.
OPERATIONS = {"dense_block": 60, "moe_block": 240, "dispatch": 65, "microbatch": 540}
HOST = Host(**{part: number * OPERATION for part, number in OPERATIONS.items()}, step_block=0.2e-3, step=4e-3)
# Of a link's bandwidth: NVLink of a B200 0.74 (all-reduce), 0.67 (gather) and 0.60 (all-to-all) (s); InfiniBand 43 to
# 47 of 50 GB/s in an all-to-all over 16 and 32 H800 (deepseek-ai/DeepEP, README).
NODE_SHARE, NETWORK_SHARE = 0.67, 0.86
# Seconds of a hop: NCCL 2.19, src/graph/tuning.cc, hwLat of Ring/Simple over NVLink and the network.
NVLINK_HOP, NETWORK_HOP = 3.4 * MICRO, 14.0 * MICRO


def _gpu(
    name: str, source: str, memory_gb: float, bandwidth_gb: float, half: float, fp32: float, power: float,
    node_gb: float, network: str, ranks_per_node: int = 8, products: Curve = ON_H100, streaming: float = STREAMING,
    attention: float = 1.0,
) -> Machine:  # fmt: skip
    peak = {"bf16": half * TFLOPS, "fp16": half * TFLOPS, "fp32": fp32 * TFLOPS}
    return Machine(
        name=name,
        source=source,
        memory=memory_gb * GB,
        peak=peak,
        power=power,
        products={
            precision: tuple((size, share * rate) for size, share in products) for precision, rate in peak.items()
        },
        attention={p: tuple((size, attention * share * peak[p]) for size, share in ATTENTION) for p in peak},
        streaming=streaming * bandwidth_gb * GB,
        optimizer_bytes=OPTIMIZER,
        host=HOST,
        ranks_per_node=ranks_per_node,
        node=Link(bandwidth=NODE_SHARE * node_gb * GB, latency=NVLINK_HOP),
        network=NETWORKS[network],
        factors=IN_A_STEP,
    )


def _network(gigabits: float) -> Link:
    return Link(bandwidth=NETWORK_SHARE * gigabits / 8 * GB, latency=NETWORK_HOP)


# Between nodes, of one GPU with a network card of its own.
NETWORKS: dict[str, Link] = {
    "infiniband-200": _network(200),  # HDR, eight cards in a DGX A100 (its datasheet)
    "infiniband-400": _network(400),  # NDR, eight ConnectX-7 in a DGX H100 or B200 (their datasheets)
    "infiniband-800": _network(800),  # XDR, ConnectX-8 in a GB300 (its datasheet)
    "roce-400": _network(400),  # Ethernet of the same rate (Llama 3, arXiv 2407.21783, section 3.3.1)
    "efa-400": _network(400),  # AWS p5: 3,200 Gb/s for eight GPUs (AWS, EC2 instance types)
    "ethernet-100": _network(100 / 8),  # one 100 Gb/s card for eight GPUs
}

# Dense peaks, without sparsity. fp32 without TF32, which torch leaves off.
GPUS: dict[str, Machine] = {
    machine.name: machine
    for machine in (
        _gpu("h100", "NVIDIA H100 datasheet and architecture whitepaper, SXM: 80 GB, 3.35 TB/s, 989.4 TFLOP/s, "
             "700 W, NVLink 900 GB/s both ways", 80, 3350, 989.4, 67, 700, 450, "infiniband-400"),
        _gpu("h200", "NVIDIA H200 datasheet, SXM: 141 GB, 4.8 TB/s; arithmetic, power and NVLink of the H100",
             141, 4800, 989.4, 67, 700, 450, "infiniband-400"),
        _gpu("b200", "NVIDIA HGX and DGX B200 datasheets: 180 GB, 8 TB/s, 4.5 PFLOP/s with sparsity, 1,000 W, "
             "NVLink 1.8 TB/s both ways", 180, 8000, 2250, 75, 1000, 900, "infiniband-400",
             products=ON_B200, streaming=STREAMING_B200),
        _gpu("gb200", "NVIDIA GB200 NVL72 datasheet, a 72nd: 186 GB, 8 TB/s, 5 PFLOP/s with sparsity, 1,200 W, "
             "NVLink 1.8 TB/s both ways among 72 GPUs", 186, 8000, 2500, 80, 1200, 900, "infiniband-400",
             ranks_per_node=72, products=ON_B200, streaming=STREAMING_B200),
        _gpu("a100", "NVIDIA A100 80GB datasheet, SXM: 2,039 GB/s, 312 TFLOP/s, 400 W, NVLink 600 GB/s both ways",
             80, 2039, 312, 19.5, 400, 300, "infiniband-200", products=ON_A100,
             streaming=STREAMING_A100, attention=ATTENTION_ON_A100),
        _gpu("a100-40gb", "NVIDIA A100 40GB datasheet, SXM: 1,555 GB/s; the rest as of 80 GB",
             40, 1555, 312, 19.5, 400, 300, "infiniband-200", products=ON_A100,
             streaming=STREAMING_A100, attention=ATTENTION_ON_A100),
        _gpu("mi300x", "AMD Instinct MI300X datasheet: 192 GB, 5.3 TB/s, 1,307.4 TFLOP/s, 750 W, Infinity Fabric 896 "
             "GB/s both ways over seven links", 192, 5300, 1307.4, 163.4, 750, 448, "infiniband-400",
             products=ON_MI300X),
        Machine(
            name="cpu", source="assumptions for a core with AVX-512, eight a node",
            memory=4 * GB, peak={"fp32": 0.1 * TFLOPS, "bf16": 0.2 * TFLOPS, "fp16": 0.1 * TFLOPS}, power=5,
            products=dict.fromkeys(("fp32", "bf16", "fp16"), ((64, 0.03 * TFLOPS), (512, 0.06 * TFLOPS))),
            attention=dict.fromkeys(("fp32", "bf16", "fp16"), ((64, 0.02 * TFLOPS),)),
            streaming=8 * GB, optimizer_bytes=80, asynchronous=False, ranks_per_node=8, cores=8,
            host=Host(dense_block=1e-3, moe_block=3e-3, microbatch=5e-3, step_block=1e-3, step=5e-3),
            node=Link(bandwidth=GB, latency=100 * MICRO), network=Link(bandwidth=GB, latency=100 * MICRO),
        ),
    )
}  # fmt: skip


def find_machine(name: str, ranks_per_node: int | None = None, network: str | None = None) -> Machine:
    """The machine ``name``, one of ``GPUS`` or the path of a file that ``--calibrate`` wrote. ``network``: one of
    ``NETWORKS``, or GB/s and microseconds of one GPU such as ``50,5``. Raises ValueError with what is known."""
    machine = GPUS.get(name.lower())
    if machine is None:
        if not Path(name).is_file():
            raise ValueError(
                f"{name!r} is not a known machine; use one of {', '.join(GPUS)}, or the path of a file that "
                f"mmmoe plan --calibrate wrote"
            )
        machine = load(Path(name))
    if ranks_per_node is not None:
        if ranks_per_node < 1:
            raise ValueError(f"--gpus-per-node {ranks_per_node} must be 1 or more")
        machine = machine.model_copy(update={"ranks_per_node": ranks_per_node})
    return machine if network is None else machine.model_copy(update={"network": _link(network)})


def machine_of(device_name: str) -> Machine | None:
    """The machine whose name stands in ``device_name``, such as ``NVIDIA A100-SXM4-80GB``; None for others."""
    words = set(re.split(r"[^a-z0-9]+", device_name.lower()))  # an RTX A1000 is no A100, and a GB200 no B200
    known = [machine for machine in GPUS.values() if words.issuperset(machine.name.split("-"))]
    return max(known, key=lambda machine: machine.name.count("-"), default=None)  # a100-40gb before a100


def _link(text: str) -> Link:
    if text in NETWORKS:
        return NETWORKS[text]
    rate, _, latency = text.partition(",")
    try:
        return Link(bandwidth=float(rate) * GB, latency=float(latency or NETWORK_HOP / MICRO) * MICRO)
    except ValueError:
        raise ValueError(
            f"--network {text!r} is not known; use one of {', '.join(NETWORKS)}, or GB/s that one GPU sends and "
            f"microseconds of a message: 50,5"
        ) from None


def save(machine: Machine, path: Path) -> None:
    """As JSON, beside its version."""
    content = machine.model_dump_json(indent=1)
    path.write_text(f'{{"mmmoe_machine": {VERSION},{content[1:]}\n', encoding="utf-8")


def load(path: Path) -> Machine:
    """A file that ``save`` wrote. Raises ValueError where it is another or damaged file."""
    again = "write it again with mmmoe plan --calibrate"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as the JSON of a machine ({error}); {again}") from None
    version = values.pop("mmmoe_machine", None) if isinstance(values, dict) else None
    if version != VERSION:
        found = "is not the file of a machine" if version is None else f"has version {version}, and this is {VERSION}"
        raise ValueError(f"{path} {found}; {again}")
    try:
        machine = Machine.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{path}: {'; '.join(explain(error, ('machine',))[:3])}; {again}") from None
    if problem := _problem(machine):
        raise ValueError(f"{path}: machine.{problem}; {again}")
    return machine


def _problem(machine: Machine) -> str:
    """What a file lacks that plans read; empty where nothing."""
    for key in ("peak", "products", "attention"):
        if missing := [precision for precision in PRECISIONS if precision not in getattr(machine, key)]:
            return f"{key} has nothing for {', '.join(missing)}"
    for one in machine.collectives:
        if one.kind not in KINDS:
            return f"collectives: {brief(one.kind)} is not a collective; they are {', '.join(KINDS)}"
        if not _rises(one.seconds):
            return f"collectives: {one.kind} of {one.ranks} ranks must have sizes that rise"
    for key in ("products", "grouped", "attention"):
        for precision, curve in getattr(machine, key).items():
            if not curve or not _rises(curve):
                return f"{key}.{precision} must have sizes that rise"
    for part, curve in machine.crowded.items():
        if not _rises(((1.0, 1.0), *curve)):
            return f"crowded.{part} must have numbers of ranks that rise from 2"
        if any(times < 1 for _, times in curve):
            return f"crowded.{part} must have times of 1 or more"
    for key in ("crowded", "factors"):
        if unknown := [part for part in getattr(machine, key) if part not in ALL_PARTS]:
            return f"{key}.{brief(unknown[0])} is not a part of a step; parts are {', '.join(ALL_PARTS)}"
    least, most = EXTREMES
    for where, number in _numbers(machine.model_dump()):
        if number and not least <= number <= most:
            return f"{where} must be from {least:g} to {most:g} (got {brief(number)})"
    return ""


def _numbers(value: object, where: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in a machine's values, and the key of each."""
    if isinstance(value, Mapping):
        entries = [(f"{where}.{key}".lstrip("."), its) for key, its in value.items()]
    else:
        entries = [(where, its) for its in value] if isinstance(value, tuple) else []
    for key, its in entries:
        yield from _numbers(its, key)
    if isinstance(value, int | float):
        yield where, value


def _rises(curve: Curve) -> bool:
    return all(low < high for (low, _), (high, _) in pairwise(curve))
