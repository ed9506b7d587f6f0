"""Which layouts a run can have: its degrees, model, schedule and engine must go together.

Pure arithmetic, so that a layout can be planned on any machine. A rule is one function that returns what
is wrong and what would work, or None, and one line in the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.parallel.degrees import Layout, divisors, refuse, resolve_degrees

__all__ = ["Layout", "resolve_layout"]


def resolve_layout(config: RunConfig, world_size: int, vocab_size: int | None = None) -> Layout:
    """The layout of a run on ``world_size`` ranks; the vocabulary is checked where its size is given.

    Raises ValueError for a layout that cannot work or would train something else than one process,
    with the keys, their values and the nearest that can.
    """
    layout = resolve_degrees(config.parallel, config.moe.group_sizes, world_size)
    for check in RUN_CHECKS:
        refuse(check(config, layout))
    refuse(_uncut_sizes(config, layout, vocab_size))
    return layout


def _uncut_sizes(config: RunConfig, layout: Layout, vocab_size: int | None) -> str | None:
    sizes = dict(_cut_sizes(config))
    if vocab_size is not None:
        sizes["the vocabulary of data.tokenizer"] = vocab_size
    uneven = [f"{key} {size}" for key, size in sizes.items() if size % layout.tensor]
    if not uneven:
        return None
    legal = [n for n in divisors(layout.world_size // layout.pipeline) if not any(s % n for s in sizes.values())]
    return (
        f"parallel.tensor_parallel_size {layout.tensor} does not divide {', '.join(uneven)}; use "
        f"tensor_parallel_size {legal}, or multiples of {layout.tensor}"
    )


def _cut_sizes(config: RunConfig) -> Iterator[tuple[str, int]]:
    """The key and size of everything that tensor parallelism cuts, but the vocabulary."""
    model, moe = config.model, config.moe
    yield "model.num_heads", model.num_heads
    mixtures = range(moe.every - 1, model.num_layers, moe.every)
    if len(mixtures) < model.num_layers:
        yield "model.ffn_hidden_size", model.ffn_hidden_size
    for index in mixtures:
        layer, where = moe.for_layer(index), f"moe.layers.{index}" if index in moe.layers else "moe"
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


def _samples_to_contrast(config: RunConfig, layout: Layout) -> str | None:
    contrastive, train = config.objectives.contrastive, config.train
    parts = 1 if contrastive.cached else train.num_microbatches
    if not contrastive.on or train.global_batch_size != parts:
        return None
    remedies = [f"train.global_batch_size {2 * parts} or more"]
    if parts > 1:
        fewer = [n for n in divisors(train.global_batch_size // layout.data or 1) if n < parts]
        remedies += [f"num_microbatches {fewer}", "objectives.contrastive.cached: true (negatives of the whole step)"]
    return (
        f"train.global_batch_size {train.global_batch_size} in train.num_microbatches {train.num_microbatches}: with "
        f"one sample a microbatch objectives.contrastive has no negatives, and its loss and gradient would always be "
        f"0; use {', '.join(remedies)}, or objectives.contrastive.weight: 0"
    )


def _pipeline_engine(config: RunConfig, layout: Layout) -> str | None:
    if layout.engine == "megatron" or layout.pipeline == 1:
        return None
    return (
        f"parallel.pipeline_parallel_size {layout.pipeline} with parallel.engine deepspeed: pipelines are engine "
        f"megatron's (DeepSpeed's own exclude ZeRO stages 2 and 3); set engine: megatron, or "
        f"pipeline_parallel_size: 1 with tensor_parallel_size {divisors(layout.world_size)}"
    )


def _clipping_without_zero(config: RunConfig, layout: Layout) -> str | None:
    clips = config.optimizer.clip_norm > 0
    if layout.engine == "megatron" or layout.zero_stage > 0 or not clips or layout.expert == 1:
        return None
    return (
        f"parallel.zero_stage 0 with parallel.engine deepspeed, optimizer.clip_norm {config.optimizer.clip_norm:g} "
        f"and parallel.expert_parallel_size {layout.expert}: without ZeRO, DeepSpeed takes the mean of the "
        f"ranks' norms for the gradient's (its issue 8475); use zero_stage 1, 2 or 3, expert_parallel_size: 1, or "
        f"clip_norm: 0"
    )


def _megatron_zero(config: RunConfig, layout: Layout) -> str | None:
    if layout.engine == "deepspeed" or layout.zero_stage < 2:
        return None
    what = "gradients" if layout.zero_stage == 2 else "parameters"
    return (
        f"parallel.zero_stage {layout.zero_stage} shards {what}, and parallel.engine megatron shards optimizer state "
        f"alone; use zero_stage: 1 (its distributed optimizer), or {_with_deepspeed(layout)}"
    )


def _deepspeed_settings(config: RunConfig, layout: Layout) -> str | None:
    if layout.engine == "deepspeed" or not config.parallel.deepspeed:
        return None
    return (
        f"parallel.deepspeed ({', '.join(sorted(config.parallel.deepspeed))}) is DeepSpeed's JSON, and "
        f"parallel.engine is megatron, which never reads it; set engine: deepspeed, or leave it out"
    )


def _deepspeed_overlap(config: RunConfig, layout: Layout) -> str | None:
    asked = [key for key in ("overlap_grad_reduce", "overlap_param_gather") if getattr(config.parallel, key)]
    if layout.engine == "megatron" or not asked:
        return None
    return (
        f"parallel.{asked[0]} is engine megatron's, and parallel.engine is deepspeed; set {asked[0]}: false, and "
        f"parallel.deepspeed: {{zero_optimization: {{overlap_comm: true}}}} for DeepSpeed's own overlap"
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
    target = config.parallel.offload_optimizer
    if target == "nvme" and not (layout.engine == "deepspeed" and layout.zero_stage == 3):
        return (
            f"parallel.offload_optimizer nvme with parallel.engine {layout.engine} and parallel.zero_stage "
            f"{layout.zero_stage}: DeepSpeed keeps optimizer state in files under ZeRO-3 alone; use "
            f"{_with_deepspeed(layout)} and zero_stage: 3, or offload_optimizer: cpu with zero_stage 1, 2 or 3"
        )
    if target == "none" or (layout.engine == "deepspeed" and layout.zero_stage > 0):
        return None
    if layout.engine == "deepspeed":
        return (
            "parallel.offload_optimizer cpu moves optimizer state that ZeRO sharded, and parallel.zero_stage is 0; "
            "use zero_stage 1, 2 or 3, or offload_optimizer: none"
        )
    return (
        f"parallel.offload_optimizer cpu with parallel.engine megatron, which keeps optimizer state on the device; "
        f"use offload_optimizer: none with zero_stage: 1, which leaves each rank 1/{layout.data} of it, or "
        f"{_with_deepspeed(layout)} and zero_stage 1, 2 or 3"
    )


def _with_deepspeed(layout: Layout) -> str:
    """A remedy; that engine has no pipeline."""
    return f"engine: deepspeed{' with pipeline_parallel_size: 1' if layout.pipeline > 1 else ''}"


RUN_CHECKS: tuple[Callable[[RunConfig, Layout], str | None], ...] = (
    _pipeline_engine,
    _blocks_for_stages,
    _interleaved_microbatches,
    _samples_to_contrast,
    _megatron_zero,
    _deepspeed_settings,
    _deepspeed_overlap,
    _overlap_param_gather,
    _clipping_without_zero,
    _offload,
)
