"""The section ``data``: the sources of the training mix, how they are read, and the cache of remote shards."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from mmmoe_pretrain.config.base import PathText, SourceText, StrictModel
from mmmoe_pretrain.config.schedule import Schedule, Weight, check_schedule, schedule_of, value_at
from mmmoe_pretrain.urls import secret_option


class SourceConfig(StrictModel):
    """A source of samples and its share of the training mix.

    ``path``: a folder of shards, a tar, a URL of either (``s3://bucket/train``), braces (``data-{000..099}.tar``),
    several of these (``a::b``), a list (``shards.json``), or a split of a folder of Energon's (``DIR#val``).

    ``weight``: of the mix, or a schedule over steps such as ``[[0, 1.0], [10000, 0.1]]``. ``epochs``: after so many
    its share goes to the other sources; None: without end. ``split_by``: samples of each set of modalities
    (``modalities``; by their files), or with each value of a field of their JSON (``language``), are a part of their
    own, drawn by (size of the part)^(1 / ``temperature``).
    """

    path: SourceText
    weight: Weight = 1.0
    epochs: int | None = Field(None, ge=1)
    split_by: str | None = Field(None, min_length=1)
    temperature: float = Field(1.0, gt=0)  # of the parts
    stream_window: int = Field(16, ge=1)  # of pipe: samples of a sub-lane that are permuted, and kept in memory

    @model_validator(mode="after")
    def _weights(self) -> SourceConfig:
        check_schedule(self.schedule, "weight")
        if not any(weight > 0 for _, weight in self.schedule):
            raise ValueError(f"data.train: {self.path} has weight 0; leave it out, or give it a weight above 0")
        if self.temperature != 1.0 and self.split_by is None:
            raise ValueError(
                f"data.train: temperature {self.temperature:g} of {self.path} is that of its parts; add split_by: "
                f"modalities or a field, or set data.temperature for all sources"
            )
        return self

    @property
    def schedule(self) -> Schedule:
        return schedule_of(self.weight)

    def mean_weight(self, steps: int) -> float:
        """Over the first ``steps`` steps."""
        return sum(value_at(self.schedule, (i + 0.5) * steps / 64) for i in range(64)) / 64


class CacheConfig(StrictModel):
    """Blocks of remote shards on a disk of each node, shared by its ranks and workers."""

    folder: PathText
    size_gb: float = Field(100.0, gt=0)  # above it the least recently used blocks are removed
    block_mb: int = Field(8, ge=1, le=1024)  # of a request

    @model_validator(mode="after")
    def _some_blocks(self) -> CacheConfig:
        if self.size_gb * 1000 < 4 * self.block_mb:
            raise ValueError(
                f"data.cache.size_gb {self.size_gb:g} has no room for four blocks of data.cache.block_mb "
                f"{self.block_mb}; raise it to {0.004 * self.block_mb:g} or more, or lower block_mb"
            )
        return self


def _sources(values: Any) -> Any:
    """Of ``data.train``: a path alone is a source, and one source alone is a list of it."""
    each = [values] if isinstance(values, str | dict) else values
    if not isinstance(each, list | tuple) or not all(isinstance(item, str | dict | BaseModel) for item in each):
        raise PydanticCustomError(
            "sources",
            "must be a path, or a list of sources; e.g. data.train=DIR or 'data.train=[{path: DIR, weight: 2}]'",
        )
    return [{"path": item} if isinstance(item, str) else item for item in each]


def _cache(values: Any) -> Any:
    """Of ``data.cache``: a path alone is its folder."""
    return {"folder": values} if isinstance(values, str) else values


class DataConfig(StrictModel):
    train: Annotated[tuple[SourceConfig, ...], BeforeValidator(_sources)] = Field(min_length=1)
    weigh_by: Literal["samples", "tokens"] = "samples"  # what weights are shares of
    temperature: float | None = Field(None, gt=0)  # T: a source's weight is times its size^(1/T); None: no sizes
    shuffle_window: int = Field(1 << 18, ge=1)  # samples, over all lanes; smaller sources are permuted as a whole
    shuffle_chunk: int = Field(64, ge=1)  # consecutive samples of a shard that stay together
    lanes: int | None = Field(None, ge=1)  # parallel reads of a source; None: train.global_batch_size, at most 1024
    level_tokens: bool = True  # data-parallel ranks exchange samples of a microbatch until their tokens are level
    tokenizer: PathText | None = None  # of every modality that reads text
    max_tokens_per_document: int | None = Field(None, ge=1)  # longer ones lose their last items; None: any length
    num_workers: int = Field(1, ge=0)
    prefetch: int = Field(4, ge=1)  # microbatches that a rank reads ahead; at least those of a step
    prefetch_bytes: int = Field(1 << 30, ge=0)  # of what is ready, above which a rank begins no further microbatches
    worker_timeout: float = Field(0.0, ge=0)  # seconds until a silent worker is replaced; 0: 0.4 of the hang limit
    max_bad_fraction: float = Field(0.01, ge=0, le=1)  # of the samples read; past it the run ends
    storage_options: dict[str, dict[str, Any]] = Field({})  # of fsspec, by protocol (s3) or by the beginning of a URL
    request_timeout: float = Field(20.0, gt=0)  # seconds until a request for remote bytes is given up and made again
    read_timeout: float = Field(0.0, ge=0)  # seconds of a read with its retries; 0: 0.3 of the hang limit
    read_retries: int = Field(100, ge=0)  # further requests of a read, with random pauses of up to 10 s
    cache: Annotated[CacheConfig | None, BeforeValidator(_cache)] = None  # of remote shards; None: memory alone

    @model_validator(mode="after")
    def _no_secrets(self) -> DataConfig:
        if name := secret_option(self.storage_options):
            raise ValueError(
                f"data.storage_options.{name} would be saved with the run, and may be a secret; set it in the "
                f"environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, say), or name a profile: "
                f"{{s3: {{profile: NAME}}}}"
            )
        return self
