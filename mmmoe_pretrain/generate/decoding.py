"""Choice of the tokens of sequences that grow: greedy, by sampling, or by beam search (beam.py).

Shapes: S sequences, L of them that have not ended, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import xxhash
from torch import Tensor

from mmmoe_pretrain.batch import send
from mmmoe_pretrain.config.evaluate import GenerateConfig
from mmmoe_pretrain.generate.beam import search
from mmmoe_pretrain.generate.growing import Ahead, Generated, Growing

Choose = Callable[[Tensor, Sequence[str], int], Tensor]  # log p [L, V], keys, number of the token -> ids [L]


def generate(growing: Growing, ahead: Ahead, settings: GenerateConfig) -> list[Generated]:
    """Of every sequence, in their order."""
    if settings.method == "beam":
        return search(growing, ahead, settings.beams, settings.length_penalty)
    choose = _most_probable if settings.method == "greedy" else partial(_drawn, settings)
    return _one_by_one(growing, ahead, choose)


def _one_by_one(growing: Growing, ahead: Ahead, choose: Choose) -> list[Generated]:
    number = len(ahead.keys)
    ids: list[list[int]] = [[] for _ in range(number)]
    total, ended = [0.0] * number, [False] * number
    live, step = list(range(number)), 0
    while live:
        log_p_LV = ahead.log_p(growing.logits_SV)
        ids_L = choose(log_p_LV, [ahead.keys[s] for s in live], step)
        of_chosen = log_p_LV.gather(-1, ids_L[:, None])[:, 0].double()
        going = []
        for row, (s, token, its) in enumerate(zip(live, ids_L.tolist(), of_chosen.tolist(), strict=True)):
            total[s] += its
            ended[s] = token == ahead.end
            ids[s] += [] if ended[s] else [token]
            if not ended[s] and len(ids[s]) < ahead.limits[s]:
                going.append(row)
        if going:
            if len(going) < len(live):
                rows_L = send(torch.tensor(going), ids_L.device)
                growing.select(rows_L)
                ids_L = ids_L.index_select(0, rows_L)
            growing.append(ids_L)
        live, step = [live[row] for row in going], step + 1
    return [Generated(tuple(its), sum_, end) for its, sum_, end in zip(ids, total, ended, strict=True)]


def _most_probable(log_p_LV: Tensor, keys: Sequence[str], step: int) -> Tensor:
    return log_p_LV.argmax(-1)


def _drawn(settings: GenerateConfig, log_p_LV: Tensor, keys: Sequence[str], step: int) -> Tensor:
    numbers = [uniform(settings.seed, key, step) for key in keys]
    uniform_L = send(torch.tensor(numbers, dtype=torch.float64), log_p_LV.device)
    return draw(log_p_LV, uniform_L, settings)


def draw(log_p_LV: Tensor, uniform_L: Tensor, settings: GenerateConfig) -> Tensor:
    """int64 [L]: the inverse of the distribution function at ``uniform_L``, tokens in the order of their
    probability."""
    sorted_LV, order_LV = (log_p_LV.double() / settings.temperature).sort(dim=-1, descending=True, stable=True)
    if settings.top_k:
        sorted_LV[:, settings.top_k :] = -torch.inf
    p_LV = sorted_LV.softmax(-1)
    before_LV = p_LV.cumsum(-1) - p_LV
    p_LV = p_LV.masked_fill(before_LV >= settings.top_p, 0.0)  # nucleus (arXiv 1904.09751); the first one stays
    up_to_LV = p_LV.cumsum(-1)
    place_L = (up_to_LV <= uniform_L[:, None] * up_to_LV[:, -1:]).sum(-1)
    last_L = (p_LV > 0).sum(-1) - 1  # rounding must not choose a token of probability 0
    return order_LV.gather(-1, torch.minimum(place_L, last_L)[:, None])[:, 0]


def uniform(seed: int, key: str, step: int) -> float:
    """In [0, 1), of 53 bits: the same whatever other sequences there are."""
    return float(xxhash.xxh3_64_intdigest(f"{seed}/{step}/{key}".encode()) >> 11) / (1 << 53)
