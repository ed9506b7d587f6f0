"""Groups of predicted tokens that count equally, whatever their numbers: the loss of a group is the mean over its
targets in the step, and the objective's is the mean of the groups' losses (macro average). With one loss for all
targets, a modality or language counts by its tokens, and one that is rare or short is hardly learned.

Groups are the modalities of the targets, or the values of a field of the samples, such as their language.

Shapes: N targets of a batch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from mmmoe_pretrain.batch import Batch, Targets, send

MODALITY = "modality"
OTHER = "other"  # the group of all values that are not named
VALUE = re.compile(r"[A-Za-z0-9_-]+")  # it stands in the names of losses


def _values(fields: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    for name, values in fields.items():
        wrong = [value for value in values if not VALUE.fullmatch(value)]
        if wrong or len(values) < 2 or len(set(values)) < len(values):
            raise ValueError(
                f"{name} {list(values)}: name two values or more, each once, of letters, digits, _ and -; e.g. "
                f"{{language: [en, de, other]}}, where other stands for all that are not named"
            )
    return fields


# None: every token counts equally.
Balance = (
    Literal["modality"]
    | Annotated[dict[str, tuple[str, ...]], Field(min_length=1, max_length=1), AfterValidator(_values)]
    | None
)


@dataclass(frozen=True)
class TokenGroups:
    """``names`` of the groups. ``of_modality``: their numbers by modality id. ``field``: of the samples, whose values
    are the names; empty: the groups are modalities."""

    names: tuple[str, ...]
    of_modality: tuple[int, ...] = ()
    field: str = ""

    @classmethod
    def of(cls, balance: Mapping[str, Sequence[str]] | str | None, modalities: Sequence[str], predicted: set[str]
           ) -> TokenGroups | None:  # fmt: skip
        """``predicted``: the modalities that have targets, of all ``modalities``. None: there is one group."""
        if balance is None:
            return None
        if isinstance(balance, str):
            names = tuple(name for name in modalities if name in predicted)
            return cls(names, tuple(names.index(name) if name in predicted else -1 for name in modalities))
        ((field, values),) = balance.items()
        return cls(tuple(values), field=field)

    def numbers(self, batch: Batch, targets: Targets) -> Tensor:
        """int64 [N]: the group of each target, -1 of one that is in none."""
        if not self.field:
            ids_N = batch.modality_ids.index_select(0, targets.rows)
            return send(torch.tensor(self.of_modality), ids_N.device).index_select(0, ids_N)
        number = {name: i for i, name in enumerate(self.names)}
        rest = number.get(OTHER, -1)
        found = [number.get(meta.get(self.field), rest) for meta in batch.metas]
        of_sample = torch.tensor(found, dtype=torch.int64)
        sample_N = batch.sample_ids.index_select(0, batch.segment_ids.index_select(0, targets.rows))
        return send(of_sample, sample_N.device).index_select(0, sample_N)
