"""The model of a run as its ranks would hold it: built by the engines' own code on the device ``meta``, under process
groups that do not communicate (torch's backend ``fake``). Takes seconds for any number of ranks.

Ranks of one pipeline stage hold equal shares, so one rank of each is built: data, tensor and expert rank 0.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.engines.apply import build_models, cut_trunk
from mmmoe_pretrain.modalities import build_modalities
from mmmoe_pretrain.models.pretraining import PretrainingModel
from mmmoe_pretrain.parallel.degrees import Layout
from mmmoe_pretrain.parallel.groups import Groups
from mmmoe_pretrain.parallel.layout import resolve_layout
from mmmoe_pretrain.parallel.mesh import build_groups, destroy_groups
from mmmoe_pretrain.parallel.placement import logical_shape, placements
from mmmoe_pretrain.parallel.stages import Stage, stages_of_rank
from mmmoe_pretrain.plan.communication import Parameter, parameters_of

ATTENTION, DENSE, ROUTERS, EXPERTS = "attention", "dense feed-forward", "routers", "experts"
SHARED, AMONG, HEADS, OTHERS = "shared experts", "attention among experts", "heads", "others"
EMBEDDERS = "embedder of "  # and the modality's name


@dataclass(frozen=True)
class RankBuild:
    """One rank of a pipeline stage. ``parameters``: of each of its ``stages``, in the model's order. ``by_part``: its
    own numbers."""

    pipeline_rank: int
    stages: tuple[Stage, ...]
    parameters: tuple[tuple[Parameter, ...], ...]
    by_part: Mapping[str, int]


@dataclass(frozen=True)
class Build:
    """``ranks``: one of each pipeline rank. ``total``, ``active``, ``by_part`` and ``active_by_part``: parameters of
    the whole model, each counted once; active are those that compute for one token, of a layer's experts K of E."""

    config: RunConfig
    layout: Layout
    ranks: tuple[RankBuild, ...]
    total: int
    active: int
    by_part: Mapping[str, int]
    active_by_part: Mapping[str, float]


def build(config: RunConfig, world_size: int, groups: Groups | None = None) -> Build:
    """The model of ``config`` on ``world_size`` ranks. ``groups``: of this job, where one runs.

    Raises ValueError for an impossible layout, and where the vocabulary is not known.
    """
    check_vocabulary(config)
    layout = resolve_layout(config, world_size)
    if groups is not None:
        return _build(config, layout, groups)
    with pretended_groups(layout) as made:
        return _build(config, layout, made)


def check_vocabulary(config: RunConfig) -> None:
    """Raises ValueError where some modality reads text and the size of its vocabulary is not known."""
    readers = [name for name, m in build_modalities(config.modalities, decoding=False).items() if m.needs_tokenizer]
    if readers and not config.model.vocab_size:
        raise ValueError(
            f"model.vocab_size is 0, and modality {readers[0]} reads text: the plan reads no tokenizer; set "
            f"model.vocab_size to its number of tokens"
        )


@contextmanager
def pretended_groups(layout: Layout) -> Iterator[Groups]:
    """The groups of rank 0 of a job that does not run; nothing is left of them afterwards.

    Raises ValueError in a process that has a default process group, whose job they would replace.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    if dist.is_initialized():
        raise ValueError("a plan makes its own process groups, and this process is in some; give build their Groups")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=layout.world_size)
    try:
        yield build_groups(layout)
    finally:
        destroy_groups()
        dist.destroy_process_group()


def meta_models(config: RunConfig, groups: Groups, stages: Sequence[Stage]) -> list[PretrainingModel]:
    """The models of one rank without memory for their parameters, and without lending."""
    with torch.device("meta"):
        return build_models(without_lending(config), groups, stages)


def without_lending(config: RunConfig) -> RunConfig:
    """What lending moves depends on the routing of each step: plans leave it out (``report.assumed_lending``)."""
    return config.model_copy(update={"moe": config.moe.model_copy(update={"lending": None})})


def _build(config: RunConfig, layout: Layout, groups: Groups) -> Build:
    stages = cut_trunk(config, layout.num_stages)
    whole: Counter[str] = Counter()
    active: dict[str, float] = {}
    ranks = []
    for rank in range(layout.pipeline):
        own = stages_of_rank(stages, rank, layout.pipeline, layout.virtual_pipeline)
        models = meta_models(config, dataclasses.replace(groups, pipeline_rank=rank), own)
        by_part: Counter[str] = Counter()
        for model in models:
            cuts = placements(model)
            for name, parameter in model.named_parameters():
                part, numel = part_of_model(name), math.prod(logical_shape(tuple(parameter.shape), cuts[name]))
                by_part[part] += parameter.numel()
                whole[part] += numel
                active[part] = active.get(part, 0.0) + numel * _active_share(config, name, part)
        ranks.append(RankBuild(rank, own, tuple(tuple(parameters_of(m)) for m in models), dict(by_part)))
    return Build(config, layout, tuple(ranks), whole.total(), round(sum(active.values())), dict(whole), dict(active))


def part_of_model(parameter: str) -> str:
    """The part of the model that a parameter of ``PretrainingModel`` belongs to, by its name."""
    _, *names = parameter.split(".")
    match names:
        case ["embedders", modality, *_]:
            return f"{EMBEDDERS}{modality}"
        case ["trunk", "blocks", _, "attention", *_]:
            return ATTENTION
        case ["trunk", "blocks", _, "ffn", "router", *_]:
            return ROUTERS
        case ["trunk", "blocks", _, "ffn", "experts", *_]:
            return EXPERTS
        case ["trunk", "blocks", _, "ffn", "shared", *_]:
            return SHARED
        case ["trunk", "blocks", _, "ffn", "expert_attention", *_]:
            return AMONG
        case ["trunk", "blocks", _, "ffn", *_]:
            return DENSE
        case ["banks" | "fusions" | "class_heads" | "code_heads" | "joint_heads", *_]:
            return HEADS
        case ["language_head" | "language_heads", *_]:
            return HEADS
    return OTHERS  # norms, modality embeddings, and what objectives learn


def _active_share(config: RunConfig, name: str, part: str) -> float:
    """Of experts the share that a token's choices are of all that it may choose; where their sizes differ, on average
    over evenly chosen ones."""
    if part != EXPERTS:
        return 1.0
    moe = config.moe.for_layer(int(name.split(".")[3]))
    return moe.experts_per_token / moe.router_outputs
