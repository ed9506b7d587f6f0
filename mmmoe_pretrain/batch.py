"""The values that travel from the loader to the model: a sample, its segments, and one packed microbatch.

Defines the terms for sequences and the shape legend of the whole project. Independent of files, models,
communication, and of the names of modalities and objectives.

Shape legend: B samples in a microbatch, T tokens in the stream, S segments, D hidden size, H heads, F expert hidden
size, E experts, E_local experts on this rank, K experts per token, C capacity, M modalities, X tasks, V vocabulary. A
tensor whose layout is not obvious carries it as a suffix: ``x_TD``, ``expert_ids_TK``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

IGNORE = -100  # a target that takes no part in a loss
OF_TOKENIZER = ""  # among vocabularies, which else have the name of their modality


@dataclass(frozen=True)
class SampleMeta:
    """The metadata of a sample; every field but ``key`` may be empty. Several shards may use
    a key. ``tags``: other short strings of its JSON."""

    key: str
    group: str = ""  # samples that show the same thing share a group and are never negatives
    language: str = ""
    label: str = ""
    subset: str = ""
    source: str = ""
    shard: str = ""  # the file that holds it
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def identity(self) -> str:
        """Unique among all samples."""
        return f"\0{self.shard}\0{self.key}"

    @property
    def own_group(self) -> str:
        """The group; a sample without one is a group of its own."""
        return self.group or self.identity

    def get(self, name: str) -> str:
        """A field or a tag; empty where the sample has none."""
        return str(getattr(self, name, "")) if name in META_FIELDS else self.tags.get(name, "")


META_FIELDS = ("group", "language", "label", "subset", "source")  # of a sample's JSON that have a meaning here


@dataclass(frozen=True)
class Item:
    """One decoded item of a sample: ``value`` is the result of its modality's ``decode``. ``raw``: the string in the
    shard, if it is one. ``loss``: False if none of its tokens is a target."""

    modality: str
    value: np.ndarray
    raw: str = ""
    loss: bool = True


@dataclass(frozen=True)
class Sample:
    """One decoded sample: its items in order. A triple has three, each of another modality; a document has any
    number, in reading order."""

    meta: SampleMeta
    items: tuple[Item, ...] = ()
    document: bool = False  # the order of the items has a meaning

    def index(self, modality: str) -> int | None:
        """The number of the first item of ``modality``."""
        return next((i for i, item in enumerate(self.items) if item.modality == modality), None)

    def only(self, modalities: Container[str]) -> Sample:
        """The sample with its items of these modalities alone."""
        return dataclasses.replace(self, items=tuple(item for item in self.items if item.modality in modalities))

    def first(self, modality: str) -> Item | None:
        """The first item of ``modality``."""
        return next((item for item in self.items if item.modality == modality), None)


@dataclass(frozen=True)
class Part:
    """The tokens ``start`` to ``stop`` of item ``item`` of a sample, as a part of a segment.

    ``attention``: tokens of ``full`` parts attend to each other in both directions; those of ``causal`` parts to
    themselves and to all before them; a part that is ``alone`` attends to itself only. ``targets``: int64
    [stop - start], IGNORE where there is none. Positions count from ``first_position``.

    ``view``: a value of the modality that is embedded in place of the item's, such as one without some tokens'
    content. ``hidden``: bool [stop - start], the tokens without content; the model marks them. ``contents``: float32
    [hidden tokens, numbers], what is to be predicted there.
    """

    item: int
    start: int
    stop: int
    attention: Literal["full", "causal", "alone"] = "full"
    targets: np.ndarray | None = None
    first_position: int = 0
    view: np.ndarray | None = None
    hidden: np.ndarray | None = None
    contents: np.ndarray | None = None

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class LeftOut:
    """Tokens of item ``item`` of a sample that a segment has no part of, and whose contents are to be predicted from
    it: int64 [n], their numbers in the item, and float32 [n, numbers]."""

    item: int
    numbers: np.ndarray
    contents: np.ndarray


@dataclass(frozen=True)
class Segment:
    """A run of tokens of one sample for one ``task``. Full parts come before causal ones, which attend to them.
    ``representation``: the name under which its tokens are pooled, or empty."""

    task: str
    parts: tuple[Part, ...]
    representation: str = ""
    left_out: tuple[LeftOut, ...] = ()

    def __post_init__(self) -> None:
        order = ["full causal".find(part.attention) for part in self.parts if part.attention != "alone"]
        assert order == sorted(order), f"a full part stands after a causal one: {self.parts}"


@dataclass(frozen=True)
class AttentionBlocks:
    """Runs of consecutive tokens of a stream, as numbers of tokens, known on the host. Tokens of different blocks
    never attend to each other. The first ``full[i]`` tokens of block i attend to each other in both directions;
    those after them causally: to themselves and to all before them."""

    lengths: tuple[int, ...]
    full: tuple[int, ...]


@dataclass(frozen=True)
class Spans:
    """A run of rows of the stream for each sample, known on the host: where it begins and its length, 0 of a sample
    without one."""

    starts: tuple[int, ...]  # [B]
    lengths: tuple[int, ...]  # [B]


@dataclass(frozen=True)
class Targets:
    """The targets of one task: int64 [N] rows of the stream, and the token that follows each.

    ``of_vocabulary``: where some are not ids of the tokenizer, int64 [n] by vocabulary, which of the N are ids of it;
    vocabularies are ``OF_TOKENIZER`` and the modalities that have their own."""

    rows: Tensor
    ids: Tensor
    of_vocabulary: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.rows.shape[0]


@dataclass(frozen=True)
class Seen:
    """What is known of contents that are predicted from a segment, run by run: how many of them follow each other in
    a run, and the rows of its segment."""

    counts: tuple[int, ...]
    spans: Spans


@dataclass(frozen=True)
class Contents:
    """The hidden contents of one modality's tokens, for one task: int64 [N] rows of the stream, and float32 [N, C],
    the numbers that were there, NaN where nothing was measured. With ``seen`` the tokens are not in the stream, and
    ``rows`` are their numbers in their items."""

    rows: Tensor
    values: Tensor
    seen: Seen | None = None

    def __len__(self) -> int:
        return self.rows.shape[0]


@dataclass(frozen=True)
class Anchors:
    """A vector of each sample as a target: float32 [B, W], bool [B] where there is one (else zeros), and int64 [B],
    equal where vectors are."""

    vectors: Tensor
    present: Tensor
    ids: Tensor


@dataclass(frozen=True)
class Originals:
    """The whole content of the first item of one modality of each sample that has it, token by token: int64 [N] the
    sample by its number in the batch, int64 [N] the token's number in the item, and int64 [N] ids of discrete tokens
    (without the begin mark, which is the same in all), or float32 [N, C] numbers, NaN where nothing was measured."""

    samples: Tensor
    places: Tensor
    content: Tensor

    def __len__(self) -> int:
        return self.samples.shape[0]


@dataclass(frozen=True)
class Batch:
    """One packed microbatch: the inputs of the embedders, by modality, and the stream made of their outputs.

    The embedder of modality m turns ``inputs[m]`` into rows ``[rows_m, D]``; the stream takes ``emb_m[source[m]]`` at
    its rows ``rows[m]``. One item may be in several segments and is embedded once. Mappings of one batch have
    the modalities, tasks and representations of the run in the config's order, whatever modalities the samples have.
    """

    inputs: dict[str, dict[str, Tensor]]
    rows: dict[str, Tensor]  # by modality: rows of the stream, int64 [n]
    source: dict[str, Tensor]  # by modality: rows of the embedder's output, int64 [n]
    modality_ids: Tensor  # int64 [T]; padding carries 0 and valid = False
    segment_ids: Tensor  # int64 [T]; padding carries -1
    positions: Tensor  # int64 [T]: for rotary positions
    keys: Tensor  # int64 [T]: the id of a discrete token, else its number in its item
    valid: Tensor  # bool [T]
    hidden: Tensor  # bool [T]: tokens whose content the model does not see
    task_ids: Tensor  # int64 [S]
    sample_ids: Tensor  # int64 [S]: the sample of each segment, by its number in the batch
    attention: AttentionBlocks
    targets: dict[str, Targets]  # by task, of those that predict tokens
    contents: dict[str, Contents]  # by loss (task/modality), of those that predict contents
    anchors: dict[str, Anchors]  # by task, of those that have them
    pooled: dict[str, Tensor]  # by representation: int64 [B], the (first) segment of each sample, or -1
    group_ids: Tensor  # int64 [B]: hash of the sample's group
    metas: tuple[SampleMeta, ...]  # [B]; a skipped sample has no segment
    spans: dict[str, Spans] = field(default_factory=dict)  # by representation whose tokens a fusion module reads
    # int64 [T]: the combination of modalities that the token's sample has (StreamNames.combinations), -1 for none of
    # them and for tokens of other modalities; None where no loss of routing asks for it
    combination_ids: Tensor | None = None
    originals: dict[str, Originals] = field(default_factory=dict)  # by modality that some objective reconstructs
    noise: dict[str, Tensor] = field(
        default_factory=dict
    )  # by task, of those that ask for it: N(0, 1), float32 [B, W]

    @property
    def num_tokens(self) -> int:
        """T, padding included."""
        return int(self.valid.shape[0])

    @property
    def num_valid(self) -> int:
        """Tokens without padding; known on the host, without a GPU synchronization."""
        return sum(self.attention.lengths)

    @property
    def num_segments(self) -> int:
        return int(self.task_ids.shape[0])

    def to(self, device: torch.device) -> Batch:
        """The same batch with every tensor on ``device`` (``send``)."""
        return map_leaves(self, Tensor, lambda tensor: send(tensor, device))


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``. To an accelerator from pinned memory: a copy from other memory would make the host
    wait for all work that the device has been given."""
    if tensor.device.type != "cpu" or device.type in ("cpu", "meta"):
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def map_leaves(value: Any, kind: type, function: Any) -> Any:
    """Apply ``function`` to every ``kind`` in ``value``, through tuples, dicts and dataclasses."""
    if isinstance(value, kind):
        return function(value)
    if type(value) is tuple:
        if value and isinstance(value[0], SampleMeta | int):  # all are such, hold none, and there are many
            return value
        return tuple(map_leaves(item, kind, function) for item in value)
    if type(value) is dict:
        return {name: map_leaves(item, kind, function) for name, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: map_leaves(getattr(value, f.name), kind, function) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


def to_arrays(item: object) -> Any:
    """Tensors as arrays, which cross processes without torch."""
    return map_leaves(item, Tensor, Tensor.numpy)


def to_tensors(item: object) -> Any:
    """The inverse of ``to_arrays``; the memory is shared."""
    return map_leaves(item, np.ndarray, torch.from_numpy)


def to_pinned(item: object) -> Any:
    """Arrays as tensors in pinned memory."""
    return map_leaves(to_tensors(item), Tensor, Tensor.pin_memory)
