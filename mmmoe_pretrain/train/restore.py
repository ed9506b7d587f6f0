"""Going on from a checkpoint: the newest one whose every byte is as it was written."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmmoe_pretrain.checkpoint import store
from mmmoe_pretrain.checkpoint.model import TOKENIZER
from mmmoe_pretrain.checkpoint.storage import StorageError
from mmmoe_pretrain.data.cursor import Cursor
from mmmoe_pretrain.engines.base import Progress
from mmmoe_pretrain.train.control import from_rank_0
from mmmoe_pretrain.train.schedule import jump_on_resume
from mmmoe_pretrain.train.session import Session
from mmmoe_pretrain.train.tally import Tally

log = logging.getLogger(__name__)
SAME_DATA = (("seed",), ("train", "global_batch_size"), ("data", "train"))  # on which the order of the data depends


@dataclass(frozen=True)
class Restored:
    checkpoint: store.Checkpoint
    step: int  # steps done
    cursor: Cursor  # as saved
    samples: Tally  # read by then


def restore(session: Session, candidates: Sequence[store.Checkpoint]) -> Restored:
    """Load the newest of ``candidates`` (oldest first) that verifies into the engine. Collective.

    Damaged ones are reported and passed over. Raises ValueError on every rank where none is left: a run must
    not begin afresh in the place of what it has lost, unless told so.
    """
    damage = "there is none of a step before the trouble"
    for checkpoint in reversed(candidates):
        try:
            store.verify(checkpoint, session.host.storage)
            meta = from_rank_0(session.host.storage, lambda at=checkpoint: store.read_meta(at))  # type: ignore[misc]
        except StorageError:
            raise  # the disk or the service does not answer, which says nothing of the checkpoint
        except ValueError as error:
            damage = str(error)
            if session.main:
                log.error("%s; going back to the checkpoint before", damage)
            session.journal.write("checkpoint_damaged", step=checkpoint.step, path=str(checkpoint), error=damage)
            continue
        return _load(session, checkpoint, meta)
    raise ValueError(
        f"none of the {len(candidates)} checkpoints in {session.config.checkpoint_root} can be used: {damage}; "
        f"bring one back from a backup, or begin afresh with --overwrite"
    )


def _load(session: Session, checkpoint: store.Checkpoint, meta: dict[str, Any]) -> Restored:
    fingerprint = session.codecs.text.fingerprint
    if meta["tokenizer_fingerprint"] != fingerprint:
        own = session.config.run_dir / TOKENIZER
        raise ValueError(
            f"{checkpoint} was trained with another tokenizer than {session.config.data.tokenizer} "
            f"(fingerprint {meta['tokenizer_fingerprint']}, now {fingerprint}); set data.tokenizer to the one that "
            f"it was trained with{f', e.g. the copy in {own}' if own.is_file() else ''}"
        )
    if session.main:
        _warn_of_other_data(session, meta)
        _warn_of_a_jump(session, meta)
    samples = Tally.from_json(meta["samples"]) if "samples" in meta else Tally()  # made by import or surgery
    state = store.load(checkpoint, session.engine.export_state(), session.host.storage)
    progress = _progress(meta)
    session.engine.import_state(state, progress)
    return Restored(checkpoint, progress.steps, Cursor.from_json(meta.get("skipped_batches", [])), samples)


def _progress(meta: dict[str, Any]) -> Progress:
    if "progress" in meta:
        return Progress.from_json(meta["progress"])
    return Progress(steps=meta["step"], updates=meta["step"])  # made by model surgery, which trains no step


def _warn_of_a_jump(session: Session, meta: dict[str, Any]) -> None:
    jump = jump_on_resume(_progress(meta).steps, session.config, meta["config"]) if meta.get("config") else ""
    if jump:
        log.warning("%s", jump)


def _warn_of_other_data(session: Session, meta: dict[str, Any]) -> None:
    now = session.config.model_dump(mode="json")
    for keys in SAME_DATA:
        old, new = meta.get("config"), now
        for key in keys:
            old, new = (old or {}).get(key), new[key]
        if meta.get("config") is not None and old != new:
            log.warning(
                "%s was %s and is %s: the data comes in another order now, so samples may be repeated or left out",
                ".".join(keys), old, new,
            )  # fmt: skip
