"""Zero-shot classification: an image takes the class whose text is nearest.

Owns the class texts and the counting; accuracy is plain and balanced (mean recall over the classes
that occur). The candidate classes are those of the held-out rows.

Shapes: N images, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ZeroShot:
    """Both accuracies beside what needs no model."""

    accuracy: float
    balanced: float
    chance: float  # of both
    majority: float  # of the plain accuracy; a constant answer's balanced accuracy is chance
    counts: tuple[int, ...]  # images of each class


def class_texts(prompt: str, labels: Sequence[str]) -> list[str]:
    """What the text encoder reads for each class."""
    if "{}" not in prompt:
        raise ValueError(
            f"evaluate.prompt {prompt!r} has no {{}} where the class name goes, so all classes "
            f"would read alike; use e.g. '{{}}' or 'a picture of {{}}'"
        )
    return [prompt.format(label) for label in labels]


def classify(similarity_NC: np.ndarray, labels_N: np.ndarray) -> ZeroShot:
    """Accuracies of the nearest class; a tie of t classes earns 1/t if the true one is among them."""
    if similarity_NC.size == 0:
        raise ValueError(
            f"zero-shot over {similarity_NC.shape[0]} images and {similarity_NC.shape[1]} classes is "
            f"undefined; give the held-out rows an image and a label"
        )
    if not np.isfinite(similarity_NC).all():
        raise ValueError(
            "the similarities hold NaN or infinity, so no class is nearest; the features of this "
            "checkpoint are broken: evaluate an earlier one"
        )
    best_NC = similarity_NC == similarity_NC.max(axis=1, keepdims=True)
    credit_N = best_NC[np.arange(len(labels_N)), labels_N] / best_NC.sum(axis=1)
    classes = similarity_NC.shape[1]
    counts_C = np.bincount(labels_N, minlength=classes)
    present = counts_C > 0
    recall_C = np.bincount(labels_N, weights=credit_N, minlength=classes)[present] / counts_C[present]
    return ZeroShot(
        accuracy=float(credit_N.mean()),
        balanced=float(recall_C.mean()),
        chance=1.0 / classes,
        majority=float(counts_C.max() / counts_C.sum()),
        counts=tuple(counts_C[present].tolist()),
    )
