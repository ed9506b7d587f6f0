"""``mmmoe import``: an export becomes a run that begins at step 0 with these weights and moments of zero.

An export is not trusted: sizes of its JSON are limited, file names must stay inside the folder, only
safetensors are read, and every name, shape and type must be what the config's model has.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmmoe_pretrain import __version__
from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.checkpoint.model import CONFIG as RUN_CONFIG
from mmmoe_pretrain.checkpoint.model import TOKENIZER, buffers_of_objectives, meta_of_new_run, write_first
from mmmoe_pretrain.checkpoint.state import WholeState, model_key, optimizer_key, persistent_buffers
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.config.optimizer import AVERAGE
from mmmoe_pretrain.config.upgrade import OLD_MODALITIES, OLD_TASKS, upgraded
from mmmoe_pretrain.export import layout
from mmmoe_pretrain.export.layout import Weight
from mmmoe_pretrain.modalities import Modalities, Tokenizer, build_modalities
from mmmoe_pretrain.models.mmmoe import MMMoE
from mmmoe_pretrain.paths import VARIABLE, new_folder
from mmmoe_pretrain.untrusted import brief, read_json

MAX_JSON = 64 << 20  # bytes
OF_A_MACHINE = ("parallel", "checkpoint", "faults")  # sections, with paths and sizes from an untrusted file
SECTIONS_WITH_PATHS = (
    "data",
    "modalities",
    "objectives",
    "train",
    "trackers",
)  # beside evaluate, whose prompt may hold a $
SCORED_PATHS = ("test", "validation", "generate")  # of evaluate
# Until version 0.12 of MMMoE, exports of format version 1 had three fixed modalities and two tasks, and what is one
# tensor for each of them now was a row of one tensor.
VERSION_1 = 1
ROWS = {  # the ends of names without their last part -> what that part was stored as, and whose rows they are
    "modality_embedding": (".weight", OLD_MODALITIES),
    "router.task_embedding": ("", OLD_TASKS),
    "router.bias": ("", OLD_MODALITIES),
}
ALLOWED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def import_run(folder: Path, out: Path, overrides: Sequence[str] = ()) -> list[str]:
    """Make the run ``out`` of the export in ``folder``; returns a summary.

    ``overrides``: key=value of the new run. Raises ValueError where ``out`` exists, and where something of the
    export is missing, unknown, or not as in its config; then nothing is written.
    """
    if out.exists():
        raise ValueError(f"{out} exists; choose another --out, or remove it")
    described = _described(folder)
    places = _places(folder)
    with new_folder(out) as draft:
        config = _config_of_run(described, draft / RUN_CONFIG, out, overrides)
        _copy_tokenizer(folder, described, config, draft / TOKENIZER)
        _copy_files(folder, described, config, draft, out)
        if config.data.tokenizer not in (None, str(out / TOKENIZER)):  # of an override
            Tokenizer(config.data.tokenizer, expected_fingerprint=described["tokenizer_fingerprint"])
        _plausible(config, _headers(folder, places))
        weights = layout.weights_of(config)
        state = buffers_of_objectives(config)
        for weight, value in _read(folder, places, weights, described["format_version"]):
            state |= _state(weight, value, config.optimizer.state)
        config = config.with_vocabulary(described["vocab_size"])
        write_first(config, draft, 0, state, meta_of_new_run(config, described["tokenizer_fingerprint"]))
    return [f"wrote {out}: {len(weights)} tensors of step {described['step']}, now at step 0 with moments of zero",
            f"train it with: mmmoe train {out / RUN_CONFIG}"]  # fmt: skip


def load_export(folder: Path, device: torch.device | None = None) -> tuple[MMMoE, RunConfig, Modalities]:
    """The model of an export in eval mode and fp32 on ``device`` (default: the CPU), its config, and its modalities,
    which decode what goes in.

    Raises ValueError as ``import_run`` does.
    """
    described, places = _described(folder), _places(folder)
    values = _values(described, folder, _tokenizer(folder, described))
    config = run_config.parse(values, where=str(folder / layout.CONFIG))
    modalities = build_modalities(
        config.modalities, config.data.tokenizer, fingerprint=described["tokenizer_fingerprint"]
    )
    _plausible(config, _headers(folder, places))
    model = MMMoE(config.with_vocabulary(modalities.vocab_size))
    own = {f"mmmoe.{name}": p.data for name, p in model.named_parameters()}
    own |= {f"mmmoe.{name}": buffer for name, buffer in persistent_buffers(model).items()}
    weights = layout.weights_of(config)
    for weight, value in _read(folder, places, weights, described["format_version"]):
        if weight.name in own:  # the others are of the objectives
            own[weight.name].copy_(value)
    return model.eval().to(device), config, modalities


def _described(folder: Path) -> dict[str, Any]:
    value = _json(folder / layout.CONFIG)
    if value.get("model_type") != layout.FORMAT:
        raise ValueError(f"{folder / layout.CONFIG} is of model_type {brief(value.get('model_type'))}, not mmmoe")
    if value.get("format_version") not in (VERSION_1, layout.VERSION):
        raise ValueError(
            f"{folder} has format_version {brief(value.get('format_version'))}, and MMMoE {__version__} reads "
            f"{VERSION_1} and {layout.VERSION}; export it again with this version"
        )
    wanted = {"step": int, "vocab_size": int, "tokenizer": str, "tokenizer_fingerprint": str, "config": dict}
    for key, kind in wanted.items():
        if type(value.get(key)) is not kind:
            raise ValueError(
                f"{folder / layout.CONFIG}: {key} is {value.get(key)!r}, and should be of type {kind.__name__}"
            )
    return value


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} is missing; give the folder that mmmoe export wrote")
    return read_json(path, MAX_JSON)


def _plain(name: Any, what: str) -> str:
    """The name of a file of the export's own folder."""
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise ValueError(f"{what} {brief(name)} is not the plain name of a file of the export")
    return name


def _config_of_run(described: dict[str, Any], path: Path, out: Path, overrides: Sequence[str]) -> RunConfig:
    """The exported config as that of the run ``out``, written to ``path``. Its files are the new run's own, and the
    machine's settings (layout, checkpoints, fault limits) are the defaults or overrides."""
    tokenizer = out / TOKENIZER if described["tokenizer"] else None
    raw = {**_values(described, out, tokenizer), "name": out.name, "runs_dir": str(out.parent)}
    path.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")  # the order of names numbers them
    config = run_config.load(path, list(overrides))
    run_config.dump(config, path)
    return config


def _values(described: dict[str, Any], folder: Path, tokenizer: Path | None) -> dict[str, Any]:
    """Of the exported config, whose files are in ``folder``."""
    written = described["config"] if described["format_version"] == layout.VERSION else upgraded(described["config"])
    raw = {name: value for name, value in written.items() if name not in OF_A_MACHINE}
    with_paths = [_section(raw, name) for name in SECTIONS_WITH_PATHS]
    scored = _section(raw, "evaluate")
    found = VARIABLE.search(json.dumps([*with_paths, *(scored.get(name) for name in SCORED_PATHS)]))
    if found:  # an export has none, and the environment of this machine must not enter untrusted paths
        raise ValueError(f"{layout.CONFIG}: a path of its config holds {found[0]}; write the path out there")
    changed = {
        "data": {**_section(raw, "data"), "tokenizer": None if tokenizer is None else str(tokenizer)},
        "model": {**_section(raw, "model"), "vocab_size": described["vocab_size"]},
    }
    values = {**raw, **changed}
    for key, name in _files(described).items():
        section, _, rest = key.partition(".")
        entry, _, setting = rest.rpartition(".")
        entries = _section(values, section) if section in ("modalities", "objectives") else {}
        if not isinstance(entries.get(entry), dict) or setting not in entries[entry]:
            raise ValueError(f"{layout.CONFIG}: files names {brief(key)}, which is no setting of its config")
        values[section] = {**entries, entry: {**entries[entry], setting: str(folder / name)}}
    return values


def _files(described: dict[str, Any]) -> dict[str, str]:
    """The setting that names each file beside the tokenizer -> the file of the export. Exports of earlier versions
    have none."""
    files = described.get("files", {})
    if not isinstance(files, dict):
        raise ValueError(f"{layout.CONFIG}: files is {brief(files)}, and should be a section")
    return {key: _plain(name, f"{layout.CONFIG}: the file of {brief(key)}") for key, name in files.items()}


def _copy_files(folder: Path, described: dict[str, Any], config: RunConfig, draft: Path, out: Path) -> None:
    """Checked as the run's own; those that overrides name stay where they are."""
    names = set(_files(described).values())
    for its in config.used_files.values():
        own = next((name for name in names if its.file == str(out / name)), None)
        if own is not None:
            its.model_copy(update={its.file_setting: str(folder / own)}).with_file()
            shutil.copyfile(folder / own, draft / own)
        elif names:
            its.with_file()


def _section(raw: dict[str, Any], name: str) -> dict[str, Any]:
    section = raw.get(name, {})
    if not isinstance(section, dict):
        raise ValueError(f"{layout.CONFIG}: config.{name} is {brief(section)}, and should be a section")
    return section


def _tokenizer(folder: Path, described: dict[str, Any]) -> Path | None:
    """None where no modality reads text."""
    name = described["tokenizer"]
    return folder / _plain(name, f"{layout.CONFIG}: tokenizer") if name else None


def _copy_tokenizer(folder: Path, described: dict[str, Any], config: RunConfig, to: Path) -> None:
    path = _tokenizer(folder, described)
    if path is not None:
        config.with_vocabulary(Tokenizer(path, expected_fingerprint=described["tokenizer_fingerprint"]).vocab_size)
        shutil.copyfile(path, to)


def _places(folder: Path) -> dict[str, str]:
    """Name -> file, from the index."""
    found = _json(folder / layout.INDEX).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{folder / layout.INDEX} has no weight_map")
    return {name: _plain(file, f"{layout.INDEX}: file") for name, file in found.items()}


def _headers(folder: Path, places: dict[str, str]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of everything that the files hold, which must match the index."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(set(places.values())):
        with _opened(folder / file) as opened:
            _same_names(set(opened.keys()), {name for name, at in places.items() if at == file}, file)
            shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    return shapes


def _plausible(config: RunConfig, shapes: dict[str, tuple[int, ...]]) -> None:
    """Before a model is built: a config that names more blocks or experts than the files can hold would take
    forever."""
    largest = max(math.prod(shape) for shape in shapes.values())
    counts = {"model.num_layers": (config.model.num_layers, len(shapes)),
              "moe.num_experts": (max(config.moe.group_sizes), largest)}  # fmt: skip
    for key, (count, most) in counts.items():
        if count > most:
            raise ValueError(f"{layout.CONFIG}: {key} is {count}, and the files hold {len(shapes)} tensors, none of "
                             f"more than {largest} numbers")  # fmt: skip


def _read(
    folder: Path, places: dict[str, str], weights: Sequence[Weight], version: int
) -> Iterator[tuple[Weight, Tensor]]:
    """Every weight in fp32, checked; the files are mapped, not copied, where they hold fp32."""
    stored: dict[str, tuple[str, int | None]] = {weight.name: (weight.name, None) for weight in weights}
    if version == VERSION_1:
        stored = {name: stored_as(name) for name in stored}
    names = {name for name, _ in stored.values()}
    _same_names(set(places) if version == layout.VERSION else set(places) & names, names, layout.INDEX)
    for file in sorted(set(places.values())):
        with _opened(folder / file) as opened:
            for weight in weights:
                name, row = stored[weight.name]
                if places[name] == file:
                    yield weight, _tensor(opened, weight, name, row, file)


def stored_as(name: str) -> tuple[str, int | None]:
    """The tensor of such an export that holds the weight ``name``, and its row in it (None: all of it)."""
    head, _, last = name.rpartition(".")
    for ending, (stored, rows) in ROWS.items():
        if head.endswith(ending):
            return head + stored, rows.index(last) if last in rows else 0  # one bias for all is a single row
    for task in OLD_TASKS:
        name = name.replace(f"tasks.{task}.", f"{task}.", 1)
    return name, None


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise ValueError(f"{path} is missing, and {layout.INDEX} names it")
    try:
        with safe_open(path, framework="pt") as opened:
            yield opened
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no safetensors file: {error}") from None


def _same_names(found: set[str], expected: set[str], where: str) -> None:
    missing, unknown = sorted(expected - found), sorted(found - expected)
    if missing or unknown:
        raise ValueError(
            f"{where} does not hold the tensors that it should: missing {len(missing)} {missing[:3]}, unknown "
            f"{len(unknown)} {unknown[:3]}"
        )


def _tensor(opened: Any, weight: Weight, name: str, row: int | None, file: str) -> Tensor:
    piece = opened.get_slice(name)
    shape, dtype = tuple(piece.get_shape()), piece.get_dtype()
    if (shape if row is None else (int(row < shape[0]), *shape[1:])) != weight.shape:
        raise ValueError(f"{file}: {name} has shape {shape}, and the config's model {weight.shape} for {weight.name}")
    if dtype not in ALLOWED:
        raise ValueError(f"{file}: {name} is of type {dtype}; weights are {', '.join(ALLOWED)}")
    return (opened.get_tensor(name) if row is None else piece[row : row + 1]).float()


def _state(weight: Weight, value: Tensor, optimizer: Sequence[str]) -> WholeState:
    zero = torch.zeros([1] * len(weight.shape)).expand(weight.shape)  # takes no memory
    fresh = {
        optimizer_key(weight.name, tensor): value if tensor == AVERAGE else zero
        for tensor in optimizer
        if weight.trained
    }
    return {model_key(weight.name): value} | fresh
