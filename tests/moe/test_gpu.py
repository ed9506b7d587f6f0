"""The layer on a GPU against the layer on the CPU; skipped without CUDA."""

import pytest
import torch

from mmmoe_pretrain.config import MoEConfig
from mmmoe_pretrain.models.init import init_parameters
from mmmoe_pretrain.moe.layer import MoELayer
from mmmoe_pretrain.moe.tokens import TokenInfo
from mmmoe_pretrain.parallel.groups import SINGLE
from tests.moe.routing_inputs import NAMES

CASES = [
    MoEConfig(num_experts=16, experts_per_token=2, expert_hidden_size=64),
    MoEConfig(num_experts=16, experts_per_token=2, expert_hidden_size=64, expert_backend="blocked"),
    MoEConfig(num_experts=16, experts_per_token=4, expert_hidden_size=64, capacity_factor=1.0, activation="gelu"),
    MoEConfig(num_experts=8, experts_per_token=2, expert_hidden_size=64, shared_expert_hidden_size=32,
              identity_experts=2),
]  # fmt: skip


def run(config: MoEConfig, device: str, dtype: torch.dtype, tokens: int) -> list[torch.Tensor]:
    """Output and gradients, in fp32 on the CPU."""
    moe = MoELayer(config, 64, 0, SINGLE, NAMES)
    init_parameters(moe, seed=1, num_layers=1)
    moe.to(device)
    for name, parameter in moe.named_parameters():
        if "router" not in name:
            parameter.data = parameter.data.to(dtype)
    x = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(0)).to(device, dtype).requires_grad_()
    modality = (torch.arange(tokens) % 3).to(device)
    out, _ = moe(x, TokenInfo.of_modalities(modality, NAMES))
    out.float().square().sum().backward()
    found = [out, x.grad, *(p.grad for p in moe.parameters())]
    return [tensor.detach().float().cpu() for tensor in found]


@pytest.mark.gpu
@pytest.mark.parametrize("config,dtype", [*((config, torch.float32) for config in CASES), (CASES[0], torch.bfloat16)])
@pytest.mark.parametrize("tokens", [0, 1, 200])  # 1: most experts have no row
def test_gpu_equals_cpu(config: MoEConfig, dtype: torch.dtype, tokens: int) -> None:
    found, expected = (run(config, device, dtype, tokens) for device in ("cuda", "cpu"))
    for ours, reference in zip(found, expected, strict=True):
        if dtype == torch.float32:  # TF32 is off by default for matrix products; fp32 sums in another order
            torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)
        elif reference.numel():
            # Routing is decided in fp32 from the same rounded x, so few ties flip; three products of 8 bits.
            assert (ours - reference).abs().max() <= 0.05 * reference.abs().max() + 1e-3
