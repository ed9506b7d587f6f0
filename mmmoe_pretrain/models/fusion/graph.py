"""Fusion by a sparse graph over the tokens of a sample's parts, with layers of a graph convolution (GCN, arXiv
1609.02907) or graph attention (GAT, arXiv 1710.10903). Each node receives from its neighbours and from itself; the
vector is the mean over nodes. Edges are of the kinds that the settings name:

* ``modality``: every part has a node more, at first the mean of its tokens, with edges from and to its tokens and
  from and to such nodes of the sample's other parts.
* ``time``: between tokens of a part that follow each other, if it has no grid for edges of space.
* ``space``: between tokens that are beside or above each other, of each part in ``grid``, which has the number of
  tokens in a row of it.
* ``similarity``: to each token from those ``neighbours`` of the sample's other parts whose hidden states are the most
  similar to its own (cosine). The choice has no gradient.

An absent part (``missing: allow``) has no nodes. Shapes: N nodes, E edges, k tokens, H heads, d head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmmoe_pretrain.batch import Spans, send
from mmmoe_pretrain.config import ModelConfig
from mmmoe_pretrain.config.base import RepresentationSettings
from mmmoe_pretrain.modalities import Modality
from mmmoe_pretrain.models.fusion.base import MASKED, Fusion
from mmmoe_pretrain.models.fusion.cross import plan_cross, tokens_of

EdgeKind = Literal["modality", "time", "space", "similarity"]


class GraphSettings(RepresentationSettings):
    reads_tokens: ClassVar[bool] = True

    kind: Literal["graph"] = "graph"
    layer: Literal["gcn", "gat"] = "gat"
    edges: tuple[EdgeKind, ...] = ("modality",)
    grid: dict[str, Annotated[int, Field(ge=1)]] = Field({})  # by part with edges of space: the tokens in a row of it
    neighbours: int = Field(4, ge=1, le=1024)  # of each token, by similarity
    num_layers: int = Field(2, ge=1, le=64)

    @model_validator(mode="after")
    def _edges_join_parts(self) -> GraphSettings:
        if not {"modality", "similarity"} & set(self.edges):
            raise ValueError(
                f"edges {list(self.edges)} join no token with one of another part; add modality or similarity"
            )
        return self

    @model_validator(mode="after")
    def _grid_of_space(self) -> GraphSettings:
        if bool(self.grid) != ("space" in self.edges) or not set(self.grid) <= set(self.parts):
            raise ValueError(
                f"grid {self.grid} with edges {list(self.edges)} of {', '.join(self.parts)}: edges of space are of "
                f"the parts in grid; give the tokens in a row of each, e.g. grid: {{{self.parts[0]}: 4}}, or neither"
            )
        return self

    def check_tokens(self, name: str, modalities: Mapping[str, Modality]) -> None:
        """See ``RepresentationSettings.check_tokens``."""
        for part, width in self.grid.items():
            if modalities[part].max_tokens % width or not modalities[part].fixed_places:
                raise ValueError(
                    f"representations.{name}.grid {part}: {width} tokens in a row, and a value of {part} has "
                    f"{modalities[part].max_tokens} tokens{'' if modalities[part].fixed_places else ' or fewer'}; "
                    f"edges of space need values of whole rows, all of one size"
                )


class Graph(Fusion):
    """See the module."""

    Settings = GraphSettings

    def __init__(self, settings: GraphSettings, model: ModelConfig) -> None:
        super().__init__(settings, model)
        self.settings = settings
        heads = model.num_heads if settings.layer == "gat" else 0
        self.layers = nn.ModuleList(_Layer(model.hidden_size, heads) for _ in range(settings.num_layers))

    def forward(self, x_nD: Tensor, mean_PBD: Tensor, present_PB: Tensor, spans_P: tuple[Spans, ...]) -> Tensor:
        tokens_kD, lengths = tokens_of(x_nD, spans_P)
        nodes = _nodes(spans_P, self.settings, x_nD.device)
        hubs = mean_PBD.transpose(0, 1).flatten(0, 1).index_select(0, nodes.run_of_hub)
        x_ND, edges = torch.cat([tokens_kD, hubs]), nodes.edges
        if "similarity" in self.settings.edges:
            similar = _most_similar(tokens_kD, nodes.part_k, lengths, self.settings.neighbours)
            edges = Edges(*(torch.cat(pair) for pair in zip(edges.tensors, similar.tensors, strict=True)))
        for number, layer in enumerate(self.layers):
            x_ND = layer(F.elu(x_ND) if number else x_ND, edges.source_E, edges.target_E, edges.there_E)
        total_BD = x_ND.new_zeros(len(lengths), self.width).index_add(0, nodes.sample_N, x_ND)
        count_B = x_ND.new_zeros(len(lengths)).index_add(0, nodes.sample_N, torch.ones_like(x_ND[:, 0]))
        return total_BD / count_B.clamp(min=1)[:, None]


class _Layer(nn.Module):
    """[N, D] -> [N, D]. With ``heads`` it is graph attention, else a graph convolution, whose sum is normalised by
    the roots of the numbers of edges by which both nodes receive."""

    def __init__(self, hidden_size: int, heads: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, hidden_size, bias=False)
        self.heads = heads
        if heads:
            self.of_source = nn.Parameter(torch.empty(heads, hidden_size // heads))
            self.of_target = nn.Parameter(torch.empty(heads, hidden_size // heads))

    def forward(self, x_ND: Tensor, source_E: Tensor, target_E: Tensor, there_E: Tensor) -> Tensor:
        h_ND, there_E = self.linear(x_ND), there_E.to(x_ND.dtype)
        if self.heads:
            h_NHd = h_ND.unflatten(1, (self.heads, -1))
            weight_EH = self._attention(h_NHd, source_E, target_E, there_E)
            sent_EHd = weight_EH[:, :, None] * h_NHd.index_select(0, source_E)
            return torch.zeros_like(h_NHd).index_add(0, target_E, sent_EHd).flatten(1)
        degree_N = h_ND.new_zeros(len(h_ND)).index_add(0, target_E, there_E)  # 1 or more: each receives from itself
        root_N = degree_N.rsqrt()
        weight_E = there_E * root_N.index_select(0, source_E) * root_N.index_select(0, target_E)
        return torch.zeros_like(h_ND).index_add(0, target_E, weight_E[:, None] * h_ND.index_select(0, source_E))

    def _attention(self, h_NHd: Tensor, source_E: Tensor, target_E: Tensor, there_E: Tensor) -> Tensor:
        """[E, H]: a softmax over the edges by which a node receives."""
        of_source_NH, of_target_NH = ((h_NHd * a).sum(dim=-1) for a in (self.of_source, self.of_target))
        logit_EH = of_source_NH.index_select(0, source_E) + of_target_NH.index_select(0, target_E)
        logit_EH = F.leaky_relu(logit_EH, 0.2).masked_fill(there_E[:, None] == 0, MASKED)
        at_EH, empty_NH = target_E[:, None].expand_as(logit_EH), torch.zeros_like(of_target_NH)
        most_NH = empty_NH.scatter_reduce(0, at_EH, logit_EH.detach(), "amax", include_self=False)
        power_EH = (logit_EH - most_NH.index_select(0, target_E)).exp() * there_E[:, None]
        return power_EH / empty_NH.index_add(0, target_E, power_EH).index_select(0, target_E)


@dataclass(frozen=True)
class Edges:
    """From nodes to nodes. ``there_E``: False for padding, which weighs nothing."""

    source_E: Tensor
    target_E: Tensor
    there_E: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.source_E, self.target_E, self.there_E


@dataclass(frozen=True)
class _Nodes:
    """Tokens, sample by sample and part by part, and behind them the nodes of parts: ``run_of_hub``, their numbers
    sample by sample. ``edges``: those that are known on the host."""

    edges: Edges
    sample_N: Tensor
    part_k: Tensor
    run_of_hub: Tensor


def _nodes(spans_P: tuple[Spans, ...], settings: GraphSettings, device: torch.device) -> _Nodes:
    kinds = settings.edges
    width_P = np.array([settings.grid.get(part, 0) for part in settings.parts], dtype=np.int64)
    length_BP = np.array([spans.lengths for spans in spans_P], dtype=np.int64).T
    samples, parts = length_BP.shape
    run_k = np.repeat(np.arange(samples * parts), length_BP.ravel())
    token_k = np.arange(len(run_k))
    hub_runs = np.flatnonzero(length_BP.ravel()) if "modality" in kinds else np.zeros(0, dtype=np.int64)
    hubs = len(run_k) + np.arange(len(hub_runs))
    everything = np.arange(len(run_k) + len(hubs))
    pairs = [(everything, everything)]
    width_k = width_P[run_k % parts]
    if "time" in kinds:
        first = token_k[:-1][(run_k[:-1] == run_k[1:]) & (width_k[:-1] == 0)]
        pairs += [(first, first + 1), (first + 1, first)]
    for first, second in _in_grids(run_k, width_k):
        pairs += [(first, second), (second, first)]
    if "modality" in kinds:
        hub_of_run = np.zeros(samples * parts, dtype=np.int64)
        hub_of_run[hub_runs] = hubs
        pairs += [(token_k, hub_of_run[run_k]), (hub_of_run[run_k], token_k)]
        for shift in range(1, parts):  # each part's node to that of the part so many behind it
            to = hub_runs // parts * parts + (hub_runs + shift) % parts
            both = length_BP.ravel()[to] > 0
            pairs.append((hubs[both], hub_of_run[to[both]]))
    source, target = (np.concatenate(side) for side in zip(*pairs, strict=True))
    sample_N = np.concatenate([run_k, hub_runs]) // parts
    arrays = (source, target, np.ones(len(source), dtype=bool), sample_N, run_k % parts, hub_runs)
    source_E, target_E, there_E, *others = (send(torch.from_numpy(array), device) for array in arrays)
    return _Nodes(Edges(source_E, target_E, there_E), *others)


def _in_grids(run_k: np.ndarray, width_k: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each token with the one beside it, and with the one below it, in the runs that have a width."""
    token_k = np.arange(len(run_k))
    column_k = (token_k - np.searchsorted(run_k, run_k)) % np.maximum(width_k, 1)  # runs rise
    found = []
    for first, step_k in ((token_k[column_k + 1 < width_k], np.ones_like(width_k)), (token_k[width_k > 0], width_k)):
        second = first + step_k[first]
        first, second = first[second < len(run_k)], second[second < len(run_k)]
        same = run_k[first] == run_k[second]
        found.append((first[same], second[same]))
    return found


@torch.no_grad()
def _most_similar(x_kD: Tensor, part_k: Tensor, lengths: list[int], neighbours: int) -> Edges:
    """To each token, from at most so many of its sample's other parts; tokens of like samples share a product."""
    plan = plan_cross(lengths, lengths, x_kD.device)
    unit_kD = F.normalize(x_kD, dim=-1)
    rows = plan.query_N.split([bucket.runs * bucket.queries for bucket in plan.buckets])
    nothing = part_k.new_zeros(0)
    found = [(nothing, nothing, nothing.bool())]
    for bucket, row in zip(plan.buckets, rows, strict=True):
        row_SL = row.view(bucket.runs, bucket.queries)
        unit_SLD, part_SL = unit_kD[row_SL], part_k[row_SL]
        other_SLL = part_SL[:, :, None] != part_SL[:, None]
        if bucket.mask_S11L is not None:
            valid_SL = bucket.mask_S11L[:, 0, 0]
            other_SLL = other_SLL & valid_SL[:, :, None] & valid_SL[:, None]
        score_SLL = (unit_SLD @ unit_SLD.transpose(1, 2)).masked_fill(~other_SLL, -2.0)  # cosines are above
        best = score_SLL.topk(min(neighbours, bucket.keys), dim=-1)
        source = row_SL[:, None].expand_as(score_SLL).gather(2, best.indices)
        target = row_SL[:, :, None].expand_as(source)
        found.append((source.flatten(), target.flatten(), (best.values > -1.5).flatten()))
    return Edges(*(torch.cat(column) for column in zip(*found, strict=True)))
