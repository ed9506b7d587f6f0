"""``plan/build.py``'s result for any layout of a config in milliseconds, put together from single blocks.

Blocks of one kind hold equal parameters, an expert rank a share of the experts, and all else follows from the stage
cut. So one block of each kind is built for each number of tensor ranks; a test holds the result equal to the build's.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache

from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.engines.apply import cut_trunk
from mmmoe_pretrain.models.block import kind_of_block
from mmmoe_pretrain.parallel.degrees import Layout
from mmmoe_pretrain.parallel.layout import resolve_layout
from mmmoe_pretrain.parallel.stages import Stage, stages_of_rank
from mmmoe_pretrain.plan.build import Build, RankBuild, build, meta_models, part_of_model, pretended_groups
from mmmoe_pretrain.plan.communication import Parameter, parameters_of

Named = tuple[tuple[str, Parameter], ...]  # with the part of the model that each belongs to


@dataclass(frozen=True)
class Pieces:
    """What the first stage holds beside blocks, a block of each kind, and what the last stage holds beside blocks."""

    first: Named
    blocks: dict[object, Named]
    last: Named


class ClosedForm:
    """Of one config, whose layout varies: engine, degrees, ZeRO stage, recomputation."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self._pieces = lru_cache(maxsize=None)(self._build_pieces)
        self._cut = lru_cache(maxsize=None)(lambda stages: cut_trunk(self.config, stages))
        self._spread = lru_cache(maxsize=None)(_spread)

    @cached_property
    def _whole(self) -> Build:
        """One process: its counts are those of every layout."""
        parallel = type(self.config.parallel)(engine=self.config.parallel.engine)
        return build(self.config.model_copy(update={"parallel": parallel}), 1)

    def build(self, config: RunConfig, layout: Layout) -> Build:
        """As ``build`` would give it. ``config``: this one with another layout."""
        pieces = self._pieces(layout.tensor, layout.sequence_parallel, layout.engine)
        stages = self._cut(layout.num_stages)
        ranks = []
        for rank in range(layout.pipeline):
            own = stages_of_rank(stages, rank, layout.pipeline, layout.virtual_pipeline)
            named = [self._of_stage(pieces, stage, layout.expert) for stage in own]
            parameters = tuple(tuple(parameter for _, parameter in stage) for stage in named)
            ranks.append(RankBuild(rank, own, parameters, _by_part(each for stage in named for each in stage)))
        whole = self._whole
        return dataclasses.replace(whole, config=config, layout=layout, ranks=tuple(ranks))

    def _of_stage(self, pieces: Pieces, stage: Stage, expert: int) -> Named:
        held = [pieces.blocks[self._kind(index)] for index in stage.blocks]
        around = (pieces.first if stage.first else ()), (pieces.last if stage.last else ())
        return sum((self._spread(named, expert) for named in (around[0], *held, around[1])), ())

    def _kind(self, index: int) -> object:
        return kind_of_block(self.config.moe, index)

    def _build_pieces(self, tensor: int, sequence: bool, engine: str) -> Pieces:
        update = {"tensor_parallel_size": tensor, "sequence_parallel": sequence, "engine": engine}
        parallel = type(self.config.parallel)(**update)
        config = self.config.model_copy(update={"parallel": parallel})
        kinds = {self._kind(index): index for index in range(config.model.num_layers)}
        found: dict[object, Named] = {}
        with pretended_groups(resolve_layout(config, tensor)) as groups:
            for kind, index in kinds.items():
                (model,) = meta_models(config, groups, [Stage(index, index + 1)])
                names = [name for name, _ in model.named_parameters()]
                named = [(part_of_model(n), p) for n, p in zip(names, parameters_of(model), strict=True)]
                inside = [place for place, name in enumerate(names) if name.startswith("mmmoe.trunk.blocks.")]
                begin, end = inside[0], inside[-1] + 1
                first, found[kind], last = tuple(named[:begin]), tuple(named[begin:end]), tuple(named[end:])
        return Pieces(first, found, last)


def _spread(named: Named, expert: int) -> Named:
    """One expert rank's share."""
    return tuple((part, dataclasses.replace(p, numel=p.numel // expert) if p.expert else p) for part, p in named)


def _by_part(named: Iterable[tuple[str, Parameter]]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for part, parameter in named:
        found[part] += parameter.numel
    return dict(found)
