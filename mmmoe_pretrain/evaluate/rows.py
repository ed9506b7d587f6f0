"""The held-out rows of a run: which folders, read by which modalities, without those whose texts were trained on.

A corpus splits its own rows so that nothing leaks; a mix of corpora can still share a text ("four"). Such rows are
not scored.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mmmoe_pretrain.batch import Batch, Sample
from mmmoe_pretrain.checkpoint import store
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.decode import texts_of
from mmmoe_pretrain.data.evaluation import eval_samples, eval_settings, iterate_eval, training_samples
from mmmoe_pretrain.data.pack import pack
from mmmoe_pretrain.data.sources.listing import is_absent, is_stream
from mmmoe_pretrain.data.sources.source import NoShards, open_indexed
from mmmoe_pretrain.data.storage.files import Files, read_settings
from mmmoe_pretrain.evaluate.features import collect_routing
from mmmoe_pretrain.modalities import Modalities, build_modalities
from mmmoe_pretrain.models.pretraining import PretrainingModel
from mmmoe_pretrain.moe.stats import RoutingStats
from mmmoe_pretrain.paths import make_folder
from mmmoe_pretrain.progress import track
from mmmoe_pretrain.untrusted import read_json

BATCH_SIZE = 64  # samples; under a capacity factor, tokens compete within a batch
MAX_TEXTS = 500_000  # of a training folder; what lies beyond is not compared


class LeakFilter:
    """Decides whether a held-out sample is clean, and counts those that are not. Documents, whose texts are parts
    of a whole, are not compared."""

    def __init__(self, folders: Sequence[str], modalities: Modalities, files: Files | None = None) -> None:
        """``folders`` of training shards; none of them: every sample is clean."""
        self.dropped: set[str] = set()
        self.absent: list[str] = []
        self._seen: set[tuple[str, ...]] = set()
        for path in folders:
            try:
                self._seen |= set() if is_stream(path) else _seen(path, modalities, files)
            except NoShards:
                self.absent.append(path)

    def clean(self, sample: Sample) -> bool:
        """True unless a training sample has all of the sample's texts, and no other."""
        texts = () if sample.document else _words(item.raw for item in sample.items)
        leaked = texts in self._seen  # which never holds ()
        if leaked:
            self.dropped.add(sample.meta.identity)
        return not leaked

    def notes(self) -> list[str]:
        """Notes for readers of the scores."""
        notes = []
        if self.dropped:
            notes.append(
                f"{len(self.dropped)} held-out rows are not scored: their texts are also in the training data"
            )
        if self.absent:
            notes.append(f"held-out texts are not compared with those of {self.absent[0]}: it is missing")
        return notes


def _seen(path: str, modalities: Modalities, files: Files | None) -> set[tuple[str, ...]]:
    folder = open_indexed(path, files, modalities)
    count = min(len(folder), MAX_TEXTS)
    places = track(range(count), f"reading the texts of {path}", count, "samples")
    return {_words(texts_of(folder.read(i), modalities)) for i in places} - {()}


def _words(texts: Iterable[str]) -> tuple[str, ...]:
    """Of each text with words these, without case, spacing and punctuation ("Four." is "four")."""
    return tuple(filter(None, (" ".join(re.findall(r"\w+", text.casefold())) for text in texts)))


@dataclass(frozen=True)
class HeldOutRows:
    """The rows of the folders ``paths``, without those that ``leaks`` rejects."""

    paths: list[str]
    config: RunConfig
    modalities: Modalities
    leaks: LeakFilter

    def batches(self) -> Iterator[tuple[Batch, list[Sample]]]:
        """One pass, in order, unperturbed; the same every time."""
        return iterate_eval(self.paths, self.config, self.modalities, BATCH_SIZE, self.leaks.clean)

    def samples(self) -> Iterator[tuple[list[Sample], range]]:
        """The same samples, batch by batch, and their positions."""
        return eval_samples(self.paths, self.config, self.modalities, BATCH_SIZE, self.leaks.clean)

    def training_batches(self, limit: int, what: str) -> Iterator[tuple[Batch, list[Sample]]]:
        """About ``limit`` training samples, spread evenly, without what is withheld from training, packed as held-out
        ones. ``what``: is done, for progress."""
        settings = eval_settings(self.config, self.modalities)
        samples = (sample for _, sample in training_samples(self.config, self.modalities, limit, what))
        while batch := list(itertools.islice(samples, BATCH_SIZE)):
            yield pack(batch, settings), batch

    @property
    def absent_training(self) -> str:
        """Training shards that cannot be read by number; empty where all can."""
        places = (source.path for source in self.config.data.train)
        return next((path for path in places if is_stream(path) or is_absent(path)), "")

    def batches_of(self, modalities: Container[str]) -> Iterator[Batch]:
        """As ``batches``, of the items of these modalities alone."""
        settings = eval_settings(self.config, self.modalities)
        for samples, positions in self.samples():
            yield pack([sample.only(modalities) for sample in samples], settings, positions)

    def notes(self, overrides: Sequence[str]) -> list[str]:
        """Notes for readers of numbers over these rows, with these ``overrides`` of settings; complete after a
        pass."""
        changed = [f"with {', '.join(overrides)} instead of the run's own settings"] if overrides else []
        trained = [f"{path} is trained on, it is not held out" for path in _trained_on(self.paths, self.config)]
        return changed + trained + self.leaks.notes()


def open_rows(run_dir: Path, config: RunConfig, test_paths: Sequence[str] | None) -> HeldOutRows:
    """The shards in ``test_paths``, or else of ``evaluate.test``. ValueError where neither names any."""
    paths = list(test_paths or config.evaluate.test)
    if not paths:
        raise ValueError(
            f"{run_dir} names no held-out shards; give --test FOLDER, or set evaluate.test in its config"
        )
    checkpoint = store.find_latest(config.checkpoints_of(run_dir))
    # Another tokenizer of the same size than the run's would give meaningless scores.
    fingerprint = store.read_meta(checkpoint).get("tokenizer_fingerprint") if checkpoint else None
    modalities = build_modalities(config.modalities, config.data.tokenizer, fingerprint=fingerprint)
    keep = config.evaluate.keep_seen_texts or _trained_on(paths, config)
    compared = [] if keep else [source.path for source in config.data.train]
    return HeldOutRows(paths, config, modalities, LeakFilter(compared, modalities, Files(read_settings(config))))


def untrained_routing(rows: HeldOutRows, device: torch.device) -> tuple[RoutingStats, ...]:
    """The routing of the run's model before its first step, on the same rows."""
    untrained = PretrainingModel(rows.config).mmmoe.eval().to(device)
    return collect_routing(untrained, rows.batches())


def place_of_report(run_dir: Path, name: str, paths: Sequence[str], out: Path | None) -> Path:
    """The folder for the report ``name`` of ``paths``: ``out``, or the run's, made if it is missing.

    Raises ValueError where the run's report is of other shards and ``out`` is not given.
    """
    before = run_dir / name
    if out is None and (others := _other_shards(before, paths)):
        raise ValueError(
            f"{before} is of {', '.join(others)}, and not of {', '.join(paths)}; write this one elsewhere with --out "
            f"FOLDER, or replace that one with --out {before.parent}"
        )
    folder = out or before.parent
    make_folder(folder)
    return folder


def _other_shards(report: Path, paths: Sequence[str]) -> list[str]:
    """The folders of an earlier report, if they differ from ``paths``."""
    try:
        before = [str(path) for path in read_json(report).get("test", ())]
    except (ValueError, TypeError, FileNotFoundError, IsADirectoryError):  # no report, or a damaged one
        return []
    return [] if are_same(before, paths) else before


def are_same(folders: Sequence[str], others: Sequence[str]) -> bool:
    """Whether these are the same folders, in any order."""
    return {Path(path).resolve() for path in folders} == {Path(path).resolve() for path in others}


def _trained_on(paths: Sequence[str], config: RunConfig) -> list[str]:
    """Those of ``paths`` that the run trains on."""
    trained_on = {Path(source.path).resolve() for source in config.data.train}
    return [path for path in paths if Path(path).resolve() in trained_on]
