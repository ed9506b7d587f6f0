"""The schema of fault tolerance: checkpoints, and the handling of faults."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mmmoe_pretrain.config.base import PathText, StrictModel


class CheckpointConfig(StrictModel):
    """When and where a run saves checkpoints, and which ones it keeps. The newest is always kept."""

    every: int = Field(200, ge=1)  # steps
    folder: PathText | None = None  # of folders NAME: path or fsspec URL (s3://bucket/runs); None: RUN/checkpoints
    asynchronous: bool = True  # training continues while a checkpoint is written
    max_failures: int = Field(3, ge=0)  # saves that may fail one after the other before the run ends
    keep_last: int = Field(2, ge=1)
    keep_every: int = Field(0, ge=0)  # steps; checkpoints at multiples of it are kept, 0: none
    keep_best: int = Field(0, ge=0)  # of those still there, how many with the lowest best_metric stay
    best_metric: str = "total"  # a loss of metrics.jsonl at the step of the checkpoint


class FaultsConfig(StrictModel):
    """Budgets and limits of what a run handles by itself; past them it ends, naming the cause."""

    max_skipped_steps: int = Field(5, ge=0)  # skipped in a row because loss or gradient is not finite
    max_rollbacks: int = Field(3, ge=0)  # to the last checkpoint, over the whole run
    skip_margin: int = Field(1, ge=0)  # batches before and after the bad ones that are skipped, too
    spike_threshold: float = Field(0.0, ge=0)  # deviations above the running median of the loss; 0: no detector
    spike_steps: int = Field(3, ge=1)  # in a row above the threshold that make a spike
    spike_action: Literal["warn", "rollback"] = "warn"
    replica_check_every: int = Field(0, ge=0)  # steps between comparisons of replicated weights; 0: never
    hang_minutes: float = Field(0.0, ge=0)  # without progress of a rank before the job ends; 0: 0.8 timeout_minutes
    max_worker_restarts: int = Field(3, ge=0)  # of data workers that died, a rank
