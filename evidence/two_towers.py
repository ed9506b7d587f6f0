"""The baseline of one sparse trunk: dense towers, each for the tokens of one modality (as CLIP's, arXiv 2103.00020).

``python -m evidence.two_towers train CONFIG ...`` is ``mmmoe train`` with ``Towers`` for the model's trunk. A token
passes through one tower, so that active FLOPs are those of one dense trunk.

Shapes: n tokens, of which m are of one modality, D hidden size.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from mmmoe_pretrain import cli
from mmmoe_pretrain.batch import AttentionBlocks
from mmmoe_pretrain.config import ModelConfig, MoEConfig
from mmmoe_pretrain.config.base import StreamNames
from mmmoe_pretrain.models import mmmoe
from mmmoe_pretrain.models.attend import AttentionPlan
from mmmoe_pretrain.models.attention import StreamPlan
from mmmoe_pretrain.models.trunk import Trunk
from mmmoe_pretrain.moe.stats import RoutingStats
from mmmoe_pretrain.moe.tokens import TokenInfo
from mmmoe_pretrain.parallel.groups import Groups
from mmmoe_pretrain.parallel.stages import Stage


class Towers(nn.Module):
    """A dense trunk by modality. Raises ValueError for a config with experts, or one that is cut over ranks."""

    def __init__(self, model: ModelConfig, moe: MoEConfig, groups: Groups, stage: Stage, names: StreamNames) -> None:
        super().__init__()
        if not moe.dense:
            raise ValueError(f"towers are dense, and moe.num_experts is {moe.num_experts}; set it to 1")
        if not (stage.first and stage.last) or groups.tensor_size > 1:
            raise ValueError(
                "towers are on one rank; set parallel.pipeline_parallel_size and tensor_parallel_size to 1"
            )
        self.towers = nn.ModuleDict({name: Trunk(model, moe, groups, stage, names) for name in names.modalities})

    def forward(self, x_nD: Tensor, plan: StreamPlan) -> tuple[Tensor, tuple[RoutingStats, ...]]:
        """As ``Trunk.forward``; a tower without tokens computes on none, so that it has a gradient."""
        parts = [split_plan(plan, number) for number in range(len(self.towers))]
        rows_n = torch.cat([rows_m for rows_m, _ in parts])
        outputs = [
            tower(x_nD.index_select(0, rows_m), part)[0]
            for tower, (rows_m, part) in zip(self.towers.values(), parts, strict=True)
        ]
        return torch.cat(outputs).index_select(0, rows_n.argsort()), ()


def split_plan(plan: StreamPlan, modality: int) -> tuple[Tensor, StreamPlan]:
    """The rows of the modality's tokens, and the plan of the stream of these alone. Raises ValueError where tokens of
    two modalities attend to each other."""
    length_S = plan.attention.length_S
    is_its_n = plan.tokens.modality_ids_n == modality
    block_n = np.repeat(np.arange(len(length_S)), length_S)
    of_block_S = np.bincount(block_n, weights=is_its_n.cpu().numpy(), minlength=len(length_S))
    whole_S = of_block_S == length_S
    if not (whole_S | (of_block_S == 0)).all():
        raise ValueError(
            "a segment has tokens of two modalities, which no tower has; use contrastive objectives alone"
        )
    rows_m = is_its_n.nonzero()[:, 0]
    all_n = plan.tokens
    tokens = TokenInfo(
        modality_ids_n=all_n.modality_ids_n[rows_m],
        task_ids_n=all_n.task_ids_n[rows_m],
        segment_ids_n=all_n.segment_ids_n[rows_m],
        keys_n=all_n.keys_n[rows_m],
        names=all_n.names,
        draw=all_n.draw,
        combination_ids_n=None if all_n.combination_ids_n is None else all_n.combination_ids_n[rows_m],
    )
    blocks = AttentionBlocks(tuple(length_S[whole_S].tolist()), tuple(plan.attention.full_S[whole_S].tolist()))
    attention = AttentionPlan(blocks, plan.attention.device)
    return rows_m, StreamPlan(tokens, plan.cos_nh[rows_m], plan.sin_nh[rows_m], attention)


def main() -> None:
    """``mmmoe`` with towers."""
    mmmoe.Trunk = Towers  # type: ignore[assignment, misc]
    cli.main()


if __name__ == "__main__":
    main()
