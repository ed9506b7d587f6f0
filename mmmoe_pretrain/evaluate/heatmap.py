"""Heat maps: one panel a layer, a row an expert, a column a modality, shares as colour; and what other figures share.

Owns the look, not the numbers. The colours (viridis) can be distinguished by colour-blind readers and in print; all
panels have one scale. Shapes: E experts, M modalities.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_COLUMNS = 6  # panels side by side
MANY_CELLS = 1000
BAR_INCHES = 6.0
MAX_ANNOTATED = 32  # rows; with more experts the numbers would overlap
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

    experts = max(len(panel.share_EM) for panel in panels)
    even = max(1.0 / len(panel.share_EM) for panel in panels)
    top, largest = scale_top([panel.share_EM for panel in panels])
    top = min(100.0, max(top, 200 * even))  # so that noise looks even
    row_inches = 0.3 if experts <= MAX_ANNOTATED else 0.12
    size = (0.62 * len(panels[0].columns) + 0.35, row_inches * experts + 0.75)
    figure, axes = grid(len(panels), MAX_COLUMNS, size, (1.6, 0.75), dpi=110)
    canvas = FigureCanvasAgg(figure)
    for ax, panel in zip(axes.flat, panels, strict=False):
        colours = _panel(ax, panel, top)
    label_axes(axes, "expert")
    colour_bar(figure, colours, axes, "share of the modality's assignments", largest)
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


def grid(
    panels: int, most_columns: int, size: tuple[float, float], margin: tuple[float, float], dpi: int = 120,
    layout: Literal["constrained", "tight"] = "constrained", **options: Any,
) -> tuple[Figure, Any]:  # fmt: skip
    """A figure and its axes [lines, columns], of which the first ``panels`` are shown. In inches: the ``size`` of a
    panel, and the ``margin`` of them all. ``options``: of ``Figure.subplots``."""
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    columns = min(most_columns, panels)
    lines = math.ceil(panels / columns)
    inches = (max(5.6, columns * size[0] + margin[0]), lines * size[1] + margin[1])
    figure = Figure(figsize=inches, dpi=dpi, layout=layout)
    axes = figure.subplots(lines, columns, squeeze=False, **options)
    for ax in list(axes.flat)[panels:]:
        ax.set_axis_off()
    return figure, axes


def scale_top(shares: Sequence[np.ndarray]) -> tuple[float, float]:
    """Where the colours end, and the largest share, both in percent. The two are equal, except that one in a hundred
    of many shares may exceed the colours, so that a single large one does not darken all others."""
    values = np.concatenate([100 * np.ravel(share) for share in shares])
    values = values[~np.isnan(values)]
    largest = float(values.max(initial=0.0))
    top = largest if values.size < MANY_CELLS else float(np.quantile(values, 0.99))
    return top or largest or 100.0, largest


def colour_bar(figure: Figure, colours: Any, axes: Any, label: str, largest: float) -> None:
    """A colour bar of percentages; with a point if values exceed the colours, and no taller than ``BAR_INCHES``."""
    bar = figure.colorbar(
        colours, ax=axes, pad=0.02, aspect=25, shrink=min(1.0, BAR_INCHES / figure.get_size_inches()[1]),
        anchor=(0, 1), format="{x:.3g}%", extend="max" if largest > colours.norm.vmax else "neither",
    )  # fmt: skip
    bar.set_label(label, color=QUIET, fontsize=9)
    bar.ax.tick_params(labelsize=8, length=0, colors=QUIET)
    bar.outline.set_visible(False)


def label_axes(axes: Any, y: str, x: str = "") -> None:
    """``y`` beside the first column of panels, ``x`` below the last line."""
    for row in axes:
        row[0].set_ylabel(y, color=QUIET, fontsize=9)
    for ax in axes[-1]:
        ax.set_xlabel(x, color=QUIET, fontsize=9)


def heat(ax: Axes, share: np.ndarray, top: float, title: str, **options: Any) -> Any:
    """Shares as colours that end at ``top`` percent, a row an expert; with numbers in the cells, unless there are too
    many. ``options``: of ``imshow``."""
    ax.set_facecolor(ABSENT)
    colours = ax.imshow(100 * share, cmap="viridis", vmin=0, vmax=top, interpolation="nearest", **options)
    ax.set_title(title, color=INK, fontsize=10)
    ax.set_yticks(range(0, len(share), 1 if len(share) <= MAX_ANNOTATED else 8))
    ax.tick_params(which="both", length=0, labelsize=8, colors=QUIET)
    ax.spines[:].set_visible(False)
    if len(share) <= MAX_ANNOTATED:
        for (row, column), value in np.ndenumerate(100 * share):
            if not np.isnan(value):
                text = "0" if value == 0 else "<1" if value < 1 else f"{value:.0f}"
                colour = INK if value > 0.6 * top else "white"
                ax.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
    return colours


def _panel(ax: Axes, panel: Panel, top: float) -> Any:
    experts, modalities = panel.share_EM.shape
    colours = heat(ax, panel.share_EM, top, panel.title, aspect="auto")
    ax.set_xticks(range(modalities), panel.columns, fontsize=9, color=INK)
    ax.set_xticks(np.arange(modalities + 1) - 0.5, minor=True)
    ax.grid(which="minor", axis="x", color="white", linewidth=2)
    for modality in np.flatnonzero(np.isnan(panel.share_EM).all(axis=0)).tolist():
        ax.text(modality, (experts - 1) / 2, "no tokens", rotation=90, ha="center", va="center", color=QUIET)
    return colours
