"""Where exports of format version 1 keep a weight.

Until version 0.12 of MMMoE there were three fixed modalities and two tasks, and what is one tensor for each of them
now was a row of one tensor. ``config/upgrade.py`` reads the config of such an export.
"""

from __future__ import annotations

from mmmoe_pretrain.config.upgrade import OLD_MODALITIES, OLD_TASKS

VERSION = 1
ROWS = {  # the ends of names without their last part -> what that part was stored as, and whose rows they are
    "modality_embedding": (".weight", OLD_MODALITIES),
    "router.task_embedding": ("", OLD_TASKS),
    "router.bias": ("", OLD_MODALITIES),
}


def stored_as(name: str) -> tuple[str, int | None]:
    """The tensor of such an export that holds the weight ``name``, and its row in it (None: all of it)."""
    head, _, last = name.rpartition(".")
    for ending, (stored, rows) in ROWS.items():
        if head.endswith(ending):
            return head + stored, rows.index(last) if last in rows else 0  # one bias for all is a single row
    for task in OLD_TASKS:
        name = name.replace(f"tasks.{task}.", f"{task}.", 1)
    return name, None
