"""The training loop: batches in, optimizer steps, log lines and checkpoints out.

Every rank runs it. The data of a step is a pure function of its number, so resuming is starting
at a later number with the state of a checkpoint.
"""

from __future__ import annotations

import logging
import math
import shutil
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist

from mmmoe_pretrain import __version__
from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.checkpoint import store
from mmmoe_pretrain.checkpoint.model import CONFIG
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.loader import Loader, make_loader, microbatch_size
from mmmoe_pretrain.engines.apply import build_engine
from mmmoe_pretrain.engines.base import Engine, StepResult
from mmmoe_pretrain.modalities import Codecs, build_codecs
from mmmoe_pretrain.parallel.groups import Groups
from mmmoe_pretrain.parallel.layout import resolve_layout
from mmmoe_pretrain.parallel.mesh import build_groups, destroy_groups
from mmmoe_pretrain.parallel.runtime import process_group
from mmmoe_pretrain.train.console import Console
from mmmoe_pretrain.train.metrics import MetricsLog
from mmmoe_pretrain.train.record import Recorder
from mmmoe_pretrain.train.resume import check_same_model
from mmmoe_pretrain.train.schedule import learning_rate

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Job:
    """What one rank's run consists of, put together once."""

    config: RunConfig
    groups: Groups
    codecs: Codecs
    engine: Engine

    @property
    def meta(self) -> dict[str, object]:
        """Facts saved beside the tensors of a checkpoint."""
        return {
            "version": __version__,
            "vocab_size": self.codecs.text.vocab_size,
            "tokenizer_fingerprint": self.codecs.text.fingerprint,
        }


def train(config: RunConfig, resume: bool = False, overwrite: bool = False) -> None:
    """Train to ``config.train.steps`` on the ranks of this job.

    Raises ValueError for a config, layout or data that cannot work, and for a run folder that
    holds checkpoints where neither ``resume`` nor ``overwrite`` says what to do with them.
    """
    torch.set_num_threads(config.train.threads_per_rank)
    with process_group(config.parallel.timeout_minutes) as device:
        layout = resolve_layout(config, dist.get_world_size())
        microbatch_size(config, layout.data)
        _check_run_dir(config, resume, overwrite)
        codecs = build_codecs(config)
        resolve_layout(config, dist.get_world_size(), codecs.text.vocab_size)
        groups = build_groups(config.parallel, config.moe.group_sizes)
        try:
            engine = build_engine(config, codecs.text.vocab_size, groups, device)
            job = _Job(config, groups, codecs, engine)
            start = _resume(job) if resume else 0
            loader = make_loader(config, codecs, dp_rank=groups.data_rank, dp_size=groups.data_size, start_step=start)
            replace = overwrite and not resume  # here, and no sooner: all else is known to work
            _claim_run_dir(config, replace)
            _run(job, loader, start)
        finally:
            destroy_groups()


def _check_run_dir(config: RunConfig, resume: bool, overwrite: bool) -> None:
    occupied = store.find_latest(config.run_dir) is not None
    if occupied and not (resume or overwrite):
        raise ValueError(
            f"{config.run_dir} holds a run already; continue it with --resume, replace it with "
            f"--overwrite, or choose another name="
        )
    if occupied and resume:
        check_same_model(config, config.run_dir / CONFIG)


def _claim_run_dir(config: RunConfig, replace: bool) -> None:
    dist.barrier()  # nobody writes before everybody has looked
    if dist.get_rank() == 0:
        if replace and (config.run_dir / CONFIG).is_file():  # never a folder that holds no run
            shutil.rmtree(config.run_dir)
        config.run_dir.mkdir(parents=True, exist_ok=True)
        run_config.dump(config, config.run_dir / CONFIG)
    dist.barrier()


def _resume(job: _Job) -> int:
    """Load the newest checkpoint if there is one; the number of steps done."""
    checkpoint = store.find_latest(job.config.run_dir)
    if checkpoint is None:
        return 0
    meta = store.read_meta(checkpoint)
    if meta["tokenizer_fingerprint"] != job.codecs.text.fingerprint:
        raise ValueError(
            f"{checkpoint} was trained with another tokenizer than {job.config.data.tokenizer} "
            f"(fingerprint {meta['tokenizer_fingerprint']}, now {job.codecs.text.fingerprint}); "
            f"set data.tokenizer to the one that it was trained with"
        )
    state = store.load(checkpoint, job.engine.export_state())
    job.engine.import_state(state, steps_done=meta["step"])
    if dist.get_rank() == 0:
        log.info("resumed from %s", checkpoint)
    return int(meta["step"])


def _run(job: _Job, loader: Loader, start: int) -> None:
    config, settings = job.config, job.config.train
    main_rank = dist.get_rank() == 0
    recorder = Recorder(job.groups.data, job.groups.pipeline)
    with (
        Console(settings.steps, start, enabled=main_rank) as console,
        MetricsLog(config.run_dir, start, settings.heatmap_every) if main_rank else nullcontext() as metrics,
    ):
        for index, microbatches, stats in loader:
            rate = learning_rate(index, settings.steps, config.optimizer)
            result = job.engine.step(microbatches, rate)
            step = index + 1
            _refuse_non_finite(step, result)
            recorder.add(result, stats)
            if _due(step, settings.log_every, settings.steps):
                record = recorder.record(step, result, rate)  # on every rank: it adds their counts up
                console.update(record)
                if metrics is not None:
                    metrics.write(record)
            if _due(step, settings.checkpoint_every, settings.steps):
                state = job.engine.export_state()
                path = store.save(config.run_dir, step, state, job.meta, settings.keep_checkpoints)
                console.say(f"saved {path}")


def _due(step: int, every: int, last: int) -> bool:
    return step % every == 0 or step == last


def _refuse_non_finite(step: int, result: StepResult) -> None:
    if math.isfinite(result.losses["total"]) and math.isfinite(result.grad_norm):
        return
    bad = [name for name, value in result.losses.items() if not math.isfinite(value)] or ["grad_norm"]
    raise ValueError(
        f"step {step}: {', '.join(bad)} is not finite; lower optimizer.learning_rate, set "
        f"optimizer.clip_norm, or train in fp32, and continue from the last checkpoint with --resume"
    )
