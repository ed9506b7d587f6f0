"""May this config go on from that run? What defines the function of the model must be the same.

Steps, learning rates, data, loss weights and the layout may change between one start and the next.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.config import RunConfig

HOW_IT_IS_COMPUTED = ("dispatch_chunks", "expert_backend", "jitter")  # of a mixture; its function is the same


def check_same_model(
    config: RunConfig, saved: Path, of_checkpoint: Callable[[], dict[str, Any] | None] = lambda: None
) -> None:
    """Compare with the config saved beside the run, or where there is none (another machine's disk) with the
    checkpoint's own; ValueError names what differs."""
    if saved.is_file():
        before = run_config.load(saved)
    else:
        values = of_checkpoint()
        if values is None:
            return
        before = run_config.parse(values, where="the checkpoint's config")
    old, new = _defining(before), _defining(config)
    changes = [f"{key} was {old.get(key)!r} and is {new.get(key)!r}" for key in sorted(old.keys() | new.keys())
               if old.get(key) != new.get(key)]  # fmt: skip
    if changes:
        raise ValueError(
            f"going on cannot change the model of {saved.parent}: {'; '.join(changes)}; set it back, train "
            f"under another name=, or replace the run with --overwrite"
        )


def _defining(config: RunConfig) -> dict[str, Any]:
    values = config.model_dump(mode="json")
    values["moe"].pop("losses")
    for settings in (values["moe"], *values["moe"]["layers"].values()):
        for key in HOW_IT_IS_COMPUTED:
            settings.pop(key, None)
        balancing = settings.get("bias_balancing") or {}
        settings["bias_balancing"] = {**balancing, "rate": balancing.get("rate") is not None}
    objectives = {
        "pairs": sorted(config.objectives.contrastive.pairs) if config.objectives.contrastive.on else [],
        "captioning": config.objectives.captioning.weight > 0,
    }
    sections = {name: values[name] for name in ("model", "moe", "modalities")}
    return _flat({**sections, "objectives": objectives})


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
