"""The config of the new run: what differs by layer, under the fewest overrides."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.models.block import is_sparse
from mmmoe_pretrain.surgery.parameters import Layer


def moe_layers(config: RunConfig) -> list[Layer]:
    """The sparse blocks of a model."""
    moe = config.moe
    return [Layer(i, moe.for_layer(i)) for i in range(config.model.num_layers) if is_sparse(moe, i)]


def chosen_layers(config: RunConfig, wanted: tuple[int, ...]) -> list[Layer]:
    """The sparse blocks of these indices; all where none is named."""
    layers = moe_layers(config)
    known = [layer.index for layer in layers]
    unknown = sorted(set(wanted) - set(known))
    if unknown or not layers:
        raise ValueError(
            f"--layer {unknown[0] if unknown else ''}: no MoE layer there; the MoE layers of this run are blocks "
            f"{', '.join(map(str, known)) or 'none: it is dense, see mmmoe experts upcycle'}"
        )
    return [layer for layer in layers if not wanted or layer.index in wanted]


def with_layers(config: RunConfig, changes: dict[int, dict[str, Any]]) -> RunConfig:
    """``config`` with settings changed by block; what most blocks have becomes the setting of the whole
    model, the others override it. Raises ValueError for settings that cannot be."""
    values = config.model_dump(mode="json")
    moe = values["moe"]
    fields = sorted({field for change in changes.values() for field in change})
    rows: dict[int, dict[str, Any]] = {}
    for layer in moe_layers(config):
        whole = {**layer.moe.model_dump(mode="json"), **changes.get(layer.index, {})}
        rows[layer.index] = {field: whole[field] for field in fields}
    count = Counter(repr(row) for row in rows.values())
    as_it_was = repr({field: moe[field] for field in fields})
    base = max(rows.values(), key=lambda row: (count[repr(row)], repr(row) == as_it_was))
    overrides = {int(index): dict(override) for index, override in moe["layers"].items()}
    for index, row in rows.items():
        kept = {key: value for key, value in overrides.get(index, {}).items() if key not in fields}
        overrides[index] = {**kept, **{key: value for key, value in row.items() if value != base[key]}}
    moe |= {**base, "layers": {index: override for index, override in overrides.items() if override}}
    _fit_thresholds(config, moe)
    return run_config.parse(values, where="the new run")


def _fit_thresholds(config: RunConfig, moe: dict[str, Any]) -> None:
    """No threshold of the global entropy asks for more experts than the smallest layer has."""
    free = moe["identity_experts"] + moe["null_experts"]
    smallest = free + min(
        [moe["num_experts"], *(o.get("num_experts", moe["num_experts"]) for o in moe["layers"].values())]
    )
    wanted = moe["losses"]["min_experts"]
    moe["losses"] = {**moe["losses"], "min_experts": {m: min(count, smallest) for m, count in wanted.items()}}


def named(config: RunConfig, out: Path) -> RunConfig:
    """The config of a run in the folder ``out``, its checkpoints within."""
    values = {**config.model_dump(mode="json"), "name": out.name, "runs_dir": str(out.parent)}
    values["checkpoint"]["folder"] = None  # those there are the source's
    return run_config.parse(values, where=f"--out {out}")


def check_spread(config: RunConfig) -> None:
    """Expert parallelism of a fixed size must still divide the experts."""
    size = config.parallel.expert_parallel_size
    uneven = [] if size == "auto" else [count for count in config.moe.group_sizes if count % int(size)]
    if uneven:
        raise ValueError(
            f"{uneven[0]} experts cannot be divided over parallel.expert_parallel_size {size}; choose another number "
            f"of experts, or add parallel.expert_parallel_size=auto to the command"
        )
