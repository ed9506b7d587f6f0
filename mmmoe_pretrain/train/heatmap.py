"""A picture of tables: one panel a layer, a row an expert, a column a modality, shares as colour.

Owns the look and knows nothing of routing. The colours (viridis) can be told apart by colour-blind
readers and in print; every panel has one scale. Shapes: E experts, M modalities.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

MAX_COLUMNS = 6  # panels side by side
MAX_ANNOTATED_ROWS = 32  # with more experts the numbers would overlap
INK, QUIET = "#222222", "#6B6B6B"
ABSENT = "#E4E4E4"


@dataclass(frozen=True)
class Panel:
    """``share_EM``: columns sum to 1; a column of NaN is a modality without tokens."""

    title: str
    share_EM: np.ndarray
    columns: tuple[str, ...]


def draw(panels: Sequence[Panel], title: str) -> np.ndarray:
    """The picture as uint8 [height, width, 3]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    experts = max(len(panel.share_EM) for panel in panels)
    top = _top_of_scale(panels)
    columns = min(MAX_COLUMNS, len(panels))
    lines = math.ceil(len(panels) / columns)
    row_inches = 0.3 if experts <= MAX_ANNOTATED_ROWS else 0.12
    width = max(5.6, 0.62 * len(panels[0].columns) * columns + 0.35 * columns + 1.6)
    figure = Figure(figsize=(width, lines * (row_inches * experts + 0.75) + 0.75), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False)
    for ax in list(axes.flat)[len(panels) :]:
        ax.set_axis_off()
    for ax, panel in zip(axes.flat, panels, strict=False):
        image = _panel(ax, panel, top)
    for row in axes:
        row[0].set_ylabel("expert", color=QUIET, fontsize=9)
    bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=25, format="{x:.0f}%")
    bar.set_label("share of the modality's assignments", color=QUIET, fontsize=9)
    bar.ax.tick_params(labelsize=8, length=0, colors=QUIET)
    bar.outline.set_visible(False)
    even = 100 / experts
    figure.suptitle(f"{title}  (even share: {even:.3g}%)", color=INK, fontsize=11)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def save(image_HWC: np.ndarray, path: Path) -> None:
    """Write a PNG that is never seen half-written."""
    from PIL import Image

    whole = path.with_name(path.name + ".tmp")
    Image.fromarray(image_HWC).save(whole, format="PNG", optimize=True)
    whole.replace(path)


def _top_of_scale(panels: Sequence[Panel]) -> float:
    """In percent: the largest share, and no less than twice an even one, so that noise looks even."""
    largest = max(float(np.nan_to_num(panel.share_EM).max()) for panel in panels)
    even = max(1.0 / len(panel.share_EM) for panel in panels)
    return 100 * min(1.0, max(largest, 2 * even))


def _panel(ax: Axes, panel: Panel, top: float) -> AxesImage:
    percent_EM = 100 * panel.share_EM
    experts, modalities = percent_EM.shape
    ax.set_facecolor(ABSENT)
    image = ax.imshow(percent_EM, cmap="viridis", vmin=0, vmax=top, aspect="auto", interpolation="nearest")
    ax.set_title(panel.title, color=INK, fontsize=10)
    ax.set_xticks(range(modalities), panel.columns, fontsize=9, color=INK)
    step = 1 if experts <= MAX_ANNOTATED_ROWS else 8
    ax.set_yticks(range(0, experts, step), [str(e) for e in range(0, experts, step)], fontsize=8, color=QUIET)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_xticks(np.arange(modalities + 1) - 0.5, minor=True)
    ax.grid(which="minor", axis="x", color="white", linewidth=2)
    ax.tick_params(which="minor", length=0)
    for modality in np.flatnonzero(np.isnan(percent_EM).all(axis=0)).tolist():
        ax.text(modality, (experts - 1) / 2, "no tokens", rotation=90, ha="center", va="center", color=QUIET)
    if experts <= MAX_ANNOTATED_ROWS:
        _annotate(ax, percent_EM, top)
    return image


def _annotate(ax: Axes, percent_EM: np.ndarray, top: float) -> None:
    for (expert, modality), value in np.ndenumerate(percent_EM):
        if np.isnan(value):
            continue
        text = "0" if value == 0 else "<1" if value < 1 else f"{value:.0f}"
        colour = INK if value > 0.6 * top else "white"
        ax.text(modality, expert, text, ha="center", va="center", fontsize=8.5, color=colour)
