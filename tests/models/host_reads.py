"""One microbatch through the model on a pretended accelerator, forward and backward: where the host would wait.

    python -m tests.models.host_reads

Prints one line of JSON for ``test_host_reads.py``: by case the places of reads and of waiting copies, with counts.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor

from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.engines.ahead import CopiedAhead
from mmmoe_pretrain.engines.base import Engine, add_reports, loss_sums
from mmmoe_pretrain.engines.megatron_setup import squared_norms
from mmmoe_pretrain.models.pretraining import LossReport, PretrainingModel
from mmmoe_pretrain.moe.dispatch import AllToAllDispatcher
from mmmoe_pretrain.moe.layer import MoELayer
from mmmoe_pretrain.objectives import objectives_of, step_counts
from mmmoe_pretrain.parallel.groups import SINGLE
from tests.accelerator import Host, fake_tensors, move, pretend
from tests.support import FUSED, objectives, random_batch, tiny_config

LAYERS = 2
# Widths at which grouped products fit: rows of 16 bytes and more in bf16.
SIZES = {"hidden_size": 16, "num_layers": LAYERS, "num_heads": 2, "ffn_hidden_size": 16, "embedding_size": 8}
EXPERTS = {
    "every": 1, "num_experts": 4, "expert_hidden_size": 16,
    "losses": {"balance": 0.01, "z": 0.001, "local_entropy": 0.01, "global_entropy": 0.01},
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "local": {"expert_biases": True, "shared_expert_hidden_size": 16, "bias_balancing": {"rate": 1e-3}},
    "local, drops": {
        "capacity_factor": 1.0, "batch_priority": True, "null_experts": 1, "identity_experts": 1,
        "router_weight_on_input": True,
    },
    "remote": {"dispatch_chunks": 2},
    "planted": {},
}  # fmt: skip


PAIRS = {"image-text": 1.0, "audio-text": 1.0, "image-audio": 0.5, **{f"{name}-text": 1.0 for name in FUSED}}


def config_of(moe: dict[str, Any], **sections: Any) -> RunConfig:
    return tiny_config(Path("nowhere"), model=SIZES, moe={**EXPERTS, **moe}, **sections)


def even(assignments: int) -> Callable[[Tensor], Any]:
    """The answers where numbers are read at once: of the sizes of an exchange with this process itself, as if routing
    were even, and of any vector."""

    def answer(tensor: Tensor) -> Any:
        if tensor.ndim == 1:
            return [1.0] * tensor.numel()
        sides, ranks, chunks, columns = tensor.shape  # rows, then assignments by expert
        counts = [assignments // (chunks * (columns - 1))] * (columns - 1)
        return [[[[sum(counts), *counts] for _ in range(chunks)] for _ in range(ranks)] for _ in range(sides)]

    return answer


def run(name: str, device: torch.device) -> dict[str, Any]:
    fused = {"representations": FUSED, "objectives": objectives({"pairs": PAIRS}, {"fraction": 0.5})}
    config = config_of(CASES[name], **(fused if name == "local" else {}))
    batch = random_batch(config, ["iat", "it", "at", "t"])
    assignments = batch.num_valid * config.moe.experts_per_token
    counts = step_counts([batch], objectives_of(config), None, device)  # of the batch on the host
    host, after = Host(even(assignments)), Host(even(0))
    with fake_tensors():
        model = PretrainingModel(config)
        model.use_half(torch.bfloat16)
        move(model, device)
        for layer in model.modules():
            if isinstance(layer, MoELayer) and name == "remote":
                layer.dispatcher = AllToAllDispatcher(4, SINGLE, config.moe.dispatch_chunks)
        if name == "planted":
            model.mmmoe.trunk.register_forward_hook(read_a_sum)
            model.mmmoe.trunk.register_forward_pre_hook(copy_a_table)
        with host.watching():
            model.begin_step(0, counts)
            loss, report = model(batch.to(device))
            loss.backward()
            model.end_step(report.routing)
        for parameter in model.parameters():
            assert parameter.grad is not None and parameter.grad.device == device
        with after.watching(), mock.patch("torch.distributed.all_reduce"):
            read_results(model, report, device)
    return {"reads": host.reads, "waits": host.waits, "copies": host.copies, "reads of a step": after.reads}


def read_results(model: PretrainingModel, report: LossReport, device: torch.device) -> None:
    """What the engine on megatron-core reads after the backward pass, with one optimizer of all gradients."""
    optimizer = SimpleNamespace(
        get_main_grads_for_grad_norm=lambda: [parameter.grad for parameter in model.parameters()],
        get_grad_stats_parallel_group=lambda: None,
    )
    sums = loss_sums([add_reports(None, report)], model.loss_names, SINGLE, device)
    engine = cast(Engine, SimpleNamespace(models=[model], groups=SINGLE))
    losses, norms, finite = Engine._read(engine, sums, squared_norms(optimizer, device))
    assert set(losses) == {"total", *model.loss_names} and len(norms) == 1 and not finite  # read: ones


def read_a_sum(module: torch.nn.Module, given: Any, result: tuple[Tensor, Any]) -> None:
    result[0].sum().item()


def copy_a_table(module: torch.nn.Module, given: tuple[Tensor, Any]) -> None:
    torch.ones(3).to(given[0].device)


class Logged(torch.Stream):
    """A stream that notes what is done on it. The pretended device has no streams of its own."""

    def begin(self, name: str, log: list[str]) -> Logged:
        self.name, self.log = name, log
        return self

    def wait_stream(self, stream: Logged) -> None:
        self.log.append(f"{self.name} waits for {stream.name}")

    def __enter__(self) -> Logged:
        self.log.append(f"on {self.name}")
        return self

    def __exit__(self, *_: object) -> None:
        self.log.append("")


def copies_ahead(device: torch.device) -> list[str]:
    """What happens to two microbatches, the second of which is copied while the first is used."""
    config, log = config_of({}), list[str]()
    compute, copies = (Logged(device=device).begin(name, log) for name in ("compute", "copies"))
    batches = [random_batch(config, ["it"], seed) for seed in range(2)]
    host = Host(log=log)
    with mock.patch("torch.accelerator.current_stream", lambda device: compute), fake_tensors(), host.watching():
        ahead = CopiedAhead(batches, device, copies)
        for batch in ahead:
            batch.valid.sum()
            log.append("used")
            ahead.copy_next()
    assert not sum(host.waits.values())
    return [line for line, _ in itertools.groupby(log) if line]


def main() -> None:
    device = pretend()
    print(json.dumps({**{name: run(name, device) for name in CASES}, "ahead": copies_ahead(device)}))


if __name__ == "__main__":
    main()
