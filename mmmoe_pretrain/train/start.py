"""How a run begins: afresh, from its checkpoints, or in the place of an older one."""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import dataclass

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.checkpoint import store
from mmmoe_pretrain.checkpoint.model import CONFIG
from mmmoe_pretrain.checkpoint.storage import open_storage
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.parallel.groups import HostGroups
from mmmoe_pretrain.train.control import any_rank, from_rank_0
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


def look(config: RunConfig, host: HostGroups, resume: bool, overwrite: bool) -> Start:
    """Decide, and change nothing. ValueError on every rank: where ``resume`` finds nothing to go on from, or the
    checkpoints are of another model."""
    if resume and overwrite:
        raise ValueError("--resume goes on with a run and --overwrite replaces it; give one of them, or neither")
    # One count may lag behind: each of torchrun's agents counts for itself, and a new machine's begins at 0.
    again = any_rank(host.control, any(int(os.environ.get(name) or 0) > 0 for name in RESTARTS))
    return from_rank_0(
        host.storage, lambda: _look(config, resume, overwrite and not (again and _was_replaced(config)))
    )


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
    found = tuple(store.checkpoints(config.checkpoint_root))
    if overwrite:
        return Start(found, replace=True)
    if resume and not found:
        raise ValueError(
            f"--resume: there is no finished checkpoint in {config.checkpoint_root}; leave --resume out to begin "
            f"afresh, or see that name, runs_dir and checkpoint.folder are those of the run"
        )
    if found:
        check_same_model(config, config.run_dir / CONFIG, lambda: store.read_meta(found[-1]).get("config"))
    return Start(found)


def claim(config: RunConfig, host: HostGroups, start: Start) -> None:
    """Make the run's folder, without what an older run left there if that is to be replaced."""
    from_rank_0(host.storage, lambda: _claim(config, start))


def _claim(config: RunConfig, start: Start) -> None:
    if start.replace:
        storage = open_storage(config.checkpoint_root)
        for checkpoint in start.found:  # they may lie elsewhere
            storage.remove_folder(checkpoint.name)
        if (config.run_dir / CONFIG).is_file():  # never a folder that holds no run
            shutil.rmtree(config.run_dir)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    if start.replace:
        (config.run_dir / REPLACED_BY).write_text(_job(), encoding="utf-8")


def write_config(config: RunConfig) -> None:
    """Put the resolved config beside the run; a kill leaves the old one or the new one."""
    path = config.run_dir / CONFIG
    draft = path.with_name(CONFIG + ".tmp")
    run_config.dump(config, draft)
    os.replace(draft, path)
