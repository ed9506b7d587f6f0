"""Turns pydantic's errors about a config into messages with the key, the value and the remedy."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel

from mmmoe_pretrain.config.base import StrictModel
from mmmoe_pretrain.untrusted import brief


def causes(items: list[Any]) -> list[Any]:
    """Without errors on the length of lists whose entries are wrong; those have their own errors."""

    def follows(item: Any) -> bool:
        inside = (other["loc"][: len(item["loc"])] for other in items if len(other["loc"]) > len(item["loc"]))
        return item["type"] == "too_short" and item["loc"] in inside

    return [item for item in items if not follows(item)]


def explain(item: Any, model: type[BaseModel], where: str = "") -> str:
    """The message of one of pydantic's errors about ``model`` at ``where``."""
    location = ".".join(str(part) for part in (where, *item["loc"]) if part != "")
    if item["type"] == "extra_forbidden":
        known = _siblings(item["loc"], model)
        close = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
        return f"unknown key {location!r}; {hint}"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "missing":
        return f"{location}: required, and missing"
    if item["type"] == "value_error":
        return f"{where}: {message}" if where else message
    null = item["type"] == "string_type" and item["input"] is None
    hint = "; YAML reads ~ alone as null, so write $HOME" if null else ""
    return f"{location}: {message} (got {brief(item['input'])}{hint})"


def _siblings(location: tuple[Any, ...], model: Any) -> list[str]:
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        args = [a for a in getattr(annotation, "__args__", ()) if isinstance(a, type) and issubclass(a, StrictModel)]
        model = args[0] if args else annotation
    return list(model.model_fields)
