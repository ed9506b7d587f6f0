"""The model: embedders lay tokens into one stream, the trunk mixes them, heads read it.

Shapes: n valid tokens, D hidden size, B samples, P size of the joint embedding space, N targets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmmoe_pretrain.batch import IGNORE, MODALITIES, Batch
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.modalities import build_embedders
from mmmoe_pretrain.models.attention import StreamPlan, plan_stream
from mmmoe_pretrain.models.trunk import Trunk
from mmmoe_pretrain.moe.router import Router
from mmmoe_pretrain.moe.stats import RoutingStats
from mmmoe_pretrain.parallel.groups import SINGLE, Groups
from mmmoe_pretrain.parallel.stages import Stage, whole
from mmmoe_pretrain.parallel.tensor import vocab_cross_entropy, vocab_head


@dataclass(frozen=True)
class ModelOutput:
    """``features[m]``: [B, P] unit rows, zero where the sample lacks modality m.

    ``caption_nll``: [N] negative log-likelihood (nats, fp32) of each caption target in the order
    of the stream. ``routing``: this rank's sums, one for each sparse block.
    """

    features: dict[str, Tensor]
    caption_nll: Tensor
    routing: tuple[RoutingStats, ...]


class MMMoE(nn.Module):
    """A multimodal mixture-of-experts transformer, or one pipeline stage of it.

    Every parameter takes part in every forward pass, whatever the batch lacks: an absent
    modality runs its embedder on zero rows.
    """

    def __init__(
        self, config: RunConfig, vocab_size: int, groups: Groups = SINGLE, stage: Stage | None = None
    ) -> None:
        super().__init__()
        hidden, joint = config.model.hidden_size, config.model.embedding_size
        self.config, self.groups = config, groups
        self.stage = stage or whole(config.model.num_layers)
        self.compute_dtype = torch.float32
        self._passes = 0  # forward passes since begin_step
        if self.stage.first:
            self.embedders = nn.ModuleDict(build_embedders(config.modalities, hidden, vocab_size, groups))
            self.modality_embedding = nn.Embedding(len(MODALITIES), hidden)
        self.trunk = Trunk(config.model, config.moe, groups, self.stage)
        self.language_head: Any = None
        if self.stage.last:
            self.joint_heads = nn.ModuleDict({m: nn.Linear(hidden, joint, bias=False) for m in MODALITIES})
            if config.objectives.captioning.weight > 0:
                self.language_head = vocab_head(hidden, vocab_size, groups)
        rotary = [getattr(config.modalities, m).positions == "rotary" for m in MODALITIES]
        self.register_buffer("rotary_M", torch.tensor(rotary), persistent=False)

    def begin_step(self, seed: int) -> None:
        """What is random in routing becomes a function of ``seed`` and of the forward passes since."""
        self._passes = 0
        for module in self.modules():
            if isinstance(module, Router):
                module.begin_step(seed)

    def forward(self, batch: Batch) -> ModelOutput:
        """All of the model on one batch."""
        assert self.stage.first and self.stage.last
        x_nD, routing = self.run_stage(batch, None)
        return self.heads(x_nD, batch, routing)

    def run_stage(self, batch: Batch, received_nD: Tensor | None) -> tuple[Tensor, tuple[RoutingStats, ...]]:
        """This stage's blocks on what the stage before sent (the first one embeds ``batch``): the hidden
        states for the next stage or the heads, and the routing sums of each sparse block."""
        model = self.config.model
        head_size = model.hidden_size // model.num_heads
        plan = plan_stream(batch, head_size, model.rotary_base, self.get_buffer("rotary_M"), self._passes)
        self._passes += 1
        if self.stage.first:
            received_nD = self._embed(batch, plan)
        assert received_nD is not None
        return self.trunk(received_nD, plan)

    def heads(self, x_nD: Tensor, batch: Batch, routing: tuple[RoutingStats, ...]) -> ModelOutput:
        """What the last stage makes of the trunk's output."""
        return ModelOutput(self.features(x_nD, batch), self._caption_nll(x_nD, batch), routing)

    def _embed(self, batch: Batch, plan: StreamPlan) -> Tensor:
        text_rows = batch.rows[MODALITIES.index("text")]
        outputs = (
            self.embedders["image"](batch.images),
            self.embedders["audio"](batch.audio, batch.audio_frames),
            self.embedders["text"](batch.text_ids, batch.positions.index_select(0, text_rows)),
        )
        tokens = torch.cat([out.index_select(0, source) for out, source in zip(outputs, batch.source, strict=True)])
        rows = torch.cat(batch.rows)
        place = torch.empty_like(rows)
        place[rows] = torch.arange(rows.numel(), device=rows.device)
        x_nD = tokens.index_select(0, place) + self.modality_embedding(plan.tokens.modality_ids_n)
        return x_nD.to(self.compute_dtype)

    def features(self, x_nD: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Mean over each unimodal segment, projected and normalised."""
        num_samples, num_segments = len(batch.metas), batch.pool_sample.shape[0]
        segment_n = batch.segment_ids[: x_nD.shape[0]]
        total_SD = x_nD.new_zeros(num_segments + 1, x_nD.shape[1], dtype=torch.float32)
        total_SD = total_SD.index_add(0, segment_n, x_nD.float())
        length_S = torch.zeros(num_segments + 1, dtype=torch.int64, device=x_nD.device)
        length_S.scatter_add_(0, segment_n, torch.ones_like(segment_n))  # bincount would make a GPU's host wait
        length_S = length_S.clamp(min=1)
        mean_SD = total_SD / length_S[:, None]
        segment_MB = _segment_of_sample(batch, num_segments, num_samples)
        features = {}
        for m, name in enumerate(MODALITIES):
            pooled_BD = mean_SD.index_select(0, segment_MB[m])
            projected_BP = self.joint_heads[name](pooled_BD)
            features[name] = F.normalize(projected_BP, dim=-1, eps=1e-6) * batch.present_MB[m][:, None]
        return features

    def _caption_nll(self, x_nD: Tensor, batch: Batch) -> Tensor:
        if self.language_head is None:
            return x_nD.new_zeros(0, dtype=torch.float32)
        targets_n = batch.targets[: x_nD.shape[0]]
        rows = (targets_n != IGNORE).nonzero().squeeze(1)
        logits_NV = self.language_head(x_nD.index_select(0, rows)).float()
        return vocab_cross_entropy(logits_NV, targets_n.index_select(0, rows), self.groups)


def _segment_of_sample(batch: Batch, num_segments: int, num_samples: int) -> Tensor:
    """[M, B]: the unimodal segment of each modality and sample, or ``num_segments`` (an empty one)."""
    cells = len(MODALITIES) * num_samples
    cell_S = batch.pool_modality * num_samples + batch.pool_sample
    cell_S = torch.where(batch.pool_sample >= 0, cell_S, cells)
    segment = torch.full((cells + 1,), num_segments, dtype=torch.int64, device=cell_S.device)
    segment = segment.scatter(0, cell_S, torch.arange(num_segments, device=cell_S.device))
    return segment[:cells].view(len(MODALITIES), num_samples)
