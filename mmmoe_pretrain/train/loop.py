"""Training, from the start of the processes to their exit code.

Every rank runs it. The data of a step is a pure function of its number and of the batches left out, so
resuming is starting at a later number with the state of a checkpoint. ``run.py`` has the steps.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
import torch.distributed as dist

from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.loader import Loader, make_loader, microbatch_size
from mmmoe_pretrain.data.survey import refuse_useless, survey
from mmmoe_pretrain.engines.apply import build_engine
from mmmoe_pretrain.modalities import build_codecs
from mmmoe_pretrain.parallel.groups import HostGroups
from mmmoe_pretrain.parallel.layout import resolve_layout
from mmmoe_pretrain.parallel.mesh import build_groups, build_host_groups, destroy_groups
from mmmoe_pretrain.parallel.runtime import process_group
from mmmoe_pretrain.train import start
from mmmoe_pretrain.train.journal import Journal
from mmmoe_pretrain.train.lock import RunLock
from mmmoe_pretrain.train.run import Run
from mmmoe_pretrain.train.session import Session
from mmmoe_pretrain.train.signals import StopRequest, stop_on_signals
from mmmoe_pretrain.train.watchdog import Watchdog

log = logging.getLogger(__name__)


def train(config: RunConfig, resume: bool = False, overwrite: bool = False) -> int:
    """Train to ``config.train.steps`` on the ranks of this job; the exit code, DONE or STOPPED (after saving).

    A run that has checkpoints goes on from the newest one; ``resume`` refuses to begin afresh, ``overwrite``
    replaces the run. Raises ValueError for a config, layout, data or checkpoints that cannot work.
    """
    torch.set_num_threads(config.train.threads_per_rank)
    with stop_on_signals() as stop, process_group(config.parallel.timeout_minutes) as device:
        layout = resolve_layout(config, dist.get_world_size())
        microbatch_size(config, layout.data)
        finished = False
        try:
            host = build_host_groups(config.parallel.timeout_minutes)
            with (
                RunLock(config.run_dir) as lock,
                Watchdog(config.run_dir, host.control, config.hang_seconds) as watchdog,
            ):
                begin = start.look(config, host, lock, resume, overwrite)
                code = _train(config, begin, lock, host, device, stop, watchdog)
            finished = True
        finally:
            destroy_groups(after_error=not finished)
    return code


def _train(
    config: RunConfig,
    begin: start.Start,
    lock: RunLock,
    host: HostGroups,
    device: torch.device,
    stop: StopRequest,
    watchdog: Watchdog,
) -> int:
    codecs = build_codecs(config)
    layout = resolve_layout(config, dist.get_world_size(), codecs.text.vocab_size)
    groups = build_groups(config.parallel, config.moe.group_sizes)
    engine = build_engine(config, codecs.text.vocab_size, groups, device)
    main = dist.get_rank() == 0
    with make_loader(config, codecs, dp_rank=groups.data_rank, dp_size=groups.data_size) as loader:
        _survey(config, loader, main)
        begin = start.claim(config, host, lock, begin)  # here, and no sooner: all else is known to work
        with Journal(config.run_dir, enabled=main) as journal:
            session = Session(config, layout, groups, host, codecs, engine, journal, main)
            run = Run(session, loader, stop, watchdog)
            run.begin(begin.found)
            return run.to_its_end()


def _survey(config: RunConfig, loader: Loader, main: bool) -> None:
    """Say what data.train holds and leaves out. Raises ValueError where no objective can use any of it."""
    found = survey(loader.folders)
    unserved = refuse_useless(loader.folders, found, config)
    if not main:
        return
    log.info("data.train: %s samples: %s", f"{found.samples:,}", found.content())
    if found.unread:
        log.warning("files of data.train that are not read: %s; docs/data_format.md has the rule", found.left_out())
    if unserved:
        log.warning("no sample of data.train serves these objectives: %s", ", ".join(unserved))
    for path in config.evaluate.test:
        if not Path(path).is_dir():
            log.warning("evaluate.test: there is no folder %s, and mmmoe evaluate will ask for one", path)
