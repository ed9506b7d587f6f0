"""Training, from the start of the processes to the exit code: groups, data, engine, then the steps (``trainer.py``).

Data workers are forked from a server that starts first: a fork of a process that uses a GPU is not safe.
"""

from __future__ import annotations

import logging
from contextlib import closing
from dataclasses import replace

import torch
import torch.distributed as dist

from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.order.assign import microbatch_size
from mmmoe_pretrain.engines.apply import build_engine
from mmmoe_pretrain.modalities import build_modalities
from mmmoe_pretrain.parallel.agreement import (
    agree,
    from_rank_0,
)
from mmmoe_pretrain.parallel.layout import resolve_layout
from mmmoe_pretrain.parallel.mesh import build_groups, build_host_groups, destroy_groups, host_pipeline
from mmmoe_pretrain.parallel.replica import build_replica_channel
from mmmoe_pretrain.parallel.runtime import deterministic_operations, process_group
from mmmoe_pretrain.train import budgets, cpu, start
from mmmoe_pretrain.train.checkpointing import RunContext
from mmmoe_pretrain.train.held_out import open_validation
from mmmoe_pretrain.train.journal import Journal
from mmmoe_pretrain.train.lock import RunLock
from mmmoe_pretrain.train.memory import resident
from mmmoe_pretrain.train.opening import check_data, open_data, worker_server
from mmmoe_pretrain.train.planned import check_machine
from mmmoe_pretrain.train.signals import stop_on_signals
from mmmoe_pretrain.train.trackers.kinds import check_installed
from mmmoe_pretrain.train.trainer import Trainer
from mmmoe_pretrain.train.watchdog import Watchdog

log = logging.getLogger(__name__)


def train(config: RunConfig, resume: bool = False, overwrite: bool = False) -> int:
    """Train to ``config.train.steps`` on the ranks of this job; the exit code, DONE or STOPPED (after saving).

    A run that has checkpoints resumes from the newest one. ``resume`` refuses to start from step 0; ``overwrite``
    replaces the run. Raises ValueError for a config, layout, data or checkpoints that cannot work.
    """
    torch.set_num_threads(config.train.threads_per_rank)
    with (
        deterministic_operations(config.train.deterministic),
        worker_server(config) as server,
        stop_on_signals() as stop,
        process_group(config.parallel.timeout_minutes) as device,
    ):
        finished = False
        try:
            host = build_host_groups(config.parallel.timeout_minutes)
            from_rank_0(host.control, lambda: check_installed(config.trackers.named))
            from_rank_0(host.control, lambda: check_machine(config))
            # Files may be missing on one machine alone.
            modalities = agree(host.control, lambda: build_modalities(config.modalities, config.data.tokenizer))
            config = agree(host.control, config.with_files)
            start.check_same_config(config, host)
            config = config.with_vocabulary(modalities.vocab_size)
            config = budgets.settle(config, modalities, host, overwrite)
            layout = resolve_layout(config, dist.get_world_size())
            microbatch_size(config, layout.data)
            with (
                RunLock(config.run_dir) as lock,
                Watchdog(config.run_dir, host.control, config.hang_seconds) as watchdog,
            ):
                decision = start.look(config, host, lock, resume, overwrite)
                config = cpu.settle(config, layout, host, device, decision.found)
                groups = build_groups(layout, config.parallel.timeout_minutes)
                host = replace(host, pipeline=host_pipeline(groups, host.control, config.parallel.timeout_minutes))
                before_model = resident()
                engine = build_engine(config, groups, device)
                main = dist.get_rank() == 0
                for name, decoder in modalities.decoders.items() if main else ():
                    log.info("decoder of %s: %s", name, decoder)
                channel = build_replica_channel(groups, host.control)
                with open_data(config, modalities, groups, host, channel, device, server) as loader:
                    check_data(config, host, loader, main)
                    losses = engine.models[0].loss_names
                    validation = open_validation(config, modalities, groups, host, loader, losses)
                    decision = start.claim(config, host, lock, decision)  # only now: everything else works
                    with closing(Journal(config.run_dir, enabled=main)) as journal:
                        context = RunContext(
                            config, layout, groups, host, modalities, engine, journal, main, before_model
                        )
                        trainer = Trainer(context, loader, stop, watchdog, validation)
                        trainer.load(decision.found)
                        code = trainer.train()
            finished = True
        finally:
            destroy_groups(after_error=not finished)
    return code
