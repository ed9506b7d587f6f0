"""Which parameters of a model belong to some tasks alone, and which all tasks share."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import nn

from mmmoe_pretrain.batch import OF_TOKENIZER
from mmmoe_pretrain.models.pretraining import PretrainingModel
from mmmoe_pretrain.objectives import Objective

# What stands before the heads, by the beginnings of names.
SHARED = ("mmmoe.trunk.", "mmmoe.embedders.", "mmmoe.modality_embedding.", "mmmoe.mask_embedding.")
BY_REPRESENTATION = ("joint_heads", "fusions", "banks")


def own_parameters(model: PretrainingModel, tasks: Collection[str]) -> Iterator[nn.Parameter]:
    """Those of this stage that no objective beside ``tasks`` uses: of their modules, their heads and what fuses their
    representations, learned weights of their losses, and embeddings of the tasks in routers. Embedders, the trunk and
    experts are never among them."""
    objectives = model.objectives
    others = [its for name, its in objectives.items() if name not in tasks]
    mine = [objectives[name] for name in tasks]
    read = {name for its in others for name in its.representations}
    heads = {head for its in others for head in _token_heads(its)}
    contents, hidden = {m for its in others for m in its.contents.values()}, {m for its in others for m in its.hidden}
    found = {f"tasks.{name}" for name in tasks}
    found |= {f"mmmoe.{holder}.{name}" for holder in ("class_heads", "content_decoders") for name in tasks}
    found |= {f"mmmoe.{holder}.{rep}" for its in mine for rep in its.representations if rep not in read
              for holder in BY_REPRESENTATION}  # fmt: skip
    for its in mine:
        found |= {f"mmmoe.{head}" for head in _token_heads(its) if head not in heads}
        found |= {f"mmmoe.content_heads.{name}" for name in its.contents.values() if name not in contents}
        found |= {f"mmmoe.mask_embedding.{name}" for name in its.hidden if name not in hidden}
        found |= {f"loss_weighting.log_variance.{loss.replace('/', '-')}" for loss in its.losses}
    endings = tuple(f".router.task_embedding.{name}" for name in tasks)
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if name.endswith(endings) or any(".".join(parts[:count]) in found for count in (2, 3)):
            yield parameter


def _token_heads(objective: Objective) -> Iterator[str]:
    """By which it predicts tokens, under their names in the model."""
    for vocabulary in objective.vocabularies:
        if vocabulary != OF_TOKENIZER:
            yield f"code_heads.{vocabulary}"
        else:
            yield "language_head" if objective.head is None else f"language_heads.{objective.head}"
