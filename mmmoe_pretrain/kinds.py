"""Tables of kinds: what users choose by ``kind:`` in a config, each found in an explicit table or by entry point.

Owns the lookup, the names that users may choose, and the choice of a settings class by ``kind``. A kind is a class
with a ``Settings`` class (a router is a function); its module is imported when the kind is first asked for, so that
a config names a kind without importing the others.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, NamedTuple

from pydantic import BaseModel

from mmmoe_pretrain.untrusted import brief

NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")  # it stands in files, tables and figures


@dataclass(frozen=True)
class Kinds:
    """A table of kinds. ``builtin``: kind -> ``module:Class``; installed packages add theirs by entry points of
    ``group``."""

    what: str  # one kind, for errors
    group: str
    builtin: Mapping[str, str]

    @property
    def names(self) -> list[str]:
        """Every kind that can be chosen, the built-in ones first."""
        return [*sorted(self.builtin), *sorted(_installed(self.group).keys() - self.builtin.keys())]

    def check(self, kind: str) -> str:
        """``kind``. Raises ValueError where there is none of this name."""
        if kind not in self.names:
            raise ValueError(f"there is no {self.what} {brief(kind)}; {nearest(kind, self.names, 'there are')}")
        return kind

    def load(self, kind: str) -> Any:
        """What ``kind`` names: a class, or of a router a function. Raises ValueError where there is none."""
        target = self.builtin.get(self.check(kind)) or _installed(self.group)[kind]
        module, _, name = target.partition(":")
        try:
            return getattr(importlib.import_module(module), name)
        except Exception as error:  # another package's module may raise anything
            raise ValueError(
                f"{self.what} {kind} cannot be loaded from {target} ({type(error).__name__}: {error}); fix or "
                f"uninstall its package"
            ) from error

    def settings(self, values: Any) -> BaseModel:
        """``values`` as an instance of the ``Settings`` of their kind."""
        if isinstance(values, BaseModel):
            return values
        if not isinstance(values, dict) or not isinstance(values.get("kind"), str):
            raise ValueError(
                f"it has no kind; give one of {', '.join(self.names)}, e.g. {{kind: {self.names[0]}}}. A config of "
                f"an earlier version, in which no entry has a kind, is rewritten by mmmoe config upgrade FILE"
            )
        model = getattr(self.load(values["kind"]), "Settings", None)
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            raise ValueError(
                f"{self.what} {values['kind']} has no class Settings of pydantic's; fix or uninstall its package"
            )
        return model.model_validate(values)


@functools.cache
def _installed(group: str) -> dict[str, str]:
    return {point.name: point.value for point in entry_points(group=group)}


MODALITIES = Kinds(
    "modality kind",
    "mmmoe.modalities",
    {
        "image": "mmmoe_pretrain.modalities.image:Image",
        "audio": "mmmoe_pretrain.modalities.audio:Audio",
        "text": "mmmoe_pretrain.modalities.text:Text",
        "series": "mmmoe_pretrain.modalities.series:Series",
        "image_codes": "mmmoe_pretrain.modalities.image_codes:ImageCodes",
        "audio_codes": "mmmoe_pretrain.modalities.audio_codes:AudioCodes",
    },
)


class Reads(NamedTuple):
    """What a kind of modality reads: files by the last part of their extension, the preferred first, and a field of a
    sample's JSON, where one modality of a run has the kind."""

    formats: tuple[str, ...] = ()
    field: str | None = None


# Of the built-in kinds, so that data preparation need not load them and torch; other kinds say it by their class.
READS = {
    "image": Reads(("png", "jpg", "jpeg", "jpe", "jfif", "webp", "gif", "bmp", "tif", "tiff")),
    "audio": Reads(("flac", "ogg", "oga", "opus", "wav", "wave", "mp3")),
    "text": Reads(("txt", "text", "caption"), "text"),
    "series": Reads(("npy", "csv")),
    "image_codes": Reads(),  # files of images, where a run asks for their codes
    "audio_codes": Reads(),
}
OBJECTIVES = Kinds(
    "objective kind",
    "mmmoe.objectives",
    {
        "classify": "mmmoe_pretrain.objectives.classify:Classify",
        "contrastive": "mmmoe_pretrain.objectives.contrastive:Contrastive",
        "completion": "mmmoe_pretrain.objectives.completion:Completion",
        "self_distillation": "mmmoe_pretrain.objectives.self_distillation:SelfDistillation",
        "sigmoid_contrastive": "mmmoe_pretrain.objectives.sigmoid_contrastive:SigmoidContrastive",
        "deep_cca": "mmmoe_pretrain.objectives.deep_cca:DeepCCA",
        "deep_gcca": "mmmoe_pretrain.objectives.deep_gcca:DeepGCCA",
        "distillation": "mmmoe_pretrain.objectives.distillation:Distillation",
        "domain_adversarial": "mmmoe_pretrain.objectives.domain_adversarial:DomainAdversarial",
        "moment_alignment": "mmmoe_pretrain.objectives.moment_alignment:MomentAlignment",
        "masked": "mmmoe_pretrain.objectives.masked:Masked",
        "multimodal_vae": "mmmoe_pretrain.objectives.multimodal_vae:MultimodalVAE",
        "next_token": "mmmoe_pretrain.objectives.next_token:NextToken",
        "semantic_anchors": "mmmoe_pretrain.objectives.semantic_anchors:SemanticAnchors",
    },
)

REPRESENTATIONS = Kinds(
    "representation kind",
    "mmmoe.representations",
    {
        "early": "mmmoe_pretrain.models.fusion.early:Early",
        "late": "mmmoe_pretrain.models.fusion.late:Late",
        "gated": "mmmoe_pretrain.models.fusion.gated:Gated",
        "tensor": "mmmoe_pretrain.models.fusion.tensor:TensorFusion",
        "low_rank": "mmmoe_pretrain.models.fusion.low_rank:LowRank",
        "latents": "mmmoe_pretrain.models.fusion.latents:Latents",
        "mult": "mmmoe_pretrain.models.fusion.mult:MulT",
        "bottleneck": "mmmoe_pretrain.models.fusion.bottleneck:Bottleneck",
        "graph": "mmmoe_pretrain.models.fusion.graph:Graph",
        "view": "mmmoe_pretrain.models.fusion.view:View",
    },
)
ROUTERS = Kinds(
    "router",
    "mmmoe.routers",
    {
        "softmax_top_k": "mmmoe_pretrain.moe.routers.softmax_top_k:softmax_top_k",
        "sigmoid_top_k": "mmmoe_pretrain.moe.routers.sigmoid_top_k:sigmoid_top_k",
        "group_limited": "mmmoe_pretrain.moe.routers.group_limited:group_limited",
        "noisy_top_k": "mmmoe_pretrain.moe.routers.noisy_top_k:noisy_top_k",
        "expert_choice": "mmmoe_pretrain.moe.routers.expert_choice:expert_choice",
        "hash": "mmmoe_pretrain.moe.routers.hash:hash_route",
    },
)


def nearest(word: Any, known: Iterable[str], all_are: str) -> str:
    """The nearest of the ``known`` words, for an error; or all of them."""
    words = list(known)
    close = difflib.get_close_matches(str(word), words, n=1)
    return f"did you mean {close[0]}?" if close else f"{all_are} {', '.join(words)}"


def check_name(name: Any) -> str:
    """``name``. Raises ValueError where a user may not choose it."""
    from torch import nn

    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError("a name is at most 40 lower-case letters, digits and _, beginning with a letter")
    if any(hasattr(holder, name) for holder in (nn.ModuleDict(), nn.ParameterDict())):  # which refuse it as a key
        raise ValueError(f"the name is reserved by torch; choose e.g. {name}_1")
    if name == "split":
        raise ValueError("the name is that of a column of manifests; choose e.g. split_1")
    return name


def stream_keys(kinds: Mapping[str, str]) -> dict[str, str]:
    """Name -> key of its random numbers: the kind, and a number for the second and later names of a kind. So adding a
    name does not change the numbers of others, and renaming one does not change its own."""
    keys, seen = {}, dict.fromkeys(kinds.values(), 0)
    for name, kind in kinds.items():
        keys[name] = kind if not seen[kind] else f"{kind}_{seen[kind]}"
        seen[kind] += 1
    return keys
