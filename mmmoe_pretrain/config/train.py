"""The sections ``train``, ``checkpoint`` and ``faults``: the steps of a run, what it saves, and what it survives."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from mmmoe_pretrain.config.base import PathText, StrictModel
from mmmoe_pretrain.config.watching import ProfileConfig


class LossScaleConfig(StrictModel):
    """The loss scale of fp16: a factor of the loss that keeps small gradients above zero and halves when they
    overflow; such a step is skipped (arXiv 1710.03740)."""

    initial: float = Field(65536.0, gt=0)
    minimum: float = Field(1.0, gt=0)
    window: int = Field(1000, ge=1)  # steps without overflow before the scale doubles
    hysteresis: int = Field(2, ge=1)  # overflows before the scale halves

    @model_validator(mode="after")
    def _begins_above_its_minimum(self) -> LossScaleConfig:
        if self.initial < self.minimum:
            raise ValueError(f"train.loss_scale.initial {self.initial:g} is below its minimum {self.minimum:g}")
        return self


class CpuConfig(StrictModel):
    """How the MoE layers compute on CPUs (``moe/cpu/``). A new run measures what is left open and saves the result,
    which its later starts keep: another value changes the last bits of the losses. Without effect on GPUs."""

    products: Literal["auto", "torch", "onednn"] = "auto"  # library of products in fp32; auto: the faster one
    # A thread; experts with fewer run side by side, a thread each. null: measured where a rank has several threads.
    rows_for_all_threads: int | None = Field(None, ge=0)


class TaskGradientsConfig(StrictModel):
    """Gradients of each task (objective) by a pass of its own (``engines/task_gradients.py``): how far they conflict
    is in the log. ``combine``: ``sum``, which changes nothing, or ``pcgrad``, which projects conflicts away (arXiv
    2001.06782) and needs the passes in every step. ``every``: steps from one measurement to the next under ``sum``;
    None: ``train.log_every``."""

    combine: Literal["sum", "pcgrad"] = "sum"
    every: int | None = Field(None, ge=1)

    def every_of(self, log_every: int) -> int:
        """Steps from one that runs a pass for each task to the next."""
        return 1 if self.combine == "pcgrad" else self.every or log_every


class TrainConfig(StrictModel):
    steps: int = Field(1000, ge=1)
    global_batch_size: int = Field(128, ge=1)  # samples an optimizer step, over all ranks
    num_microbatches: int = Field(1, ge=1)  # gradient accumulation
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the trunk's activations; master weights are fp32
    loss_scale: LossScaleConfig = LossScaleConfig()
    loss_weighting: Literal["fixed", "uncertainty"] = "fixed"  # of objectives; uncertainty: times a learned weight
    task_gradients: TaskGradientsConfig | None = None  # of each objective by a pass of its own
    recompute: Literal["none", "experts", "blocks"] = "none"  # activations computed again in the backward pass
    compile: Literal["none", "blocks"] = "none"  # torch.compile of norms, rotary positions and activations
    deterministic: bool = False  # the same bits from the same steps on a GPU, too; slower there
    threads_per_rank: int = Field(1, ge=1)  # CPU threads of torch
    cpu: CpuConfig = CpuConfig()
    log_every: int = Field(10, ge=1)
    machine: PathText | None = None  # of mmmoe plan --calibrate: the log shows the plan; of a known GPU always
    heatmap_every: int = Field(200, ge=1)
    profile: ProfileConfig | None = None

    @model_validator(mode="after")
    def _profiled_steps_are_trained(self) -> TrainConfig:
        if self.profile is not None and self.profile.steps[1] > self.steps:
            raise ValueError(
                f"train.profile.steps {list(self.profile.steps)} are not all of the {self.steps} of train.steps; "
                f"lower them, or raise train.steps"
            )
        return self

    @model_validator(mode="after")
    def _measured_steps_are_logged(self) -> TrainConfig:
        its = self.task_gradients
        if its is None or its.every is None:
            return self
        if its.combine == "pcgrad":
            raise ValueError(
                f"train.task_gradients.every {its.every} with combine: pcgrad, which measures in every step; remove "
                f"every, or set combine: sum"
            )
        if its.every % self.log_every:
            raise ValueError(
                f"train.task_gradients.every {its.every} is not a multiple of train.log_every {self.log_every}, so "
                f"some measurements would not be in the log; use {-(-its.every // self.log_every) * self.log_every}"
            )
        return self


class CheckpointConfig(StrictModel):
    """When and where a run saves checkpoints, and which ones it keeps. The newest is always kept."""

    every: int = Field(200, ge=1)  # steps
    folder: PathText | None = None  # of folders NAME: path or fsspec URL (s3://bucket/runs); None: RUN/checkpoints
    asynchronous: bool = True  # training continues while a checkpoint is written
    max_failures: int = Field(3, ge=0)  # saves that may fail one after the other before the run ends
    keep_last: int = Field(2, ge=1)
    keep_every: int = Field(0, ge=0)  # steps; checkpoints at multiples of it are kept, 0: none
    keep_best: int = Field(0, ge=0)  # of those still there, how many with the lowest best_metric stay
    best_metric: str = "total"  # a loss of metrics.jsonl at its step, or held_out/NAME: a held-out loss or score


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
    max_worker_restarts: int = Field(3, ge=0)  # of data workers that died, a rank, within an hour
