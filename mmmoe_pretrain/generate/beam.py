"""Beam search: the B most probable beginnings are kept at every step. One that ends keeps its place, so the beam gets
narrower, and with one beam the search is greedy. Of those that ended, the best is that with the greatest log
probability / tokens ** length penalty, where the end mark is a token (the penalty as in arXiv 1609.08144, without its
constant).

Shapes: S sequences, B beams, V vocabulary. Row s B + b of what grows is beam b of sequence s.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmmoe_pretrain.batch import send
from mmmoe_pretrain.generate.growing import Ahead, Generated, Growing


@dataclass
class _Search:
    """Of one sequence. ``live``: ids so far and their log probability, by row, the best first. ``ended``: each with
    its score."""

    live: list[tuple[tuple[int, ...], float]]
    ended: list[tuple[float, Generated]] = field(default_factory=list)

    def end(self, ids: tuple[int, ...], log_probability: float, penalty: float, mark: bool) -> None:
        score = log_probability / max(1, len(ids) + mark) ** penalty
        self.ended.append((score, Generated(ids, log_probability, mark)))

    def is_decided(self, longest: int, penalty: float) -> bool:
        """No beginning can still become better: the log probability of a longer one is at most its own."""
        if not self.live:
            return True
        best = max((score for score, _ in self.ended), default=-torch.inf)
        return best >= max(its for _, its in self.live) / longest**penalty


def search(growing: Growing, ahead: Ahead, beams: int, penalty: float) -> list[Generated]:
    """The best of every sequence, in their order."""
    number, device = len(ahead.keys), growing.logits_SV.device
    growing.select(torch.arange(number, device=device).repeat_interleave(beams))
    searches = [_Search([((), 0.0)]) for _ in range(number)]
    while not all(s.is_decided(ahead.limits[i], penalty) for i, s in enumerate(searches)):
        kept = [len(s.live) for s in searches]
        found = _best(ahead.log_p(growing.logits_SV).double(), searches, beams)
        rows, ids = [], []
        for i, (s, candidates) in enumerate(zip(searches, found, strict=True)):
            before, s.live, of_rows = s.live, [], []
            for log_probability, beam, token in candidates[: beams - len(s.ended)] if kept[i] else []:
                so_far = before[beam][0]
                if token == ahead.end:
                    s.end(so_far, log_probability, penalty, mark=True)
                elif len(so_far) + 1 == ahead.limits[i]:
                    s.end((*so_far, token), log_probability, penalty, mark=False)
                else:
                    s.live.append(((*so_far, token), log_probability))
                    of_rows.append((i * beams + beam, token))
            of_rows += [(i * beams, ahead.end)] * (beams - len(of_rows))  # rows of no beginning, that nothing reads
            rows += [row for row, _ in of_rows]
            ids += [token for _, token in of_rows]
        if any(s.live for s in searches):
            growing.select(send(torch.tensor(rows), device))
            growing.append(send(torch.tensor(ids), device))
    return [max(s.ended, key=lambda its: its[0])[1] for s in searches]


def _best(log_p_NV: Tensor, searches: list[_Search], beams: int) -> list[list[tuple[float, int, int]]]:
    """Of each sequence the most probable continuations, at most ``beams``: log probability, beam and token."""
    padding = [-torch.inf] * beams
    so_far = [[its for _, its in s.live] for s in searches]
    so_far_SB = torch.tensor([[*its, *padding][:beams] for its in so_far], dtype=torch.float64)
    total_SBV = send(so_far_SB, log_p_NV.device)[..., None] + log_p_NV.unflatten(0, (len(searches), beams))
    vocab_size = log_p_NV.shape[-1]
    best, place = total_SBV.flatten(1).topk(min(beams, beams * vocab_size), dim=-1)
    return [
        [(its, *divmod(at, vocab_size)) for its, at in zip(*pair, strict=True) if its > -torch.inf]
        for pair in zip(best.tolist(), place.tolist(), strict=True)
    ]
