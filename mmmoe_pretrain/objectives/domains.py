"""The base of objectives of two domains: the vectors of a target domain, which has no pairs to train on, become like
those of the source (moment_alignment.py, domain_adversarial.py). The domain of a sample is in a field of its JSON.

Shapes: B samples of a microbatch, P joint space.
"""

from __future__ import annotations

from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mmmoe_pretrain.batch import Batch, send
from mmmoe_pretrain.objectives.pooled import OneRepresentationSettings, PooledObjective

SOURCE, TARGET = DOMAINS = ("source", "target")


class DomainSettings(OneRepresentationSettings):
    """``field``: of a sample's JSON. ``target``: its values of the
    target domain; ``source``: of the source (empty: all others). Samples of neither take no part."""

    field: str = Field(min_length=1)
    target: tuple[str, ...] = Field(min_length=1)
    source: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _disjoint(self) -> Self:
        if both := set(self.target) & set(self.source):
            raise ValueError(f"{', '.join(sorted(both))} is of the source and of the target; name it in one of them")
        return self

    def domain_of(self, value: str) -> str | None:
        """``value`` of the field: the domain, or None."""
        if value in self.target:
            return TARGET
        return SOURCE if not self.source or value in self.source else None


class DomainObjective(PooledObjective):
    """Its batches have samples of two domains. A kind has ``Settings``, ``losses``, ``counts`` and ``module``."""

    def of_domains(self, batch: Batch) -> Tensor:
        """bool [B, 2]: the samples that have the representation, of the source and of the target."""
        found = [self.settings.domain_of(meta.get(self.settings.field)) for meta in batch.metas]
        is_of_B2 = torch.tensor([[its == domain for domain in DOMAINS] for its in found]).reshape(-1, 2)
        present_B = batch.pooled[self.settings.of] >= 0
        return send(is_of_B2, present_B.device) & present_B[:, None]

    def needs(self) -> dict[str, set[str]]:
        return self.ways(f"of {self.settings.of}", (self.settings.of,))

    def why_idle(self, loss: str, count: int, so_far: str) -> str:
        settings = self.settings
        sources = f"is one of {', '.join(settings.source)}" if settings.source else "is another"
        return (
            f"objectives.{self.name}: {loss} was 0 over {count} terms {so_far}. Each microbatch needs samples with "
            f"{settings.of} whose field {settings.field} is one of {', '.join(settings.target)}, and such in which "
            f"it {sources}; give the data both"
        )


def scaled(unit_BP: Tensor) -> Tensor:
    """Unit vectors times sqrt(P): their numbers have a mean square of 1."""
    return unit_BP.float() * unit_BP.shape[1] ** 0.5
