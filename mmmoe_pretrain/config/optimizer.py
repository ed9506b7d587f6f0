"""The schema of the optimizer and of the learning rate's schedule; ``train/schedule.py`` has the formulas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, model_validator

from mmmoe_pretrain.config.base import StrictModel
from mmmoe_pretrain.config.schedule import Weight, check_schedule, schedule_of, value_at


@dataclass(frozen=True)
class OptimizerKind:
    """``settings``: its own keys of the section, with their defaults. ``state``: the tensors that it keeps for each
    parameter, by torch's names, and the power of the gradient that each of them averages."""

    settings: Mapping[str, float]
    state: Mapping[str, int]


OPTIMIZERS = {
    "adamw": OptimizerKind({"beta1": 0.9, "beta2": 0.98, "eps": 1e-8}, {"exp_avg": 1, "exp_avg_sq": 2}),
    "sgd": OptimizerKind({"momentum": 0.9}, {"momentum_buffer": 1}),
}
AVERAGE = "average"  # of the weights: a tensor of the optimizer's state beside those of its kind
GRADIENT_POWER = {name: power for kind in OPTIMIZERS.values() for name, power in kind.state.items()} | {AVERAGE: 0}


class OptimizerConfig(StrictModel):
    kind: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = Field(1e-3, gt=0)
    min_learning_rate: float = Field(1e-5, ge=0)
    warmup_steps: int = Field(50, ge=0)
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"  # wsd: warmup-stable-decay
    decay_steps: int | None = Field(None, ge=1)  # the step at which the decay ends; None: train.steps
    wsd_decay_steps: int | None = Field(None, ge=1)  # length of wsd's decay; None: a tenth of its end
    weight_decay: float = Field(0.1, ge=0)  # of matrices; vectors and temperatures do not decay
    beta1: float | None = Field(None, ge=0, lt=1)  # adamw: 0.9
    beta2: float | None = Field(None, ge=0, lt=1)  # adamw: 0.98
    eps: float | None = Field(None, gt=0)  # adamw: 1e-8
    momentum: float | None = Field(None, ge=0, lt=1)  # sgd: 0.9
    clip_norm: float = Field(1.0, ge=0)  # 0 does not clip
    # Of a moving average of the weights, which objectives with a teacher read: the share of itself that it keeps in
    # an update, or a schedule such as [[0, 0.99], [10000, 1.0]]. None: there is no average.
    average: Weight | None = None

    @property
    def own(self) -> dict[str, float]:
        """The settings of this kind of optimizer, by name."""
        return {key: getattr(self, key) for key in OPTIMIZERS[self.kind].settings}

    @property
    def state(self) -> tuple[str, ...]:
        """The tensors that are kept for each parameter: the optimizer's by torch's names, and the average."""
        own = () if self.momentum == 0 else tuple(OPTIMIZERS[self.kind].state)
        return own if self.average is None else (*own, AVERAGE)

    def average_at(self, step: int) -> float:
        """The share of the average that the update of a step (the first is 0) keeps."""
        assert self.average is not None
        return value_at(schedule_of(self.average), step)

    @model_validator(mode="after")
    def _average_is_a_share(self) -> OptimizerConfig:
        schedule = schedule_of(0.0 if self.average is None else self.average)
        check_schedule(schedule, "optimizer.average")
        if any(share > 1 for _, share in schedule):
            raise ValueError(
                f"optimizer.average {self.average} is the share of the average that an update keeps, at most 1; e.g. "
                f"0.996"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _of_its_kind(cls, values: Any) -> Any:
        """Fill in the settings of the kind, and refuse those of another."""
        kind = values.get("kind", "adamw") if isinstance(values, dict) else None
        if not isinstance(kind, str) or kind not in OPTIMIZERS:
            return values  # refused as it stands
        own = OPTIMIZERS[kind].settings
        for other, its in OPTIMIZERS.items():
            wrong = [key for key in its.settings if key not in own and values.get(key) is not None]
            if wrong:
                raise ValueError(
                    f"optimizer.{wrong[0]} {values[wrong[0]]} is a setting of optimizer.kind {other}, and that is "
                    f"{kind}; remove {wrong[0]}, or set kind: {other}"
                )
        return {**values, **{key: default for key, default in own.items() if values.get(key) is None}}

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
