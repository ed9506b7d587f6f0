"""What each part of the model costs, so that a pipeline can be cut into stages of like cost.

Owns estimates from a config alone. Counted are matrix products and convolutions of the forward pass,
2 FLOPs a multiply-add, divided by the tokens of the stream; the backward pass is twice that everywhere,
and communication is left out. A sample is taken to have every modality at its full length, since what
the data holds is not in the config: shares are right to the extent that texts and clips fill theirs.

D hidden size, F hidden size of a feed-forward layer, L tokens that a token attends to, E router outputs,
K experts a token, V vocabulary, P joint embedding size, G samples of the global microbatch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmmoe_pretrain.batch import Spans
from mmmoe_pretrain.config import ModelConfig, RunConfig
from mmmoe_pretrain.config.moe import MoEConfig
from mmmoe_pretrain.modalities import Modality
from mmmoe_pretrain.models.block import dense_width, is_sparse
from mmmoe_pretrain.models.fusion.base import build_fusion
from mmmoe_pretrain.moe import expert_attention, routing_memory
from mmmoe_pretrain.moe.activation import ACTIVATIONS
from mmmoe_pretrain.moe.losses import loss_names
from mmmoe_pretrain.objectives import Objective, Objectives, Representation, objectives_of

BACKWARD = 2  # times the forward pass: gradients of the input and of the weight


class BlockCosts(NamedTuple):
    """FLOPs a token of one block, forward, by part; ``sum`` is the whole block."""

    projections: float  # of queries, keys, values and the output
    scores: float  # and their mix with the values
    dense: float = 0.0
    router: float = 0.0
    experts: float = 0.0
    shared: float = 0.0  # expert, and its gate
    expert_attention: float = 0.0


class ModelCosts(NamedTuple):
    """FLOPs a token, forward: of each block by part, and of what the first and the last stage hold beside blocks."""

    blocks: tuple[BlockCosts, ...]
    first_extra: float
    last_extra: float

    @property
    def training(self) -> float:
        """Of forward and backward pass, without recomputation."""
        return (1 + BACKWARD) * (sum(map(sum, self.blocks)) + self.first_extra + self.last_extra)


class TrunkCosts(NamedTuple):
    """FLOPs a token of each block, and of what the first and the last stage hold beside blocks."""

    blocks: tuple[float, ...]
    first_extra: float
    last_extra: float


def model_costs(config: RunConfig) -> ModelCosts:
    """FLOPs a token in the forward pass.

    Blocks: attention 4 D^2 (queries and output), 4 D^2 for as many heads of keys and values as of queries or less
    for fewer, and 4 L D (scores and their mix); and ``feed_forward_parts``. First: the stems, for each modality's
    share of the tokens. Last: for each representation of a sample its joint head, 2 D P, and what fuses it; what
    objectives compute beside, decoders of contents (``decoder_flops``), the head of tokens 2 D V for the share of
    tokens that have a target (V of their vocabulary), and 2 D for each number of predicted contents.
    """
    objectives, model = objectives_of(config), config.model
    tokens, scores, targets, contents = _of_sample(objectives)
    projections = 4 * model.hidden_size**2 * (1 + model.kv_heads / model.num_heads)
    attention = BlockCosts(projections, 4 * scores / tokens * model.hidden_size)
    return ModelCosts(
        tuple(attention._replace(**feed_forward_parts(config, index)) for index in range(model.num_layers)),
        _stem_flops_of_sample(objectives, model.hidden_size) / tokens,
        _head_flops_of_sample(config, objectives, targets, contents) / tokens,
    )


def gradient_passes(config: RunConfig) -> float:
    """Forward and backward passes over the microbatches of a step, in the mean over the steps: more than one where
    the gradient of each task is taken alone (``train.task_gradients``)."""
    settings = config.train.task_gradients
    if settings is None:
        return 1.0
    sparse = any(is_sparse(config.moe, index) for index in range(config.model.num_layers))
    routing = sparse and loss_names(config.moe.losses, tuple(config.modalities))
    passes = len(objectives_of(config)) + bool(routing or config.train.loss_weighting != "fixed")
    return 1 + (passes - 1) / settings.every_of(config.train.log_every)


def block_costs(config: RunConfig) -> TrunkCosts:
    """``model_costs`` with the sum of each block, as a pipeline is cut by."""
    costs = model_costs(config)
    return TrunkCosts(tuple(sum(block) for block in costs.blocks), costs.first_extra, costs.last_extra)


def _of_sample(objectives: Objectives) -> tuple[float, float, float, float]:
    """Tokens, pairs of query and key, targets, and numbers of predicted contents."""
    segments = [segment for objective in objectives.values() for segment in objective.expected()]
    tokens = sum(segment.count * segment.length for segment in segments)
    scores = sum(segment.count * segment.scores for segment in segments)
    targets = sum(segment.count * segment.targets for segment in segments)
    return tokens, scores, targets, sum(segment.count * segment.contents for segment in segments)


def feed_forward_flops(config: RunConfig, index: int) -> float:
    """FLOPs a token of block ``index`` beside attention."""
    return sum(feed_forward_parts(config, index).values())


def feed_forward_parts(config: RunConfig, index: int) -> dict[str, float]:
    """FLOPs a token of block ``index`` beside attention, by field of ``BlockCosts``: dense SwiGLU 6 D F; or the
    router 2 D E and its memory, the K chosen experts and the shared one, 6 D F each with SwiGLU and 4 D F with GELU,
    the shared one's gate 2 D, and attention among the chosen ones. Experts are taken to be chosen evenly, which is
    what balancing works for; those without computation cost nothing, and biases are left out."""
    hidden = config.model.hidden_size
    if not is_sparse(config.moe, index):
        return {"dense": 6 * hidden * dense_width(config.model, config.moe, index)}
    moe = config.moe.for_layer(index)
    a_unit = 2 * hidden * (ACTIVATIONS[moe.activation].width + 1)
    routers = 2 if moe.router == "noisy_top_k" else 1  # logits, and the width of their noise
    size, attention = moe.routing_memory_size, moe.expert_attention_size
    memory = routing_memory.flops(hidden, size, moe.router_outputs) if size else 0
    return {
        "router": 2 * hidden * routers * moe.router_outputs + memory,
        "experts": a_unit * moe.experts_per_token * _mean_expert_size(moe),
        "shared": a_unit * moe.shared_expert_hidden_size + 2 * hidden * moe.shared_expert_gate,
        "expert_attention": expert_attention.flops(hidden, attention, moe.experts_per_token) if attention else 0,
    }


def _mean_expert_size(moe: MoEConfig) -> float:
    total = sum(group.num_experts * (group.expert_hidden_size or moe.expert_hidden_size) for group in moe.groups)
    return total / moe.router_outputs


def _stem_flops_of_sample(objectives: Objectives, hidden_size: int) -> float:
    """Each modality that stands in some segment is embedded once."""
    modalities = _modalities_of(objectives)
    used = {name for objective in objectives.values() for part in objective.expected() for name, _ in part.tokens}
    return sum(modalities[name].max_tokens * stem_flops(modalities[name], hidden_size) for name in sorted(used))


def _modalities_of(objectives: Objectives) -> dict[str, Modality]:
    return {name: modality for objective in objectives.values() for name, modality in objective.modalities.items()}


def stem_flops(modality: Modality, hidden_size: int) -> float:
    """FLOPs a token of the modality's embedder, counted on an example."""
    value = modality.example(np.random.default_rng(0), vocab_size=1)
    inputs = {name: torch.from_numpy(array) for name, array in modality.collate([value]).arrays.items()}
    embedder = modality.embedder(hidden_size, vocab_size=1)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        embedder(**inputs)
    return counter.get_total_flops() / modality.num_tokens(value)


def fusion_flops(representation: Representation, modalities: Mapping[str, Modality], model: ModelConfig) -> float:
    """FLOPs of a representation of one sample that has all of its parts, with its joint head, counted on the device
    ``meta``."""
    lengths = [segment.length for segment in representation.expected(modalities).values()]
    spans = [Spans((sum(lengths[:part]),), (length,)) for part, length in enumerate(lengths)]
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        fusion = build_fusion(representation.settings, model).requires_grad_(False)
        x_nD, mean_PBD = (torch.empty(*rows, model.hidden_size) for rows in ((sum(lengths),), (len(lengths), 1)))
        fused_BW = fusion(x_nD, mean_PBD, torch.empty(len(lengths), 1, dtype=torch.bool), tuple(spans))
        nn.Linear(fusion.width, model.embedding_size, bias=False)(fused_BW)
    return counter.get_total_flops()


def decoder_flops(objective: Objective, hidden_size: int) -> float:
    """FLOPs a sample of its decoder without the heads: in each block 8 D^2 for a token that it predicts, 4 D^2 for
    one of the segment (for each modality anew) and 4 D for each pair of both."""
    total = 0.0
    for segment in objective.expected():
        number, seen = sum(segment.left_out), segment.length
        rows = 8 * number * hidden_size**2 + 4 * len(segment.left_out) * seen * hidden_size**2
        total += segment.count * objective.decoder_layers * (rows + 4 * number * seen * hidden_size)
    return total


def _head_flops_of_sample(config: RunConfig, objectives: Objectives, targets: float, contents: float) -> float:
    model, train = config.model, config.train
    modalities = _modalities_of(objectives)
    heads = sum(fusion_flops(its, modalities, config.model) for its in objectives.representations.values())
    losses = 0.0
    for objective in objectives.values():
        parts = 1 if objective.whole_step else train.num_microbatches
        losses += objective.flops(model.embedding_size, train.global_batch_size / parts)
    losses += sum(decoder_flops(objective, model.hidden_size) for objective in objectives.values())
    logits = model.vocab_size * targets
    for objective in objectives.values():
        for segment in objective.expected():
            own = ((number, modalities[name].settings.vocabulary) for name, number in segment.targets_of)
            logits += sum(segment.count * number * (size - model.vocab_size) for number, size in own if size)
    return heads + losses + 2 * model.hidden_size * (logits + contents)
