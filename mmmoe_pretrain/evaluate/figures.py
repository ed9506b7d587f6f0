"""The figure of ``mmmoe evaluate``: which experts serve which modality.

Owns its look. Colours of modalities are of Okabe and Ito's palette, which colour-blind readers can distinguish.
Shapes: E experts, M modalities.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmmoe_pretrain.evaluate.heatmap import INK, QUIET, grid, label_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000")
BAR_COLUMNS = 3


def colour(modality: int) -> str:
    """The colour of the modality with this number."""
    return COLOURS[modality % len(COLOURS)]


def shares(layers: Sequence[dict[str, Any]], modalities: Sequence[str], path: Path) -> bool:
    """Bars that show how each expert's share of all assignments is made up, every modality weighing the same; the
    dashed line is an even share. Experts are sorted by the modality that uses them most, unused ones last. False, and
    no file, where no layer has two experts to compare."""
    mixed = [layer for layer in layers if layer["experts"] > 1 and layer["share"]]
    if not mixed:
        return False
    width = min(5.2, max(3.4, 0.26 * mixed[0]["experts"] + 1.2))
    figure, axes = grid(len(mixed), BAR_COLUMNS, (width, 2.9), (0, 0.5), dpi=160, layout="tight", sharey=True)
    for ax, layer in zip(axes.flat, mixed, strict=False):
        _bars(ax, layer, modalities)
    label_axes(axes, "share of assignments", "expert")
    handles, names = axes.flat[0].get_legend_handles_labels()
    figure.suptitle("Which experts serve which modality", x=0.01, ha="left", color=INK, fontsize=13, weight="bold")
    figure.legend(handles, names, loc="upper right", ncols=len(names), frameon=False, fontsize=10, handlelength=1.0)
    figure.savefig(path, facecolor="white")
    return True


def _bars(ax: Axes, layer: dict[str, Any], modalities: Sequence[str]) -> None:
    seen = [(m, name) for m, name in enumerate(modalities) if name in layer["share"]]
    share_ME = np.array([layer["share"][name] for _, name in seen])
    order = expert_order(share_ME)
    base = np.zeros(len(order))
    for (m, name), share_E in zip(seen, 100 * share_ME[:, order] / len(seen), strict=True):
        ax.bar(range(len(order)), share_E, bottom=base, width=0.84, color=colour(m), label=name)
        base += share_E
    ax.axhline(100 / len(order), color=INK, linewidth=0.8, linestyle=(0, (4, 3)), alpha=0.6)
    compared = f"{layer['specialisation']:.0%}, untrained {layer['specialisation_untrained']:.0%}"
    _style_percent(ax, f"layer {layer['layer']}\nspecialisation {compared}")
    # more than 64 names would not be legible
    ticks = [(place, str(expert)) for place, expert in enumerate(order) if len(order) <= 64]
    ax.set_xticks([place for place, _ in ticks], [name for _, name in ticks], fontsize=8 if len(order) <= 16 else 6)
    ax.set_xlim(-0.6, len(order) - 0.4)


def expert_order(share_ME: np.ndarray) -> list[int]:
    """Experts by the modality that uses them most, the purest first; unused experts last."""
    purity_ME = share_ME / np.maximum(share_ME.sum(axis=0), 1e-12)
    main_E = np.where(share_ME.any(axis=0), share_ME.argmax(axis=0), len(share_ME) - 1)
    return sorted(range(share_ME.shape[1]), key=lambda e: (main_E[e], -purity_ME[main_E[e], e], e))


def _style_percent(ax: Axes, title: str) -> None:
    """Title, and grid lines at percentages."""
    ax.set_title(title, fontsize=10, color=INK, loc="left")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0f}%")
    ax.tick_params(length=0, labelsize=8, colors=QUIET)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.grid(axis="y", color="#E6E6E6", linewidth=0.7)
    ax.set_axisbelow(True)
