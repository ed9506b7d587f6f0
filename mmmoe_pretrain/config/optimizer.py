"""The schema of the optimizer and of the learning rate's schedule; ``train/schedule.py`` has the formulas."""

from __future__ import annotations

import re
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
# Tensors of the optimizer's state beside those of its kind: the average of the weights, the weights that they are
# held to, and how much each of these matters.
AVERAGE, ANCHOR, IMPORTANCE = "average", "anchor", "importance"
GRADIENT_POWER = {name: power for kind in OPTIMIZERS.values() for name, power in kind.state.items()} | {
    AVERAGE: 0,
    ANCHOR: 0,
    IMPORTANCE: 2,
}
FROZEN = re.compile(r"([^\[\]]+)(?:\[(\d*):(\d*)\])?")  # NAME or NAME[first:end] of rows


class HoldConfig(StrictModel):
    """What holds the weights of the run before, which ``mmmoe extend`` made this run of.

    ``strength``: of the pull to those weights, times the learning rate, as ``weight_decay`` is; of each weight times
    its importance, whose mean over the weights of the run before is 1. ``importance``: the diagonal of the Fisher
    information (EWC, arXiv 1612.00796), of which ``kept`` of the earlier runs' is added (online EWC, arXiv
    1805.06370), or ``uniform`` (L2-SP, arXiv 1802.01483). New weights have none.

    ``frozen``: parameters that stay as they are, by name, with ``*``, and of these with ``[first:end]`` some rows:
    ``mmmoe.trunk.blocks.*.experts.*[:16]`` are the first 16 experts of each stack.
    """

    strength: float = Field(0.0, ge=0)
    importance: Literal["fisher", "uniform"] = "fisher"
    kept: float = Field(1.0, ge=0, le=1)
    frozen: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _holds_something(self) -> HoldConfig:
        if not self.strength and not self.frozen:
            raise ValueError(
                "optimizer.hold has strength 0 and no frozen parameters, so it holds nothing; give one of them, or "
                "set hold: null"
            )
        if wrong := [name for name in self.frozen if not FROZEN.fullmatch(name)]:
            raise ValueError(
                f"optimizer.hold.frozen {wrong[0]!r} is not the name of a parameter, with * and perhaps rows; e.g. "
                f"mmmoe.embedders.* or mmmoe.trunk.blocks.*.experts.*[:16]"
            )
        return self


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
    hold: HoldConfig | None = None

    @property
    def own(self) -> dict[str, float]:
        """The settings of this kind of optimizer, by name."""
        return {key: getattr(self, key) for key in OPTIMIZERS[self.kind].settings}

    @property
    def state(self) -> tuple[str, ...]:
        """The tensors that are kept for each parameter: the optimizer's by torch's names, the average, and what
        weights are held to."""
        own = () if self.momentum == 0 else tuple(OPTIMIZERS[self.kind].state)
        average = () if self.average is None else (AVERAGE,)
        return (*own, *average, ANCHOR, IMPORTANCE) if self.pull else (*own, *average)

    @property
    def pull(self) -> float:
        """The strength of the pull to the weights of the run before."""
        return 0.0 if self.hold is None else self.hold.strength

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
