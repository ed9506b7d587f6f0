"""What one rank computes in a step, in closed form: the seconds of its products (FLOPs over the rate of products of
that size), attention's scores, operations bound by memory (bytes over bandwidth), recomputation, the host and the
optimizer.

Shapes: n tokens, t rows of a tensor rank, D hidden size, F of a feed-forward layer, K experts a token, E experts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.models.block import dense_width, is_sparse
from mmmoe_pretrain.models.costs import BACKWARD, BlockCosts, ModelCosts, gradient_passes
from mmmoe_pretrain.moe.activation import ACTIVATIONS
from mmmoe_pretrain.objectives import objectives_of
from mmmoe_pretrain.parallel.degrees import Layout
from mmmoe_pretrain.parallel.stages import Stage
from mmmoe_pretrain.plan import communication as plan
from mmmoe_pretrain.plan.communication import FP32, Microbatch, Parameter
from mmmoe_pretrain.plan.machines import Machine

# Bytes of memory traffic of a gradient at each microbatch beside reading it: added to the sum in fp32 (read and
# written); under DeepSpeed copied to a bucket from stage 2 on, and at stage 3 its parameter gathered into one buffer.
SUMMED, BUCKETED, GATHERED = 8, 8, 8
# ZeRO-3's hooks, over the host's time of a dense block (for a block of either kind) and of the rest of a microbatch:
# narrow models under ZeRO-2 and 3 on one and two ranks of a CPU, 1.8 to 2.3 ms over 0.9 ms and 2.6 over 3.5 ms.
ZERO_3_BLOCK, ZERO_3_ENDS = 2.0, 0.75


def of_microbatch(
    config: RunConfig,
    layout: Layout,
    stages: Sequence[Stage],
    costs: ModelCosts,
    batch: Microbatch,
    machine: Machine,
    imbalance: float,
) -> dict[str, float]:
    """Seconds of one microbatch, forward and backward."""
    forward: dict[str, float] = defaultdict(float)
    recomputed = 0.0
    for stage in stages:
        for index in stage.blocks:
            block = _block(config, layout, index, costs.blocks[index], batch, machine, imbalance)
            for name, seconds in block.items():
                forward[name] += seconds
            recomputed += _recomputed(config, machine, stage, index, block)
        rate = machine.product_rate(config.train.precision, min(batch.tokens, config.model.hidden_size))
        forward["embedders"] += stage.first * batch.tokens * costs.first_extra / rate
        forward["heads"] += stage.last * batch.tokens * costs.last_extra / layout.tensor / rate
    objectives = objectives_of(config)
    looks = objectives.whole_step + objectives.taught  # once a step, and the others for each of its gradients
    passes = 1 + BACKWARD + looks / gradient_passes(config)
    found = {name: passes * seconds for name, seconds in forward.items()}
    return {**found, "recomputation": recomputed}


def _block(
    config: RunConfig, layout: Layout, index: int, costs: BlockCosts, batch: Microbatch, machine: Machine,
    imbalance: float,
) -> dict[str, float]:  # fmt: skip
    """Seconds of one block's forward pass."""
    precision, hidden, tensor = config.train.precision, config.model.hidden_size, layout.tensor
    n = batch.tokens

    def products(flops: float, *dimensions: float) -> float:
        return n * flops / machine.product_rate(precision, min(dimensions)) if flops else 0.0

    found = {
        "products": products(costs.projections / tensor, n, hidden / tensor),
        "attention": n * costs.scores / tensor / machine.attention_rate(precision, costs.scores / (4 * hidden)),
        "memory bound": n * _streamed(config, layout, index) / machine.streaming,
    }
    if not is_sparse(config.moe, index):
        width = dense_width(config.model, config.moe, index) / tensor
        found["products"] += products(costs.dense / tensor, n, hidden, width)
        return found
    moe = config.moe.for_layer(index)
    shared = moe.shared_expert_hidden_size / tensor
    found["products"] += products(costs.router, n, hidden, moe.router_outputs)
    found["products"] += products(costs.shared / tensor, n, hidden, shared)
    found["products"] += products(costs.expert_attention, n, hidden, moe.expert_attention_size)
    rows = n * layout.expert * moe.experts_per_token / moe.router_outputs  # of one expert
    width = moe.expert_hidden_size / tensor
    rate = machine.expert_rate(precision, rows, min(hidden, width))
    found["experts"] = imbalance * n * costs.experts / tensor / rate
    return found


def _streamed(config: RunConfig, layout: Layout, index: int) -> float:
    """Bytes a token that a block's operations without products move, forward: norms and residual sums (read and write
    of [t, D]: 10 D in all), heads prepared (read and written once), activations (two read, one written of each
    hidden unit), and an MoE layer's rows permuted and combined (2 K D, and K D + D). Where experts are on several
    ranks, a token has a row for each of r ranks, which are gathered (2 r D) and added up twice: those of one rank's
    experts (r D instead of D) and those of all ranks (r D + D). For attention among experts the rows of all choices
    are written, normalised, added to and weighed (8 K D); a routing memory is cut off the rows and put back (4 D)."""
    model, tensor = config.model, layout.tensor
    element = FP32 if config.train.precision == "fp32" else 2
    hidden = model.hidden_size
    rows = 10 * hidden / (tensor if layout.sequence_parallel else 1)
    heads = 2 * hidden * (1 + 2 * model.kv_heads / model.num_heads) / tensor
    if not is_sparse(config.moe, index):
        return element * (rows + heads + 3 * dense_width(config.model, config.moe, index) / tensor)
    moe = config.moe.for_layer(index)
    k, widths = moe.experts_per_token, ACTIVATIONS[moe.activation].width + 1
    units = k * moe.expert_hidden_size + moe.shared_expert_hidden_size
    alone = moe.expert_attention_size > 0
    sent = k if alone else plan.ranks_of_token(k, moe.num_experts, layout.expert)
    moved = 3 * k + 1 + 4 * sent * (layout.expert > 1) + 8 * k * alone + 4 * (moe.routing_memory_size > 0)
    return element * (rows + heads + widths * units / tensor + moved * hidden)


def _runs_again(config: RunConfig, stage: Stage, index: int) -> bool:
    return config.train.recompute == "blocks" and index in stage.recomputed


def _recomputed(config: RunConfig, machine: Machine, stage: Stage, index: int, block: dict[str, float]) -> float:
    """Seconds of a block that the backward pass computes again: all of it, on GPUs without the experts' second
    product; or of experts the first product (width of the activation + 1 of the products)."""
    first_products = 0.0
    if is_sparse(config.moe, index):
        width = ACTIVATIONS[config.moe.for_layer(index).activation].width
        first_products = block["experts"] * width / (width + 1)
    if _runs_again(config, stage, index):
        needed = {**block, "experts": first_products} if machine.asynchronous else block
        return sum(needed.values())
    return first_products if config.train.recompute == "experts" else 0.0


def accumulated_bytes(layout: Layout, held: Sequence[Parameter]) -> float:
    """Bytes of one microbatch's gradients."""
    if layout.engine == "megatron":
        return sum(p.numel * (p.bytes + SUMMED) for p in held)
    copied = BUCKETED * (layout.zero_stage >= 2) + GATHERED * (layout.zero_stage == 3)
    return sum(p.numel for p in held) * (FP32 + SUMMED + copied)


def host_seconds(config: RunConfig, layout: Layout, stages: Sequence[Stage], machine: Machine) -> float:
    """Seconds of one microbatch that the host takes to start its operations."""
    moe_block = machine.host.moe_block + (machine.host.dispatch if layout.expert > 1 else 0.0)
    blocks = 0.0
    for stage in stages:
        for index in stage.blocks:
            once = moe_block if is_sparse(config.moe, index) else machine.host.dense_block
            blocks += once * (1 + _runs_again(config, stage, index) / (1 + BACKWARD))
    ends = machine.host.microbatch * sum(stage.first + stage.last for stage in stages) / 2
    return blocks + ends


def hook_seconds(layout: Layout, stages: Sequence[Stage], machine: Machine) -> float:
    """Seconds of one microbatch of the hooks of ZeRO-3, which run before and after each module."""
    if layout.zero_stage < 3:
        return 0.0
    blocks = sum(len(stage.blocks) for stage in stages)
    ends = sum(stage.first + stage.last for stage in stages) / 2
    return ZERO_3_BLOCK * blocks * machine.host.dense_block + ZERO_3_ENDS * ends * machine.host.microbatch


def waiting_seconds(config: RunConfig, layout: Layout, stages: Sequence[Stage], machine: Machine) -> float:
    """Seconds of one microbatch in which a device idles: each MoE layer with experts on several ranks waits for the
    sizes of its exchange, and then for the host to start its forward operations (a third of all)."""
    if layout.expert == 1:
        return 0.0
    sparse = [(stage, index) for stage in stages for index in stage.blocks if is_sparse(config.moe, index)]
    passes = sum(1 + _runs_again(config, stage, index) for stage, index in sparse)
    return passes * (machine.host.moe_block + machine.host.dispatch) / (1 + BACKWARD)


def host_seconds_of_step(stages: Sequence[Stage], machine: Machine) -> float:
    return machine.host.step + machine.host.step_block * sum(len(stage.blocks) for stage in stages)


def optimizer_seconds(layout: Layout, held: Sequence[Parameter], machine: Machine) -> float:
    """Seconds of the optimizer's step over a rank's share of its parameters."""
    shared = layout.zero_stage > 0
    numel = sum(p.numel / ((layout.expert_data if p.expert else layout.data) if shared else 1) for p in held)
    return numel * machine.optimizer_bytes / machine.streaming
