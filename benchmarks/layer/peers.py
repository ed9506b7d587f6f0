"""The implementations that are timed: one class each, all of the same function of the same tensors.

A library is imported when it is built; ``missing`` gives the reason if it cannot be. All are dropless, without
auxiliary losses, and route by softmax, top K, weights divided by their sum. Each keeps the layout of
weights that its library prescribes.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.layer.workload import Point, Task
from mmmoe_pretrain.config.base import StreamNames
from mmmoe_pretrain.config.moe import MoEConfig
from mmmoe_pretrain.config.train import CpuConfig
from mmmoe_pretrain.models.trunk import set_cpu
from mmmoe_pretrain.moe.cpu.calibration import calibrate
from mmmoe_pretrain.moe.cpu.matmul import linear
from mmmoe_pretrain.moe.layer import MoELayer
from mmmoe_pretrain.moe.tokens import TokenInfo
from mmmoe_pretrain.parallel.groups import SINGLE

Gradients = tuple[Tensor, Tensor, Tensor]


class Layer(nn.Module):
    """[T, D] -> [T, D]."""

    def gradients(self) -> Gradients:
        """Of router, up and down, in the layout of ``Task``."""
        raise NotImplementedError


class SwiGLU(nn.Module):
    """A dense feed-forward layer, gate and up in one product; also what DeepSpeed takes as an expert."""

    def __init__(self, point: Point, inner_size: int) -> None:
        super().__init__()
        self.up = nn.Linear(point.hidden_size, 2 * inner_size, bias=False, dtype=point.dtype)
        self.down = nn.Linear(inner_size, point.hidden_size, bias=False, dtype=point.dtype)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Dense(Layer):
    """The dense layer of as many operations: hidden size K F. Another function, the yardstick."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.layer = SwiGLU(task.point, task.point.top_k * task.point.expert_hidden_size).to(task.x_TD.device)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.layer(x_TD)


class DenseTwin(Dense):
    """The same with its products by the library that ours takes (``moe/cpu/matmul.py``): what of our lead
    over ``Dense`` is the library's."""

    def __init__(self, task: Task, products: str = "auto") -> None:
        super().__init__(task)
        self.products = products

    def forward(self, x_TD: Tensor) -> Tensor:
        gate, up = linear(x_TD, self.layer.up.weight, self.products).chunk(2, dim=-1)
        return linear(F.silu(gate) * up, self.layer.down.weight, self.products)


NAMES = StreamNames(("text",), ("reading",))


def moe_config(point: Point) -> MoEConfig:
    return MoEConfig(
        num_experts=point.experts, experts_per_token=point.top_k, expert_hidden_size=point.expert_hidden_size
    )


def calibrated(point: Point) -> CpuConfig:
    """``train.cpu`` as a run of one rank would choose it; prints the choice."""
    found = calibrate(CpuConfig(), moe_config(point), point.hidden_size, point.dtype)
    for line in found.lines:
        print(f"{point.name}: {line}")
    return found.settings


class Ours(Layer):
    """``MoELayer`` with its default settings but ``train.cpu``; its router is always fp32."""

    def __init__(self, task: Task, cpu: CpuConfig | None = None) -> None:
        super().__init__()
        point = task.point
        self.layer: Any = MoELayer(moe_config(point), point.hidden_size, 0, SINGLE, NAMES).to(task.x_TD.device)
        set_cpu(self.layer, cpu or CpuConfig())
        self.layer.router.weight.data = task.router_ED.float()
        self.layer.experts.up.data, self.layer.experts.down.data = task.up_EFD, task.down_EDF
        modality_n = torch.zeros(point.tokens, dtype=torch.int64, device=task.x_TD.device)
        self.tokens = TokenInfo.of_modalities(modality_n, NAMES)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.layer(x_TD, self.tokens)[0]

    def gradients(self) -> Gradients:
        layer = self.layer
        return layer.router.weight.grad, layer.experts.up.grad, layer.experts.down.grad


class Transformers(Layer):
    """The Mixtral block of Hugging Face transformers, its experts by grouped_mm."""

    def __init__(self, task: Task) -> None:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

        super().__init__()
        point = task.point
        config = MixtralConfig(
            hidden_size=point.hidden_size,
            intermediate_size=point.expert_hidden_size,
            num_local_experts=point.experts,
            num_experts_per_tok=point.top_k,
            experts_implementation="grouped_mm",
        )
        assert config._experts_implementation == "grouped_mm", config._experts_implementation
        self.block: Any = MixtralSparseMoeBlock(config)
        self.block.gate.weight.data = task.router_ED
        self.block.experts.gate_up_proj.data = task.up_EFD
        self.block.experts.down_proj.data = task.down_EDF

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.block(x_TD[None])[0]

    def gradients(self) -> Gradients:
        experts = self.block.experts
        return self.block.gate.weight.grad, experts.gate_up_proj.grad, experts.down_proj.grad


class DeepSpeed(Layer):
    """``deepspeed.moe.layer.MoE`` with drop_tokens off; it pads every expert to the busiest one's load.

    Sampling of the second expert is off, so that it computes the same function.
    """

    def __init__(self, task: Task) -> None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu" if task.x_TD.device.type == "cpu" else "cuda")
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        from deepspeed.moe.layer import MoE

        super().__init__()
        point = task.point
        self.layer: Any = MoE(
            point.hidden_size,
            SwiGLU(point, point.expert_hidden_size),
            num_experts=point.experts,
            ep_size=1,
            k=point.top_k,
            drop_tokens=False,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        )
        self.gate, self.experts = self.layer.deepspeed_moe.gate.wg, self.layer.deepspeed_moe.experts.deepspeed_experts
        self.gate.weight.data = task.router_ED.float()
        for e, expert in enumerate(self.experts):
            expert.up.weight.data = task.up_EFD[e]
            expert.down.weight.data = task.down_EDF[e]

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.layer(x_TD[None])[0][0]

    def gradients(self) -> Gradients:
        up = torch.stack([expert.up.weight.grad for expert in self.experts])
        return self.gate.weight.grad, up, torch.stack([expert.down.weight.grad for expert in self.experts])


class Megatron(Layer):
    """megatron-core's ``MoELayer`` over ``SequentialMLP`` and its all-to-all dispatcher, on one rank.

    Of its settings (dispatcher, fused activation, router in fp32) those that were fastest on a CPU. On
    a CPU its compiled helpers run as they are written.
    """

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.layer: Any = make_megatron_layer(task.point)
        self.layer.router.weight.data = task.router_ED
        for e, expert in enumerate(self.layer.experts.local_experts):
            expert.linear_fc1.weight.data = task.up_EFD[e]
            expert.linear_fc2.weight.data = task.down_EDF[e]

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.layer(x_TD[:, None])[0][:, 0]

    def gradients(self) -> Gradients:
        experts = self.layer.experts.local_experts
        up = torch.stack([expert.linear_fc1.weight.grad for expert in experts])
        down = torch.stack([expert.linear_fc2.weight.grad for expert in experts])
        return self.layer.router.weight.grad, up, down


def make_megatron_layer(point: Point, **settings: Any) -> Any:
    """``MoELayer`` with ``settings`` beside those of a single rank without a balance loss."""
    layer_class, submodules, config_class = _megatron()
    common = {
        "num_layers": 1,
        "hidden_size": point.hidden_size,
        "num_attention_heads": 1,
        "ffn_hidden_size": point.expert_hidden_size,
        "moe_ffn_hidden_size": point.expert_hidden_size,
        "num_moe_experts": point.experts,
        "moe_router_topk": point.top_k,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "bias_activation_fusion": False,
        "add_bias_linear": False,
        "use_cpu_initialization": True,
        "perform_initialization": False,
        "params_dtype": point.dtype,
        "bf16": point.dtype == torch.bfloat16,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # packages for GPUs, and its advice on fp32 routers
        return layer_class(config_class(**{**common, **settings}), submodules)


def _megatron() -> tuple[Any, Any, Any]:
    """The layer's class, its parts and the class of its config; on a CPU through the stand-in."""
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
        from megatron.core.transformer.mlp import MLPSubmodules
        from megatron.core.transformer.moe import moe_layer, moe_utils, token_dispatcher
        from megatron.core.transformer.moe.experts import SequentialMLP
        from megatron.core.transformer.spec_utils import ModuleSpec
        from megatron.core.transformer.transformer_config import TransformerConfig

        from mmmoe_pretrain.engines import megatron_cpu

        megatron_cpu.install()
    if not hasattr(moe_utils, "te_general_gemm"):  # unbound there without Transformer Engine
        moe_utils.te_general_gemm = None
    if not torch.cuda.is_available():
        token_dispatcher.maybe_move_tensor_to_cpu = as_on_cpu
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    products = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    parts = moe_layer.MoESubmodules(experts=ModuleSpec(module=SequentialMLP, submodules=products))
    return moe_layer.MoELayer, parts, TransformerConfig


def as_on_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """What the dispatcher's own function returns for a tensor of a GPU; it leaves others as they are."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


class Plain(Layer):
    """What one would write first: gather, two grouped products, scatter."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.top_k = task.point.top_k
        self.router = nn.Parameter(task.router_ED.float())
        self.up, self.down = nn.Parameter(task.up_EFD), nn.Parameter(task.down_EDF)

    def forward(self, x_TD: Tensor) -> Tensor:
        weights_A, experts_A, order = self._route(x_TD)
        ends = torch.bincount(experts_A, minlength=self.up.shape[0]).cumsum(0).to(torch.int32)
        tokens_A = order // self.top_k
        gate, up = F.grouped_mm(x_TD[tokens_A], self.up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        y_AD = F.grouped_mm(F.silu(gate) * up, self.down.transpose(1, 2), offs=ends)
        return torch.zeros_like(x_TD).index_add(0, tokens_A, y_AD * weights_A[:, None].to(y_AD.dtype))

    def _route(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weight and expert of each assignment, sorted by expert, and their order."""
        weights, ids = F.linear(x_TD.float(), self.router).softmax(-1).topk(self.top_k)
        experts_A, order = ids.reshape(-1).sort()
        return (weights / weights.sum(-1, keepdim=True)).reshape(-1)[order], experts_A, order

    def gradients(self) -> Gradients:
        assert self.router.grad is not None and self.up.grad is not None and self.down.grad is not None
        return self.router.grad, self.up.grad, self.down.grad


class Loop(Plain):
    """A Python loop over the experts."""

    def forward(self, x_TD: Tensor) -> Tensor:
        weights_A, experts_A, order = self._route(x_TD)
        out_TD, first = torch.zeros_like(x_TD), 0
        for e, count in enumerate(torch.bincount(experts_A, minlength=self.up.shape[0]).tolist()):
            tokens = order[first : first + count] // self.top_k
            gate, up = (x_TD[tokens] @ self.up[e].t()).chunk(2, dim=-1)
            y = (F.silu(gate) * up) @ self.down[e].t()
            out_TD = out_TD.index_add(0, tokens, y * weights_A[first : first + count, None].to(y.dtype))
            first += count
        return out_TD


YARDSTICK, TWIN, OURS = "dense", "dense_twin", "ours"
PEERS: dict[str, tuple[Callable[[Task], Layer], str | None]] = {  # and the package it comes from
    "transformers": (Transformers, "transformers"),
    "deepspeed": (DeepSpeed, "deepspeed"),
    "megatron": (Megatron, "megatron"),
}
BASELINES: dict[str, Callable[[Task], Layer]] = {"grouped_mm": Plain, "loop": Loop}


def missing(name: str) -> str | None:
    """Why this library cannot be timed here, or None."""
    package = PEERS[name][1]
    if package is not None and importlib.util.find_spec(package) is None:
        return f"{name} is skipped: {package} is not installed (pip install -e '.[bench]')"
    return None
