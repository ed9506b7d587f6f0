"""``mmmoe export``: a checkpoint's weights into files that other programs read.

One file's tensors are in memory at a time. Everything is written under ``NAME.tmp`` and renamed at the end.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mmmoe_pretrain import __version__
from mmmoe_pretrain.checkpoint import store
from mmmoe_pretrain.checkpoint.model import SavedRun, copy_of, open_run
from mmmoe_pretrain.config.base import FileSettings
from mmmoe_pretrain.export import card, layout
from mmmoe_pretrain.export.layout import Weight
from mmmoe_pretrain.modalities import copy_tokenizer
from mmmoe_pretrain.paths import new_folder

PLACES = ("data", "evaluate", "checkpoint")  # sections with paths


def export_run(
    run_dir: Path,
    out: Path,
    *,
    step: int | None = None,
    overrides: Sequence[str] = (),
    dtype: str = "fp32",
    overwrite: bool = False,
    license_id: str = card.UNKNOWN_LICENSE,
    file_bytes: int = layout.FILE_BYTES,
) -> list[str]:
    """Write the checkpoint of ``step`` (default: the newest) to the folder ``out``; returns a summary.

    Raises ValueError where there is no such checkpoint, it is damaged, the tokenizer or another file of its config is
    not the one that it was trained with, or ``out`` exists and ``overwrite`` does not allow to replace an earlier
    export.
    """
    if dtype not in layout.DTYPES:
        raise ValueError(f"--dtype {dtype}: choose one of {', '.join(layout.DTYPES)}")
    for override in overrides:
        if override.partition("=")[0].partition(".")[0] not in PLACES:
            raise ValueError(
                f"{override}: an export has the settings of its training; what can be given is in {', '.join(PLACES)}"
            )
    _check_out(out, overwrite)
    source = open_run(run_dir, overrides, step)
    weights = layout.weights_of(source.config, dtype)
    with new_folder(out, replace=overwrite) as draft:
        fingerprint = source.meta["tokenizer_fingerprint"]
        if fingerprint:  # empty where no modality reads text
            copy_tokenizer(source.config.data.tokenizer or "", draft / layout.TOKENIZER, fingerprint)
        for place, its in source.config.used_files.items():
            its.with_file()  # raises ValueError where it is another
            shutil.copyfile(its.file, draft / copy_of(place, its))
        files = layout.in_files(weights, file_bytes)
        for name, held in files.items():
            _write_file(source.checkpoint, held, draft / name)
        _write_json(draft / layout.INDEX, _index(files))
        described = _describe(source, weights, dtype)
        _write_json(draft / layout.CONFIG, described)
        facts = card.facts_of(run_dir, source.config, described, license_id)
        (draft / layout.CARD).write_text(card.page(facts), encoding="utf-8")
    size = sum(weight.bytes for weight in weights)
    return [f"wrote {out}: step {source.checkpoint.step}, {len(weights)} tensors in {len(files)} "
            f"file{'s' * (len(files) > 1)}, {size / 1e6:,.1f} MB"]  # fmt: skip


def _describe(source: SavedRun, weights: Sequence[Weight], dtype: str) -> dict[str, Any]:
    """The values of config.json."""
    total, active = layout.parameter_counts(source.config, list(weights))
    used = source.config.used_files
    own = source.config.with_entries({place: _moved(its, copy_of(place, its)) for place, its in used.items()})
    return {
        "model_type": layout.FORMAT,
        "format_version": layout.VERSION,
        "mmmoe_version": __version__,
        "step": source.checkpoint.step,
        "dtype": dtype,
        "vocab_size": source.config.model.vocab_size,
        "tokenizer": layout.TOKENIZER if source.meta["tokenizer_fingerprint"] else "",
        "tokenizer_fingerprint": source.meta["tokenizer_fingerprint"],
        "files": {f"{place}.{its.file_setting}": copy_of(place, its) for place, its in used.items()},
        "parameters": {"total": total, "active": active},
        "config": own.model_dump(mode="json"),
    }


def _moved(settings: FileSettings, file: str) -> FileSettings:
    return settings.model_copy(update={settings.file_setting: file})


def _check_out(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not overwrite:
        raise ValueError(f"{out} exists; choose another --out, or replace an earlier export with --overwrite")
    if not (out / layout.INDEX).is_file():
        raise ValueError(f"{out} is not an export (it has no {layout.INDEX}) and is not replaced; change --out")


def _write_file(checkpoint: store.Checkpoint, weights: Sequence[Weight], path: Path) -> None:
    tensors = {weight.name: torch.empty(weight.shape) for weight in weights}
    store.load_weights(checkpoint, tensors)
    path.touch()
    mode = path.stat().st_mode  # by the umask; safetensors creates files with mode 0600
    save_file({w.name: tensors[w.name].to(w.dtype) for w in weights}, path, metadata={"format": "pt"})
    path.chmod(mode)


def _index(files: dict[str, list[Weight]]) -> dict[str, Any]:
    total = sum(weight.bytes for held in files.values() for weight in held)
    return {
        "metadata": {"total_size": total},
        "weight_map": {weight.name: name for name, held in files.items() for weight in held},
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
