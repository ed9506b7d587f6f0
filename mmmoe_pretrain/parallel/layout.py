"""Checks of a run's layout: its degrees, model, schedule and engine must be compatible.

Pure arithmetic, so that a layout can be planned on any machine. A rule is one function that returns the problem and
the remedy, or None, and one line in the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.config.base import StepSizes
from mmmoe_pretrain.config.engines import ENGINES, Capabilities
from mmmoe_pretrain.parallel.degrees import Layout, divisors, refuse, resolve_degrees

__all__ = ["Layout", "resolve_layout"]


def resolve_layout(config: RunConfig, world_size: int) -> Layout:
    """The layout of a run on ``world_size`` ranks.

    Raises ValueError for a layout that cannot work or would not train the same as one process, with the keys, their
    values and the nearest possible ones.
    """
    layout = resolve_degrees(config.parallel, config.moe.group_sizes, world_size)
    for check in RUN_CHECKS:
        refuse(check(config, layout))
    refuse(_uncut_sizes(config, layout))
    return layout


def _uncut_sizes(config: RunConfig, layout: Layout) -> str | None:
    sizes = dict(_cut_sizes(config))
    uneven = [f"{key} {size}" for key, size in sizes.items() if size % layout.tensor]
    if not uneven:
        return None
    legal = [n for n in divisors(layout.world_size // layout.pipeline) if not any(s % n for s in sizes.values())]
    return (
        f"parallel.tensor_parallel_size {layout.tensor} does not divide {', '.join(uneven)}; use "
        f"tensor_parallel_size {legal}, or multiples of {layout.tensor}"
    )


def _cut_sizes(config: RunConfig) -> Iterator[tuple[str, int]]:
    """The key and size of everything that tensor parallelism cuts."""
    model, moe = config.model, config.moe
    yield "model.vocab_size (of data.tokenizer)", model.vocab_size  # 0 divides
    for name, modality in config.modalities.items():
        yield f"the vocabulary of modalities.{name}", modality.vocabulary
    yield "model.num_heads", model.num_heads
    if model.num_kv_heads is not None:
        yield "model.num_kv_heads", model.num_kv_heads
    moe_blocks = range(moe.every - 1, model.num_layers, moe.every)
    if len(moe_blocks) < model.num_layers:
        yield "model.ffn_hidden_size", model.ffn_hidden_size
    own = {f"moe.layers.{index}": moe.for_layer(index) for index in moe_blocks if index in moe.layers}
    others = {"moe": moe} if len(own) < len(moe_blocks) else {}
    for where, layer in (others | own).items():
        for number, group in enumerate(layer.groups):
            key = f"expert_groups.{number}.expert_hidden_size" if layer.expert_groups else "expert_hidden_size"
            yield f"{where}.{key}", group.expert_hidden_size or layer.expert_hidden_size
        if layer.shared_expert_hidden_size and not moe.dense:
            yield f"{where}.shared_expert_hidden_size", layer.shared_expert_hidden_size


def _blocks_for_stages(config: RunConfig, layout: Layout) -> str | None:
    blocks = config.model.num_layers
    if layout.num_stages <= blocks:
        return None
    remedies = [f"model.num_layers {layout.num_stages} or more"]
    if layout.pipeline <= blocks:
        remedies.append(f"virtual_pipeline_size {list(range(1, blocks // layout.pipeline + 1))}")
    legal = [n for n in divisors(layout.world_size // layout.tensor) if n * layout.virtual_pipeline <= blocks]
    if layout.virtual_pipeline > 1:
        legal = [n for n in legal if n > 1]
    if legal:
        remedies.append(f"pipeline_parallel_size {legal}")
    return (
        f"parallel.pipeline_parallel_size {layout.pipeline} x parallel.virtual_pipeline_size "
        f"{layout.virtual_pipeline} is {layout.num_stages} stages, and model.num_layers {blocks} leaves some without "
        f"a block; use {', or '.join(remedies)}"
    )


def _interleaved_microbatches(config: RunConfig, layout: Layout) -> str | None:
    count, ranks = config.train.num_microbatches, layout.pipeline
    if layout.virtual_pipeline == 1 or count % ranks == 0:
        return None
    below = count // ranks * ranks
    return (
        f"train.num_microbatches {count} is not a multiple of parallel.pipeline_parallel_size {ranks}, as the "
        f"interleaved schedule (parallel.virtual_pipeline_size {layout.virtual_pipeline}) needs; use "
        f"{f'{below} or ' if below else ''}{below + ranks} microbatches, or virtual_pipeline_size: 1"
    )


def _samples_of_objectives(config: RunConfig, layout: Layout) -> str | None:
    train = config.train
    sizes = StepSizes(train.global_batch_size, train.num_microbatches, layout.data, config.model.embedding_size)
    return next(filter(None, (its.batch_problem(name, sizes) for name, its in config.objectives.items())), None)


def _pipeline_engine(config: RunConfig, layout: Layout) -> str | None:
    if layout.pipeline == 1 or layout.capabilities.pipeline:
        return None
    return (
        f"parallel.pipeline_parallel_size {layout.pipeline} with parallel.engine {layout.engine}: it has no "
        f"pipeline; set {_switch(layout, lambda engine: engine.pipeline)}, or "
        f"pipeline_parallel_size: 1 with tensor_parallel_size {divisors(layout.world_size)}"
    )


def _zero_stage(config: RunConfig, layout: Layout) -> str | None:
    stage, legal = layout.zero_stage, layout.capabilities.zero_stages
    if stage in legal:
        return None
    what = {1: "optimizer state", 2: "gradients", 3: "parameters"}.get(stage, "nothing")
    return (
        f"parallel.zero_stage {stage} shards {what}, and parallel.engine {layout.engine} has the stages {_or(legal)} "
        f"alone; use zero_stage: {legal[-1]}, or {_switch(layout, lambda engine: stage in engine.zero_stages)}"
    )


def _optimizer(config: RunConfig, layout: Layout) -> str | None:
    kind, stage = config.optimizer.kind, layout.zero_stage
    legal = layout.capabilities.optimizers.get(kind, ())
    if stage in legal:
        return None
    remedies = [f"zero_stage {_or(legal)}"] if legal else []
    switch = _switch(layout, lambda engine: stage in engine.optimizers.get(kind, ()))
    remedies += [switch] if switch else []
    remedies += [f"optimizer.kind: {other}" for other, stages in layout.capabilities.optimizers.items()
                 if stage in stages]  # fmt: skip
    return (
        f"optimizer.kind {kind} with parallel.engine {layout.engine} and parallel.zero_stage {stage}, which work "
        f"with other optimizers alone; use {', or '.join(remedies)}"
    )


def _precision(config: RunConfig, layout: Layout) -> str | None:
    precision, legal = config.train.precision, layout.capabilities.precisions
    if precision in legal:
        return None
    return (
        f"train.precision {precision} with parallel.engine {layout.engine}, which computes in {_or(legal)}; use "
        f"one of these, or {_switch(layout, lambda engine: precision in engine.precisions)}"
    )


def _engine_settings(config: RunConfig, layout: Layout) -> str | None:
    for name, engine in ENGINES.items():
        given = getattr(config.parallel, engine.settings) if engine.settings else {}
        if given and engine.settings != layout.capabilities.settings:
            return (
                f"parallel.{engine.settings} ({', '.join(sorted(given))}) has settings of engine {name}, and "
                f"parallel.engine is {layout.engine}, which never reads them; set engine: {name}, or leave it out"
            )
    return None


def _overlap(config: RunConfig, layout: Layout) -> str | None:
    known = dict.fromkeys(key for engine in ENGINES.values() for key in engine.overlap)
    wrong = [key for key in known if getattr(config.parallel, key) and key not in layout.capabilities.overlap]
    if not wrong:
        return None
    instead = layout.capabilities.instead_of_overlap
    return (
        f"parallel.{wrong[0]} has no meaning under parallel.engine {layout.engine}; set {wrong[0]}: false"
        f"{f', and {instead}' if instead else ''}, or {_switch(layout, lambda engine: wrong[0] in engine.overlap)}"
    )


def _overlap_param_gather(config: RunConfig, layout: Layout) -> str | None:
    parallel = config.parallel
    if not parallel.overlap_param_gather or (layout.zero_stage == 1 and parallel.overlap_grad_reduce):
        return None
    return (
        f"parallel.overlap_param_gather gathers what zero_stage 1 sharded while gradients overlap too, and "
        f"parallel.zero_stage is {layout.zero_stage}, parallel.overlap_grad_reduce "
        f"{str(parallel.overlap_grad_reduce).lower()}; set zero_stage: 1 and overlap_grad_reduce: true, or "
        f"overlap_param_gather: false"
    )


def _offload(config: RunConfig, layout: Layout) -> str | None:
    target, kind = config.parallel.offload_optimizer, config.optimizer.kind
    offload = layout.capabilities.offload.get(target)
    if target == "none" or (offload and layout.zero_stage in offload.zero_stages and kind in offload.optimizers):
        return None
    remedies = [
        f"{_engine(name, layout)} and zero_stage {_or(engine.offload[target].zero_stages)} with optimizer.kind "
        f"{_or(engine.offload[target].optimizers)}"
        for name, engine in ENGINES.items()
        if target in engine.offload
    ]
    remedies += [
        f"offload_optimizer: {other} with zero_stage {_or(able.zero_stages)}"
        for other, able in layout.capabilities.offload.items()
        if other != target and kind in able.optimizers
    ]
    share = f" with zero_stage 1 or more, which leaves each rank 1/{layout.data} of it" if layout.data > 1 else ""
    return (
        f"parallel.offload_optimizer {target} with parallel.engine {layout.engine}, parallel.zero_stage "
        f"{layout.zero_stage} and optimizer.kind {kind}, whose state stays on the device; use "
        f"{', or '.join(remedies)}, or offload_optimizer: none{share}"
    )


def _average(config: RunConfig, layout: Layout) -> str | None:
    """Where master weights lie in files, or change beside the passes of a step."""
    zero = config.parallel.deepspeed.get("zero_optimization") or {}
    early = [key for key in ("zenflow", "super_offload") if key in str(zero)]
    kept = {"average": "be swapped with their average between two passes", "hold": "be held before an update"}
    used = [key for key in kept if getattr(config.optimizer, key) is not None]
    if not used or not (config.parallel.offload_optimizer == "nvme" or early):
        return None
    what = f"parallel.deepspeed {early[0]}" if early else "parallel.offload_optimizer nvme"
    return (
        f"optimizer.{used[0]} with {what}, under which the weights cannot {kept[used[0]]}; use "
        f"{'another offload' if early else 'offload_optimizer: cpu'}, or set optimizer.{used[0]}: null"
    )


def _task_gradients(config: RunConfig, layout: Layout) -> str | None:
    stage, legal = layout.zero_stage, layout.capabilities.task_gradients
    if config.train.task_gradients is None or stage in legal:
        return None
    return (
        f"train.task_gradients keeps the reduced gradient of each task, and parallel.engine {layout.engine} with "
        f"parallel.zero_stage {stage} has none to keep; use zero_stage {_or(legal)}, or "
        f"{_switch(layout, lambda engine: 1 in engine.task_gradients)} with zero_stage 0 or 1, or set "
        f"train.task_gradients: null"
    )


def _lending(config: RunConfig, layout: Layout) -> str | None:
    if config.moe.lending is None:
        return None
    if layout.expert == 1:
        legal = [n for n in divisors(layout.data)[1:] if not any(count % n for count in config.moe.group_sizes)]
        remedy = f"use expert_parallel_size {_or(legal)}" if legal else "start more data-parallel ranks"
        return (
            f"moe.lending moves rows between the ranks of an expert group, and parallel.expert_parallel_size is 1; "
            f"{remedy}, or set moe.lending: null"
        )
    if layout.zero_stage == 3:
        return (
            "moe.lending holds the weights of a layer's experts from its forward to its backward pass, and "
            "parallel.zero_stage 3 is there to free them; use zero_stage 0, 1 or 2, or set moe.lending: null"
        )
    return None


def _switch(layout: Layout, able: Callable[[Capabilities], bool]) -> str:
    """A remedy: the engines that are able."""
    return " or ".join(_engine(name, layout) for name, engine in ENGINES.items() if able(engine))


def _engine(name: str, layout: Layout) -> str:
    """A remedy: this engine, which may have no pipeline."""
    unpipelined = layout.pipeline > 1 and not ENGINES[name].pipeline
    return f"engine: {name}{' with pipeline_parallel_size: 1' if unpipelined else ''}"


def _or(values: Sequence[object]) -> str:
    *others, last = map(str, values)
    return f"{', '.join(others)} or {last}" if others else last


def _profiled_ranks(config: RunConfig, layout: Layout) -> str | None:
    ranks = () if config.train.profile is None else config.train.profile.ranks
    if all(rank < layout.world_size for rank in ranks):
        return None
    return f"train.profile.ranks {list(ranks)}: the job has the ranks 0 to {layout.world_size - 1}; name some of them"


RUN_CHECKS: tuple[Callable[[RunConfig, Layout], str | None], ...] = (
    _pipeline_engine,
    _blocks_for_stages,
    _interleaved_microbatches,
    _samples_of_objectives,
    _zero_stage,
    _optimizer,
    _engine_settings,
    _overlap,
    _overlap_param_gather,
    _offload,
    _average,
    _task_gradients,
    _precision,
    _profiled_ranks,
    _lending,
)
