"""What lets a run be watched: the trackers that get its records (``train/trackers/``), and steps that are profiled
(``train/profiling.py``)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mmmoe_pretrain.config.base import PathText, StrictModel

MOST_PROFILED = 20  # steps of a trace, which may take megabytes each


class WandbConfig(StrictModel):
    """Weights & Biases. The key comes from WANDB_API_KEY or ``wandb login``. ``offline``: files alone, in
    RUN/trackers/wandb, for ``wandb sync``."""

    project: str = Field("mmmoe", min_length=1)
    entity: str | None = Field(None, min_length=1)  # user or team; None: the default one of the key
    mode: Literal["online", "offline"] = "online"


class MlflowConfig(StrictModel):
    """MLflow. Credentials come from MLflow's own environment variables."""

    uri: PathText  # http://HOST:PORT of a server, or a folder
    experiment: str = Field("mmmoe", min_length=1)


class TrackioConfig(StrictModel):
    """trackio, on this machine."""

    project: str = Field("mmmoe", pattern=r"^[A-Za-z0-9 _-]+$")
    folder: PathText | None = None  # None: TRACKIO_DIR, else trackio's own


class TrackersConfig(StrictModel):
    """The trackers that get the records of the run, beside metrics.jsonl and TensorBoard; those that are None get
    none."""

    wandb: WandbConfig | None = None
    mlflow: MlflowConfig | None = None
    trackio: TrackioConfig | None = None

    @property
    def named(self) -> tuple[str, ...]:
        """The kinds that the config names."""
        return tuple(name for name in type(self).model_fields if getattr(self, name) is not None)


class ProfileConfig(StrictModel):
    """Steps whose trace is written to RUN/profile/, and on which ranks."""

    steps: tuple[int, int]  # the first and the last, as the log counts them (from 1)
    ranks: tuple[Annotated[int, Field(ge=0)], ...] = Field((0,), min_length=1, max_length=16)

    @model_validator(mode="after")
    def _few_steps(self) -> ProfileConfig:
        first, last = self.steps
        if not 1 <= first <= last < first + MOST_PROFILED:
            raise ValueError(
                f"train.profile.steps {[first, last]} must be the first and the last of at most {MOST_PROFILED} "
                f"steps, counted from 1; e.g. [10, 12]"
            )
        return self
