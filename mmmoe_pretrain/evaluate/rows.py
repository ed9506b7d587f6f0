"""The held-out rows of a run: which folders, read by which codecs, without what was trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmmoe_pretrain.batch import Batch, Sample
from mmmoe_pretrain.checkpoint import store
from mmmoe_pretrain.checkpoint.model import root_of
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.evaluation import iterate_eval
from mmmoe_pretrain.evaluate.leaks import LeakFilter
from mmmoe_pretrain.modalities import Codecs, build_codecs
from mmmoe_pretrain.paths import make_folder
from mmmoe_pretrain.untrusted import read_json

BATCH_SIZE = 64  # samples; under a capacity factor, tokens compete within a batch


@dataclass(frozen=True)
class HeldOutRows:
    """``leaks`` is None where the rows are trained on, and nothing can be left out."""

    paths: list[str]
    config: RunConfig
    codecs: Codecs
    leaks: LeakFilter | None

    def batches(self) -> Iterator[tuple[Batch, list[Sample]]]:
        """One pass, in order, unperturbed; the same every time."""
        return iterate_eval(
            self.paths, self.config, self.codecs, BATCH_SIZE, self.leaks.clean if self.leaks else None
        )

    def notes(self) -> list[str]:
        """What a reader of numbers over these rows should know; complete after a pass."""
        trained = [f"{path} is trained on: these are no held-out rows" for path in trains_on(self.paths, self.config)]
        return trained + (self.leaks.notes() if self.leaks else [])


def open_rows(run_dir: Path, config: RunConfig, test_paths: Sequence[str] | None) -> HeldOutRows:
    """The shards in ``test_paths``, or else of ``evaluate.test``. ValueError where neither names any."""
    paths = list(test_paths or config.evaluate.test)
    if not paths:
        raise ValueError(
            f"{run_dir} names no held-out shards; give --test FOLDER, or set evaluate.test in its config"
        )
    codecs = build_codecs(config, expected_fingerprint=_tokenizer_fingerprint(root_of(run_dir, config)))
    return HeldOutRows(paths, config, codecs, LeakFilter(config) if not trains_on(paths, config) else None)


def overridden(overrides: Sequence[str]) -> list[str]:
    """The note that says under which settings, other than its own, a run was looked at."""
    return [f"with {', '.join(overrides)} instead of the run's own settings"] if overrides else []


def place_of_report(run_dir: Path, name: str, paths: Sequence[str], out: Path | None) -> Path:
    """The folder for the report ``name`` of ``paths``: ``out``, or the run's, made if it is missing.

    Raises ValueError where the run's report is of other shards and ``out`` does not say that it may go.
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
    """The folders that an earlier report is of, where it says so and they are others than ``paths``."""
    try:
        before = [str(path) for path in read_json(report).get("test", ())]
    except (ValueError, TypeError, FileNotFoundError):  # no report, or a damaged one
        return []
    same = {Path(path).resolve() for path in before} == {Path(path).resolve() for path in paths}
    return [] if same else before


def trains_on(paths: Sequence[str], config: RunConfig) -> list[str]:
    """Those of ``paths`` that the run trains on."""
    trained_on = {Path(source.path).resolve() for source in config.data.train}
    return [path for path in paths if Path(path).resolve() in trained_on]


def _tokenizer_fingerprint(root: str) -> str | None:
    """What the run's checkpoint says of its tokenizer: another one of the same size would score noise."""
    checkpoint = store.find_latest(root)
    return store.read_meta(checkpoint).get("tokenizer_fingerprint") if checkpoint else None
