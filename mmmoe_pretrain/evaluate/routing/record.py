"""What every router of a model decided in a forward pass, and whose tokens those were.

Forward hooks look on and change nothing. Shapes: n valid tokens, S segments, E experts, K choices.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmmoe_pretrain.batch import MODALITY_ID, Batch
from mmmoe_pretrain.config import ModalitiesConfig
from mmmoe_pretrain.moe.router import Router
from mmmoe_pretrain.moe.routing import Routing


@dataclass(frozen=True)
class Decisions:
    """Of one layer, a row a token: ``served_nE`` is True where the expert took the token (chosen, and
    with room for it)."""

    layer: int
    log_p_nE: np.ndarray
    served_nE: np.ndarray


@dataclass(frozen=True)
class Origins:
    """Where each token of a stream comes from: its sample, and its place in that sample's modality (a
    patch, a stretch of sound, or a text token, 0 being the begin mark)."""

    sample_n: np.ndarray
    place_n: np.ndarray
    modality_n: np.ndarray


@contextmanager
def watch(model: nn.Module) -> Iterator[list[Decisions]]:
    """A list to which each forward pass of ``model`` adds one entry a mixture layer, in order; the
    caller empties it between passes."""
    seen: list[Decisions] = []

    def keep(module: nn.Module, _: Any, routing: Routing) -> None:
        assert isinstance(module, Router)
        seen.append(Decisions(module.layer, routing.log_p_nE.detach().float().cpu().numpy(), _served(routing)))

    handles = [module.register_forward_hook(keep) for module in model.modules() if isinstance(module, Router)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _served(routing: Routing) -> np.ndarray:
    served_nE = torch.zeros(routing.log_p_nE.shape, device=routing.kept_nK.device)
    served_nE.scatter_add_(1, routing.expert_ids_nK, routing.kept_nK.float())
    return (served_nE > 0).cpu().numpy()


def origins(batch: Batch, config: ModalitiesConfig) -> Origins:
    """The origins of the valid tokens. A fused segment is of the sample that its image or audio is of."""
    num_valid = batch.num_valid
    segment_n = _numpy(batch.segment_ids[:num_valid])
    sample_S = _numpy(batch.pool_sample).copy()
    inputs = {"image": config.image.num_tokens, "audio": batch.audio.shape[2] // config.audio.patch}
    for name, rows_per_input in inputs.items():
        m = MODALITY_ID[name]
        having = np.flatnonzero(_numpy(batch.present_MB[m]))  # the i-th input is of the i-th sample that has one
        sample_S[segment_n[_numpy(batch.rows[m])]] = having[_numpy(batch.source[m]) // max(1, rows_per_input)]
    return Origins(
        sample_n=sample_S[segment_n],
        place_n=_numpy(batch.positions[:num_valid]),
        modality_n=_numpy(batch.modality_ids[:num_valid]),
    )


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().numpy()
