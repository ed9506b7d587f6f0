"""Which run a config goes on with, and whether it may: what defines the function of the model must be the same.

Steps, learning rates, data, loss weights and the layout may change between one start and the next.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.checkpoint.folders import named_checkpoints
from mmmoe_pretrain.checkpoint.model import CONFIG, TOKENIZER, names_tokenizer, with_tokenizer
from mmmoe_pretrain.checkpoint.storage import open_storage
from mmmoe_pretrain.config import RUN_NAME, RunConfig
from mmmoe_pretrain.train.journal import EVENTS

log = logging.getLogger(__name__)
HOW_IT_IS_COMPUTED = ("dispatch_chunks", "expert_backend", "jitter")  # of a mixture; its function is the same


def config_to_train(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config of the run to train. ``path`` may be the config.yaml of a run whose folder was moved or copied: the
    run goes on where it lies now, and takes its own copy of a tokenizer that is gone. ``name=`` or ``runs_dir=`` make
    another run of it. Raises ValueError where the place of its checkpoints would be in doubt."""
    config = run_config.load(path, tuple(overrides))
    folder = path.resolve().parent
    same_run = not {"name", "runs_dir"} & {override.partition("=")[0] for override in overrides}
    if same_run and path.name == CONFIG and _holds_a_run(folder) and config.run_dir.resolve() != folder:
        config = _moved(config, path, folder)
    own = config.run_dir / TOKENIZER
    if names_tokenizer(overrides) or Path(config.data.tokenizer).is_file() or not own.is_file():
        return config
    _tell("there is no tokenizer at %s: taking the run's own copy, %s", config.data.tokenizer, own)
    return with_tokenizer(config, own)


def _holds_a_run(folder: Path) -> bool:
    return (folder / EVENTS).is_file() or bool(named_checkpoints(open_storage(folder / "checkpoints")))


def _moved(config: RunConfig, path: Path, folder: Path) -> RunConfig:
    if config.checkpoint.folder is not None and (config.name != folder.name or config.run_dir.exists()):
        raise ValueError(
            f"{path} was made in {config.run_dir}, and its checkpoints are in {config.checkpoint_root}; move the "
            f"folder back, or say which run is meant with runs_dir=, name= and checkpoint.folder="
        )
    if not re.fullmatch(RUN_NAME, folder.name):
        raise ValueError(
            f"{folder} is a run under a name that none can have; rename it to letters, digits, dots, - and _, "
            f"beginning with a letter or digit"
        )
    _tell("%s was made in %s: going on in %s, where it lies now", path, config.run_dir, folder)
    place = {"name": folder.name, "runs_dir": str(folder.parent)}
    return run_config.parse({**config.model_dump(mode="json"), **place}, where=str(path))


def _tell(message: str, *values: object) -> None:
    if os.environ.get("RANK", "0") == "0":  # there is no process group yet
        log.warning(message, *values)


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
