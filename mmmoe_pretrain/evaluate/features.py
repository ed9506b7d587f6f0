"""One pass of a model over held-out rows, which collects the inputs of all scores.

Owns the collection: features and content names of every row, likelihoods of targets, sums of routing. Content is
named by hash, so that one image with captions in thirteen languages is one image.

Shapes: N rows, P the joint space, G segments with targets, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from mmmoe_pretrain.batch import Batch, Item, Sample, SampleMeta
from mmmoe_pretrain.models.mmmoe import MMMoE
from mmmoe_pretrain.moe.stats import RoutingStats

Batches = Iterable[tuple[Batch, Sequence[Sample]]]


@dataclass(frozen=True)
class Predicted:
    """The likelihoods of one task: sums over each segment with targets, and the count of each token id among all
    targets."""

    nll_G: np.ndarray
    tokens_G: np.ndarray
    first_G: np.ndarray  # modality id of the segment's first token
    targets_V: np.ndarray


@dataclass(frozen=True)
class HeldOut:
    """The results of one pass over the held-out rows; row i of each array is one sample."""

    metas: tuple[SampleMeta, ...]
    texts: tuple[str, ...]  # the first of each sample; equal texts are equal strings; "" where there is none
    content: dict[str, tuple[str, ...]]  # representation -> name of its content, "" where the row has none
    features: dict[str, np.ndarray]  # representation -> float32 [N, P], unit rows
    predicted: dict[str, Predicted]  # by task
    routing: tuple[RoutingStats, ...]
    damaged: int = 0  # rows that could not be decoded


@dataclass
class _Pass:
    """Lists that grow batch by batch."""

    samples: list[tuple[SampleMeta, str]] = field(default_factory=list)
    content: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    features: defaultdict[str, list[np.ndarray]] = field(default_factory=lambda: defaultdict(list))
    predicted: defaultdict[str, list[Predicted]] = field(default_factory=lambda: defaultdict(list))
    routing: tuple[RoutingStats, ...] = ()
    damaged: int = 0


def collect(model: MMMoE, batches: Batches) -> HeldOut:
    """Run ``model`` once over ``batches``."""
    seen = _Pass()
    with torch.inference_mode():
        for batch, samples in batches:
            _add(seen, model, batch, samples)
    if not seen.samples:
        raise ValueError(
            "the held-out shards hold no sample whose text is not trained on, too; check evaluate.test or --test, or "
            "set evaluate.keep_seen_texts=true"
        )
    return HeldOut(
        metas=tuple(meta for meta, _ in seen.samples),
        texts=tuple(text for _, text in seen.samples),
        content={name: tuple(names) for name, names in seen.content.items()},
        features={name: np.concatenate(rows) for name, rows in seen.features.items()},
        predicted={task: _join(parts) for task, parts in seen.predicted.items()},
        routing=seen.routing,
        damaged=seen.damaged,
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


def first_text(sample: Sample) -> str:
    """What the shard holds of the first item that is a text; empty without one."""
    return next((item.raw for item in sample.items if item.raw), "")


def content_name(item: Item) -> str:
    """Equal for equal content: a text itself, a hash of anything else."""
    if item.raw:
        return same_text(item.raw)
    return hashlib.blake2b(np.ascontiguousarray(item.value).tobytes(), digest_size=16).hexdigest()


def _add(seen: _Pass, model: MMMoE, batch: Batch, samples: Sequence[Sample]) -> None:
    outputs, routing = model(batch.to(device_of(model)))
    for name, features in outputs.features.items():
        rows, present = _numpy(features), batch.pooled[name].numpy() >= 0
        if not np.isfinite(rows[present]).all():
            key = batch.metas[int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])].key
            raise ValueError(
                f"the {name} feature of held-out sample {key!r} is not finite, so it has no rank; "
                f"this checkpoint diverged: evaluate an earlier one"
            )
        parts = model.objectives.representations[name].modalities
        seen.features[name].append(rows)
        seen.content[name] += [
            " ".join(content_name(item) for part in parts if (item := sample.first(part))) if here else ""
            for sample, here in zip(samples, present, strict=True)
        ]
    seen.samples += [(sample.meta, same_text(first_text(sample))) for sample in samples]
    seen.damaged += sum(not sample.items for sample in samples)
    for task, nll_N in outputs.token_nll.items():
        seen.predicted[task].append(sums_of_targets(batch, task, nll_N, model.config.model.vocab_size))
    seen.routing = add_routing(seen.routing, routing)


def sums_of_targets(batch: Batch, task: str, nll_N: Tensor, vocab_size: int) -> Predicted:
    """The negative log-likelihoods of the targets of ``task``, summed by segment."""
    targets = batch.targets[task]
    segment_ids = batch.segment_ids.numpy()
    segments, segment_N = np.unique(segment_ids[targets.rows.numpy()], return_inverse=True)
    first_G = np.searchsorted(segment_ids[: batch.num_valid], segments)  # segments rise along the stream
    return Predicted(
        nll_G=np.bincount(segment_N, weights=_numpy(nll_N).astype(np.float64), minlength=len(segments)),
        tokens_G=np.bincount(segment_N, minlength=len(segments)),
        first_G=batch.modality_ids.numpy()[first_G],
        targets_V=np.bincount(targets.ids.numpy(), minlength=vocab_size),
    )


def _join(parts: Sequence[Predicted]) -> Predicted:
    return Predicted(
        nll_G=np.concatenate([p.nll_G for p in parts]),
        tokens_G=np.concatenate([p.tokens_G for p in parts]),
        first_G=np.concatenate([p.first_G for p in parts]),
        targets_V=np.sum([p.targets_V for p in parts], axis=0),
    )


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()
