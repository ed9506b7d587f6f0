"""``mmmoe-data index``: the index of each source, made or completed before training; of the sources of a run's config
also the field that they are split by and, with ``--lengths``, the tokens of their samples."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from data_prep.pool import map_in_order
from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.data.order.fields import MODALITIES, field_path, measure_field, read_field
from mmmoe_pretrain.data.order.lengths import lengths_path, measure_lengths, open_lengths
from mmmoe_pretrain.data.sources.index import Rows
from mmmoe_pretrain.data.sources.listing import is_remote, is_stream, without_ranges
from mmmoe_pretrain.data.sources.source import open_indexed
from mmmoe_pretrain.data.storage.files import Files, Stat, read_settings
from mmmoe_pretrain.modalities import Modalities, build_modalities
from mmmoe_pretrain.progress import counted
from mmmoe_pretrain.urls import redacted

MOST_PARTS = 8  # values of a field that are printed
log = logging.getLogger(__name__)
_OVERRIDE = re.compile(r"[a-z_]+(\.\w+)*=")  # of a config, as for mmmoe train


def run(specs: Sequence[str], workers: int, lengths: bool) -> None:
    """The command: a line a source. A config names the sources of its data.train and evaluate.test; ``key=value``
    overrides settings of the configs."""
    overrides = [spec for spec in specs if _OVERRIDE.match(spec) and not Path(spec).exists()]
    for spec in (spec for spec in specs if spec not in overrides):
        if not spec.endswith((".yaml", ".yml")):
            if lengths:
                raise ValueError(f"--lengths measures tokens, and {redacted(spec)} names no tokenizer; name a config")
            _index(spec, Files(), workers)
            continue
        config = run_config.load(spec, overrides)
        files = Files(read_settings(config))
        modalities = build_modalities(config.modalities, config.data.tokenizer) if lengths else None
        for source in config.data.train:
            if is_stream(source.path):
                _say(f"{redacted(source.path)}: is read in its order, without an index")
            else:
                field = None if source.split_by == MODALITIES else source.split_by
                _index(source.path, files, workers, modalities, field)
        for path in config.evaluate.test:
            _index(path, files, workers)


def _index(
    spec: str, files: Files, workers: int, modalities: Modalities | None = None, field: str | None = None
) -> None:
    """With ``modalities`` also the lengths of the samples, with a ``field`` its values, where they are not known."""
    walk = None if is_remote(spec) else functools.partial(_walk, workers=workers)
    source = open_indexed(spec, files, modalities, walk=walk, ask="all")
    for note in without_ranges(source.urls, files):
        log.warning("%s", note)
    held = f"{counted(len(source), 'sample')} in {counted(len(source.shard_sizes), 'shard')}"
    _say(f"{redacted(spec)}: {held}, {source.index_path}")
    if modalities is not None:
        path = lengths_path(source, modalities)
        if _is_older(path, source.index_path) or open_lengths(path, source, modalities) is None:
            measure_lengths(source, modalities, path)
        _say(f"  lengths: {path}")
    if field is not None:
        known = None if _is_older(field_path(source, field), source.index_path) else read_field(source, field)
        values, ids = known or measure_field(source, field)
        sizes = zip(np.bincount(ids, minlength=len(values)).tolist(), values, strict=True)
        parts = [f"{value or '(none)'} {size:,}" for size, value in sorted(sizes, reverse=True)]
        more = f", and {len(parts) - MOST_PARTS} more" if len(parts) > MOST_PARTS else ""
        _say(f"  {field}: {', '.join(parts[:MOST_PARTS])}{more}")


def _is_older(path: Path, index: Path) -> bool:
    """Whether what ``path`` holds, if it is there, may be of other shards than ``index`` now is."""
    return path.exists() and path.stat().st_mtime_ns < index.stat().st_mtime_ns


def _say(line: str) -> None:
    Console(markup=False).print(line, highlight=False, soft_wrap=True)


def _walk(
    function: Callable[[str], tuple[Stat, Rows]], urls: Iterable[str], workers: int
) -> Iterator[tuple[Stat, Rows]]:
    todo = list(urls)
    return map_in_order(function, todo, min(workers, len(todo)))
