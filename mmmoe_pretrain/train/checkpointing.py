"""The checkpoints of a run: saving them while it trains, and restoring the newest intact one."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from mmmoe_pretrain import __version__, exit_codes
from mmmoe_pretrain.checkpoint import store
from mmmoe_pretrain.checkpoint.folders import Retention
from mmmoe_pretrain.checkpoint.model import TOKENIZER, refuse_old
from mmmoe_pretrain.checkpoint.saver import Saver, SaveReport
from mmmoe_pretrain.checkpoint.storage import StorageError
from mmmoe_pretrain.config import HELD_OUT, RunConfig
from mmmoe_pretrain.data.cursor import Cursor
from mmmoe_pretrain.data.sources import stream_state
from mmmoe_pretrain.data.sources.survey import Sizes, read_sizes
from mmmoe_pretrain.engines.base import Engine, Progress
from mmmoe_pretrain.modalities import Modalities
from mmmoe_pretrain.objectives import Objectives
from mmmoe_pretrain.parallel.agreement import from_rank_0
from mmmoe_pretrain.parallel.degrees import Layout
from mmmoe_pretrain.parallel.groups import Groups, HostGroups
from mmmoe_pretrain.train.held_out import HeldOutScores
from mmmoe_pretrain.train.journal import Journal
from mmmoe_pretrain.train.metrics import SampleCounts
from mmmoe_pretrain.train.schedule import jump_on_resume
from mmmoe_pretrain.train.start import differences

log = logging.getLogger(__name__)
silent = logging.Logger("silent", level=logging.CRITICAL + 1)


@dataclass(frozen=True)
class RunContext:
    """The parts of a run on one rank."""

    config: RunConfig
    layout: Layout
    groups: Groups
    host: HostGroups
    modalities: Modalities
    engine: Engine
    journal: Journal  # of rank 0; elsewhere it writes nothing
    main: bool  # is this rank 0?
    before_model: float = 0.0  # bytes of this process before it built the model

    @property
    def log(self) -> logging.Logger:
        """Of rank 0; elsewhere it is silent."""
        return log if self.main else silent


ORDER_OF_DATA = ("lanes", "shuffle_window", "shuffle_chunk")  # of data: another value changes the order
BLEND = ("train", "temperature", "weigh_by")  # of data: may change it


@dataclass(frozen=True)
class DataState:
    """What of the data has been read: the batches that are skipped, the counts, and how far each stream is.
    ``order``: ``Loader.digest`` of the batches up to here, empty where it was not saved; ``sizes``: of the sources,
    and ``changes``: of their settings since then, for messages."""

    cursor: Cursor = field(default_factory=Cursor)
    samples: SampleCounts = field(default_factory=SampleCounts)
    streams: stream_state.Table = field(default_factory=dict)
    order: str = ""
    sizes: list[Sizes] = field(default_factory=list)
    changes: tuple[str, ...] = ()


class CheckpointManager:
    """The saves of a run. All ranks call the same methods in the same order."""

    def __init__(self, context: RunContext, say: Callable[[str], None]) -> None:
        settings = context.config.checkpoint
        self._context, self._settings, self._say = context, settings, say
        keep = Retention(settings.keep_last, settings.keep_every, settings.keep_best)
        self._saver = Saver(context.config.checkpoint_root, context.host.storage, keep, settings.asynchronous)
        losses = ("total", *context.engine.models[0].loss_names)  # of a PretrainingModel
        if settings.keep_best and not self.best_by_held_out and settings.best_metric not in losses:
            raise ValueError(
                f"checkpoint.best_metric {settings.best_metric!r} is not a loss of this run: {', '.join(losses)}; or "
                f"{HELD_OUT} and the name of a loss or score, e.g. {HELD_OUT}total or {HELD_OUT}image_to_text_r1"
            )
        if warning := warning_of_changing_weights(context.config, context.engine.models[0].objectives):
            context.log.warning("%s", warning)
        self._started = -1  # the step of the last save
        self._last: SaveReport | None = None
        self.failures = 0  # failed saves in a row

    @property
    def best_by_held_out(self) -> bool:
        """Whether the best checkpoints are those with the best of a held-out loss or score."""
        return bool(self._settings.keep_best) and self._settings.best_metric.startswith(HELD_OUT)

    def save(
        self, step: int, data: DataState, losses: dict[str, float], held_out: HeldOutScores | None = None
    ) -> None:
        """Start to save ``step``; training may continue when this returns: it waits for the copy before its next
        update. ``held_out``: its scores, where they are due."""
        engine, meta = self._context.engine, _meta(self._context, data, losses)
        self._saver.save(step, engine.export_state(), meta, self._metric(step, losses, held_out))
        engine.before_update(self._saver.wait_for_copy)
        self._started = step

    def _metric(self, step: int, losses: dict[str, float], held_out: HeldOutScores | None) -> float | None:
        """The best_metric of ``step``, the lower the better, without the weight that an objective had then, which may
        follow a schedule; None before the first step, where the weight was 0, and where it was not scored."""
        name, objectives = self._settings.best_metric, self._context.engine.models[0].objectives
        if self.best_by_held_out:
            name = name.removeprefix(HELD_OUT)
            weight = objectives.weights(step).get(name, 1.0)
            return held_out.metric(name) / weight if held_out is not None and weight else None
        weight = objectives.weights(step - 1).get(name, 1.0)
        return losses[name] / weight if weight and name in losses else None

    def save_and_wait(
        self, step: int, data: DataState, losses: dict[str, float], held_out: HeldOutScores | None = None
    ) -> None:
        """``step`` is saved when this returns. Raises ValueError on every rank where it cannot be, Restartable
        where a disk or a peer failed; earlier checkpoints remain."""
        self.wait()
        if self._started != step or (self._last is not None and self._last.error is not None):
            self.save(step, data, losses, held_out)
            self.wait()
        if self._last is not None and self._last.error is not None:
            kind = exit_codes.Restartable if self._last.restartable else ValueError
            raise kind(f"step {step} could not be saved: {self._last.error}")

    def wait(self) -> None:
        """Wait for the save in flight."""
        self._saver.wait()
        self.poll()

    def poll(self) -> None:
        """Log the finished saves in the journal. Ranks may see a save finish in different steps."""
        for report in self._saver.poll():
            self._last = report
            self.failures = 0 if report.error is None else self.failures + 1
            self._report(report)

    def too_many(self, failures: int) -> bool:
        """Whether ``failures`` in a row, as rank 0 counts them, end the run."""
        return failures > self._settings.max_failures

    def give_up(self, failures: int) -> NoReturn:
        """End the run with the reason of the last failure."""
        self.wait()
        reason = self._last.error if self._last is not None else None
        raise ValueError(
            f"{failures} saves failed in a row, and checkpoint.max_failures is {self._settings.max_failures}; the "
            f"last one: {reason}"
        )

    def after_rollback(self) -> None:
        """After a rollback the step saved last may be saved again with other values."""
        self._started = -1

    def close(self) -> None:
        self._saver.close()
        self.poll()

    def _report(self, report: SaveReport) -> None:
        log, journal = self._context.log, self._context.journal
        if report.error is not None:
            log.error("step %d could not be saved: %s", report.step, report.error)
            journal.write("save_failed", step=report.step, error=report.error)
            return
        self._say(f"saved {report.path}")
        journal.write(
            "saved", step=report.step, path=report.path, bytes=report.bytes,
            seconds_blocked=round(report.seconds_blocked, 4), seconds_waited=round(report.seconds_waited, 4),
            seconds_before_update=round(report.seconds_before_update, 4),
            seconds_writing=round(report.seconds_writing, 4),
        )  # fmt: skip
        if report.warning is not None:
            log.warning("step %d is saved, with a warning: %s", report.step, report.warning)
            journal.write("cleaning_failed", step=report.step, error=report.warning)


def warning_of_changing_weights(config: RunConfig, objectives: Objectives) -> str:
    """Where the best checkpoints are those with the lowest total, and a weight in it changes during the run; else
    empty."""
    metric = config.checkpoint.best_metric
    before = HELD_OUT if metric.startswith(HELD_OUT) else ""
    if not config.checkpoint.keep_best or metric.removeprefix(before) != "total":
        return ""
    last = config.train.steps if before else config.train.steps - 1  # held-out samples have the next step's weights
    changing = [name for name, its in objectives.items() if its.settings.changes_until(last)]
    if not changing:
        return ""
    losses = [before + loss for loss, name in objectives.losses.items() if name in changing]
    return (
        f"checkpoint.best_metric {metric} compares totals of different weights: the weight of {', '.join(changing)} "
        f"changes during the run; losses that are compared without their weight: {', '.join(losses)}"
    )


def _meta(context: RunContext, data: DataState, losses: dict[str, float]) -> dict[str, Any]:
    """Plain values saved beside the tensors of a checkpoint. Every random number of a run is a function of its seed,
    the step and the sample's position, so no generator's state is among them."""
    return {
        "version": __version__,
        "vocab_size": context.config.model.vocab_size,
        "tokenizer_fingerprint": context.modalities.fingerprint,
        "seed": context.config.seed,
        "progress": context.engine.progress().to_json(),
        "skipped_batches": data.cursor.to_json(),
        "samples": data.samples.to_json(),
        "streams": stream_state.to_json(data.streams),
        "data_order": data.order,
        "data_sizes": data.sizes,
        "losses": {name: value if math.isfinite(value) else None for name, value in losses.items()},
        "layout": dataclasses.asdict(context.layout),  # for information: a run may resume under any other
        "config": context.config.model_dump(mode="json"),
    }


@dataclass(frozen=True)
class Restored:
    checkpoint: store.Checkpoint
    step: int  # steps done
    data: DataState  # as saved
    losses: dict[str, float]  # of that step, as saved


def restore(context: RunContext, candidates: Sequence[store.Checkpoint]) -> Restored:
    """Load the newest of ``candidates`` (oldest first) that verifies into the engine. Collective.

    Damaged ones are reported and skipped. Raises ValueError on every rank if none is left: a run with lost
    checkpoints must not start from step 0 without --overwrite.
    """
    damage = "there is none before the steps to roll back"
    for checkpoint in reversed(candidates):
        try:
            store.verify(checkpoint, context.host.storage)
            meta = from_rank_0(context.host.storage, lambda at=checkpoint: store.read_meta(at))  # type: ignore[misc]
        except StorageError:
            raise  # the disk or service failed, not the checkpoint
        except ValueError as error:
            damage = str(error)
            context.log.error("%s; trying the checkpoint before", damage)
            context.journal.write("checkpoint_damaged", step=checkpoint.step, path=str(checkpoint), error=damage)
            continue
        return _load(context, checkpoint, meta)
    raise ValueError(
        f"none of the {len(candidates)} checkpoints in {context.config.checkpoint_root} can be used: {damage}; "
        f"restore one from a backup, or start from step 0 with --overwrite"
    )


def _load(context: RunContext, checkpoint: store.Checkpoint, meta: dict[str, Any]) -> Restored:
    refuse_old(checkpoint, meta)
    fingerprint = context.modalities.fingerprint
    if meta["tokenizer_fingerprint"] != fingerprint:
        own = context.config.run_dir / TOKENIZER
        raise ValueError(
            f"{checkpoint} was trained with another tokenizer than {context.config.data.tokenizer} "
            f"(fingerprint {meta['tokenizer_fingerprint']}, now {fingerprint}); set data.tokenizer to the one that "
            f"it was trained with{f', e.g. the copy in {own}' if own.is_file() else ''}"
        )
    # Checkpoints of import and model surgery have neither progress nor counts.
    progress = Progress.from_json(meta["progress"]) if "progress" in meta else Progress(meta["step"], meta["step"])
    samples = SampleCounts.from_json(meta["samples"]) if "samples" in meta else SampleCounts()
    changes: tuple[str, ...] = ()
    if meta.get("config") is not None:
        saved, now = meta["config"], context.config.model_dump(mode="json")
        changes = tuple(differences(_settings_of_data(saved, BLEND), _settings_of_data(now, BLEND)))
        for change in differences(_order_of_data(saved), _order_of_data(now)):
            context.log.warning("%s: the order of the data changes; samples may be repeated or never read", change)
        if jump := jump_on_resume(progress.steps, context.config, saved):
            context.log.warning("%s", jump)
    state = store.load(checkpoint, context.engine.export_state(), context.host.storage)
    context.engine.import_state(state, progress)
    cursor, streams = (
        Cursor.from_json(meta.get("skipped_batches", [])),
        stream_state.from_json(meta.get("streams", {})),
    )
    order, sizes = str(meta.get("data_order", "")), read_sizes(meta.get("data_sizes"))
    data = DataState(cursor, samples, streams, order, sizes, changes)
    losses = {name: math.nan if value is None else value for name, value in meta.get("losses", {}).items()}
    return Restored(checkpoint, progress.steps, data, losses)


def _order_of_data(values: dict[str, Any]) -> dict[str, Any]:
    """The settings on which it depends, of a config in plain values."""
    return {
        "seed": values["seed"],
        "train": {"global_batch_size": values["train"]["global_batch_size"]},
        **_settings_of_data(values, ORDER_OF_DATA),
    }


def _settings_of_data(values: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    data = values.get("data") or {}
    return {"data": {name: data.get(name) for name in names}}
