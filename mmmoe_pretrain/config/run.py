"""The complete config of a run, and the checks between its sections."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from mmmoe_pretrain import kinds
from mmmoe_pretrain.config.base import (
    FileSettings,
    FolderText,
    ModalitySettings,
    ObjectiveSettings,
    RepresentationSettings,
    StreamNames,
    StrictModel,
    check_missing,
    check_pair,
    representation_settings,
)
from mmmoe_pretrain.config.data import DataConfig
from mmmoe_pretrain.config.evaluate import HELD_OUT, EvaluateConfig
from mmmoe_pretrain.config.model import ModelConfig
from mmmoe_pretrain.config.moe import MoEConfig
from mmmoe_pretrain.config.optimizer import OptimizerConfig
from mmmoe_pretrain.config.parallel import ParallelConfig
from mmmoe_pretrain.config.train import CheckpointConfig, FaultsConfig, TrainConfig
from mmmoe_pretrain.config.watching import TrackersConfig

HANG_SHARE = 0.8  # of parallel.timeout_minutes
WAIT_SHARE = 0.4  # of the hang limit, for one item of a data worker
READ_SHARE = 0.75  # of that, for one read with its retries, whose error is clearer than that of a hung worker
LOSSES_OF_ALL = ("total", "aux", "weighting")  # in metrics.jsonl, where the losses of an objective go by its name
RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


Name = Annotated[str, BeforeValidator(kinds.check_name)]
AnyModality = Annotated[SerializeAsAny[ModalitySettings], BeforeValidator(kinds.MODALITIES.settings)]
AnyRepresentation = Annotated[SerializeAsAny[RepresentationSettings], BeforeValidator(representation_settings)]
AnyObjective = Annotated[SerializeAsAny[ObjectiveSettings], BeforeValidator(kinds.OBJECTIVES.settings)]


class RunConfig(StrictModel):
    """The complete config of a run; saved in its folder and its checkpoints."""

    name: str = Field(pattern=RUN_NAME)  # of the run's folder
    runs_dir: FolderText = "runs"
    seed: int = 0
    data: DataConfig
    modalities: dict[Name, AnyModality] = Field(min_length=1)
    representations: dict[Name, AnyRepresentation] = Field({})  # beside the modalities, each of which is one
    objectives: dict[Name, AnyObjective] = Field(min_length=1)
    model: ModelConfig = ModelConfig()
    moe: MoEConfig = MoEConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    faults: FaultsConfig = FaultsConfig()
    trackers: TrackersConfig = TrackersConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="after")
    def _names(self) -> RunConfig:
        """Names in one section that refer to an entry of another."""
        for name, representation in self.representations.items():
            self._known(representation.parts, f"representations.{name}")
            representation.check_parts(name, self.modalities)
        for where, names in self.moe.modalities_named:
            self._known(names, where)
        for layer in (self.moe, *map(self.moe.for_layer, self.moe.layers)):
            tasks = layer.task_conditioned if isinstance(layer.task_conditioned, tuple) else ()
            if absent := [name for name in tasks if name not in self.objectives]:
                hint = kinds.nearest(absent[0], self.objectives, "the objectives are")
                raise ValueError(f"moe.task_conditioned: there is no objective {', '.join(absent)}; {hint}")
        claimed = Counter(member for modality in self.modalities.values() for member in modality.members)
        if twice := [member for member, count in claimed.items() if count > 1]:
            raise ValueError(
                f"modalities: members names {', '.join(twice)} more than once, and a file is read as one modality; "
                f"keep it in one of them"
            )
        for name, modality in self.modalities.items():
            modality.check_names(name, self.modalities)
        every: dict[str, tuple[str, ...]] = {name: (name,) for name in self.modalities}
        every |= {name: representation.parts for name, representation in self.representations.items()}
        for where, pairs in {"rows": self.evaluate.rows, "pairs": self.evaluate.pairs}.items():
            for pair in pairs:
                check_pair(pair, every, f"evaluate.{where}")
        if unknown := [key for key in self.evaluate.by if key not in every]:
            raise ValueError(f"evaluate.by {unknown[0]!r} is none of {', '.join(every)}")
        if unknown := [name for name in self.evaluate.generate if name not in self.objectives]:
            raise ValueError(
                f"evaluate.generate {unknown[0]}: there is no such objective; there are {', '.join(self.objectives)}"
            )
        for key, imputed in self.evaluate.impute.items():
            check_missing(key, imputed.observed, every, ("evaluate.impute", f"evaluate.impute.{key}.observed"))
        if self.evaluate.subsets and all(its.missing == "skip" for its in self.representations.values()):
            raise ValueError(
                "evaluate.subsets scores representations whose parts may be missing, and no entry of representations "
                "has missing: allow or bank; give one of them missing: allow, or set evaluate.subsets: false"
            )
        for name, objective in self.objectives.items():
            if name in LOSSES_OF_ALL:
                raise ValueError(f"objectives.{name}: the name is that of other losses; choose e.g. {name}_1")
            objective.check_names(name, self.modalities, every)
        for layer in (self.moe, *map(self.moe.for_layer, self.moe.layers)):
            layer.check_modalities(tuple(self.modalities))
        if not any(objective.on for objective in self.objectives.values()):
            raise ValueError(
                f"objectives: none of {', '.join(self.objectives)} has a weight, so there is nothing to learn; give "
                f"one a weight above 0"
            )
        return self

    def _known(self, names: Iterable[str], where: str) -> None:
        unknown = [name for name in names if name not in self.modalities]
        if unknown:
            hint = kinds.nearest(unknown[0], self.modalities, "the modalities are")
            raise ValueError(f"{where}: there is no modality {', '.join(unknown)}; {hint}")

    @model_validator(mode="after")
    def _some_sparse_block(self) -> RunConfig:
        if not self.moe.dense and self.moe.every > self.model.num_layers:
            raise ValueError(
                f"moe.every {self.moe.every} exceeds model.num_layers {self.model.num_layers}, so no block has "
                f"experts; lower moe.every, or set moe.num_experts: 1 and moe.experts_per_token: 1 for a dense model"
            )
        absent = [index for index in self.moe.layers if index >= self.model.num_layers]
        if absent:
            raise ValueError(
                f"moe.layers.{absent[0]}: there is no such block; model.num_layers is {self.model.num_layers}"
            )
        routers = {self.moe.for_layer(i).router for i in range(self.model.num_layers)}
        causal = [name for name, its in self.objectives.items() if its.on and kinds.OBJECTIVES.load(its.kind).causal]
        if "expert_choice" in routers and causal:
            raise ValueError(
                f"moe.router expert_choice lets later tokens affect the routing of earlier ones, and the segments of "
                f"objectives.{causal[0]} are causal; set objectives.{causal[0]}.weight: 0, or choose softmax_top_k"
            )
        return self

    @model_validator(mode="after")
    def _teachers(self) -> RunConfig:
        taught = [name for name, its in self.objectives.items() if its.on and its.taught]
        if taught and self.optimizer.average is None:
            raise ValueError(
                f"objectives.{taught[0]} learns from the model with the average of its weights, and the optimizer "
                f"keeps none; set optimizer.average, e.g. 0.996"
            )
        return self

    @model_validator(mode="after")
    def _weights_can_be_learned(self) -> RunConfig:
        """The logarithm of a variance that is learned for a negative loss has no lower bound."""
        negative = [name for name, its in self.objectives.items() if its.on and its.below_zero]
        if negative and self.train.loss_weighting == "uncertainty":
            raise ValueError(
                f"train.loss_weighting uncertainty needs losses from 0 on, and that of objectives.{negative[0]} is "
                f"of a density and can be negative; set loss_weighting: fixed, or choose another head"
            )
        return self

    @model_validator(mode="after")
    def _tasks_to_compare(self) -> RunConfig:
        tasks = [name for name, its in self.objectives.items() if its.on]
        if self.train.task_gradients is not None and len(tasks) < 2:
            raise ValueError(
                f"train.task_gradients compares the gradients of two objectives or more, and {tasks[0]} alone has a "
                f"weight; remove it, or add an objective"
            )
        return self

    @model_validator(mode="after")
    def _modulated(self) -> RunConfig:
        scored = {name for its in self.objectives.values() if its.on for name in its.scored}
        for name, its in self.representations.items():
            if its.modulated and name not in scored:
                other = next((each for each in self.modalities if each not in its.parts), its.parts[0])
                raise ValueError(
                    f"representations.{name}.modulation follows the scores that its parts give to pairs, and no "
                    f"contrastive objective has a pair with {name}; add one, e.g. {name}-{other}, or remove it"
                )
        return self

    @model_validator(mode="after")
    def _best_is_known(self) -> RunConfig:
        settings, every = self.checkpoint, self.evaluate.every
        held_out = settings.keep_best and settings.best_metric.startswith(HELD_OUT)
        if held_out and (not every or settings.every % every):
            raise ValueError(
                f"checkpoint.best_metric {settings.best_metric} is known every evaluate.every {every} steps, and "
                f"checkpoints are saved every {settings.every}; set evaluate.every to a divisor of checkpoint.every"
            )
        return self

    @model_validator(mode="after")
    def _hang_before_timeout(self) -> RunConfig:
        hang, timeout = self.faults.hang_minutes, self.parallel.timeout_minutes
        if hang >= timeout:
            raise ValueError(
                f"faults.hang_minutes {hang:g} is not below parallel.timeout_minutes {timeout}: collectives would "
                f"end the job first, without naming the hung rank; set hang_minutes: "
                f"{HANG_SHARE * timeout:g} or timeout_minutes: {int(hang) + 1}"
            )
        return self

    @property
    def hang_seconds(self) -> float:
        """Seconds without progress of a rank before the job ends: less than the timeout of the collectives, whose
        errors are less clear."""
        return 60.0 * (self.faults.hang_minutes or HANG_SHARE * self.parallel.timeout_minutes)

    @model_validator(mode="after")
    def _reads_end_before_their_worker(self) -> RunConfig:
        if self.data.read_timeout > self._wait_seconds:
            raise ValueError(
                f"data.read_timeout {self.data.read_timeout:g} exceeds the {self._wait_seconds:g} seconds after "
                f"which a data worker counts as hung; lower it, or raise data.worker_timeout, faults.hang_minutes "
                f"and parallel.timeout_minutes"
            )
        return self

    @property
    def _wait_seconds(self) -> float:
        return min(self.data.worker_timeout or math.inf, WAIT_SHARE * self.hang_seconds)

    @property
    def read_seconds(self) -> float:
        """Seconds that one read of the training data may take, with all its retries."""
        return self.data.read_timeout or READ_SHARE * self._wait_seconds

    @property
    def stream_names(self) -> StreamNames:
        """Names of the modalities, the objectives with a weight, and the combinations of modalities that have experts
        of their own; their order defines their ids."""
        modalities, tasks = tuple(self.modalities), tuple(name for name, its in self.objectives.items() if its.on)
        return StreamNames(modalities, tasks, self.moe.combinations(modalities))

    def with_vocabulary(self, vocab_size: int) -> RunConfig:
        """The config with ``vocab_size`` of its tokenizer, 0 where no modality reads text. Raises ValueError where it
        has another."""
        if self.model.vocab_size and not vocab_size:
            raise ValueError(f"no modality reads text, but model.vocab_size is {self.model.vocab_size}; set it to 0")
        if self.model.vocab_size not in (0, vocab_size):
            raise ValueError(
                f"the tokenizer {self.data.tokenizer} has vocabulary size {vocab_size}, and model.vocab_size is "
                f"{self.model.vocab_size}; set data.tokenizer to the file that the run started with, or for a new "
                f"run model.vocab_size: 0"
            )
        return self.model_copy(update={"model": self.model.model_copy(update={"vocab_size": vocab_size})})

    @property
    def files(self) -> dict[str, FileSettings]:
        """The entries of modalities and objectives that read a file, each by its place (``objectives.NAME``)."""
        sections: dict[str, Mapping[str, FileSettings]] = {}
        sections |= {"modalities": self.modalities, "objectives": self.objectives}
        every = {f"{section}.{name}": its for section, entries in sections.items() for name, its in entries.items()}
        return {place: its for place, its in every.items() if its.file}

    @property
    def used_files(self) -> dict[str, FileSettings]:
        """Those that are not of an objective without weight."""
        return {place: its for place, its in self.files.items() if not isinstance(its, ObjectiveSettings) or its.on}

    def with_entries(self, changed: Mapping[str, FileSettings]) -> RunConfig:
        """The config with other settings of some entries, by place."""
        sections: dict[str, dict[str, FileSettings]] = {}
        for place, its in changed.items():
            section, _, name = place.partition(".")
            sections.setdefault(section, dict(getattr(self, section)))[name] = its
        return self.model_copy(update=sections)

    def with_files(self) -> RunConfig:
        """The config with the fingerprints of the files that its entries read (``FileSettings.with_file``)."""
        return self.with_entries({place: its.with_file() for place, its in self.used_files.items()})

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.name

    @property
    def checkpoint_root(self) -> str:
        """Where the checkpoints of the run are: a path or an fsspec URL."""
        return self.checkpoints_of(self.run_dir)

    def checkpoints_of(self, run_dir: Path) -> str:
        """The checkpoints of a run folder that may have been moved; ``checkpoint.folder`` has a folder for each run's
        name."""
        folder = self.checkpoint.folder
        return f"{folder.rstrip('/')}/{self.name}" if folder else str(run_dir / "checkpoints")
