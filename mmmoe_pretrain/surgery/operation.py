"""The common steps of all commands: read a run, change its state, write a new run, and compare the two.

The new run is written under ``NAME.tmp`` and renamed only if the comparison succeeds.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.batch import Batch, Sample
from mmmoe_pretrain.checkpoint import load_model, store
from mmmoe_pretrain.checkpoint.model import (
    CONFIG,
    TOKENIZER,
    buffers_of_objectives,
    copy_of,
    open_run,
    read_config,
    with_tokenizer,
    write_first,
)
from mmmoe_pretrain.config import MoEConfig, RunConfig
from mmmoe_pretrain.data.evaluation import eval_settings, training_samples
from mmmoe_pretrain.data.pack import pack
from mmmoe_pretrain.data.sources.listing import is_absent, is_stream
from mmmoe_pretrain.modalities import build_modalities, copy_tokenizer
from mmmoe_pretrain.models.mmmoe import MMMoE
from mmmoe_pretrain.models.pretraining import PretrainingModel
from mmmoe_pretrain.objectives import objectives_of
from mmmoe_pretrain.paths import new_folder
from mmmoe_pretrain.surgery.parameters import Layer, Parameter, State, by_key, by_parameter
from mmmoe_pretrain.surgery.probe import TOLERANCE, Usage, held_out_batch, largest_difference, noise_batch, usage
from mmmoe_pretrain.surgery.settings import check_spread, named

RECORD = "surgery.json"


@dataclass(frozen=True)
class Source:
    """The newest checkpoint of a run. ``config`` has the command's overrides applied; ``model`` is as
    it was trained."""

    run_dir: Path
    config: RunConfig
    model: MMMoE
    step: int
    meta: dict[str, Any]
    state: State

    @cached_property
    def data(self) -> tuple[Batch, str]:
        """A batch of the run's own data, or of noise where its shards are elsewhere; and what it is."""
        noise = noise_batch(self.config), "a batch of noise (the run's shards are not here)"
        return held_out_batch(self.config) or noise

    def training_batches(self, samples: int, size: int, what: str) -> Iterator[tuple[Batch, list[Sample]]]:
        """About ``samples`` training samples without augmentation, ``size`` at a time, for ``what``. Raises
        ValueError where the shards cannot be read by number."""
        config, where = self.config, (source.path for source in self.config.data.train)
        if unread := next((path for path in where if is_stream(path) or is_absent(path)), None):
            raise ValueError(
                f"{what} is of training samples that are read by number, and {unread} is a stream or missing; bring "
                f"the shards of {self.run_dir} here, or name others with data.train=..."
            )
        fingerprint = self.meta["tokenizer_fingerprint"]
        modalities = build_modalities(config.modalities, config.data.tokenizer, fingerprint=fingerprint)
        settings = eval_settings(config, modalities)
        read = (sample for _, sample in training_samples(config, modalities, samples, what))
        while batch := list(itertools.islice(read, size)):
            yield pack(batch, settings), batch

    @cached_property
    def usage(self) -> Usage:
        """How much each expert of each layer is used."""
        return usage(self.run_dir, self.step, self.model, *self.data)


@dataclass(frozen=True)
class Result:
    """The result of a command. ``exact``: the function should be the same; ``why_not``: what to do if it is not;
    ``allowed``: why it may change. ``on_data`` compares on the run's data instead of noise."""

    config: RunConfig
    state: State
    did: tuple[str, ...]
    exact: bool = True
    on_data: bool = False
    why_not: str = ""
    allowed: str = "as --lossy allows"


def operate(
    run_dir: Path, out: Path, overrides: Sequence[str], command: str, make: Callable[[Source], Result]
) -> list[str]:
    """Write the run ``out`` that ``make`` turns the newest checkpoint of ``run_dir`` into; returns what was done and
    how it compares, for people.

    Raises ValueError where ``out`` exists, and if the function should be the same but is not: then nothing is
    written. ``run_dir`` never changes.
    """
    if out.exists():
        raise ValueError(f"{out} exists; choose another --out, or remove it")
    source = read_source(run_dir, overrides)
    result = _fitted(make(source))
    config = named(result.config, out)
    check_spread(config)
    with new_folder(out) as draft:
        tokenizer = config.data.tokenizer
        if tokenizer is not None and Path(tokenizer).is_file():
            copy_tokenizer(tokenizer, draft / TOKENIZER, source.meta["tokenizer_fingerprint"])
            config = with_tokenizer(config, out / TOKENIZER)
        config = with_files(config, draft, out)
        meta = {**source.meta, "config": config.model_dump(mode="json")}
        write_first(config, draft, source.step, by_key(result.state), meta)
        run_config.dump(config, draft / CONFIG)
        largest, probe = _compare(source, result, draft)
        lines = [*result.did, summary(result, largest, probe, command)]
        record = {
            "command": command, "source": str(run_dir), "step": source.step, "did": lines,
            "largest_difference": largest,
        }  # fmt: skip
        (draft / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    reached = f"it is at step {source.step} of {config.train.steps}"
    if source.step >= config.train.steps:
        reached += "; add train.steps=N to train further"
    return [*lines, f"wrote {out}; resume with: mmmoe train {out / CONFIG} ({reached})"]


def _fitted(result: Result) -> Result:
    """The result with what objectives keep from step to step in the sizes that overrides give it: a queue of another
    size begins empty. Raises ValueError where overrides ask for other weights or optimizer state than there are."""
    config, held = result.config, result.state
    with torch.device("meta"):
        parameters = dict(PretrainingModel(config).named_parameters())
    kept, did = {name: its for name, its in held.items() if not _is_buffer(name, its, parameters)}, list(result.did)
    for name, fresh in by_parameter(buffers_of_objectives(config)).items():
        same = name in held and held[name].value.shape == fresh.value.shape
        kept[name] = held[name] if same else fresh
        if not same:
            did.append(f"{name.removeprefix('tasks.')} has another size, and begins empty")
    buffers = {name for name, its in kept.items() if name not in parameters and not its.optimizer}
    wrong = [name for name in parameters if name not in kept or kept[name].value.shape != parameters[name].shape]
    wrong += [name for name in kept if name not in parameters and name not in buffers]
    if wrong:
        raise ValueError(
            f"the overrides ask for other weights, such as {', '.join(wrong[:3])} ({len(wrong)} in all), and this "
            f"command makes no others; leave out those of model, objectives and train.loss_weighting, or use mmmoe "
            f"extend"
        )
    states = {tuple(sorted(its.optimizer)) for name, its in kept.items() if name in parameters}
    if states != {tuple(sorted(config.optimizer.state))}:
        raise ValueError(
            f"the overrides ask for an optimizer that keeps {', '.join(config.optimizer.state) or 'nothing'} of each "
            f"weight, and the checkpoint has {', '.join(next(iter(states))) or 'nothing'}; leave out optimizer.kind, "
            f"optimizer.momentum, optimizer.average and optimizer.hold, which mmmoe extend can change"
        )
    return replace(result, state=kept, did=tuple(did))


def _is_buffer(name: str, its: Parameter, parameters: Container[str]) -> bool:
    """Of an objective."""
    return name.startswith("tasks.") and name not in parameters and not its.optimizer


def with_files(config: RunConfig, draft: Path, out: Path) -> RunConfig:
    """With copies in the new run of the files that its entries read, so that it does not need the old one's."""
    changed = {}
    for place, its in config.used_files.items():
        if Path(its.file).is_file():
            shutil.copyfile(its.file, draft / copy_of(place, its))
            changed[place] = its.model_copy(update={its.file_setting: str(out / copy_of(place, its))})
    return config.with_entries(changed)


def read_source(run_dir: Path, overrides: Sequence[str] = ()) -> Source:
    """The newest checkpoint of a run, whole in this process's memory."""
    run = open_run(run_dir)
    config = read_config(run_dir, overrides).with_vocabulary(run.config.model.vocab_size)
    _refuse_other_losses(run.config, config)
    state = by_parameter(store.read_state(run.checkpoint))
    return Source(run_dir, config, run.model(), run.checkpoint.step, run.meta, state)


def _refuse_other_losses(trained: RunConfig, config: RunConfig) -> None:
    """The two are compared by them."""
    losses, representations = (
        [getattr(objectives_of(its), what) for its in (trained, config)] for what in ("losses", "representations")
    )
    changed = sorted({*losses[0]} ^ {*losses[1]})
    changed += [name for name, its in representations[0].items() if its != representations[1].get(name)]
    if changed:
        raise ValueError(
            f"the overrides change what is trained ({', '.join(changed)}), and this command does not; "
            f"leave them out here, and give mmmoe train those that it can change"
        )


def stays_exact(layer: Layer, reason: str, lossy: bool) -> bool:
    """Whether the function stays the same; ``reason`` says why it does not, else it is empty. Raises ValueError for a
    change without ``lossy``."""
    if reason and not lossy:
        raise ValueError(f"block {layer.index}: {reason}; pass --lossy to allow it")
    return not reason


def capacity_reason(moe: MoEConfig) -> str:
    """Why the number of experts changes which tokens are dropped; empty if none are."""
    if moe.router == "expert_choice":
        return "router expert_choice gives each expert C = ceil(c n K / E) tokens, and E changes"
    if moe.router == "hash":
        return "router hash takes the token's hash modulo the number of experts, which changes"
    if moe.capacity_factor is not None:
        return f"capacity_factor {moe.capacity_factor:g} leaves each expert room for ceil(c n K / E), and E changes"
    return ""


def _compare(source: Source, result: Result, written: Path) -> tuple[float, str]:
    new, _, _ = load_model(written)
    if result.on_data:
        batch, name = source.data
    else:
        batch, name = noise_batch(source.config), "a batch of noise"
    return largest_difference(source.model, new, batch), name


WITHOUT_REASON = (
    "Overrides of the sections moe and model may change the function, and so may two experts with equal logits: "
    "leave the overrides out; if it fails without any, this is a defect, please report it"
)


def summary(result: Result, largest: float, probe: str, command: str) -> str:
    """What people read of the comparison. Raises ValueError where the function should be the same and is not."""
    numbers = f"largest difference of features and likelihoods {largest:.2g} on {probe}"
    if not result.exact:
        changed = f"changed, {result.allowed}" if largest > TOLERANCE else "hardly changed"
        return f"the function {changed}: {numbers}"
    if largest > TOLERANCE:
        raise ValueError(
            f"{command} did not preserve the function: {numbers}, tolerance {TOLERANCE:g}; nothing was written"
            + f". {result.why_not or WITHOUT_REASON}"
        )
    return f"the function is preserved: {numbers} (tolerance {TOLERANCE:g})"
