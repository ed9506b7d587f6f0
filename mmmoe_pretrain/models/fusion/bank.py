"""What stands in for absent parts with ``missing: bank``: the missing modality bank of Flex-MoE (arXiv 2410.08245).
For each part and each combination of the other parts it has a learned vector, which a sample of that combination gets
in the absent part's place: as its mean, and where a kind reads tokens as its one token. To the module of the kind the
part is then present. A vector is trained by samples of its combination alone, so training needs such samples
(``dropout_share`` makes them).

Shapes: n tokens of the stream, B samples, P parts, D hidden size, R vectors, C = 2^P sets of parts, each by its code:
the sum of 2^p over its parts p.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from mmmoe_pretrain.batch import Spans
from mmmoe_pretrain.config.base import RepresentationSettings

GIVEN = "given"  # name of the dictionaries by combination, as in ``parts.audio.given.image-text``


class Bank(nn.Module):
    """See the module."""

    def __init__(self, settings: RepresentationSettings, hidden_size: int) -> None:
        super().__init__()
        self.reads_tokens = settings.reads_tokens
        self.parts = nn.ModuleDict({part: _Vectors(settings.parts, part, hidden_size) for part in settings.parts})
        self.row_CP = _rows(settings.parts)
        self.register_buffer("row_of", torch.from_numpy(self.row_CP), persistent=False)

    def forward(self, x_nD: Tensor, mean_PBD: Tensor, present_PB: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens, where the kind reads them with the vectors behind them, and the means of all parts."""
        of_parts = (cast(_Vectors, vectors) for vectors in self.parts.values())
        bank_RD = torch.cat([vectors.given[name] for vectors in of_parts for name in vectors.names])
        bit_P1 = 2 ** torch.arange(len(present_PB), device=present_PB.device)[:, None]
        row_PB = self.get_buffer("row_of")[(present_PB * bit_P1).sum(dim=0)].T
        vector_PBD = bank_RD.index_select(0, row_PB.flatten()).unflatten(0, row_PB.shape)
        mean_PBD = torch.where((self.present(present_PB) & ~present_PB)[:, :, None], vector_PBD, mean_PBD)
        return (torch.cat([x_nD, bank_RD]) if self.reads_tokens else x_nD), mean_PBD

    def present(self, present_PB: Tensor) -> Tensor:
        """Of samples that have any, all parts."""
        return present_PB | present_PB.any(dim=0)

    def spans(self, spans_P: tuple[Spans, ...], tokens: int) -> tuple[Spans, ...]:
        """With the vectors, which stand behind so many tokens."""
        if not spans_P:
            return ()
        starts_PB, lengths_PB = (
            np.array([getattr(spans, name) for spans in spans_P], dtype=np.int64) for name in ("starts", "lengths")
        )
        here_PB = lengths_PB > 0
        code_B = 2 ** np.arange(len(here_PB)) @ here_PB
        filled_PB = here_PB.any(axis=0) & ~here_PB
        starts_PB = np.where(filled_PB, tokens + self.row_CP[code_B].T, starts_PB)
        lengths_PB = np.where(filled_PB, 1, lengths_PB)
        return tuple(Spans(*map(tuple, its)) for its in zip(starts_PB.tolist(), lengths_PB.tolist(), strict=True))


class _Vectors(nn.Module):
    """Of an absent part. ``names``: those of ``given`` in the order of ``others``; a ParameterDict has its own."""

    def __init__(self, parts: Sequence[str], absent: str, hidden_size: int) -> None:
        super().__init__()
        self.names = ["-".join(sorted(its)) for its in others(parts, absent)]
        self.given = nn.ParameterDict({name: nn.Parameter(torch.empty(1, hidden_size)) for name in self.names})


def others(parts: Sequence[str], absent: str) -> list[tuple[str, ...]]:
    """The sets of parts that a sample without ``absent`` may have."""
    left = [part for part in parts if part != absent]
    return [its for size in range(1, len(left) + 1) for its in itertools.combinations(left, size)]


def _rows(parts: Sequence[str]) -> np.ndarray:
    """[C, P]: which vector a sample with these parts gets for each that it lacks; 0 for those that it has."""
    row_CP, row = np.zeros((2 ** len(parts), len(parts)), dtype=np.int64), itertools.count()
    for p, part in enumerate(parts):
        for its in others(parts, part):
            row_CP[sum(2 ** parts.index(other) for other in its), p] = next(row)
    return row_CP


def stream_keys(banked: Iterable[RepresentationSettings], streams: Mapping[str, str]) -> dict[str, str]:
    """By the name of a combination, the key of its initial numbers, in which kinds take the place of names."""
    found = (its for settings in banked for part in settings.parts for its in others(settings.parts, part))
    return {"-".join(sorted(its)): "-".join(sorted(streams[part] for part in its)) for its in found}
