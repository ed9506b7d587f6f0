"""Whether a run, or the record of one, was made with the settings that its study has now."""

from __future__ import annotations

from typing import Any

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.train.start import differences

# What a run decides by itself, and settings that change neither its model nor its scores.
NOT_COMPARED = ("runs_dir", "checkpoint", "trackers", "model.vocab_size", "train.cpu", "train.heatmap_every",
                "data.num_workers")  # fmt: skip
FILLED_IN = "fingerprint"  # by a run, of the file that an entry of these sections names
ENTRIES = ("modalities", "objectives")


def refuse_other_settings(config: RunConfig) -> None:
    """Raises ValueError where the run was begun with other settings: its record would be of neither."""
    saved = config.run_dir / "config.yaml"
    if saved.is_file() and (changes := changed(run_config.load(saved).model_dump(mode="json"), config)):
        raise ValueError(
            f"{config.run_dir} was begun with other settings ({'; '.join(changes)}); set them back, or remove the "
            f"folder to train it anew"
        )


def changed(before: dict[str, Any], now: RunConfig) -> list[str]:
    """The settings that differ and matter to a comparison. What ``before`` lacks had its default."""
    values = now.model_dump(mode="json")
    filled = _filled(before, values, now.model_dump(mode="json", exclude_defaults=True))
    return list(differences(_compared(filled), _compared(values)))


def _filled(before: Any, now: Any, not_default: Any) -> Any:
    """``before`` with the values of ``now`` that it lacks, but for those of ``not_default``."""
    if _are_lists(before, now, not_default):
        return [_filled(*each) for each in zip(before, now, not_default, strict=True)]
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return before
    given = not_default if isinstance(not_default, dict) else {}
    lacking = {key: value for key, value in now.items() if key not in before and key not in given}
    return {key: _filled(value, now.get(key), given.get(key)) for key, value in before.items()} | lacking


def _are_lists(*values: Any) -> bool:
    return all(isinstance(value, list) for value in values) and len({len(value) for value in values}) == 1


def _compared(values: dict[str, Any]) -> dict[str, Any]:
    """Without the settings that are not compared; ``values`` stays as it is."""
    values = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    for section, _, name in (key.rpartition(".") for key in NOT_COMPARED):
        (values.get(section, {}) if section else values).pop(name, None)
    for section in ENTRIES:
        entries = values.get(section, {}).items()
        values[section] = {name: {k: v for k, v in its.items() if k != FILLED_IN} for name, its in entries}
    return values
