"""What the folders and files of a checkpoint are called.

ROOT/latest                           the name of the newest checkpoint
ROOT/step_00000100/rank_00000.safetensors ...
                   index.json         every logical tensor: shape, dtype, and where its boxes stand in boxes.bin
                   boxes.bin          in which file each box is, and where (boxes.py)
                   meta.json          facts of the run
                   manifest.json      sizes and hashes of the others; written last, it makes the whole complete
ROOT/step_00000100.tmp                a draft
ROOT/step_00000100.old.tmp            a checkpoint that its draft is about to replace: whole
ROOT/step_00000100.gone.tmp           one that is being deleted
"""

from __future__ import annotations

import re
from dataclasses import dataclass

LATEST = "latest"
INDEX, BOXES, META, MANIFEST = "index.json", "boxes.bin", "meta.json", "manifest.json"
DRAFT, OLD, GONE = ".tmp", ".old.tmp", ".gone.tmp"
FOLDER = re.compile(r"step_(\d{8,18})")
LEFTOVER = re.compile(rf"{FOLDER.pattern}(\.old|\.gone)?\.tmp")
FILE = re.compile(r"rank_\d{5,9}\.safetensors|index\.json|boxes\.bin|meta\.json|manifest\.json")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint; ``str()`` gives its path or URL."""

    root: str
    name: str
    step: int

    def __str__(self) -> str:
        return f"{self.root.rstrip('/')}/{self.name}"


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def checkpoint_at(root: str, name: str) -> Checkpoint | None:
    """The checkpoint that a folder of this name would be; None for any other name."""
    match = FOLDER.fullmatch(name)
    step = int(match[1]) if match else 0
    return Checkpoint(root, name, step) if match and folder_name(step) == name else None
