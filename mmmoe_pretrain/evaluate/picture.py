"""``routing.png``: which experts serve which modality, one panel a mixture layer.

Owns the picture. Bars show how an expert's share of all assignments is made up, every modality
weighing the same; the dashed line is an even share. Experts stand in the order of the modality that
uses them most, so that specialists stand together, and unused ones at the end. Colours are of Okabe
and Ito's palette, which colour-blind readers can tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmmoe_pretrain.batch import MODALITIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"image": "#0072B2", "audio": "#E69F00", "text": "#009E73"}
INK, QUIET = "#222222", "#6B6B6B"
MAX_COLUMNS = 3


def draw(layers: Sequence[dict[str, Any]], path: Path) -> bool:
    """Draw the layers' shares; False, and no file, where no layer has two experts to compare."""
    mixed = [layer for layer in layers if layer["experts"] > 1 and layer["share"]]
    if not mixed:
        return False
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    columns = min(MAX_COLUMNS, len(mixed))
    lines = math.ceil(len(mixed) / columns)
    width = min(5.2, max(3.4, 0.26 * mixed[0]["experts"] + 1.2))
    size = (max(6.6, width * columns), 2.9 * lines + 0.5)
    figure = Figure(figsize=size)
    axes = figure.subplots(lines, columns, sharey=True, squeeze=False)
    for ax, layer in zip(axes.flat, mixed, strict=False):
        _panel(ax, layer)
    for ax in list(axes.flat)[len(mixed) :]:
        ax.set_axis_off()
    for row in axes:
        row[0].set_ylabel("share of assignments", color=QUIET, fontsize=9)
    handles, names = axes.flat[0].get_legend_handles_labels()
    figure.suptitle("Which experts serve which modality", x=0.01, ha="left", color=INK, fontsize=13, weight="bold")
    figure.legend(handles, names, loc="upper right", ncols=len(names), frameon=False, fontsize=10, handlelength=1.0)
    figure.tight_layout(h_pad=1.6)
    figure.savefig(path, dpi=160, facecolor="white")
    return True


def _panel(ax: Axes, layer: dict[str, Any]) -> None:
    names = [m for m in MODALITIES if m in layer["share"]]
    share_ME = np.array([layer["share"][m] for m in names])
    order = expert_order(share_ME)
    base = np.zeros(len(order))
    for name, share_E in zip(names, share_ME[:, order] / len(names), strict=True):
        ax.bar(range(len(order)), share_E, bottom=base, width=0.84, color=COLOURS[name], label=name)
        base += share_E
    ax.axhline(1 / len(order), color=INK, linewidth=0.8, linestyle=(0, (4, 3)), alpha=0.6)
    ax.set_title(
        f"layer {layer['layer']}\nspecialisation {layer['specialisation']:.0%}, "
        f"untrained {layer['specialisation_untrained']:.0%}",
        loc="left",
        fontsize=9.5,
        color=INK,
    )
    if len(order) <= 64:  # more names would not be legible
        ax.set_xticks(range(len(order)), [str(e) for e in order], fontsize=8 if len(order) <= 16 else 6)
    else:
        ax.set_xticks([])
    ax.set_xlim(-0.6, len(order) - 0.4)
    ax.set_xlabel("expert", color=QUIET, fontsize=9)
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    ax.tick_params(axis="y", labelsize=8)
    ax.tick_params(length=0, colors=QUIET)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.grid(axis="y", color="#E6E6E6", linewidth=0.7)
    ax.set_axisbelow(True)


def expert_order(share_ME: np.ndarray) -> list[int]:
    """Experts by the modality that uses them most, the purest first; unused experts last."""
    purity_ME = share_ME / np.maximum(share_ME.sum(axis=0), 1e-12)
    favourite = np.where(share_ME.any(axis=0), share_ME.argmax(axis=0), len(share_ME) - 1)
    return sorted(range(share_ME.shape[1]), key=lambda e: (favourite[e], -purity_ME[favourite[e], e], e))
