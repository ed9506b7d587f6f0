"""How a run starts: which run a config means, and whether it resumes, starts from step 0, or replaces an older run.

What defines the function of the model cannot change when a run resumes. Steps, learning rates, data, loss weights and
the layout may.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.batch import OF_TOKENIZER
from mmmoe_pretrain.checkpoint import store
from mmmoe_pretrain.checkpoint.folders import named_checkpoints
from mmmoe_pretrain.checkpoint.model import CONFIG, TOKENIZER, copy_of, names_tokenizer, with_copies, with_tokenizer
from mmmoe_pretrain.checkpoint.names import MANIFEST
from mmmoe_pretrain.checkpoint.state import persistent_buffers
from mmmoe_pretrain.checkpoint.storage import StorageError, open_storage
from mmmoe_pretrain.config import RUN_NAME, RunConfig
from mmmoe_pretrain.modalities import copy_tokenizer
from mmmoe_pretrain.objectives import objectives_of
from mmmoe_pretrain.parallel.agreement import any_rank, exchange, exchange_distinct, from_rank_0
from mmmoe_pretrain.parallel.groups import HostGroups
from mmmoe_pretrain.train.journal import EVENTS, read_events, replacing
from mmmoe_pretrain.train.lock import LOCK, RunLock

log = logging.getLogger(__name__)
RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
JOBS = ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID")  # the same in all starts of a job
SHARED_WITHIN = 30.0  # seconds until a new folder shows on another machine: NFS may keep its view for so long
REPLACED_BY = "replaced_by"  # a file that names the job that replaced an older run here
MOST_CHANGES = 4  # that a message about machines with different configs names
# MoE settings of how it is computed, and of how a new run is made
NOT_OF_THE_FUNCTION = ("dispatch_chunks", "expert_backend", "group_multiple", "jitter", "lending")


def config_to_train(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config of the run to train. ``path`` may be the config.yaml of a run whose folder was moved or copied: it
    resumes in its new place, with its own copy of the tokenizer if the original is missing. ``name=`` or
    ``runs_dir=`` make another run. Raises ValueError where it is not clear which checkpoints are meant."""
    config = run_config.load(path, tuple(overrides))
    folder = path.resolve().parent
    same_run = not {"name", "runs_dir"} & {override.partition("=")[0] for override in overrides}
    if same_run and path.name == CONFIG and _holds_a_run(folder) and config.run_dir.resolve() != folder:
        config = _moved(config, path, folder)
    config = with_copies(config, config.run_dir, only_missing=True)
    own = config.run_dir / TOKENIZER
    named = config.data.tokenizer
    if names_tokenizer(overrides) or named is None or Path(named).is_file() or not own.is_file():
        return config
    _warn("there is no tokenizer at %s: using the run's own copy, %s", config.data.tokenizer, own)
    return with_tokenizer(config, own)


def _holds_a_run(folder: Path) -> bool:
    return (folder / EVENTS).is_file() or bool(named_checkpoints(open_storage(folder / "checkpoints")))


def _moved(config: RunConfig, path: Path, folder: Path) -> RunConfig:
    if config.checkpoint.folder is not None and (config.name != folder.name or config.run_dir.exists()):
        raise ValueError(
            f"{path} was made in {config.run_dir}, and its checkpoints are in {config.checkpoint_root}; move the "
            f"folder back, or name the run with runs_dir=, name= and checkpoint.folder="
        )
    if not re.fullmatch(RUN_NAME, folder.name):
        raise ValueError(
            f"{folder.name} is not a legal name of a run; rename {folder} to letters, digits, dots, - and _, "
            f"beginning with a letter or digit"
        )
    _warn("%s was made in %s: resuming in %s, where it is now", path, config.run_dir, folder)
    place = {"name": folder.name, "runs_dir": str(folder.parent)}
    return run_config.parse({**config.model_dump(mode="json"), **place}, where=str(path))


def _warn(message: str, *values: object) -> None:
    if os.environ.get("RANK", "0") == "0":  # there is no process group yet
        log.warning(message, *values)


@dataclass(frozen=True)
class Start:
    """``found``: the checkpoints of the run, oldest first. ``replace``: delete an older run first."""

    found: tuple[store.Checkpoint, ...] = ()
    replace: bool = False


def look(config: RunConfig, host: HostGroups, lock: RunLock, resume: bool, overwrite: bool) -> Start:
    """Decide how to start, without changing the run; locks an existing folder. Raises ValueError on every rank if
    another job holds it, ``resume`` finds no checkpoint, the checkpoints are of another model, or earlier checkpoints
    are missing.
    """
    if resume and overwrite:
        raise ValueError("--resume continues a run and --overwrite replaces it; give one of them, or neither")
    # One count may lag behind: each of torchrun's agents counts for itself, and a new machine's begins at 0.
    again = any_rank(host.control, any(int(os.environ.get(name) or 0) > 0 for name in RESTARTS))

    def on_rank_0() -> Start:
        if config.run_dir.is_dir():
            with _explained(config):
                lock.take()
        return _look(config, resume, overwrite and not (again and _was_replaced(config)))

    return from_rank_0(host.storage, on_rank_0)


def _was_replaced(config: RunConfig) -> bool:
    """Whether an earlier start of this job replaced the run that was here."""
    mark = config.run_dir / REPLACED_BY
    done = mark.is_file() and mark.read_text(encoding="utf-8") == _job()
    if done:
        log.info("an earlier start of this job has already replaced the run (--overwrite); resuming it")
    return done


def _job() -> str:
    return next((os.environ[name] for name in JOBS if os.environ.get(name)), "")


def _look(config: RunConfig, resume: bool, overwrite: bool) -> Start:
    if overwrite:
        _refuse_nothing_to_hold(config)
        return Start(replace=True)
    found = tuple(store.candidates(config.checkpoint_root))
    if found:
        check_same_model(config, config.run_dir / CONFIG, lambda: store.read_meta(found[-1]).get("config"))
        return Start(found)
    _refuse_lost(config)
    _refuse_nothing_to_hold(config)
    if resume:
        raise ValueError(
            f"--resume: there is no finished checkpoint in {config.checkpoint_root}; leave --resume out to start "
            f"from step 0, or check that name, runs_dir and checkpoint.folder are those of the run"
        )
    return Start()


def _refuse_nothing_to_hold(config: RunConfig) -> None:
    if config.optimizer.pull:
        raise ValueError(
            f"optimizer.hold.strength {config.optimizer.pull:g} pulls to the weights of the run before, and this run "
            f"starts from step 0 without one; make it with mmmoe extend RUN --out {config.run_dir}, or set "
            f"optimizer.hold: null"
        )


def _refuse_lost(config: RunConfig) -> None:
    """A run that has saved checkpoints must not start from step 0: that would delete its metrics, too."""
    root = config.checkpoint_root
    there = [checkpoint.name for checkpoint in _committed(root)]
    saved = [event for event in read_events(config.run_dir) if event["event"] == "saved"]
    if there:
        problem = f"none of the checkpoints in {root} is complete: {', '.join(there[-3:])}"
    elif saved:
        step = saved[-1].get("step")
        problem = f"{config.run_dir / EVENTS} records a save of step {step}, and there is no checkpoint in {root}"
    else:
        return
    raise ValueError(
        f"{problem}. Restore the folder (check mounts and backups), set checkpoint.folder to where "
        f"it is, or start from step 0 with --overwrite"
    )


def _committed(root: str) -> list[store.Checkpoint]:
    """Checkpoints that were complete once, damaged or not; oldest first."""
    storage = open_storage(root)

    def committed(name: str) -> bool:
        has_drafts = storage.draft(name) != name  # elsewhere the manifest commits, and no rename
        return has_drafts or MANIFEST in storage.sizes(name)

    return [checkpoint for checkpoint in named_checkpoints(storage) if committed(checkpoint.name)]


def check_same_model(
    config: RunConfig, saved: Path, of_checkpoint: Callable[[], dict[str, Any] | None] = lambda: None
) -> None:
    """Compare with the config saved beside the run, or where there is none (another machine's disk) with the
    checkpoint's own. Raises ValueError that names what differs."""
    before = config_before(saved, of_checkpoint)
    if before is None:
        return
    if not before.model.vocab_size:  # of an earlier version; the tokenizer's fingerprint is compared later
        before = before.with_vocabulary(config.model.vocab_size)
    if changes := list(differences(_model_settings(before), _model_settings(config))):
        raise ValueError(
            f"a resumed run cannot change the model of {saved.parent}: {'; '.join(changes)}; set it back, train "
            f"under another name=, or replace the run with --overwrite"
        )


def config_before(saved: Path, of_checkpoint: Callable[[], dict[str, Any] | None]) -> RunConfig | None:
    """Of the starts before this one, from ``saved`` or else from the checkpoint; None where neither has it."""
    if saved.is_file():
        return run_config.load(saved)
    values = of_checkpoint()
    return None if values is None else run_config.parse(values, where="the checkpoint's config")


def _model_settings(config: RunConfig) -> dict[str, Any]:
    """What defines the function of the model, by section."""
    values = config.model_dump(mode="json")
    values["moe"].pop("losses")
    for settings in (values["moe"], *values["moe"]["layers"].values()):
        for key in NOT_OF_THE_FUNCTION:
            settings.pop(key, None)
        balancing = settings.get("bias_balancing") or {}
        settings["bias_balancing"] = {**balancing, "rate": balancing.get("rate") is not None}
    objectives = objectives_of(config)
    return {
        "model": values["model"],
        "moe": values["moe"],
        "modalities": {name: settings.of_the_model() for name, settings in config.modalities.items()},
        "train": {"loss_weighting": config.train.loss_weighting},
        "predicted": {
            "tokens": OF_TOKENIZER in objectives.vocabularies,
            "language_heads": sorted(name or "unnamed" for name in objectives.language_heads),
            "codes": sorted({*objectives.vocabularies} - {OF_TOKENIZER}),
            "classes": {
                name: {"of": its.representations[0], "names": ", ".join(its.classes)}
                for name, its in objectives.classifying.items()
            },
            "hidden": sorted(objectives.hidden),
            "contents": sorted({*objectives.contents.values()}),
            "decoders": {
                name: {"layers": its.decoder_layers, "contents": sorted({*its.contents.values()})}
                for name, its in objectives.items()
                if its.decoder_layers
            },
        },
        "representations": {name: its.settings.of_the_model() for name, its in objectives.representations.items()},
        "objectives": {
            **{name: _tensors(its.module(config.model.embedding_size)) for name, its in objectives.items()},
            **{
                f"{name}.{its.settings.file_setting}": f"the file of fingerprint {its.settings.fingerprint}"
                for name, its in objectives.items()
                if its.settings.file
            },
        },
    }


def _tensors(module: nn.Module) -> list[str]:
    """Names of parameters; of buffers, whose sizes are settings, with their shapes."""
    buffers = [f"{name} {tuple(buffer.shape)}" for name, buffer in persistent_buffers(module).items()]
    return [*(name for name, _ in module.named_parameters()), *buffers]


def differences(old: Mapping[str, Any], new: Mapping[str, Any], before: str = "") -> Iterator[str]:
    """What differs, by dotted key; an entry that only one of them has is named as a whole."""
    for key in sorted(old.keys() | new.keys(), key=str):
        where = f"{before}{key}"
        if key not in old or key not in new:
            yield f"{where} is {'new' if key in new else 'missing'}"
        elif isinstance(old[key], dict) and isinstance(new[key], dict):
            yield from differences(old[key], new[key], f"{where}.")
        elif old[key] != new[key] and _of_dicts(old[key]) and _of_dicts(new[key]):  # such as data.train
            if len(old[key]) == len(new[key]):
                for number, (one, other) in enumerate(zip(old[key], new[key], strict=True)):
                    yield from differences(one, other, f"{where}[{number}].")
            else:
                was, now = (", ".join(str(its.get("path", its)) for its in each) for each in (old[key], new[key]))
                yield f"{where} was {was} and is {now}"
        elif old[key] != new[key]:
            yield f"{where} was {old[key]!r} and is {new[key]!r}"


def _of_dicts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(its, dict) for its in value)


def check_same_config(config: RunConfig, host: HostGroups) -> None:
    """Raises ValueError on every rank where a machine was started with another config: its weights would drift from
    the others', or its ranks run other steps. Paths may differ between machines. Collective."""
    other = exchange_distinct(host.control, lambda: _of_all_machines(config), _first_other_config)
    if other is not None:
        exchange(host.control, socket.gethostname, lambda hosts: _refuse_other_config(hosts, *other))


def _of_all_machines(config: RunConfig) -> dict[str, Any]:
    values = config.model_dump(mode="json")
    del values["runs_dir"], values["data"]["tokenizer"], values["checkpoint"]["folder"]
    del values["evaluate"]["test"], values["evaluate"]["validation"]
    for source in values["data"]["train"]:
        del source["path"]
    for place, its in config.files.items():
        section, _, name = place.partition(".")
        values[section][name].pop(its.file_setting)  # the fingerprint stays
    return values


def _first_other_config(configs: Sequence[dict[str, Any]], which: Sequence[int]) -> tuple[int, list[str]] | None:
    """The first rank whose config is not rank 0's, and the keys that differ; on rank 0."""
    for number, config in enumerate(configs):
        if keys := [change.partition(" ")[0] for change in differences(configs[0], config)]:
            return which.index(number), keys
    return None


def _refuse_other_config(hosts: Sequence[str], rank: int, keys: Sequence[str]) -> None:
    raise ValueError(
        f"rank {rank} on {hosts[rank]} has another {', '.join(keys[:MOST_CHANGES])} than rank 0 on {hosts[0]}; "
        f"start every machine with the same config and overrides"
    )


def claim(config: RunConfig, host: HostGroups, lock: RunLock, start: Start) -> Start:
    """Make the run's folder, and delete an older run there if that is to be replaced; how to start. Raises ValueError
    on every rank, before anything is deleted, where another machine does not see that folder."""

    def take() -> tuple[bool, str]:
        with _explained(config):
            return lock.take(), lock.holder

    waited, holder = from_rank_0(host.storage, take)
    # Where the checkpoints are elsewhere, only rank 0 needs the folder.
    if config.checkpoint.folder is None:
        exchange(host.storage, lambda: _apart(lock, holder), lambda hosts: _refuse_unshared(config, hosts))
    return from_rank_0(host.storage, lambda: _claim(config, start, waited))


def _apart(lock: RunLock, holder: str) -> str:
    """The name of this machine if it does not see rank 0's lock; its first rank looks."""
    looks = os.environ.get("RANK", "0") != "0" and os.environ.get("LOCAL_RANK", "0") == "0"
    return "" if not looks or _appears(lock, holder) else socket.gethostname()


def _appears(lock: RunLock, holder: str) -> bool:
    """Whether rank 0's lock appears here: a network file system shows a new file late."""
    deadline = time.monotonic() + SHARED_WITHIN
    while lock.seen() != holder:
        if time.monotonic() > deadline:
            return False
        with suppress(OSError):
            os.listdir(lock.run_dir.parent)  # the file system then asks its server what is new
        time.sleep(0.2)
    return True


def _refuse_unshared(config: RunConfig, hosts: Sequence[str]) -> None:
    apart = sorted({*hosts} - {""})
    if apart:
        raise ValueError(
            f"the run's folder {config.run_dir.absolute()} on {', '.join(apart[:8])} is not the one of rank 0; set "
            f"runs_dir to a folder that all machines share, or checkpoint.folder to one (mmmoe doctor checks it)"
        )


def _claim(config: RunConfig, start: Start, waited: bool) -> Start:
    if start.replace:
        with _explained(config):
            _clear(config)
            (config.run_dir / REPLACED_BY).write_text(_job(), encoding="utf-8")
    # Another job may have trained here since the first look.
    return _look(config, False, False) if waited and not start.replace else start


@contextmanager
def _explained(config: RunConfig) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise ValueError(
            f"the run's folder {config.run_dir} cannot be written: {error}; make room, change its owner or mode, or "
            f"set runs_dir to another place"
        ) from error


def _clear(config: RunConfig) -> None:
    """Delete an older run, its config last, so that after a kill the next start deletes the rest."""
    storage, run_dir = open_storage(config.checkpoint_root), config.run_dir
    (run_dir / REPLACED_BY).unlink(missing_ok=True)  # maybe of an earlier start of this job, for the run before
    for checkpoint in reversed(named_checkpoints(storage)):  # they may be elsewhere
        storage.remove_folder(checkpoint.name)
    if not (run_dir / CONFIG).is_file():  # never delete a folder that is not a run
        return
    for path in sorted(run_dir.iterdir(), key=lambda path: path.name == CONFIG):
        if path.name == LOCK or path.name in _own_files(config):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _files(config: RunConfig) -> dict[str, str]:
    """The files that a run keeps a copy of: the copy's name, and where the config has the file."""
    tokenizer = {} if config.data.tokenizer is None else {TOKENIZER: config.data.tokenizer}
    return tokenizer | {copy_of(place, its): its.file for place, its in config.used_files.items()}


def _own_files(config: RunConfig) -> set[str]:
    """The copies that the config itself names, such as the tokenizer that ``mmmoe import`` writes."""
    return {
        copy for copy, named in _files(config).items() if Path(named).resolve() == (config.run_dir / copy).resolve()
    }


def write_config(config: RunConfig, tokenizer_fingerprint: str) -> None:
    """Put the resolved config, and the tokenizer and the files of its entries, where it has them, into the run's
    folder, so that the run can be moved."""
    for name, path in _files(config).items():
        if name in _own_files(config) or (name == TOKENIZER and not tokenizer_fingerprint):
            continue
        with replacing(config.run_dir / name) as draft:
            if name == TOKENIZER:
                copy_tokenizer(path, draft, tokenizer_fingerprint)
            else:
                shutil.copyfile(path, draft)
    with replacing(config.run_dir / CONFIG) as draft:
        run_config.dump(config, draft)
