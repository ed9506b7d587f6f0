"""The lines that a run logs as it starts: where it is, what it trains, on which layout, from which data."""

from __future__ import annotations

from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.export.layout import Weight, parameter_counts, sparse_blocks
from mmmoe_pretrain.parallel.agreement import gather_objects
from mmmoe_pretrain.parallel.degrees import Layout
from mmmoe_pretrain.train.checkpointing import RunContext
from mmmoe_pretrain.train.console import short


def summary(context: RunContext, step: int) -> list[str]:
    """``step``: how many are done. Collective over the pipeline, whose stages have the parameters."""
    config, shapes = context.config, context.engine.parameter_shapes()
    stages = gather_objects(context.host.pipeline, shapes)
    total, active = parameter_counts(config, [shape for stage in stages for shape in _weights(stage)])
    return [
        f"run {config.name} in {config.run_dir.absolute()}: step {step:,} of {config.train.steps:,}, "
        f"a record every {config.train.log_every} steps, a checkpoint every {config.checkpoint.every}",
        f"model: {short(total)} parameters, {short(active)} active per token; {_model(config)}",
        f"layout: {_layout(context.layout)}",
        f"batch: {config.train.global_batch_size:,} samples in {config.train.num_microbatches} microbatch"
        f"{'es' * (config.train.num_microbatches > 1)}; data.train: "
        f"{', '.join(source.path for source in config.data.train[:SOURCES])}"
        f"{', ...' * (len(config.data.train) > SOURCES)}",
    ]


SOURCES = 3  # that are named


def _weights(shapes: dict[str, tuple[int, ...]]) -> list[Weight]:
    import torch

    return [Weight(name, shape, torch.float32, True) for name, shape in shapes.items()]


def _model(config: RunConfig) -> str:
    moe = [settings for _, settings in sparse_blocks(config)]
    experts = sorted({settings.router_outputs for settings in moe})
    chosen = sorted({settings.experts_per_token for settings in moe})
    layers = f"{config.model.num_layers} layers of width {config.model.hidden_size}"
    if not moe:
        return f"{layers}, dense; {config.train.precision}"
    counts, per_token = (" or ".join(map(str, each)) for each in (experts, chosen))
    return f"{layers}, {len(moe)} of them with {counts} experts, {per_token} per token; {config.train.precision}"


def _layout(layout: Layout) -> str:
    degrees = {
        "data": layout.data,
        "expert": layout.expert,
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "virtual pipeline": layout.virtual_pipeline,
    }
    cut = ", ".join(f"{name} {degree}" for name, degree in degrees.items() if degree > 1) or "no parallelism"
    zero = f", ZeRO stage {layout.zero_stage}" if layout.zero_stage else ""
    return f"{layout.engine} on {layout.world_size} rank{'s' * (layout.world_size > 1)}: {cut}{zero}"
