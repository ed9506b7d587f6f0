"""One run is one YAML file, read into frozen typed models.

Owns the schema, its defaults and every check that needs no hardware: unknown keys, bad values
and combinations that cannot work. What depends on the number of ranks is checked in
``parallel/layout.py``. The README's tour explains the keys by example.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError, model_validator

from mmmoe_pretrain import kinds
from mmmoe_pretrain.config.base import (
    FolderText,
    ModalitySettings,
    ObjectiveSettings,
    PathText,
    Schedule,
    SourceText,
    StreamNames,
    Weight,
    cache_settings,
    check_pair,
    check_schedule,
    explain,
    paths,
    sources,
    value_at,
)
from mmmoe_pretrain.config.base import StrictModel as _Model
from mmmoe_pretrain.config.engines import EngineName
from mmmoe_pretrain.config.moe import MoEConfig, RoutingLossConfig
from mmmoe_pretrain.config.optimizer import OptimizerConfig
from mmmoe_pretrain.config.upgrade import needs_upgrade
from mmmoe_pretrain.config.watching import ProfileConfig, TrackersConfig
from mmmoe_pretrain.untrusted import brief, parse_yaml, read_yaml
from mmmoe_pretrain.urls import secret_option, shown

__all__ = [
    "CheckpointConfig", "FaultsConfig", "MoEConfig", "OptimizerConfig", "RoutingLossConfig", "RunConfig", "dump",
    "load", "parse",
]  # fmt: skip


HANG_SHARE = 0.8  # of parallel.timeout_minutes
WAIT_SHARE = 0.4  # of the hang limit, for one item of a data worker
READ_SHARE = 0.75  # of that, for one read with its retries, whose error is clearer than that of a hung worker
LOSSES_OF_ALL = ("total", "aux")  # in metrics.jsonl, where the losses of an objective go by its name
RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"

Name = Annotated[str, BeforeValidator(kinds.check_name)]
AnyModality = Annotated[SerializeAsAny[ModalitySettings], BeforeValidator(kinds.MODALITIES.settings)]
AnyObjective = Annotated[SerializeAsAny[ObjectiveSettings], BeforeValidator(kinds.OBJECTIVES.settings)]


class SourceConfig(_Model):
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
        return self.weight if isinstance(self.weight, tuple) else ((0, float(self.weight)),)

    def mean_weight(self, steps: int) -> float:
        """Over the first ``steps`` steps."""
        return sum(value_at(self.schedule, (i + 0.5) * steps / 64) for i in range(64)) / 64


class CacheConfig(_Model):
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


class DataConfig(_Model):
    train: Annotated[tuple[SourceConfig, ...], BeforeValidator(sources)] = Field(min_length=1)
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
    cache: Annotated[CacheConfig | None, BeforeValidator(cache_settings)] = (
        None  # of remote shards; None: memory alone
    )

    @model_validator(mode="after")
    def _no_secrets(self) -> DataConfig:
        if name := secret_option(self.storage_options):
            raise ValueError(
                f"data.storage_options.{name} would be saved with the run, and may be a secret; set it in the "
                f"environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, say), or name a profile: "
                f"{{s3: {{profile: NAME}}}}"
            )
        return self


class ModelConfig(_Model):
    hidden_size: int = Field(128, ge=8)
    num_layers: int = Field(4, ge=1, le=10_000)  # checks go through them all
    num_heads: int = Field(4, ge=1)
    num_kv_heads: int | None = Field(None, ge=1)  # of keys and values, each for a group of queries; None: num_heads
    ffn_hidden_size: int = Field(256, ge=1)  # of the dense blocks
    embedding_size: int = Field(128, ge=2)  # of the joint space of the contrastive objective
    rotary_base: float = Field(10_000.0, gt=1)
    vocab_size: int = Field(0, ge=0, le=1 << 24)  # of data.tokenizer; filled in when the run starts

    @model_validator(mode="after")
    def _heads(self) -> ModelConfig:
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"model.hidden_size {self.hidden_size} does not split into {self.num_heads} "
                f"heads of even width (rotary positions need pairs); use a multiple of "
                f"{2 * self.num_heads}"
            )
        if self.num_heads % self.kv_heads:
            divisors = [n for n in range(1, self.num_heads + 1) if self.num_heads % n == 0]
            raise ValueError(
                f"model.num_kv_heads {self.kv_heads} does not divide model.num_heads {self.num_heads}, so that heads "
                f"of queries could not share those of keys and values evenly; use one of {divisors}"
            )
        return self

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads


class ParallelConfig(_Model):
    """Degrees of parallelism. What depends on the number of ranks is checked in ``parallel/layout.py``."""

    engine: EngineName = "megatron"
    data_parallel_size: int | Literal["auto"] = "auto"  # what the other degrees leave of the ranks
    tensor_parallel_size: int = Field(1, ge=1)  # ranks that share each matrix
    sequence_parallel: bool = False  # between matrices, tensor ranks hold a share of the tokens each
    pipeline_parallel_size: int = Field(1, ge=1)
    virtual_pipeline_size: int = Field(1, ge=1)  # stages that a pipeline rank holds (interleaved schedule)
    expert_parallel_size: int | Literal["auto"] = "auto"  # ranks over which the experts are spread
    expert_tensor_parallel_size: int | Literal["auto"] = "auto"  # ranks that share one expert's matrices
    context_parallel_size: int = Field(1, ge=1)
    zero_stage: Literal[0, 1, 2, 3] = 0  # shards optimizer state (1), gradients (2), parameters (3)
    overlap_grad_reduce: bool = False  # megatron: reduce gradients during the backward pass
    overlap_param_gather: bool = False  # megatron, zero_stage 1: gather parameters during the forward pass
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"  # nvme: zero_stage 3, nvme_path in deepspeed
    deepspeed: dict[str, Any] = Field({})  # DeepSpeed's own JSON, for what has no key here
    timeout_minutes: int = Field(5, ge=1)  # of a collective, before the job ends


class LossScaleConfig(_Model):
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


class TrainConfig(_Model):
    steps: int = Field(1000, ge=1)
    global_batch_size: int = Field(128, ge=1)  # samples an optimizer step, over all ranks
    num_microbatches: int = Field(1, ge=1)  # gradient accumulation
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the trunk's activations; master weights are fp32
    loss_scale: LossScaleConfig = LossScaleConfig()
    recompute: Literal["none", "experts", "blocks"] = "none"  # activations computed again in the backward pass
    compile: Literal["none", "blocks"] = "none"  # torch.compile of norms, rotary positions and activations
    threads_per_rank: int = Field(1, ge=1)  # CPU threads of torch
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


HELD_OUT = "held_out/"  # names of held-out losses and scores begin so


class CheckpointConfig(_Model):
    """When and where a run saves checkpoints, and which ones it keeps. The newest is always kept."""

    every: int = Field(200, ge=1)  # steps
    folder: PathText | None = None  # of folders NAME: path or fsspec URL (s3://bucket/runs); None: RUN/checkpoints
    asynchronous: bool = True  # training continues while a checkpoint is written
    max_failures: int = Field(3, ge=0)  # saves that may fail one after the other before the run ends
    keep_last: int = Field(2, ge=1)
    keep_every: int = Field(0, ge=0)  # steps; checkpoints at multiples of it are kept, 0: none
    keep_best: int = Field(0, ge=0)  # of those still there, how many with the lowest best_metric stay
    best_metric: str = "total"  # a loss of metrics.jsonl at its step, or held_out/NAME: a held-out loss or score


class FaultsConfig(_Model):
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


class EvaluateConfig(_Model):
    """Held-out shards, how a class name becomes a text, and which rows make which score, by fields of their JSON.

    ``validation``: shards that training is scored on every ``every`` steps, of which ``samples`` are taken, spread
    evenly; ``test``: those of ``mmmoe evaluate``.

    ``rows``: by pair ``a-b`` of representations, the values that a row of its scores has in each field. ``by``: by
    representation, a field that splits its rows: each value is scored by itself and under its own name. ``within``: a
    field that splits the candidates: scores are averaged over its values with ``min_items`` distinct items.
    """

    test: Annotated[tuple[SourceText, ...], BeforeValidator(paths)] = ()
    validation: Annotated[tuple[SourceText, ...], BeforeValidator(paths)] = ()
    every: int = Field(0, ge=0)  # steps between scores of the validation shards in training; 0: never
    samples: int = Field(1024, ge=1)  # of the validation shards, or all where they hold fewer
    prompt: str = "{}"  # {} is the name of the class
    rows: dict[str, dict[str, tuple[str, ...]]] = Field({})
    by: dict[str, str] = Field({})
    within: str = ""
    min_items: int = Field(50, ge=1)
    keep_seen_texts: bool = False  # score rows whose text is trained on, too: where a text is a class

    @model_validator(mode="after")
    def _prompt(self) -> EvaluateConfig:
        if self.every and not self.validation:
            raise ValueError(
                f"evaluate.every {self.every} scores held-out samples in training, and evaluate.validation names "
                f"none; name shards that are not trained on (mmmoe-data shard --ratio makes them), or set every: 0"
            )
        for key, places in {"test": self.test, "validation": self.validation}.items():
            if commands := [path for path in places if path.startswith("pipe:") or "::pipe:" in path]:
                raise ValueError(
                    f"evaluate.{key} names the output of a command ({commands[0].split()[0]} ...), and held-out "
                    f"samples are read by number; name shards by a path or URL"
                )
        around = self.prompt.replace("{}", "", 1)
        if "{}" not in self.prompt or "{" in around or "}" in around:
            raise ValueError(f"evaluate.prompt {self.prompt!r} must hold {{}} once; e.g. 'an image of {{}}'")
        return self


class RunConfig(_Model):
    """The complete config of a run; saved in its folder and its checkpoints."""

    name: str = Field(pattern=RUN_NAME)  # of the run's folder
    runs_dir: FolderText = "runs"
    seed: int = 0
    data: DataConfig
    modalities: dict[Name, AnyModality] = Field(min_length=1)
    representations: dict[Name, tuple[str, ...]] = Field({})  # name: modalities whose tokens are pooled together
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
        for name, parts in self.representations.items():
            self._known(parts, f"representations.{name}")
            if name in self.modalities or not parts or len(set(parts)) < len(parts):
                raise ValueError(
                    f"representations.{name} {list(parts)}: every modality is a representation under its own name; "
                    f"choose another name, and name one modality or more, each once"
                )
        for where, names in self.moe.modalities_named:
            self._known(names, where)
        claimed = Counter(member for modality in self.modalities.values() for member in modality.members)
        if twice := [member for member, count in claimed.items() if count > 1]:
            raise ValueError(
                f"modalities: members names {', '.join(twice)} more than once, and a file is read as one modality; "
                f"keep it in one of them"
            )
        for name, modality in self.modalities.items():
            modality.check_names(name, self.modalities)
        every = {**{name: (name,) for name in self.modalities}, **self.representations}
        for key in self.evaluate.rows:
            check_pair(key, every, "evaluate.rows")
        if unknown := [key for key in self.evaluate.by if key not in every]:
            raise ValueError(f"evaluate.by {unknown[0]!r} is none of {', '.join(every)}")
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
        """Names of the modalities and the objectives with a weight; their order defines their ids."""
        return StreamNames(tuple(self.modalities), tuple(name for name, its in self.objectives.items() if its.on))

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


MOST_LINES, LONGEST_LINE = 8, 500  # of a message about a config, whatever stands in it


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a run's YAML file and apply ``key.sub=value`` overrides (values are YAML too).

    Raises ValueError naming the key, the value and the remedy.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no config at {path}; ready-made configs are in configs/")
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds {type(raw).__name__}, not a mapping of sections; see configs/demo.yaml")
    for override in overrides:
        _apply_override(raw, override)
    return parse(
        raw,
        where=" ".join(
            [str(path), *(["with", *(brief(shown(override)) for override in overrides)] if overrides else [])]
        ),
    )


def parse(raw: dict[str, Any], where: str = "config") -> RunConfig:
    """A RunConfig from plain values, with errors a user can act on."""
    if needs_upgrade(raw) and {"modalities", "objectives", "data"} & raw.keys():
        raise ValueError(
            f"{where} has no kind of modality and objective: it was made for an earlier version, or is incomplete. "
            f"An old one is rewritten by mmmoe config upgrade FILE; configs/demo.yaml shows a new one"
        )
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        lines = explain(error)
        more = f"; and {len(lines) - MOST_LINES} more" if len(lines) > MOST_LINES else ""
        raise ValueError(f"{where}: {'; '.join(line[:LONGEST_LINE] for line in lines[:MOST_LINES])}{more}") from None


def dump(config: RunConfig, path: Path) -> None:
    """Write the resolved config; ``load`` of the file gives an equal value."""
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, sep, text = override.partition("=")
    if not sep or not key:
        raise ValueError(f"override {brief(override)} is not key=value; e.g. train.steps=100")
    node: Any = raw
    *parents, leaf = key.split(".")
    for part in parents:
        place = _place(node, part, override)
        node = node.setdefault(place, {}) if isinstance(node, dict) else node[place]
        if not isinstance(node, dict | list):
            raise ValueError(f"override {brief(override)}: {brief(part)} is a value ({brief(node)}), not a section")
    value = parse_yaml(text, f"override {brief(override)}")
    node[_place(node, leaf, override)] = value


def _place(node: dict[Any, Any] | list[Any], part: str, override: str) -> Any:
    """The key or index that ``part`` names: YAML makes numbers of some keys (moe.layers: {3: ...})."""
    if isinstance(node, dict):
        return next((key for key in node if str(key) == part), part)
    if not (part.isdecimal() and len(part) < 10 and int(part) < len(node)):
        raise ValueError(f"override {brief(override)}: {brief(part)} is not an index of a list of {len(node)}")
    return int(part)
