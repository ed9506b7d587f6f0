"""The schema of AdamW and of the learning rate's schedule; ``train/schedule.py`` has the formulas."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from mmmoe_pretrain.config_moe import StrictModel


class OptimizerConfig(StrictModel):
    learning_rate: float = Field(1e-3, gt=0)
    min_learning_rate: float = Field(1e-5, ge=0)
    warmup_steps: int = Field(50, ge=0)
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"  # wsd: warmup-stable-decay
    decay_steps: int | None = Field(None, ge=1)  # the step at which the decay ends; None: train.steps
    wsd_decay_steps: int | None = Field(None, ge=1)  # length of wsd's decay; None: a tenth of its end
    weight_decay: float = Field(0.1, ge=0)  # of matrices; vectors and temperatures do not decay
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.98, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    clip_norm: float = Field(1.0, ge=0)  # 0 does not clip

    @model_validator(mode="after")
    def _used_by_the_schedule(self) -> OptimizerConfig:
        unused = {"decay_steps": self.schedule == "constant", "wsd_decay_steps": self.schedule != "wsd"}
        for key, idle in unused.items():
            if idle and getattr(self, key) is not None:
                raise ValueError(
                    f"optimizer.{key} {getattr(self, key)} has no meaning under optimizer.schedule {self.schedule}; "
                    f"set it to null, or choose schedule: wsd"
                )
        return self
