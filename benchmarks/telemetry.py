"""What the statistics of routing cost: their time as a share of the work that they tell of.

``step``: a whole optimizer step of the demo in one process, against the statistics of all its layers
as they run inside of it, and against a record (sums to rates, JSON, TensorBoard) divided by
``train.log_every``. ``layer``: forward and backward of one MoE layer by itself, which is less than
a step and so the harder measure. "with gradients": forward and backward of the statistics where an
auxiliary loss needs gradients through them; that much is the losses', not telemetry's. Medians, one
thread. Prints a table and, as its last line, one JSON object: ``telemetry_share`` is that of the step,
``of_a_layer`` the largest of the layers' shares.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, its folder alone is there

from benchmarks.step import ROOT, random_batch
from benchmarks.stepping.workload import VOCAB_SIZE
from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.config.base import StreamNames
from mmmoe_pretrain.config.moe import MoEConfig
from mmmoe_pretrain.data.loader import LoadStats
from mmmoe_pretrain.engines.apply import build_engine
from mmmoe_pretrain.moe import router as router_module
from mmmoe_pretrain.moe.layer import MoELayer
from mmmoe_pretrain.moe.routing import Choice, RouterInputs
from mmmoe_pretrain.moe.tokens import TokenInfo
from mmmoe_pretrain.parallel.degrees import resolve_degrees
from mmmoe_pretrain.parallel.groups import SINGLE
from mmmoe_pretrain.parallel.mesh import build_groups
from mmmoe_pretrain.parallel.runtime import process_group
from mmmoe_pretrain.train.metrics import MetricsLog, Recorder, SampleCounts

# tokens, experts, experts a token, D, F
LAYERS = {"demo": (2560, 8, 1, 128, 512), "large": (8192, 64, 2, 512, 1024), "many": (8192, 128, 8, 512, 256)}


@dataclass
class Clock:
    """Seconds spent in ``statistics``, and the arguments of its last call."""

    seconds: float = 0.0
    arguments: tuple[Any, ...] = field(default_factory=tuple)


@dataclass(frozen=True)
class Row:
    name: str
    work: float  # seconds, as are the others
    telemetry: float
    with_gradients: float

    @property
    def share(self) -> float:
        return self.telemetry / self.work


@contextmanager
def clocked() -> Iterator[Clock]:
    """Time the routers' statistics where they run."""
    clock, original = Clock(), router_module.gather_stats

    def timed(*arguments: Any) -> Any:
        began = time.perf_counter()
        found = original(*arguments)
        clock.seconds += time.perf_counter() - began
        clock.arguments = arguments
        return found

    with mock.patch.object(router_module, "gather_stats", timed):
        yield clock


def median_seconds(work: Callable[[], Any], repeats: int) -> float:
    """The first run warms up."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def with_gradients(clock: Clock, repeats: int) -> float:
    """Seconds of the last statistics' forward and backward pass, a log-softmax in between included."""
    inputs, choice, *others = clock.arguments
    assert isinstance(inputs, RouterInputs) and isinstance(choice, Choice)
    losses = inputs.config.losses.model_copy(update={"z": 1.0})
    config = inputs.config.model_copy(update={"losses": losses})

    def work() -> None:
        logits_nE = inputs.logits_nE.detach().requires_grad_()
        seen = RouterInputs(logits_nE, inputs.tokens, config, inputs.bias_nE, inputs.noise_std_nE, inputs.normal_nE)
        made = Choice(choice.expert_ids_nK, choice.weights_nK, logits_nE.log_softmax(-1), choice.priority_n)
        router_module.gather_stats(seen, made, *others).flatten().sum().backward()

    return median_seconds(work, repeats)


NAMES = StreamNames(("image", "audio", "text"), ("contrastive", "captioning"))


def layer_row(name: str, repeats: int) -> Row:
    """One layer by itself, tokens of all modalities and tasks."""
    tokens, experts, top_k, hidden, expert_hidden = LAYERS[name]
    torch.manual_seed(0)
    config = MoEConfig(num_experts=experts, experts_per_token=top_k, expert_hidden_size=expert_hidden, every=1)
    layer = MoELayer(config, hidden, 0, SINGLE, NAMES)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    x_nD = torch.randn(tokens, hidden, requires_grad=True)
    modality_n = torch.arange(tokens) * len(NAMES.modalities) // tokens
    task_n = torch.randint(len(NAMES.tasks), (tokens,))
    info = TokenInfo(modality_n, task_n, torch.zeros_like(task_n), torch.arange(tokens), NAMES)
    times, inside = [], []
    with clocked() as clock:
        for _ in range(repeats + 1):
            clock.seconds, began = 0.0, time.perf_counter()
            layer(x_nD, info)[0].sum().backward()
            times.append(time.perf_counter() - began)
            inside.append(clock.seconds)
    title = f"layer {name}: T {tokens}, E {experts}, K {top_k}"
    return Row(title, statistics.median(times[1:]), statistics.median(inside[1:]), with_gradients(clock, repeats))


def step_row(config: RunConfig, samples: int, repeats: int) -> Row:
    """A whole step, and a record of it."""
    times, inside = [], []
    with process_group(timeout_minutes=5) as device, tempfile.TemporaryDirectory() as folder, clocked() as clock:
        groups = build_groups(resolve_degrees(config.parallel, config.moe.group_sizes, dist.get_world_size()))
        engine = build_engine(config, groups, device)
        batch = random_batch(config, samples, seed=samples)
        for _ in range(repeats + 1):
            clock.seconds, began = 0.0, time.perf_counter()
            result = engine.step([batch], 1e-4)
            times.append(time.perf_counter() - began)
            inside.append(clock.seconds)
        recorder = Recorder(groups.data)
        with closing(MetricsLog(Path(folder), heatmap_every=10**9)) as log:

            def record() -> None:
                recorder.add(result, LoadStats(samples))
                log.write(recorder.record(1, result, 1e-4, SampleCounts()))

            logged = median_seconds(record, 3 * repeats)
        gradients = with_gradients(clock, repeats)
    telemetry = statistics.median(inside[1:]) + logged / config.train.log_every
    print(f"a record takes {1e3 * logged:.2f} ms, one in {config.train.log_every} steps")
    return Row(f"step of {config.name}, {samples} samples", statistics.median(times[1:]), telemetry, gradients)


def main() -> None:
    """Measure a step and single layers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer layers, few repeats")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "demo.yaml")
    args = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU's work is not over when a call returns
    torch.set_num_threads(1)
    repeats = 3 if args.quick else 9
    rows = [step_row(run_config.load(args.config).with_vocabulary(VOCAB_SIZE), 64, repeats)]
    rows += [layer_row(name, repeats) for name in (("large",) if args.quick else LAYERS)]
    print(f"{'':<40}{'work ms':>10}{'telemetry ms':>14}{'share':>8}{'with gradients ms':>19}")
    for row in rows:
        print(f"{row.name:<40}{1e3 * row.work:>10.1f}{1e3 * row.telemetry:>14.2f}{row.share:>8.2%}"
              f"{1e3 * row.with_gradients:>19.2f}")  # fmt: skip
    step, *layers = [round(row.share, 5) for row in rows]
    print(json.dumps({"telemetry_share": step, "of_a_layer": max(layers), "device": "cpu"}))


if __name__ == "__main__":
    main()
