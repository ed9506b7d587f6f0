"""Heat maps: one panel a layer, a row an expert, a column a modality, shares as colour.

Owns the look, not the numbers. The colours (viridis) can be distinguished by colour-blind readers and in print; all
panels have one scale. Shapes: E experts, M modalities.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

MAX_COLUMNS = 6  # panels side by side
MANY_CELLS = 1000
BAR_INCHES = 6.0
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
    """uint8 [height, width, 3]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    experts = max(len(panel.share_EM) for panel in panels)
    even = max(1.0 / len(panel.share_EM) for panel in panels)
    top, largest = scale_top([panel.share_EM for panel in panels])
    top = 100 * min(1.0, max(top, 2 * even))  # so that noise looks even
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
        colours = _panel(ax, panel, top)
    for row in axes:
        row[0].set_ylabel("expert", color=QUIET, fontsize=9)
    colour_bar(figure, colours, axes, "share of the modality's assignments", 100 * largest)
    shares = {f"{100 / len(panel.share_EM):.3g}%" for panel in panels}
    figure.suptitle(f"{title}  (even share: {', '.join(sorted(shares))})", color=INK, fontsize=11)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def save(image_HWC: np.ndarray, path: Path) -> None:
    """Write a PNG atomically."""
    from PIL import Image

    whole = path.with_name(path.name + ".tmp")
    Image.fromarray(image_HWC).save(whole, format="PNG", optimize=True)
    whole.replace(path)


def scale_top(shares: Sequence[np.ndarray]) -> tuple[float, float]:
    """Where the colours end, and the largest share. The two are equal, except that one in a hundred of many shares
    may exceed the colours, so that a single large one does not darken all others."""
    values = np.concatenate([np.ravel(share) for share in shares])
    values = values[~np.isnan(values)]
    largest = float(values.max(initial=0.0))
    top = largest if values.size < MANY_CELLS else float(np.quantile(values, 0.99))
    return top or largest or 1.0, largest


def colour_bar(figure: Figure, colours: Any, axes: Any, label: str, largest: float) -> None:
    """A colour bar of percentages; with a point if values exceed the colours, and no taller than ``BAR_INCHES``."""
    bar = figure.colorbar(
        colours, ax=axes, pad=0.02, aspect=25, shrink=min(1.0, BAR_INCHES / figure.get_size_inches()[1]),
        anchor=(0, 1), format="{x:.3g}%", extend="max" if largest > colours.norm.vmax else "neither",
    )  # fmt: skip
    bar.set_label(label, color=QUIET, fontsize=9)
    bar.ax.tick_params(labelsize=8, length=0, colors=QUIET)
    bar.outline.set_visible(False)


def _panel(ax: Axes, panel: Panel, top: float) -> AxesImage:
    percent_EM = 100 * panel.share_EM
    experts, modalities = percent_EM.shape
    ax.set_facecolor(ABSENT)
    shown = ax.imshow(percent_EM, cmap="viridis", vmin=0, vmax=top, aspect="auto", interpolation="nearest")
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
        annotate(ax, percent_EM, top, 8.5)
    return shown


def annotate(ax: Axes, percent: np.ndarray, top: float, font_size: float) -> None:
    """The numbers in the cells of a map whose colours end at ``top``."""
    for (row, column), value in np.ndenumerate(percent):
        if np.isnan(value):
            continue
        text = "0" if value == 0 else "<1" if value < 1 else f"{value:.0f}"
        colour = INK if value > 0.6 * top else "white"
        ax.text(column, row, text, ha="center", va="center", fontsize=font_size, color=colour)
