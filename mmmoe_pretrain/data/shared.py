"""The sources of data.train on many ranks: rank 0 lists the shards and estimates lengths for all, and one rank of
each other machine compares the files there with their index. A thousand ranks that each list a bucket, or ask a file
system about 100,000 shards, wait for it for long, or are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass

from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.order.assign import Estimates, estimate_all, needs_estimates
from mmmoe_pretrain.data.sources.indexing import Ask
from mmmoe_pretrain.data.sources.listing import Listing, is_stream
from mmmoe_pretrain.data.sources.source import Indexed, open_source
from mmmoe_pretrain.data.sources.stream import Stream
from mmmoe_pretrain.data.storage.files import Files, read_settings
from mmmoe_pretrain.modalities import Modalities
from mmmoe_pretrain.urls import filled_in


@dataclass(frozen=True)
class Found:
    """What rank 0 finds, for all ranks. ``listings``: of indexed sources by their paths, rank 0's ``$VAR``
    filled in. ``estimates``: None where nothing depends on them."""

    listings: Mapping[str, Listing]
    estimates: Estimates | None = None


def find(config: RunConfig, modalities: Modalities, dp_size: int) -> Found:
    """For rank 0: lists the shards, and makes their index where it is missing."""
    with closing(Files(read_settings(config))) as files:
        sources = open_sources(config, modalities, files)
        listings = {filled_in(source.spec): source.listing for source in sources if isinstance(source, Indexed)}
        estimates = estimate_all(config, sources, modalities) if needs_estimates(config, dp_size) else None
        return Found(listings, estimates)


def look(config: RunConfig, modalities: Modalities, found: Found) -> None:
    """For one rank of each other machine: compare local shards with their index, which is made where it is missing.
    The other ranks of the machine can then open them without a look."""
    with closing(Files(read_settings(config))) as files:
        open_sources(config, modalities, files, found)


def open_sources(
    config: RunConfig, modalities: Modalities, files: Files, found: Found | None = None, ask: Ask = "local"
) -> list[Indexed | Stream]:
    """The sources of data.train. What ``found`` lists is not listed again, and asked as ``ask`` says
    (``open_index``), unless this rank has another path for it (``$SCRATCH/train``)."""

    def known(path: str) -> Listing | None:
        return found.listings.get(filled_in(path)) if found and not is_stream(path) else None

    return [
        open_source(
            its.path, files, modalities, config.seed, its.stream_window, listing := known(its.path),
            ask if listing else "local",
        )
        for its in config.data.train
    ]  # fmt: skip
