"""From degrees of parallelism to numbers of ranks, or an error that names possible degrees.

Owns what the ``parallel`` section and the number of ranks decide alone; ``layout.py`` has the rest. Pure
arithmetic: no process group and no torch. A rule is one function that returns what is wrong, or None,
and one line in the table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mmmoe_pretrain.config import ParallelConfig
from mmmoe_pretrain.config.engines import ENGINES, Capabilities


@dataclass(frozen=True)
class Layout:
    """Numbers of ranks: ``world_size`` = data * tensor * pipeline, and ``data`` = expert * expert_data.

    ``virtual_pipeline``: stages that each pipeline rank holds. Experts are cut over the tensor ranks too.
    """

    world_size: int
    data: int
    tensor: int
    pipeline: int
    virtual_pipeline: int
    expert: int
    expert_data: int
    sequence_parallel: bool
    zero_stage: int
    engine: str

    @property
    def num_stages(self) -> int:
        return self.pipeline * self.virtual_pipeline

    @property
    def capabilities(self) -> Capabilities:
        """The capabilities of its engine."""
        return ENGINES[self.engine]


def resolve_degrees(parallel: ParallelConfig, num_experts: int | Sequence[int], world_size: int) -> Layout:
    """The layout as far as the degrees alone decide it; ``num_experts`` as in ``resolve_expert_parallel_size``.

    Raises ValueError.
    """
    for check in DEGREE_CHECKS:
        refuse(check(parallel, world_size))
    tensor, pipeline = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    data = world_size // (tensor * pipeline)
    expert = resolve_expert_parallel_size(parallel.expert_parallel_size, num_experts, data)
    return Layout(
        world_size=world_size,
        data=data,
        tensor=tensor,
        pipeline=pipeline,
        virtual_pipeline=parallel.virtual_pipeline_size,
        expert=expert,
        expert_data=data // expert,
        sequence_parallel=parallel.sequence_parallel,
        zero_stage=parallel.zero_stage,
        engine=parallel.engine,
    )


def resolve_expert_parallel_size(requested: int | str, num_experts: int | Sequence[int], data_size: int) -> int:
    """The number of data-parallel ranks that share one set of experts.

    ``num_experts``: of the MoE layers, or of each group and layer where they differ. ``auto`` takes the
    largest number that divides both the experts and the ranks. Raises ValueError.
    """
    counts = [num_experts] if isinstance(num_experts, int) else list(num_experts)
    legal = [n for n in divisors(data_size) if all(count % n == 0 for count in counts)]
    if requested == "auto":
        return legal[-1]
    size = int(requested)
    if size not in legal:
        raise ValueError(
            f"parallel.expert_parallel_size {size} does not fit moe.num_experts {', '.join(map(str, counts))} on "
            f"{data_size} data-parallel ranks: it must divide both; use one of {legal} or auto"
        )
    return size


def refuse(problem: str | None) -> None:
    """Raises ValueError where there is one."""
    if problem is not None:
        raise ValueError(problem)


def divisors(number: int) -> list[int]:
    """In rising order."""
    return [n for n in range(1, number + 1) if number % n == 0]


def _context(parallel: ParallelConfig, world_size: int) -> str | None:
    if parallel.context_parallel_size == 1:
        return None
    return (
        f"parallel.context_parallel_size {parallel.context_parallel_size}: tokens attend within one segment (an "
        f"image, a clip, a text), which one rank computes whole, in memory linear in its length; set "
        f"context_parallel_size: 1, and for memory use parallel.tensor_parallel_size with "
        f"parallel.sequence_parallel, or shorter segments (the limits in modalities)"
    )


def _ranks_of_a_model(parallel: ParallelConfig, world_size: int) -> str | None:
    tensor, pipeline = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    size = tensor * pipeline
    if world_size % size == 0:
        return None
    below = world_size // size * size
    remedies = [f"start {f'{below} or ' if below else ''}{below + size} ranks"]
    if world_size % pipeline == 0:
        remedies.append(f"use tensor_parallel_size {divisors(world_size // pipeline)}")
    if world_size % tensor == 0:
        remedies.append(f"use pipeline_parallel_size {divisors(world_size // tensor)}")
    return (
        f"parallel.tensor_parallel_size {tensor} x parallel.pipeline_parallel_size {pipeline} is {size} ranks a "
        f"model, which does not divide the {world_size} that run; {', or '.join(remedies)}"
    )


def _data_size(parallel: ParallelConfig, world_size: int) -> str | None:
    data, tensor = parallel.data_parallel_size, parallel.tensor_parallel_size
    pipeline = parallel.pipeline_parallel_size
    needed = world_size if data == "auto" else int(data) * tensor * pipeline
    if needed == world_size:
        return None
    return (
        f"parallel.data_parallel_size {data} x tensor_parallel_size {tensor} x pipeline_parallel_size {pipeline} is "
        f"{needed} ranks, and {world_size} run; use data_parallel_size {world_size // (tensor * pipeline)} or auto"
        f"{f', or start {needed} ranks' if needed > 0 else ''}"
    )


def _virtual_stages(parallel: ParallelConfig, world_size: int) -> str | None:
    if parallel.virtual_pipeline_size == 1 or parallel.pipeline_parallel_size > 1:
        return None
    return (
        f"parallel.virtual_pipeline_size {parallel.virtual_pipeline_size} interleaves the stages of a pipeline, and "
        f"parallel.pipeline_parallel_size is 1; set virtual_pipeline_size: 1, or "
        f"{_wider('pipeline_parallel_size', world_size // parallel.tensor_parallel_size)}"
    )


def _sequence(parallel: ParallelConfig, world_size: int) -> str | None:
    if not parallel.sequence_parallel or parallel.tensor_parallel_size > 1:
        return None
    return (
        f"parallel.sequence_parallel shares the tokens between matrices among the tensor ranks, and "
        f"parallel.tensor_parallel_size is 1; set sequence_parallel: false, or "
        f"{_wider('tensor_parallel_size', world_size // parallel.pipeline_parallel_size)}"
    )


def _wider(key: str, ranks: int) -> str:
    """A remedy: the values of ``key`` above 1 on ``ranks`` ranks."""
    return f"use {key} {divisors(ranks)[1:]}" if ranks > 1 else f"start more ranks for a {key} above 1"


def _expert_tensor(parallel: ParallelConfig, world_size: int) -> str | None:
    asked, tensor = parallel.expert_tensor_parallel_size, parallel.tensor_parallel_size
    if asked in ("auto", tensor):
        return None
    return (
        f"parallel.expert_tensor_parallel_size {asked} is not parallel.tensor_parallel_size {tensor}: experts are "
        f"cut over the tensor ranks like every other matrix, and megatron-core trains wrong experts without a word "
        f"where the two differ at expert_parallel_size 1; set expert_tensor_parallel_size: {tensor} or auto"
    )


DEGREE_CHECKS: tuple[Callable[[ParallelConfig, int], str | None], ...] = (
    _context,
    _ranks_of_a_model,
    _data_size,
    _virtual_stages,
    _sequence,
    _expert_tensor,
)
