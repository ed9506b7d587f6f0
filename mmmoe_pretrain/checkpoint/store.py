"""Writing, finding and reading checkpoints of a run.

A checkpoint is a folder ``step_00000100`` under ``RUN/checkpoints``: the tensors by
torch.distributed.checkpoint under ``model/NAME`` and ``optimizer/NAME/exp_avg(_sq)`` in their
full logical shape, and ``meta.json``. It is written under ``.tmp``, renamed when it is whole,
and only then does the file ``latest`` name it; a killed writer leaves the one before.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from mmmoe_pretrain.checkpoint.state import ParameterState
from mmmoe_pretrain.parallel.groups import SINGLE, Groups

FOLDER = "checkpoints"
LATEST = "latest"
STEP = re.compile(r"step_(\d{8})")


def save(
    run_dir: Path, step: int, state: dict[str, ParameterState], groups: Groups, meta: dict[str, Any], keep: int
) -> Path:
    """Write the checkpoint of ``step`` from all ranks and keep the last ``keep`` of them."""
    root = run_dir / FOLDER
    final, draft = root / f"step_{step:08d}", root / f"step_{step:08d}.tmp"
    if dist.get_rank() == 0:
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(draft, ignore_errors=True)
    dist.barrier()
    dcp.save(_tensors(state, groups), checkpoint_id=draft)
    if dist.get_rank() == 0:
        _commit(draft, final, {"step": step, **meta})
        for old in _complete(root)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def find_latest(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    root = run_dir / FOLDER
    pointer = root / LATEST
    if pointer.is_file():
        named = root / pointer.read_text(encoding="utf-8").strip()
        if _is_complete(named):
            return named
    complete = _complete(root)
    return complete[-1] if complete else None


def read_meta(checkpoint: Path) -> dict[str, Any]:
    """The facts saved beside the tensors; ``step`` among them."""
    return json.loads((checkpoint / "meta.json").read_text(encoding="utf-8"))


def load(checkpoint: Path, like: dict[str, ParameterState], groups: Groups) -> dict[str, ParameterState]:
    """The state of ``checkpoint`` cut for this rank; ``like`` gives names and local shapes."""
    state = {name: parameter.clone() for name, parameter in like.items()}
    tensors = _tensors(state, groups)
    _check_tensors(checkpoint, tensors, exactly=True)
    dcp.load(tensors, checkpoint_id=checkpoint)
    return state


def load_weights(checkpoint: Path, weights: dict[str, Tensor]) -> None:
    """Fill full tensors in place, by logical name, in a process without a process group."""
    tensors = {f"model/{name}": tensor for name, tensor in weights.items()}
    _check_tensors(checkpoint, tensors, exactly=False)
    with _alone():
        dcp.load(tensors, checkpoint_id=checkpoint, no_dist=True)


def read_state(checkpoint: Path) -> dict[str, ParameterState]:
    """Everything that a checkpoint holds, in full, in a process without a process group."""
    stored = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    tensors = {
        key: torch.empty(item.size, dtype=item.properties.dtype)
        for key, item in stored.items()
        if isinstance(item, TensorStorageMetadata)
    }
    with _alone():
        dcp.load(tensors, checkpoint_id=checkpoint, no_dist=True)
    names = [key.removeprefix("model/") for key in tensors if key.startswith("model/")]
    return {
        name: ParameterState(
            tensors[f"model/{name}"],
            tensors.get(f"optimizer/{name}/exp_avg"),
            tensors.get(f"optimizer/{name}/exp_avg_sq"),
            expert_axis=False,  # nothing is cut
        )
        for name in names
    }


def write_state(run_dir: Path, step: int, state: dict[str, ParameterState], meta: dict[str, Any]) -> Path:
    """``save`` of full tensors from a process without a process group."""
    root = run_dir / FOLDER
    final, draft = root / f"step_{step:08d}", root / f"step_{step:08d}.tmp"
    root.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(draft, ignore_errors=True)
    with _alone():
        dcp.save(_tensors(state, SINGLE), checkpoint_id=draft, no_dist=True)
    _commit(draft, final, {**meta, "step": step})
    return final


@contextmanager
def _alone() -> Iterator[None]:
    """Without torch's remarks that a process group is missing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no_dist.*|.*single process.*")
        yield


def _tensors(state: dict[str, ParameterState], groups: Groups) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, parameter in state.items():
        tensors |= {key: _logical(t, parameter, groups) for key, t in parameter.tensors(name).items()}
    return tensors


def _logical(tensor: Tensor, parameter: ParameterState, groups: Groups) -> Tensor:
    """This rank's experts as a piece of the tensor over all experts."""
    if not parameter.expert_axis or groups.expert_size == 1:
        return tensor
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Replicate, Shard

    ranks = torch.arange(groups.data_size).view(groups.expert_data_size, groups.expert_size)
    assert groups.expert is not None and groups.expert_data is not None
    assert dist.get_process_group_ranks(groups.expert) == ranks[groups.data_rank // groups.expert_size].tolist()
    mesh = DeviceMesh.from_group(
        [groups.expert_data, groups.expert], tensor.device.type, mesh=ranks, mesh_dim_names=("expert_data", "expert")
    )
    return DTensor.from_local(tensor, mesh, [Replicate(), Shard(0)], run_check=False)


def _check_tensors(checkpoint: Path, wanted: dict[str, Tensor], exactly: bool) -> None:
    """Refuse names that are missing, names too many (if ``exactly``) and other shapes."""
    stored = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    problems = [f"lacks {name}" for name in sorted(wanted.keys() - stored.keys())]
    if exactly:
        problems += [f"has {name}, which this model has not" for name in sorted(stored.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & stored.keys()):
        size = getattr(stored[name], "size", None)
        if size != wanted[name].shape:
            problems.append(f"has {name} as {list(size or [])}, and this model {list(wanted[name].shape)}")
    if problems:
        raise ValueError(
            f"{checkpoint} is of another model: it {'; '.join(problems[:3])} ({len(problems)} such in all); "
            f"it was saved under the config in {checkpoint.parents[1] / 'config.yaml'}"
        )


def _commit(draft: Path, final: Path, meta: dict[str, Any]) -> None:
    """Make a written draft the newest checkpoint."""
    (draft / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    if final.exists():  # of a run that went on from an earlier checkpoint
        shutil.rmtree(final)
    os.replace(draft, final)
    _point_latest(final.parent, final.name)


def _point_latest(root: Path, name: str) -> None:
    draft = root / f"{LATEST}.tmp"
    draft.write_text(name + "\n", encoding="utf-8")
    os.replace(draft, root / LATEST)


def _complete(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("step_*") if STEP.fullmatch(path.name) and _is_complete(path))


def _is_complete(path: Path) -> bool:
    return (path / "meta.json").is_file() and (path / ".metadata").is_file()
