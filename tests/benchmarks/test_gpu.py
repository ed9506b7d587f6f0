"""The benchmark of one GPU: its FLOPs and sizes, and its lines on a CPU."""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu
from mmmoe_pretrain.engines import deepspeed
from mmmoe_pretrain.export.layout import parameter_counts, weights_of
from mmmoe_pretrain.models.costs import model_costs
from mmmoe_pretrain.models.pretraining import PretrainingModel
from tests.distributed import run_ranks


def test_the_large_model_has_a_billion_active_parameters_and_fits_80_gb() -> None:
    config = gpu.config_of(gpu.ON_GPU, "megatron")
    total, active = parameter_counts(config, weights_of(config))
    assert 1.0e9 < active < 1.3e9
    assert 2.5e9 < total < 3.0e9
    assert gpu.planned(config).total < 60e9


def test_flops_are_those_that_torch_counts_without_padding() -> None:
    """torch also counts what pads attention's buckets and the experts' blocks of rows, here 2.7%; and of attention
    only plain products, not a CPU's fused kernel."""
    config = gpu.config_of(gpu.ON_CPU, "megatron")
    batch = gpu.full_batch(config, gpu.ON_CPU.samples)
    model = PretrainingModel(config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        model(batch)
    assert 1.0 <= 3 * forward.get_total_flops() / (model_costs(config).training * batch.num_valid) < 1.04


def test_both_engines_run_and_tokens_cost_the_same_memory_at_either_size() -> None:
    deepspeed.prepare()  # before the fork: its import takes seconds
    (found,) = run_ranks(1, one_process)
    for name in gpu.ENGINES:
        assert found[name]["mfu"] > 0
        assert 0.9 < found[name]["peak_vs_plan"] < 1.1, name


def one_process() -> dict[str, dict[str, float]]:
    with gpu.process_group(timeout_minutes=1) as device:
        return {name: gpu.measure(gpu.ON_CPU, name, device, rate=1e12) for name in gpu.ENGINES}


def test_a_known_gpu_has_the_vendors_rate(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert gpu.peak_rate(torch.device("cuda"), None) == (989.4e12, "vendor")
    assert gpu.peak_rate(torch.device("cuda"), 100.0) == (1e14, "given")
