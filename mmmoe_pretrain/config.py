"""One run is one YAML file, read into frozen typed models.

Owns the schema, its defaults and every check that needs no hardware: unknown keys, bad values
and combinations that cannot work. What depends on the number of ranks is checked in
``parallel/layout.py``. The README's tour explains the keys by example.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from mmmoe_pretrain.config_moe import MoEConfig, PathText, RoutingLossConfig
from mmmoe_pretrain.config_moe import StrictModel as _Model
from mmmoe_pretrain.config_optimizer import OptimizerConfig
from mmmoe_pretrain.config_reliability import CheckpointConfig, FaultsConfig
from mmmoe_pretrain.untrusted import brief, parse_yaml, read_yaml

__all__ = [
    "CheckpointConfig", "FaultsConfig", "MoEConfig", "OptimizerConfig", "RoutingLossConfig", "RunConfig", "dump",
    "load", "parse",
]  # fmt: skip


HANG_SHARE = 0.8  # of parallel.timeout_minutes
RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
RowField = Literal["language", "label", "subset", "audio_kind", "source", "group"]  # of a sample's JSON


class SourceConfig(_Model):
    """A folder of shards and its share of the training mix."""

    path: PathText
    weight: float = Field(1.0, gt=0)


class DataConfig(_Model):
    train: tuple[SourceConfig, ...] = Field(min_length=1)
    tokenizer: PathText
    num_workers: int = Field(1, ge=0)
    prefetch: int = Field(4, ge=1)  # microbatches a worker keeps ready
    worker_timeout: float = Field(0.0, ge=0)  # seconds until a silent worker is replaced; 0: 0.4 of the hang limit
    max_bad_fraction: float = Field(0.01, ge=0, le=1)  # of the samples read; past it the run ends
    image_augment: bool = True
    image_flip: bool = True  # false where pictures hold letters: a mirrored b is a d
    audio_augment: bool = True
    label_text: float = Field(0.0, ge=0, le=1)  # share of labelled pictures with their class as text
    text_dropout: float = Field(0.0, ge=0, lt=1)  # sentencepiece subword regularisation (BPE dropout)


class ImageConfig(_Model):
    size: int = Field(48, ge=8)  # pixels of a side
    patch: int = Field(8, ge=2)  # pixels of a side
    stem: Literal["linear", "conv"] = "conv"
    stem_channels: int = Field(32, ge=4)
    positions: Literal["learned", "rotary"] = "learned"

    @property
    def num_tokens(self) -> int:
        return (self.size // self.patch) ** 2

    @model_validator(mode="after")
    def _divisible(self) -> ImageConfig:
        if self.size % self.patch:
            raise ValueError(
                f"image.size {self.size} is not a multiple of image.patch {self.patch}; "
                f"use size {self.size // self.patch * self.patch}"
            )
        if self.stem == "conv" and self.patch & (self.patch - 1):
            raise ValueError(
                f"image.stem conv halves the picture step by step, so image.patch must be "
                f"a power of two, not {self.patch}; use 8 or stem: linear"
            )
        return self


class AudioConfig(_Model):
    sample_rate: int = Field(16_000, ge=4_000)  # Hz
    n_fft: int = Field(512, ge=16)
    hop_length: int = Field(160, ge=1)  # samples between two frames
    n_mels: int = Field(64, ge=8)
    max_seconds: float = Field(4.0, gt=0)
    patch: int = Field(8, ge=1)  # frames a token
    stem: Literal["linear", "conv"] = "conv"
    stem_channels: int = Field(64, ge=4)
    positions: Literal["learned", "rotary"] = "rotary"

    @property
    def max_frames(self) -> int:
        """Frames of the longest clip, a multiple of ``patch``."""
        frames = 1 + int(self.max_seconds * self.sample_rate) // self.hop_length
        return -(-frames // self.patch) * self.patch

    @property
    def max_tokens(self) -> int:
        return self.max_frames // self.patch

    @model_validator(mode="after")
    def _power_of_two(self) -> AudioConfig:
        if self.stem == "conv" and self.patch & (self.patch - 1):
            raise ValueError(
                f"audio.stem conv halves the frames step by step, so audio.patch must be "
                f"a power of two, not {self.patch}; use 8 or stem: linear"
            )
        return self


class TextConfig(_Model):
    max_tokens: int = Field(48, ge=2)  # longer texts are cut, and counted
    positions: Literal["learned", "rotary"] = "rotary"


class ModalitiesConfig(_Model):
    image: ImageConfig = ImageConfig()
    audio: AudioConfig = AudioConfig()
    text: TextConfig = TextConfig()


class ModelConfig(_Model):
    hidden_size: int = Field(128, ge=8)
    num_layers: int = Field(4, ge=1, le=10_000)  # checks go through them all
    num_heads: int = Field(4, ge=1)
    ffn_hidden_size: int = Field(256, ge=1)  # of the dense blocks
    embedding_size: int = Field(128, ge=2)  # of the joint space of the contrastive objective
    rotary_base: float = Field(10_000.0, gt=1)

    @model_validator(mode="after")
    def _heads(self) -> ModelConfig:
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"model.hidden_size {self.hidden_size} does not split into {self.num_heads} "
                f"heads of even width (rotary positions need pairs); use a multiple of "
                f"{2 * self.num_heads}"
            )
        return self


class ContrastiveConfig(_Model):
    """Weights of the pairs; a pair that is not named takes no part."""

    weight: float = Field(1.0, ge=0)
    pairs: dict[Literal["image-text", "audio-text", "image-audio"], Annotated[float, Field(ge=0)]] = Field(
        {"image-text": 1.0, "audio-text": 1.0, "image-audio": 0.5}
    )
    initial_temperature: float = Field(0.07, ge=0.01)  # it never falls below 0.01
    cached: bool = False  # negatives are those of the whole step, over all its microbatches (GradCache)

    @property
    def on(self) -> bool:
        """Some pair has a weight."""
        return self.weight > 0 and any(self.pairs.values())

    @property
    def in_two_passes(self) -> bool:
        """The step runs twice, to fill the cache and to go by it."""
        return self.on and self.cached


class CaptioningConfig(_Model):
    """Next-token prediction of the text behind an image or audio prefix."""

    weight: float = Field(0.0, ge=0)
    prefixes: tuple[Literal["image", "audio"], ...] = ("image", "audio")
    fraction: float = Field(0.25, gt=0, le=1)  # of the samples that get a fused segment


class ObjectivesConfig(_Model):
    contrastive: ContrastiveConfig = ContrastiveConfig()
    captioning: CaptioningConfig = CaptioningConfig()

    @model_validator(mode="after")
    def _something_to_learn(self) -> ObjectivesConfig:
        captions = self.captioning.weight > 0 and bool(self.captioning.prefixes)
        if not (self.contrastive.on or captions):
            raise ValueError(
                "objectives: no contrastive pair and no captioning prefix has a weight, so there is nothing "
                "to learn; give contrastive.weight and a pair, or captioning.weight and a prefix, above 0"
            )
        if self.captioning.weight > 0 and not captions:
            raise ValueError(
                f"objectives.captioning.weight {self.captioning.weight:g} without prefixes has nothing to learn "
                f"from; give prefixes: [image, audio], or weight: 0"
            )
        return self


class ParallelConfig(_Model):
    """Degrees of parallelism. What depends on the number of ranks is checked in ``parallel/layout.py``."""

    engine: Literal["megatron", "deepspeed"] = "megatron"
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
    """Of fp16: the loss is multiplied by a scale that keeps small gradients above zero, and that halves
    where they overflow; such a step is left out (arXiv 1710.03740)."""

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
    heatmap_every: int = Field(200, ge=1)


class EvaluateConfig(_Model):
    """Held-out shards, and how a class name becomes a text."""

    test: tuple[PathText, ...] = ()
    prompt: str = "{}"  # {} is the name of the class
    min_clips_per_language: int = Field(50, ge=1)  # distinct clips (or images) that a language needs to be scored
    image_rows: dict[RowField, tuple[str, ...]] = Field({})  # of image-text and class scores; {}: all rows

    @model_validator(mode="after")
    def _prompt(self) -> EvaluateConfig:
        around = self.prompt.replace("{}", "", 1)
        if "{}" not in self.prompt or "{" in around or "}" in around:
            raise ValueError(f"evaluate.prompt {self.prompt!r} must hold {{}} once; e.g. 'a picture of {{}}'")
        return self


class RunConfig(_Model):
    """Everything that a run depends on; saved beside its checkpoints."""

    name: str = Field(pattern=RUN_NAME)  # of the run's folder
    runs_dir: PathText = "runs"
    seed: int = 0
    data: DataConfig
    modalities: ModalitiesConfig = ModalitiesConfig()
    model: ModelConfig = ModelConfig()
    moe: MoEConfig = MoEConfig()
    objectives: ObjectivesConfig = ObjectivesConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    faults: FaultsConfig = FaultsConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="after")
    def _some_sparse_block(self) -> RunConfig:
        if not self.moe.dense and self.moe.every > self.model.num_layers:
            raise ValueError(
                f"moe.every {self.moe.every} exceeds model.num_layers {self.model.num_layers}, so no block would be "
                f"a mixture; lower moe.every, or set moe.num_experts: 1 and moe.experts_per_token: 1 for a dense one"
            )
        absent = [index for index in self.moe.layers if index >= self.model.num_layers]
        if absent:
            raise ValueError(
                f"moe.layers.{absent[0]}: there is no such block; model.num_layers is {self.model.num_layers}"
            )
        routers = {self.moe.for_layer(i).router for i in range(self.model.num_layers)}
        if "expert_choice" in routers and self.objectives.captioning.weight > 0:
            raise ValueError(
                "moe.router expert_choice lets later tokens decide where earlier ones go, and the segments of "
                "objectives.captioning are causal; set objectives.captioning.weight: 0, or choose softmax_top_k"
            )
        return self

    @model_validator(mode="after")
    def _hang_before_timeout(self) -> RunConfig:
        hang, timeout = self.faults.hang_minutes, self.parallel.timeout_minutes
        if hang >= timeout:
            raise ValueError(
                f"faults.hang_minutes {hang:g} is not below parallel.timeout_minutes {timeout}: collectives would "
                f"end the job first, without saying who waits for whom; set hang_minutes: "
                f"{HANG_SHARE * timeout:g} or timeout_minutes: {int(hang) + 1}"
            )
        return self

    @property
    def hang_seconds(self) -> float:
        """Without progress of a rank before the job ends: less than the collectives' own timeout, whose errors say
        less."""
        return 60.0 * (self.faults.hang_minutes or HANG_SHARE * self.parallel.timeout_minutes)

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.name

    @property
    def checkpoint_root(self) -> str:
        """Where the checkpoints of the run are: a path or an fsspec URL."""
        return self.checkpoints_of(self.run_dir)

    def checkpoints_of(self, run_dir: Path) -> str:
        """Of a run folder that may have been moved; ``checkpoint.folder`` has a folder for each run's name."""
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
    return parse(raw, where=" ".join([str(path), *(["with", *map(brief, overrides)] if overrides else [])]))


def parse(raw: dict[str, Any], where: str = "config") -> RunConfig:
    """A RunConfig from plain values, with errors a user can act on."""
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        items = _causes(error.errors(include_url=False))
        lines = [_explain(item)[:LONGEST_LINE] for item in items[:MOST_LINES]]
        more = len(items) - len(lines)
        raise ValueError(f"{where}: " + "; ".join(lines) + (f"; and {more} more" if more else "")) from None


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
        node = _descend(node, part, override)
    value = parse_yaml(text, f"override {brief(override)}")
    if isinstance(node, list):
        node[_list_index(node, leaf, override)] = value
    else:
        node[_key(node, leaf)] = value


def _key(node: dict[Any, Any], part: str) -> Any:
    """The key that reads ``part``: YAML makes numbers of some (moe.layers: {3: ...})."""
    return next((key for key in node if str(key) == part), part)


def _descend(node: Any, part: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_list_index(node, part, override)]
    child = node.setdefault(_key(node, part), {})
    if not isinstance(child, dict | list):
        raise ValueError(f"override {brief(override)}: {brief(part)} is a value ({brief(child)}), not a section")
    return child


def _list_index(node: list[Any], part: str, override: str) -> int:
    if not (part.isdecimal() and len(part) < 10 and int(part) < len(node)):
        raise ValueError(f"override {brief(override)}: {brief(part)} is not an index of a list of {len(node)}")
    return int(part)


def _causes(items: list[Any]) -> list[Any]:
    """Without lists that are said to be too short because their entries are wrong, which stand there too."""

    def follows(item: Any) -> bool:
        inside = (other["loc"][: len(item["loc"])] for other in items if len(other["loc"]) > len(item["loc"]))
        return item["type"] == "too_short" and item["loc"] in inside

    return [item for item in items if not follows(item)]


def _explain(item: Any) -> str:
    location = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        known = _siblings(item["loc"])
        close = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
        return f"unknown key {location!r}; {hint}"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "missing":
        return f"{location}: required, and missing"
    if item["type"] == "value_error":
        return message
    null = item["type"] == "string_type" and item["input"] is None
    hint = "; YAML reads ~ alone as null, so write $HOME" if null else ""
    return f"{location}: {message} (got {brief(item['input'])}{hint})"


def _siblings(location: tuple[Any, ...]) -> list[str]:
    model: Any = RunConfig
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        args = [a for a in getattr(annotation, "__args__", ()) if isinstance(a, type) and issubclass(a, _Model)]
        model = args[0] if args else annotation
    return list(model.model_fields)
