"""One pass of a model over held-out rows, and everything the scores are computed from.

Owns the collection: features and content names of every row, caption likelihoods, routing totals.
Content is named by hash, so that one picture in thirteen languages is one picture.

Shapes: N rows, P the joint space, G captions, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from mmmoe_pretrain.batch import IGNORE, MODALITIES, Batch, Sample, SampleMeta
from mmmoe_pretrain.evaluate.routing_report import RoutingTotals
from mmmoe_pretrain.moe.stats import RoutingStats


@dataclass(frozen=True)
class Captions:
    """Sums over each fused segment, and the token counts of all targets together."""

    nll_G: np.ndarray
    tokens_G: np.ndarray
    prefix_G: np.ndarray  # modality id
    targets_V: np.ndarray  # how often each token id was a target


@dataclass(frozen=True)
class HeldOut:
    """What one pass over the held-out rows leaves behind; row i of everything is one sample."""

    metas: tuple[SampleMeta, ...]
    texts: tuple[str, ...]  # equal texts are equal strings; "" where there is none
    content: dict[str, tuple[str, ...]]  # modality -> name of its content, "" where absent
    features: dict[str, np.ndarray]  # modality -> float32 [N, P], unit rows
    captions: Captions
    routing: tuple[RoutingTotals, ...]


@dataclass
class _Pass:
    """Lists that grow batch by batch."""

    metas: list[SampleMeta] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    content: dict[str, list[str]] = field(default_factory=lambda: {m: [] for m in MODALITIES})
    features: dict[str, list[np.ndarray]] = field(default_factory=lambda: {m: [] for m in MODALITIES})
    captions: list[Captions] = field(default_factory=list)
    routing: tuple[RoutingTotals, ...] = ()


def collect(model: nn.Module, batches: Iterable[tuple[Batch, Sequence[Sample]]], vocab_size: int) -> HeldOut:
    """Run ``model`` once over ``batches``."""
    seen = _Pass()
    with torch.inference_mode():
        for batch, samples in batches:
            _add(seen, model, batch, samples, vocab_size)
    if not seen.metas:
        raise ValueError("the held-out shards hold no sample; check evaluate.test or --test")
    return HeldOut(
        metas=tuple(seen.metas),
        texts=tuple(seen.texts),
        content={m: tuple(names) for m, names in seen.content.items()},
        features={m: np.concatenate(rows) for m, rows in seen.features.items()},
        captions=_join(seen.captions),
        routing=seen.routing,
    )


def collect_routing(model: nn.Module, batches: Iterable[tuple[Batch, Sequence[Sample]]]) -> tuple[RoutingTotals, ...]:
    """The routing totals alone."""
    totals: tuple[RoutingTotals, ...] = ()
    with torch.inference_mode():
        for batch, _ in batches:
            totals = _sum(totals, model(batch.to(_device(model))).routing)
    return totals


def encode_texts(model: nn.Module, batches: Iterable[Batch]) -> np.ndarray:
    """Text features [N, P] of batches of texts alone."""
    with torch.inference_mode():
        return np.concatenate([_numpy(model(batch.to(_device(model))).features["text"]) for batch in batches])


def same_text(text: str) -> str:
    """The form in which texts are compared: case and spacing aside."""
    return " ".join(text.casefold().split())


def _add(seen: _Pass, model: nn.Module, batch: Batch, samples: Sequence[Sample], vocab_size: int) -> None:
    output = model(batch.to(_device(model)))
    present_MB = batch.present_MB.numpy()
    for m, modality in enumerate(MODALITIES):
        rows = _numpy(output.features[modality])
        if not np.isfinite(rows[present_MB[m]]).all():
            key = batch.metas[int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])].key
            raise ValueError(
                f"the {modality} feature of held-out sample {key!r} is not finite, so it has no rank; "
                f"this checkpoint diverged: evaluate an earlier one"
            )
        seen.features[modality].append(rows)
        seen.content[modality] += [
            content_name(sample, modality) if here else ""
            for sample, here in zip(samples, present_MB[m], strict=True)
        ]
    seen.metas += [sample.meta for sample in samples]
    seen.texts += [same_text(s.raw_text) for s in samples]
    seen.captions.append(caption_sums(batch, output.caption_nll, vocab_size))
    seen.routing = _sum(seen.routing, output.routing)


def caption_sums(batch: Batch, nll_N: Tensor, vocab_size: int) -> Captions:
    """Sum the targets' negative log-likelihoods by fused segment; none from a model that cannot caption."""
    rows = torch.nonzero(batch.targets != IGNORE)[:, 0] if nll_N.numel() else torch.zeros(0, dtype=torch.int64)
    assert nll_N.shape == rows.shape, (nll_N.shape, rows.shape)
    segments, caption_N = torch.unique(batch.segment_ids[rows], return_inverse=True)
    caption = caption_N.numpy()
    first_token = [int(torch.nonzero(batch.segment_ids == s)[0, 0]) for s in segments.tolist()]
    return Captions(
        nll_G=np.bincount(caption, weights=_numpy(nll_N).astype(np.float64), minlength=len(segments)),
        tokens_G=np.bincount(caption, minlength=len(segments)),
        prefix_G=batch.modality_ids.numpy()[first_token],
        targets_V=np.bincount(batch.targets[rows].numpy(), minlength=vocab_size),
    )


def content_name(sample: Sample, modality: str) -> str:
    """Equal for equal content: a text itself, a hash of anything else."""
    if modality == "text":
        return same_text(sample.raw_text)
    content = np.ascontiguousarray(getattr(sample, modality))
    return hashlib.blake2b(content.tobytes(), digest_size=16).hexdigest()


def _join(parts: Sequence[Captions]) -> Captions:
    return Captions(
        nll_G=np.concatenate([p.nll_G for p in parts]),
        tokens_G=np.concatenate([p.tokens_G for p in parts]),
        prefix_G=np.concatenate([p.prefix_G for p in parts]),
        targets_V=np.sum([p.targets_V for p in parts], axis=0),
    )


def _sum(totals: tuple[RoutingTotals, ...], routing: Sequence[RoutingStats]) -> tuple[RoutingTotals, ...]:
    new = tuple(routing_totals(stats) for stats in routing)
    return tuple(a + b for a, b in zip(totals, new, strict=True)) if totals else new


def routing_totals(stats: RoutingStats) -> RoutingTotals:
    """The sums that ``routing_report`` reads, in float64."""
    names = ("counts_ME", "probability_ME", "entropy_M", "tokens_M", "dropped_M")
    arrays = {name: _numpy(getattr(stats, name)).astype(np.float64) for name in names}
    return RoutingTotals(layer=int(stats.layer), **arrays)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()
