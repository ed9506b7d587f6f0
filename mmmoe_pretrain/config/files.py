"""A run's YAML file, read with ``key=value`` overrides, and written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from mmmoe_pretrain.config.base import explain
from mmmoe_pretrain.config.other_names import OURS
from mmmoe_pretrain.config.run import RunConfig
from mmmoe_pretrain.config.upgrade import needs_upgrade
from mmmoe_pretrain.untrusted import brief, parse_yaml, read_yaml
from mmmoe_pretrain.urls import shown

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
    return parse(
        raw,
        where=" ".join(
            [str(path), *(["with", *(brief(shown(override)) for override in overrides)] if overrides else [])]
        ),
    )


def parse(raw: dict[str, Any], where: str = "config") -> RunConfig:
    """A RunConfig from plain values, with errors a user can act on."""
    if needs_upgrade(raw) and {"modalities", "objectives", "data"} & raw.keys():
        raise ValueError(
            f"{where} has no kind of modality and objective: it was made for an earlier version, or is incomplete. "
            f"An old one is rewritten by mmmoe config upgrade FILE; configs/demo.yaml shows a new one"
        )
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        lines = explain(error, other_names=OURS)
        more = f"; and {len(lines) - MOST_LINES} more" if len(lines) > MOST_LINES else ""
        raise ValueError(f"{where}: {'; '.join(line[:LONGEST_LINE] for line in lines[:MOST_LINES])}{more}") from None


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
        place = _place(node, part, override)
        node = node.setdefault(place, {}) if isinstance(node, dict) else node[place]
        if not isinstance(node, dict | list):
            raise ValueError(f"override {brief(override)}: {brief(part)} is a value ({brief(node)}), not a section")
    value = parse_yaml(text, f"override {brief(override)}")
    node[_place(node, leaf, override)] = value


def _place(node: dict[Any, Any] | list[Any], part: str, override: str) -> Any:
    """The key or index that ``part`` names: YAML makes numbers of some keys (moe.layers: {3: ...})."""
    if isinstance(node, dict):
        return next((key for key in node if str(key) == part), part)
    if not (part.isdecimal() and len(part) < 10 and int(part) < len(node)):
        raise ValueError(f"override {brief(override)}: {brief(part)} is not an index of a list of {len(node)}")
    return int(part)
