"""``mmmoe-data index``: the index of each source, made or completed before training; of the sources of a run's config
also the field that they are split by and, with ``--lengths``, the tokens of their samples."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.data.order.fields import MODALITIES, field_path, measure_field, read_field
from mmmoe_pretrain.data.order.lengths import lengths_path, measure_lengths, open_lengths
from mmmoe_pretrain.data.sources.index import Rows
from mmmoe_pretrain.data.sources.indexing import home_of, places
from mmmoe_pretrain.data.sources.listing import is_remote, is_stream, list_shards, without_ranges
from mmmoe_pretrain.data.sources.source import open_indexed
from mmmoe_pretrain.data.storage.files import Files, Stat, read_settings
from mmmoe_pretrain.data_prep.console import answer
from mmmoe_pretrain.data_prep.pool import map_in_order
from mmmoe_pretrain.modalities import Modalities, build_modalities
from mmmoe_pretrain.progress import counted
from mmmoe_pretrain.urls import redacted

MOST_PARTS = 8  # values of a field that are printed
log = logging.getLogger(__name__)
_OVERRIDE = re.compile(r"[a-z_]+(\.\w+)*=")  # of a config, as for mmmoe train


def run(specs: Sequence[str], workers: int, lengths: bool, dry_run: bool = False, as_json: bool = False) -> None:
    """The command: a line a source. A config names the sources of its data.train and evaluate.test; ``key=value``
    overrides settings of the configs."""
    sources = []
    for spec, files, modalities, field in _sources(specs, lengths):
        found = _planned(spec, files) if dry_run else _index(spec, files, workers, modalities, field)
        sources.append(found)
        if not as_json:
            answer(False, found, *_lines(found))
    if as_json:
        answer(True, {"sources": sources})


def _sources(specs: Sequence[str], lengths: bool) -> Iterator[tuple[str, Files, Modalities | None, str | None]]:
    """The sources, what their samples are measured by, and the field that they are split by."""
    overrides = [spec for spec in specs if _OVERRIDE.match(spec) and not Path(spec).exists()]
    for spec in (spec for spec in specs if spec not in overrides):
        if not spec.endswith((".yaml", ".yml")):
            if lengths:
                raise ValueError(f"--lengths measures tokens, and {redacted(spec)} names no tokenizer; name a config")
            yield spec, Files(), None, None
            continue
        config = run_config.load(spec, overrides)
        files = Files(read_settings(config))
        modalities = build_modalities(config.modalities, config.data.tokenizer) if lengths else None
        for source in config.data.train:
            if is_stream(source.path):
                log.warning("%s: is read in its order, without an index", redacted(source.path))
            else:
                field = None if source.split_by == MODALITIES else source.split_by
                yield source.path, files, modalities, field
        for path in config.evaluate.test:
            yield path, files, None, None


def _planned(spec: str, files: Files) -> dict[str, Any]:
    """What indexing would do."""
    listing = list_shards(spec, files)
    found = [path for path in places(listing, home_of(listing)) if path.exists()]
    return {"source": redacted(spec), "shards": len(listing.shards), "has_index": [str(path) for path in found]}


def _index(spec: str, files: Files, workers: int, modalities: Modalities | None, field: str | None) -> dict[str, Any]:
    """With ``modalities`` also the lengths of the samples, with a ``field`` its values, where they are not known."""
    walk = None if is_remote(spec) else functools.partial(_walk, workers=workers)
    source = open_indexed(spec, files, modalities, walk=walk, ask="all")
    for note in without_ranges(source.urls, files):
        log.warning("%s", note)
    found: dict[str, Any] = {"source": redacted(spec), "samples": len(source), "shards": len(source.shard_sizes)}
    found["index"] = str(source.index_path)
    if modalities is not None:
        path = lengths_path(source, modalities)
        if _is_older(path, source.index_path) or open_lengths(path, source, modalities) is None:
            measure_lengths(source, modalities, path)
        found["lengths"] = str(path)
    if field is not None:
        known = None if _is_older(field_path(source, field), source.index_path) else read_field(source, field)
        values, ids = known or measure_field(source, field)
        sizes = zip(np.bincount(ids, minlength=len(values)).tolist(), values, strict=True)
        found |= {"split_by": field, "parts": {value: size for size, value in sorted(sizes, reverse=True)}}
    return found


def _lines(found: dict[str, Any]) -> Iterator[str]:
    shards = counted(found["shards"], "shard")
    if "has_index" in found:
        state = f"indexed in {found['has_index'][0]}" if found["has_index"] else "would be indexed"
        yield f"{found['source']}: {shards}, {state}"
        return
    yield f"{found['source']}: {counted(found['samples'], 'sample')} in {shards}, {found['index']}"
    if "lengths" in found:
        yield f"  lengths: {found['lengths']}"
    if "parts" in found:
        parts = [f"{value or '(none)'} {size:,}" for value, size in found["parts"].items()]
        more = f", and {len(parts) - MOST_PARTS} more" if len(parts) > MOST_PARTS else ""
        yield f"  {found['split_by']}: {', '.join(parts[:MOST_PARTS])}{more}"


def _is_older(path: Path, index: Path) -> bool:
    """Whether what ``path`` holds, if it is there, may be of other shards than ``index`` now is."""
    return path.exists() and path.stat().st_mtime_ns < index.stat().st_mtime_ns


def _walk(
    function: Callable[[str], tuple[Stat, Rows]], urls: Iterable[str], workers: int
) -> Iterator[tuple[Stat, Rows]]:
    todo = list(urls)
    return map_in_order(function, todo, min(workers, len(todo)))
