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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from pydantic import BaseModel, ValidationError

from mmmoe_pretrain.untrusted import brief

NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")  # it stands in files, tables and figures
# Attributes of the torch modules that hold parts by name: torch refuses them as keys.
RESERVED = frozenset({
    "add_module", "apply", "bfloat16", "buffers", "call_super_init", "children", "clear", "compile", "copy",
    "cpu", "cuda", "double", "dump_patches", "eval", "extra_repr", "float", "forward", "fromkeys", "get",
    "get_buffer", "get_extra_state", "get_parameter", "get_submodule", "half", "ipu", "items", "keys",
    "load_state_dict", "modules", "mtia", "named_buffers", "named_children", "named_modules",
    "named_parameters", "parameters", "pop", "popitem", "register_backward_hook", "register_buffer",
    "register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
    "register_full_backward_pre_hook", "register_load_state_dict_post_hook",
    "register_load_state_dict_pre_hook", "register_module", "register_parameter",
    "register_state_dict_post_hook", "register_state_dict_pre_hook", "requires_grad_", "set_extra_state",
    "set_submodule", "setdefault", "share_memory", "state_dict", "to", "to_empty", "train", "training", "type",
    "update", "values", "xpu", "zero_grad", "split",
})  # fmt: skip


@dataclass(frozen=True)
class Kinds:
    """A table of kinds. ``builtin``: kind -> ``module:Class``; installed packages add theirs by entry points of
    ``group``."""

    what: str  # one kind, for errors
    group: str
    builtin: Mapping[str, str]

    @property
    def names(self) -> list[str]:
        """Every kind that can be chosen."""
        return sorted({*self.builtin, *_installed(self.group)})

    def check(self, kind: str) -> str:
        """``kind``. Raises ValueError where there is none of this name."""
        if kind not in self.names:
            close = difflib.get_close_matches(kind, self.names, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(self.names)}"
            raise ValueError(f"there is no {self.what} {brief(kind)}; {hint}")
        return kind

    def load(self, kind: str) -> Any:
        """What ``kind`` names: a class, or of a router a function. Raises ValueError where there is none."""
        target = self.builtin.get(self.check(kind)) or _installed(self.group)[kind]
        module, _, name = target.partition(":")
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"{self.what} {kind} cannot be loaded from {target} ({error}); fix or uninstall its package"
            ) from None


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
    },
)
OBJECTIVES = Kinds(
    "objective kind",
    "mmmoe.objectives",
    {
        "contrastive": "mmmoe_pretrain.objectives.contrastive:Contrastive",
        "next_token": "mmmoe_pretrain.objectives.next_token:NextToken",
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


def parse_entries(
    kinds: Kinds, section: str, values: Any, explain: Callable[[Any, type[BaseModel], str], str]
) -> dict[str, Any]:
    """The entries of ``section`` by name, each an instance of its kind's ``Settings``. Raises ValueError that names
    everything that is wrong; ``explain`` turns one of pydantic's errors into a message."""
    if not isinstance(values, dict):
        raise ValueError(f"{section} holds {type(values).__name__}, not names with their settings")
    entries, problems = {}, []
    for name, value in values.items():
        try:
            entries[name] = _entry(kinds, name, value, f"{section}.{name}", explain)
        except ValueError as error:
            problems.append(str(error) if isinstance(error, _Explained) else f"{section}.{str(name)[:40]}: {error}")
    if problems:
        raise ValueError("; ".join(problems))
    return entries


class _Explained(ValueError):
    """A message that names the place already."""


def _entry(
    kinds: Kinds, name: Any, value: Any, where: str, explain: Callable[[Any, type[BaseModel], str], str]
) -> BaseModel:
    if problem := name_problem(name):
        raise ValueError(problem)
    if isinstance(value, BaseModel):
        return value
    if not isinstance(value, dict) or not isinstance(value.get("kind"), str):
        raise ValueError(
            f"it has no kind; give one of {', '.join(kinds.names)}, e.g. {{kind: {kinds.names[0]}}}. A config made "
            f"before there were kinds is rewritten by mmmoe config upgrade FILE"
        )
    settings: type[BaseModel] | None = getattr(kinds.load(value["kind"]), "Settings", None)
    if settings is None:
        raise ValueError(f"{kinds.what} {value['kind']} has no class Settings; fix or uninstall its package")
    try:
        return settings.model_validate(value)
    except ValidationError as error:
        items = error.errors(include_url=False)
        raise _Explained("; ".join(explain(item, settings, where) for item in items)) from None


def name_problem(name: Any) -> str | None:
    """Why a user may not choose ``name``, or None."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        return "a name is at most 40 lower-case letters, digits and _, beginning with a letter"
    if name in RESERVED:
        return f"the name is reserved by torch; choose e.g. {name}_1"
    return None


def stream_keys(kinds: Mapping[str, str]) -> dict[str, str]:
    """Name -> key of its random numbers: the kind, and a number for the second and later names of a kind. So adding a
    name does not change the numbers of others, and renaming one does not change its own."""
    keys, seen = {}, dict.fromkeys(kinds.values(), 0)
    for name, kind in kinds.items():
        keys[name] = kind if not seen[kind] else f"{kind}_{seen[kind]}"
        seen[kind] += 1
    return keys
