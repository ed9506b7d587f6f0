"""The top-activating tokens of each expert: of those that it served, the ones to which its router gave the highest
probability.

Owns the recording of a forward pass (by hooks that change nothing), and the selection, which is exact however
the rows are batched. Distinct content comes first: one token of each image, clip or text, as long as there are enough
of them; equal images of two samples count as one. Shapes: n valid tokens, E experts, K choices.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from mmmoe_pretrain.batch import Item, Sample
from mmmoe_pretrain.data.pack import Origins
from mmmoe_pretrain.evaluate.features import content_name
from mmmoe_pretrain.moe.router import Router
from mmmoe_pretrain.moe.routing import Routing
from mmmoe_pretrain.moe.tokens import TokenInfo


@dataclass(frozen=True)
class Decisions:
    """The routing of one layer, one row per token: ``served_nE`` is True where the expert took the token (chosen, and
    with room for it)."""

    layer: int
    log_p_nE: np.ndarray
    served_nE: np.ndarray


@contextmanager
def watch(model: nn.Module) -> Iterator[list[Decisions]]:
    """A list to which each forward pass of ``model`` adds one entry an MoE layer, in order; the
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
    times_nE = torch.zeros_like(routing.log_p_nE).scatter_add_(1, routing.expert_ids_nK, routing.kept_nK.float())
    return (times_nE > 0).cpu().numpy()


@dataclass(frozen=True)
class TopToken:
    """Token number ``token`` of item number ``number`` of a sample; ``content``: name of what the item holds."""

    log_p: float
    modality: str
    task: str
    sample: Sample
    number: int
    token: int
    content: str

    @property
    def item(self) -> Item:
        return self.sample.items[self.number]

    @property
    def probability(self) -> float:
        return float(np.exp(self.log_p))

    @property
    def place(self) -> tuple[str, int]:
        return self.content, self.token


class TopTokens:
    """Collects batch by batch; ``of(layer, expert)`` are the ``top`` best of each modality."""

    def __init__(self, top: int) -> None:
        self.top = top
        self._best: defaultdict[tuple[int, int], dict[str, list[TopToken]]] = defaultdict(dict)

    def add(
        self, decisions: Sequence[Decisions], tokens: TokenInfo, origins: Origins, samples: Sequence[Sample]
    ) -> None:
        """Add the tokens of one batch that are of a place in an item."""
        names = [[content_name(item) for item in sample.items] for sample in samples]
        modality_n, task_n = tokens.modality_ids_n.cpu().numpy(), tokens.task_ids_n.cpu().numpy()

        def found(row: int, modality: str, log_p: float) -> TopToken:
            b, number, token = (int(its[row]) for its in (origins.sample_n, origins.item_n, origins.token_n))
            task = tokens.names.tasks[task_n[row]]
            return TopToken(log_p, modality, task, samples[b], number, token, names[b][number])

        for layer in decisions:
            for m, modality in enumerate(tokens.names.modalities):
                rows = np.flatnonzero((modality_n == m) & (origins.token_n >= 0))
                for expert in np.flatnonzero(layer.served_nE[rows].any(0)).tolist():
                    log_p_n, mine = layer.log_p_nE[:, expert], rows[layer.served_nE[rows, expert]]
                    order = mine[np.argsort(-log_p_n[mine], kind="stable")].tolist()
                    best = self._best[layer.layer, expert]
                    new = (found(row, modality, float(log_p_n[row])) for row in order)
                    best[modality] = self._merged(best.get(modality, []), new)

    def of(self, layer: int, expert: int) -> dict[str, list[TopToken]]:
        """The tokens by modality, the most probable first; without modalities that the expert never served."""
        return {modality: self._chosen(best) for modality, best in self._best.get((layer, expert), {}).items()}

    def _merged(self, best: list[TopToken], new: Iterator[TopToken]) -> list[TopToken]:
        """The first tokens of ``top`` different contents, and those of ``top`` different places. Both lists begin
        with the most probable; ``new`` is read no further than needed."""
        kept: list[TopToken] = []
        contents: set[str] = set()
        places: set[tuple[str, int]] = set()
        for token in heapq.merge(best, new, key=lambda token: -token.log_p):
            if token.content not in contents or (token.place not in places and len(places) < self.top):
                kept.append(token)
            contents.add(token.content)
            places.add(token.place)
            if len(contents) == self.top:  # and then as many places
                break
        return kept

    def _chosen(self, best: list[TopToken]) -> list[TopToken]:
        first = {token.content: token for token in reversed(best)}
        others = [token for token in best if token is not first[token.content]]
        chosen = [*first.values(), *others[: self.top - len(first)]]
        return sorted(chosen, key=lambda token: -token.log_p)
