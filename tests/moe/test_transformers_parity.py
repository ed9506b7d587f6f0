"""Hugging Face transformers' blocks with the same weights: the same outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from mmmoe_pretrain.config import MoEConfig
from mmmoe_pretrain.models.init import init_parameters
from mmmoe_pretrain.moe import activation
from mmmoe_pretrain.moe.cpu import activation as cpu_activation
from mmmoe_pretrain.moe.layer import MoELayer
from mmmoe_pretrain.moe.tokens import TokenInfo
from mmmoe_pretrain.parallel.groups import SINGLE

pytest.importorskip("transformers", reason="parity with transformers needs the extra: pip install -e '.[bench]'")

from transformers.models.deepseek_v2 import modeling_deepseek_v2 as deepseek_v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek_v3
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
from transformers.models.llama4 import modeling_llama4 as llama4
from transformers.models.mixtral import modeling_mixtral as mixtral
from transformers.models.olmoe import modeling_olmoe as olmoe
from transformers.models.qwen2_moe import modeling_qwen2_moe as qwen2_moe
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3_moe

from tests.moe.routing_inputs import NAMES

D, FF, SHARED, TOKENS = 32, 64, 48, 50
Tensors = dict[str, Tensor]


class Block(NamedTuple):
    """``theirs``: the block of E experts, K a token. ``names``: their parameters, made of ours by name; gradients
    are carried over in the same way. ``settings``: of ours."""

    theirs: Callable[[int, int], nn.Module]
    names: Callable[[Tensors], Tensors]
    settings: dict[str, Any]


def block(kind: type[nn.Module], config: type, experts: str, width: str, **settings: Any) -> Callable[..., nn.Module]:
    """``kind``: a block of transformers. ``config``: its configuration, where the number of experts and their hidden
    size have these names."""

    def make(num_experts: int, top_k: int) -> nn.Module:
        sizes = {"hidden_size": D, experts: num_experts, "num_experts_per_tok": top_k, width: FF}
        return kind(config(**sizes, **settings))

    return make


def stacked(ours: Tensors) -> Tensors:
    """Laid out as ours: [E, 2F, D] with the gate first, and [E, D, F]."""
    return {
        "gate.weight": ours["router.weight"],
        "experts.gate_up_proj": ours["experts.up"],
        "experts.down_proj": ours["experts.down"],
    }


def shared(ours: Tensors, name: str) -> Tensors:
    gate, up = ours["shared.up.weight"].chunk(2)
    return {
        f"{name}.gate_proj.weight": gate,
        f"{name}.up_proj.weight": up,
        f"{name}.down_proj.weight": ours["shared.down.weight"],
    }


def of_qwen2(ours: Tensors) -> Tensors:
    gate = {"shared_expert_gate.weight": ours["shared.gate.weight"]}
    return {**stacked(ours), **shared(ours, "shared_expert"), **gate}


def of_deepseek(ours: Tensors) -> Tensors:
    bias = {"gate.e_score_correction_bias": ours["router.bias.all"][0]} if "router.bias.all" in ours else {}
    return {**stacked(ours), **shared(ours, "shared_experts"), **bias}


def of_gpt_oss(ours: Tensors) -> Tensors:
    """Gate and up in turn, and inputs first."""

    def in_turn(up: Tensor) -> Tensor:
        return up.unflatten(1, (2, FF)).transpose(1, 2).flatten(1, 2)

    return {
        "router.weight": ours["router.weight"],
        "router.bias": ours["router.logit_bias"],
        "experts.gate_up_proj": in_turn(ours["experts.up"]).transpose(1, 2),
        "experts.gate_up_proj_bias": in_turn(ours["experts.up_bias"]),
        "experts.down_proj": ours["experts.down"].transpose(1, 2),
        "experts.down_proj_bias": ours["experts.down_bias"],
    }


def of_llama4(ours: Tensors) -> Tensors:
    return {
        "router.weight": ours["router.weight"],
        "experts.gate_up_proj": ours["experts.up"].transpose(1, 2),
        "experts.down_proj": ours["experts.down"].transpose(1, 2),
        **shared(ours, "shared_expert"),
    }


OLMOE = (olmoe.OlmoeSparseMoeBlock, olmoe.OlmoeConfig, "num_experts", "intermediate_size")
DEEPSEEK = {"shared_expert_hidden_size": 2 * FF, "node_groups": 4, "groups_per_token": 2}
THEIR_DEEPSEEK = {"n_shared_experts": 2, "n_group": 4, "topk_group": 2}
BLOCKS = {
    "Mixtral": Block(
        block(mixtral.MixtralSparseMoeBlock, mixtral.MixtralConfig, "num_local_experts", "intermediate_size"),
        stacked, {}),
    "OLMoE, renormalised": Block(block(*OLMOE, norm_topk_prob=True), stacked, {}),
    "OLMoE": Block(block(*OLMOE, norm_topk_prob=False), stacked, {"renormalize": False}),
    "Qwen3-MoE": Block(
        block(qwen3_moe.Qwen3MoeSparseMoeBlock, qwen3_moe.Qwen3MoeConfig, "num_experts", "moe_intermediate_size",
              norm_topk_prob=True),
        stacked, {}),
    "Qwen2-MoE": Block(
        block(qwen2_moe.Qwen2MoeSparseMoeBlock, qwen2_moe.Qwen2MoeConfig, "num_experts", "moe_intermediate_size",
              shared_expert_intermediate_size=SHARED, norm_topk_prob=False),
        of_qwen2, {"renormalize": False, "shared_expert_hidden_size": SHARED, "shared_expert_gate": True}),
    "DeepSeek-V2": Block(
        block(deepseek_v2.DeepseekV2Moe, deepseek_v2.DeepseekV2Config, "n_routed_experts", "moe_intermediate_size",
              **THEIR_DEEPSEEK, topk_method="group_limited_greedy", routed_scaling_factor=16.0),
        of_deepseek, {**DEEPSEEK, "router": "group_limited", "scores_per_group": 1, "routed_scaling_factor": 16.0,
                      "renormalize": False}),
    "DeepSeek-V3": Block(
        block(deepseek_v3.DeepseekV3MoE, deepseek_v3.DeepseekV3Config, "n_routed_experts", "moe_intermediate_size",
              **THEIR_DEEPSEEK, norm_topk_prob=True, routed_scaling_factor=2.5),
        of_deepseek, {**DEEPSEEK, "router": "sigmoid_top_k", "scores_per_group": 2, "routed_scaling_factor": 2.5,
                      "bias_balancing": {"rate": 0}}),
    "GPT-OSS": Block(
        block(gpt_oss.GptOssMLP, gpt_oss.GptOssConfig, "num_local_experts", "intermediate_size"),
        of_gpt_oss, {"activation": "clamped_swiglu", "expert_biases": True, "router_bias": True}),
    "Llama 4": Block(
        block(llama4.Llama4TextMoe, llama4.Llama4TextConfig, "num_local_experts", "intermediate_size"),
        of_llama4, {"router": "sigmoid_top_k", "renormalize": False, "router_weight_on_input": True,
                    "shared_expert_hidden_size": FF}),
}  # fmt: skip
SIZES = {"Mixtral": ((8, 2), (16, 8), (64, 8)), "OLMoE": ((8, 2), (64, 8)), "Llama 4": ((8, 1), (8, 2)),
         "DeepSeek-V2": ((16, 6), (16, 4)), "DeepSeek-V3": ((16, 8), (16, 2))}  # fmt: skip


def make_pair(name: str, experts: int, top_k: int, **settings: Any) -> tuple[MoELayer, nn.Module]:
    block = BLOCKS[name]
    settings = {**block.settings, **settings}
    config = MoEConfig(num_experts=experts, experts_per_token=top_k, expert_hidden_size=FF, **settings)
    moe = MoELayer(config, D, 0, SINGLE, NAMES)
    init_parameters(moe, seed=3, num_layers=1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, tensor in moe.state_dict().items():
            if key.endswith(("bias", "bias.all")):
                tensor.normal_(std=0.3, generator=generator)
    theirs = block.theirs(experts, top_k)
    theirs.load_state_dict({key: value.detach().clone() for key, value in block.names(moe.state_dict()).items()})
    return moe, theirs.train()


def ours_and_theirs(name: str, moe: MoELayer, block: nn.Module) -> tuple[Tensors, Tensors]:
    """Outputs and all gradients of the same weighted sum of outputs, in their layout."""
    generator = torch.Generator().manual_seed(0)
    x, target = (torch.randn(TOKENS, D, generator=generator) for _ in range(2))
    x *= 3  # so that some of GPT-OSS's gates and ups are clamped
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    out = moe(a, TokenInfo.of_modalities(torch.zeros(TOKENS, dtype=torch.int64), NAMES))[0]
    (out * target).sum().backward()
    their_out = block(b.view(2, TOKENS // 2, D))
    their_out = (their_out[0] if isinstance(their_out, tuple) else their_out).view(TOKENS, D)
    (their_out * target).sum().backward()
    gradients = {key: parameter.grad for key, parameter in moe.named_parameters()}
    ours = {"out": out, "x": a.grad, **BLOCKS[name].names(gradients)}
    theirs = {"out": their_out, "x": b.grad, **{key: p.grad for key, p in block.named_parameters()}}
    assert ours.keys() == theirs.keys()
    return ours, theirs


@pytest.mark.parametrize("backend", ["blocked", "grouped_mm"])
@pytest.mark.parametrize(
    "name,num_experts,top_k", [(name, *size) for name in BLOCKS for size in SIZES.get(name, ((8, 2),))]
)
def test_outputs_and_gradients_are_those_of_transformers(
    name: str, num_experts: int, top_k: int, backend: str
) -> None:
    ours, theirs = ours_and_theirs(name, *make_pair(name, num_experts, top_k, expert_backend=backend))
    for key, value in ours.items():
        # fp32 sums of 32 to 100 terms in another order (6e-8 each), of values up to the largest, and the routing
        # weight multiplied before the second product here, after it there.
        worst = (value - theirs[key]).abs().max() / theirs[key].abs().max()
        assert worst < 4e-6, f"{key}: {worst:.1e} of the largest value"
        assert theirs[key].abs().max() > 0.01  # they agree on something


def test_gates_and_ups_of_gpt_oss_are_compared_where_they_are_clamped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the limits both directions differ from theirs."""
    for module in (activation, cpu_activation):
        monkeypatch.setattr(module, "LIMIT", 1e9)
    ours, theirs = ours_and_theirs("GPT-OSS", *make_pair("GPT-OSS", 8, 2))
    for key in ("out", "x", "experts.gate_up_proj"):
        assert (ours[key] - theirs[key]).abs().max() > 1e-3 * theirs[key].abs().max()
