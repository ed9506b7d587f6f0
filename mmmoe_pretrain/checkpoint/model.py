"""A saved run: its config, one of its checkpoints, and the trained model, whole, in one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmmoe_pretrain import __version__
from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.checkpoint.state import WholeState, model_key, persistent_buffers
from mmmoe_pretrain.checkpoint.store import (
    Checkpoint,
    checkpoints,
    find_latest,
    load_weights,
    read_meta,
    verify,
    write_state,
)
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.config.base import FileSettings
from mmmoe_pretrain.config.upgrade import needs_upgrade
from mmmoe_pretrain.models.mmmoe import MMMoE
from mmmoe_pretrain.objectives import Objective, ObjectiveModule, objectives_of

CONFIG = "config.yaml"
TOKENIZER = "tokenizer.model"  # the run's copy; every checkpoint has its fingerprint
EXAMPLE = "give the folder of a run that saved one, e.g. runs/demo"


def read_config(run_dir: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config of a run whose folder may have been moved, with ``key=value`` overrides. The tokenizer and the files
    of modalities and objectives are the run's own copies, where it has them and no override names others."""
    if not (run_dir / CONFIG).is_file():
        raise ValueError(f"no run in {run_dir}: it has no {CONFIG}; {EXAMPLE}")
    config = run_config.load(run_dir / CONFIG, tuple(overrides))
    config = with_copies(config, run_dir, overrides)
    if names_tokenizer(overrides) or not (run_dir / TOKENIZER).is_file():
        return config
    return with_tokenizer(config, run_dir / TOKENIZER)


def names_tokenizer(overrides: Sequence[str]) -> bool:
    return any(override.partition("=")[0] in ("data", "data.tokenizer") for override in overrides)


def copy_of(place: str, settings: FileSettings) -> str:
    """What a run calls its copy of the file that the entry at ``place`` reads (``RunConfig.files``)."""
    return f"{place}{Path(settings.file).suffix}"


def with_copies(
    config: RunConfig, run_dir: Path, overrides: Sequence[str] = (), only_missing: bool = False
) -> RunConfig:
    """The config with the copies in ``run_dir``, where they are there, as the files that its entries read, except for
    those that ``overrides`` name; ``only_missing``: of those that are missing where the config has them."""
    keys = [override.partition("=")[0] for override in overrides]
    changed = {}
    for place, its in config.files.items():
        copy, key = run_dir / copy_of(place, its), f"{place}.{its.file_setting}"
        named = any(f"{key}.".startswith(f"{other}.") for other in keys)
        if copy.is_file() and not named and not (only_missing and Path(its.file).is_file()):
            changed[place] = its.model_copy(update={its.file_setting: str(copy)})
    return config.with_entries(changed)


def with_tokenizer(config: RunConfig, path: Path) -> RunConfig:
    return config.model_copy(update={"data": config.data.model_copy(update={"tokenizer": str(path)})})


@dataclass(frozen=True)
class SavedRun:
    """One checkpoint of a run."""

    config: RunConfig
    checkpoint: Checkpoint
    meta: dict[str, Any]

    def model(self) -> MMMoE:
        """The trained model in eval mode and fp32."""
        model = MMMoE(self.config)
        weights = {name: p.data for name, p in model.named_parameters()} | persistent_buffers(model)
        load_weights(self.checkpoint, {f"mmmoe.{name}": tensor for name, tensor in weights.items()})
        return model.eval()


def open_run(run_dir: Path, overrides: Sequence[str] = (), step: int | None = None) -> SavedRun:
    """The newest checkpoint of a run, or that of ``step``, verified. ``overrides``: key=value of the config.

    Raises ValueError where the folder holds no such finished checkpoint, or where it is damaged.
    """
    config = read_config(run_dir, overrides)
    root = config.checkpoints_of(run_dir)
    checkpoint = find_latest(root)
    if checkpoint is None:
        raise ValueError(f"no finished checkpoint in {root}; {EXAMPLE}")
    if step is not None:
        there = {candidate.step: candidate for candidate in checkpoints(root)}
        if step not in there:
            raise ValueError(f"no finished checkpoint of step {step} in {root}; there are {sorted(there)}")
        checkpoint = there[step]
    verify(checkpoint)
    meta = read_meta(checkpoint)
    refuse_old(checkpoint, meta)
    vocab_size = meta.get("vocab_size")
    if type(vocab_size) is not int or not 0 <= vocab_size <= 1 << 24:
        raise ValueError(f"{checkpoint} is damaged: meta.json has vocab_size {str(vocab_size)[:40]}")
    return SavedRun(config.with_vocabulary(vocab_size), checkpoint, meta)  # configs of earlier versions lack it


def load_model(
    run_dir: Path, overrides: Sequence[str] = (), device: torch.device | None = None
) -> tuple[MMMoE, RunConfig, int]:
    """The model of ``open_run`` on ``device`` (default: the CPU), its config and its step."""
    run = open_run(run_dir, overrides)
    return run.model().to(device), run.config, run.checkpoint.step


def buffers_of_objectives(config: RunConfig) -> WholeState:
    """As a new run has them."""
    size = config.model.embedding_size
    tasks = nn.ModuleDict({name: objective.module(size) for name, objective in objectives_of(config).items()})
    return {model_key(f"tasks.{name}"): buffer for name, buffer in persistent_buffers(tasks).items()}


def trained_module(run_dir: Path, config: RunConfig, objective: Objective) -> ObjectiveModule:
    """The module of ``objective`` with the weights of the newest checkpoint of a run that was opened, on the CPU."""
    checkpoint = find_latest(config.checkpoints_of(run_dir))
    assert checkpoint is not None, "its model is loaded"
    module = objective.module(config.model.embedding_size)
    load_weights(checkpoint, {f"tasks.{objective.name}.{name}": p.data for name, p in module.named_parameters()})
    return module


def write_first(config: RunConfig, folder: Path, step: int, state: WholeState, meta: Mapping[str, Any]) -> None:
    """Write the first checkpoint of the new run in ``folder`` to where training with ``config`` reads it. Raises
    ValueError where another run has its checkpoints there."""
    root = config.checkpoints_of(folder)
    if find_latest(root) is not None:
        raise ValueError(f"{root} has the checkpoints of another run; choose another name by --out, or remove them")
    write_state(root, step, state, meta)


def meta_of_new_run(config: RunConfig, fingerprint: str) -> dict[str, Any]:
    """Of its checkpoint of step 0, as the training loop writes it. ``fingerprint``: of its tokenizer."""
    return {
        "version": __version__,
        "vocab_size": config.model.vocab_size,
        "tokenizer_fingerprint": fingerprint,
        "config": config.model_dump(mode="json"),
        "progress": {"steps": 0, "updates": 0, "loss_scale": None},
        "seed": config.seed,
        "skipped_batches": [],
    }


def refuse_old(checkpoint: Checkpoint, meta: dict[str, Any]) -> None:
    """Raises ValueError if a version with other names of weights wrote the checkpoint."""
    written = meta.get("config")
    if isinstance(written, dict) and needs_upgrade(written):
        raise ValueError(
            f"{checkpoint} was written by MMMoE {str(meta.get('version'))[:40]}, where modalities shared tensors "
            f"that are one for each now. Resume it with that version, or take its weights over: mmmoe export RUN "
            f"--out FOLDER there, mmmoe import FOLDER --out RUN here"
        )
