"""How a run begins: afresh, from its checkpoints, or in the place of an older one."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.checkpoint import store
from mmmoe_pretrain.checkpoint.folders import named_checkpoints
from mmmoe_pretrain.checkpoint.model import CONFIG, TOKENIZER
from mmmoe_pretrain.checkpoint.names import MANIFEST
from mmmoe_pretrain.checkpoint.storage import StorageError, open_storage
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.modalities import copy_tokenizer
from mmmoe_pretrain.parallel.groups import HostGroups
from mmmoe_pretrain.train.control import any_rank, from_rank_0
from mmmoe_pretrain.train.drafts import replacing
from mmmoe_pretrain.train.journal import EVENTS, read_events
from mmmoe_pretrain.train.lock import LOCK, RunLock
from mmmoe_pretrain.train.resume import check_same_model

log = logging.getLogger(__name__)
RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
JOBS = ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID")  # the same in all starts of a job
REPLACED_BY = "replaced_by"  # the job that replaced an older run here


@dataclass(frozen=True)
class Start:
    """``found``: the checkpoints of the run, oldest first. ``replace``: an older run gives way to this one."""

    found: tuple[store.Checkpoint, ...] = ()
    replace: bool = False


def look(config: RunConfig, host: HostGroups, lock: RunLock, resume: bool, overwrite: bool) -> Start:
    """Decide, and change nothing of the run; a folder that is there is held by ``lock`` from now on.

    ValueError on every rank: where another job holds it, ``resume`` finds nothing to go on from, the checkpoints are
    of another model, or there were some and are none.
    """
    if resume and overwrite:
        raise ValueError("--resume goes on with a run and --overwrite replaces it; give one of them, or neither")
    # One count may lag behind: each of torchrun's agents counts for itself, and a new machine's begins at 0.
    again = any_rank(host.control, any(int(os.environ.get(name) or 0) > 0 for name in RESTARTS))

    def here() -> Start:
        if config.run_dir.is_dir():
            _take(lock, config)
        return _look(config, resume, overwrite and not (again and _was_replaced(config)))

    return from_rank_0(host.storage, here)


def _was_replaced(config: RunConfig) -> bool:
    """Did an earlier start of this job replace the run that was here?"""
    mark = config.run_dir / REPLACED_BY
    done = mark.is_file() and mark.read_text(encoding="utf-8") == _job()
    if done:
        log.info("--overwrite was done by the start before this one; going on from there")
    return done


def _job() -> str:
    return next((os.environ[name] for name in JOBS if os.environ.get(name)), "")


def _look(config: RunConfig, resume: bool, overwrite: bool) -> Start:
    if overwrite:
        return Start(replace=True)
    found = tuple(store.candidates(config.checkpoint_root))
    if not found:
        _refuse_lost(config)
    if resume and not found:
        raise ValueError(
            f"--resume: there is no finished checkpoint in {config.checkpoint_root}; leave --resume out to begin "
            f"afresh, or see that name, runs_dir and checkpoint.folder are those of the run"
        )
    if found:
        check_same_model(config, config.run_dir / CONFIG, lambda: store.read_meta(found[-1]).get("config"))
    return Start(found)


def _refuse_lost(config: RunConfig) -> None:
    """A run must not begin afresh where it has saved itself before: that would cut its record, too."""
    root = config.checkpoint_root
    there = [checkpoint.name for checkpoint in _committed(root)]
    saved = [event for event in read_events(config.run_dir) if event["event"] == "saved"]
    if there:
        told = f"none of the checkpoints in {root} is complete: {', '.join(there[-3:])}"
    elif saved:
        step = saved[-1].get("step")
        told = f"{config.run_dir / EVENTS} tells of a save of step {step}, and there is no checkpoint in {root}"
    else:
        return
    raise ValueError(
        f"{told}. Bring the folder back (is a mount missing? is there a backup?), set checkpoint.folder to where it "
        f"is, or begin afresh with --overwrite"
    )


def _committed(root: str) -> list[store.Checkpoint]:
    """What was complete once, whole or not now; oldest first."""
    storage = open_storage(root)

    def committed(name: str) -> bool:
        has_drafts = storage.draft(name) != name  # elsewhere the manifest commits, and no rename
        return has_drafts or MANIFEST in storage.sizes(name)

    return [checkpoint for checkpoint in named_checkpoints(storage) if committed(checkpoint.name)]


def claim(config: RunConfig, host: HostGroups, lock: RunLock, start: Start) -> Start:
    """Make the run's folder, without what an older run left there if that is to be replaced; how to begin."""
    return from_rank_0(host.storage, lambda: _claim(config, lock, start))


def _claim(config: RunConfig, lock: RunLock, start: Start) -> Start:
    waited = _take(lock, config)
    if start.replace:
        with _explained(config):
            _clear(config)
            (config.run_dir / REPLACED_BY).write_text(_job(), encoding="utf-8")
    # Nothing was there to look at, and then another job came, trained and ended?
    return _look(config, False, False) if waited and not start.replace else start


def _take(lock: RunLock, config: RunConfig) -> bool:
    with _explained(config):
        return lock.take()


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
    """Delete an older run; what a kill leaves of it says that it was one, for the next start to go on with this."""
    storage, run_dir = open_storage(config.checkpoint_root), config.run_dir
    (run_dir / REPLACED_BY).unlink(missing_ok=True)  # maybe of an earlier start of this job, for the run before
    for checkpoint in reversed(named_checkpoints(storage)):  # they may lie elsewhere
        storage.remove_folder(checkpoint.name)
    if not (run_dir / CONFIG).is_file():  # never a folder that holds no run
        return
    for path in sorted(run_dir.iterdir(), key=lambda path: path.name == CONFIG):
        if path.name == LOCK or (path.name == TOKENIZER and _owns_its_tokenizer(config)):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _owns_its_tokenizer(config: RunConfig) -> bool:
    """As ``mmmoe import`` makes it: ``data.tokenizer`` is the run's own file."""
    return Path(config.data.tokenizer).resolve() == (config.run_dir / TOKENIZER).resolve()


def write_config(config: RunConfig, tokenizer_fingerprint: str) -> None:
    """Put the resolved config beside the run, and its tokenizer, so that the run can be moved; a kill leaves the old
    files or the new ones."""
    if not _owns_its_tokenizer(config):
        with replacing(config.run_dir / TOKENIZER) as draft:
            copy_tokenizer(config.data.tokenizer, draft, tokenizer_fingerprint)
    with replacing(config.run_dir / CONFIG) as draft:
        run_config.dump(config, draft)
