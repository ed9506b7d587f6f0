"""One pass of a model over held-out rows, which collects the inputs of all scores.

Owns the collection: features and content names of every row, likelihoods of targets, sums of routing. Content is
named by hash, so that one image with captions in thirteen languages is one image.

Shapes: N rows, P the joint space, G segments with targets, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from mmmoe_pretrain.batch import OF_TOKENIZER, Batch, Item, Sample, SampleMeta, Targets
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.models.mmmoe import MMMoE
from mmmoe_pretrain.moe.stats import RoutingStats
from mmmoe_pretrain.objectives import Objectives, Outputs

Batches = Iterable[tuple[Batch, Sequence[Sample]]]


@dataclass(frozen=True)
class Predicted:
    """The likelihoods of one task's targets of one vocabulary: sums over each segment with targets, and the count of
    each token id among all targets."""

    nll_G: np.ndarray
    tokens_G: np.ndarray
    first_G: np.ndarray  # modality id of the segment's first token
    targets_V: np.ndarray
    metas_G: tuple[SampleMeta, ...] = ()  # of the segment's sample


@dataclass(frozen=True)
class Contents:
    """What the scores need of the samples of a batch, whatever a model makes of them; as in ``HeldOut``."""

    metas: tuple[SampleMeta, ...]
    texts: tuple[str, ...]
    content: dict[str, tuple[str, ...]]
    modalities: tuple[frozenset[str], ...]
    damaged: int


@dataclass(frozen=True)
class HeldOut:
    """The results of a batch, or of one pass over the held-out rows; row i of each array is one sample."""

    metas: tuple[SampleMeta, ...]
    texts: tuple[str, ...]  # the first of each sample; equal texts are equal strings; "" where there is none
    content: dict[str, tuple[str, ...]]  # representation -> name of its content, "" where the row has none
    features: dict[str, np.ndarray]  # representation -> float32 [N, P], unit rows
    predicted: dict[str, Predicted]  # by task (``name_of``)
    routing: tuple[RoutingStats, ...]
    damaged: int = 0  # rows that could not be decoded
    modalities: tuple[frozenset[str], ...] = ()  # that each row has
    projected: dict[str, np.ndarray] = field(default_factory=dict)  # as ``features``, of any length; those asked for
    class_logits: dict[str, np.ndarray] = field(default_factory=dict)  # by task with classes, float32 [N, C]


def collect(model: MMMoE, batches: Batches, projected: Iterable[str] = ()) -> HeldOut:
    """Run ``model`` once over ``batches``. ``projected``: representations to keep before they get unit length."""
    projected = tuple(projected)
    with torch.inference_mode():
        parts = [_of_batch(model, batch, samples, projected) for batch, samples in batches]
    if not parts:
        raise ValueError(
            "the held-out shards hold no sample whose text is not trained on, too; check evaluate.test or --test, or "
            "set evaluate.keep_seen_texts=true"
        )
    return joined(parts)


def joined(parts: Sequence[HeldOut]) -> HeldOut:
    """Of all their rows, one part after the other."""
    first = parts[0]
    return HeldOut(
        metas=tuple(meta for part in parts for meta in part.metas),
        texts=tuple(text for part in parts for text in part.texts),
        content={name: tuple(one for part in parts for one in part.content[name]) for name in first.content},
        features={name: np.concatenate([part.features[name] for part in parts]) for name in first.features},
        predicted={task: _join([part.predicted[task] for part in parts]) for task in first.predicted},
        routing=functools.reduce(add_routing, (part.routing for part in parts)),
        modalities=tuple(one for part in parts for one in part.modalities),
        damaged=sum(part.damaged for part in parts),
        projected={name: np.concatenate([part.projected[name] for part in parts]) for name in first.projected},
        class_logits={
            task: np.concatenate([part.class_logits[task] for part in parts]) for task in first.class_logits
        },
    )


def taken(data: HeldOut, rows: np.ndarray) -> HeldOut:
    """These rows in this order; targets are kept as they are."""
    order = rows.tolist()
    return dataclasses.replace(
        data,
        metas=tuple(data.metas[i] for i in order),
        texts=tuple(data.texts[i] for i in order),
        content={name: tuple(names[i] for i in order) for name, names in data.content.items()},
        features={name: features[rows] for name, features in data.features.items()},
        modalities=tuple(data.modalities[i] for i in order),
        projected={name: projected[rows] for name, projected in data.projected.items()},
        class_logits={task: logits[rows] for task, logits in data.class_logits.items()},
    )


def collect_routing(model: nn.Module, batches: Batches) -> tuple[RoutingStats, ...]:
    """The sums of routing alone, by layer."""
    sums: tuple[RoutingStats, ...] = ()
    with torch.inference_mode():
        for batch, _ in batches:
            sums = add_routing(sums, model(batch.to(device_of(model)))[1])
    return sums


def add_routing(sums: tuple[RoutingStats, ...], new: tuple[RoutingStats, ...]) -> tuple[RoutingStats, ...]:
    return tuple(a + b for a, b in zip(sums, new, strict=True)) if sums else new


def encode(model: nn.Module, representation: str, batches: Iterable[Batch]) -> np.ndarray:
    """Its features [N, P] of all samples of ``batches``."""
    with torch.inference_mode():
        return np.concatenate([_numpy(model(b.to(device_of(model)))[0].features[representation]) for b in batches])


def same_text(text: str) -> str:
    """A text normalized for comparison, without case and spacing."""
    return " ".join(text.casefold().split())


def text_of(sample: Sample) -> str:
    """All that the shard holds of its items that are texts; empty without one."""
    return " ".join(item.raw for item in sample.items if item.raw)


def content_name(item: Item) -> str:
    """Equal for equal content: a text itself, a hash of anything else."""
    if item.raw:
        return same_text(item.raw)
    return hashlib.blake2b(np.ascontiguousarray(item.value).tobytes(), digest_size=16).hexdigest()


def _of_batch(model: MMMoE, batch: Batch, samples: Sequence[Sample], projected: tuple[str, ...]) -> HeldOut:
    outputs, routing = model(batch.to(device_of(model)))
    its = contents(batch, samples, model.objectives)
    found = held_out(outputs, batch, its, vocabularies_of(model.config), routing, projected)
    for name, rows in found.features.items():
        if not (finite := np.isfinite(rows).all(axis=1)).all():
            key = batch.metas[int(np.flatnonzero(~finite)[0])].key
            raise ValueError(
                f"the {name} feature of held-out sample {key!r} is not finite, so it has no rank; "
                f"this checkpoint diverged: evaluate an earlier one"
            )
    return found


def contents(batch: Batch, samples: Sequence[Sample], objectives: Objectives) -> Contents:
    """Of the ``samples`` of ``batch``, which is on the host."""
    content = {}
    for name, representation in objectives.representations.items():
        present, parts = batch.pooled[name].numpy() >= 0, representation.modalities
        content[name] = tuple(
            " ".join(content_name(item) for part in parts if (item := sample.first(part))) if here else ""
            for sample, here in zip(samples, present, strict=True)
        )
    texts = tuple(same_text(text_of(sample)) for sample in samples)
    modalities = tuple(frozenset(item.modality for item in sample.items) for sample in samples)
    return Contents(
        tuple(sample.meta for sample in samples), texts, content, modalities, sum(not has for has in modalities)
    )


def held_out(
    outputs: Outputs,
    batch: Batch,
    its: Contents,
    vocabularies: Mapping[str, int],
    routing: tuple[RoutingStats, ...] = (),
    projected: tuple[str, ...] = (),
) -> HeldOut:
    """What the scores need of ``outputs``, those of ``batch``, which is on the host and has the contents ``its``.
    ``vocabularies``: the sizes of all (``vocabularies_of``)."""
    return HeldOut(
        metas=its.metas,
        texts=its.texts,
        content=its.content,
        features={name: _numpy(tensor) for name, tensor in outputs.features.items()},
        predicted=_predicted(outputs, batch, vocabularies),
        routing=routing,
        modalities=its.modalities,
        damaged=its.damaged,
        projected={name: _numpy(outputs.projected[name]) for name in projected},
        class_logits={task: _numpy(logits_BC) for task, logits_BC in outputs.class_logits.items()},
    )


def vocabularies_of(config: RunConfig) -> dict[str, int]:
    """The size of each vocabulary (``batch.Targets``)."""
    own = {name: its.vocabulary for name, its in config.modalities.items() if its.vocabulary}
    return {OF_TOKENIZER: config.model.vocab_size, **own}


def name_of(task: str, vocabulary: str) -> str:
    """What the scores of a task are called whose targets are of this vocabulary."""
    return f"{task}[{vocabulary}]" if vocabulary else task


def _predicted(outputs: Outputs, batch: Batch, vocabularies: Mapping[str, int]) -> dict[str, Predicted]:
    """By task, and of targets that are not the tokenizer's by ``name_of``: likelihoods of a token are compared within
    a vocabulary."""
    found = {}
    for task, nll_N in outputs.token_nll.items():
        targets = batch.targets[task]
        every = {OF_TOKENIZER: torch.arange(len(targets))}
        for vocabulary, which in (targets.of_vocabulary or every).items():
            part = Targets(targets.rows[which], targets.ids[which])
            own = nll_N[which.to(nll_N.device)]
            found[name_of(task, vocabulary)] = sums_of_targets(batch, part, own, vocabularies[vocabulary])
    return found


def sums_of_targets(batch: Batch, targets: Targets, nll_N: Tensor, vocab_size: int) -> Predicted:
    """The negative log-likelihoods of ``targets``, some of those of a task in ``batch``, summed by segment."""
    segment_ids = batch.segment_ids.numpy()
    segments, segment_N = np.unique(segment_ids[targets.rows.numpy()], return_inverse=True)
    first_G = np.searchsorted(segment_ids[: batch.num_valid], segments)  # segments rise along the stream
    return Predicted(
        nll_G=np.bincount(segment_N, weights=_numpy(nll_N).astype(np.float64), minlength=len(segments)),
        tokens_G=np.bincount(segment_N, minlength=len(segments)),
        first_G=batch.modality_ids.numpy()[first_G],
        targets_V=np.bincount(targets.ids.numpy(), minlength=vocab_size),
        metas_G=tuple(batch.metas[sample] for sample in batch.sample_ids.numpy()[segments].tolist()),
    )


def _join(parts: Sequence[Predicted]) -> Predicted:
    return Predicted(
        nll_G=np.concatenate([p.nll_G for p in parts]),
        tokens_G=np.concatenate([p.tokens_G for p in parts]),
        first_G=np.concatenate([p.first_G for p in parts]),
        targets_V=np.sum([p.targets_V for p in parts], axis=0),
        metas_G=tuple(meta for p in parts for meta in p.metas_G),
    )


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()
