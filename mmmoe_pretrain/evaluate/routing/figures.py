"""Figures of routing: which experts serve which modality, which of them work together, and how routing changed in
training.

Owns their look. Heat maps are in viridis, on one scale a figure. Colours of modalities are of Okabe and Ito's
palette, which colour-blind readers can distinguish. Shapes: E experts, R records, M modalities.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmmoe_pretrain.evaluate.heatmap import (
    ABSENT,
    INK,
    QUIET,
    colour_bar,
    grid,
    heat,
    label_axes,
    scale_top,
    style_heat,
)
from mmmoe_pretrain.evaluate.routing.history import LayerHistory

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000")
BAR_COLUMNS = 3
MAX_COLUMNS = 4
LAYERS_A_FIGURE = 6
MAX_BINS = 120  # of steps; a record is the mean of its bin beyond that
SMOOTHING = 7  # records that a bold line is the mean of


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


def coactivation(pairs: Sequence[tuple[int, np.ndarray]], path: Path) -> bool:
    """``pairs``: layer, and how often two experts served one token [E, E]. Row e shows how the tokens of
    expert e share out over its partners. False, and no file, where no token has two experts."""
    shares = [(layer, partners(counts_EE)) for layer, counts_EE in pairs if counts_EE.any()]
    if not shares:
        return False
    size = min(4.6, max(2.6, 0.36 * max(len(share_EE) for _, share_EE in shares)))
    figure, axes = grid(len(shares), MAX_COLUMNS, (size + 0.5, size + 0.6), (1.2, 0.8))
    top, largest = scale_top([share_EE for _, share_EE in shares])
    for ax, (layer, share_EE) in zip(axes.flat, shares, strict=False):
        even = 100 / (len(share_EE) - 1)
        colours = heat(ax, share_EE, top, f"layer {layer} (even: {even:.3g}%)")
        ax.set_xticks(ax.get_yticks())
    label_axes(axes, "tokens of expert", "are served by this one too")
    colour_bar(figure, colours, axes, "share of the partners of the row's expert", largest)
    figure.suptitle("Which experts are chosen together", color=INK, fontsize=12)
    figure.savefig(path, facecolor="white")
    return True


def partners(counts_EE: np.ndarray) -> np.ndarray:
    """Rows divided by their sums; NaN on the diagonal, and in the row of an expert without a partner."""
    sums_E = counts_EE.sum(1, keepdims=True)
    share_EE = np.where(sums_E > 0, counts_EE / np.maximum(sums_E, 1), np.nan)
    np.fill_diagonal(share_EE, np.nan)
    return share_EE


def load_over_steps(history: Sequence[LayerHistory], folder: Path) -> list[str]:
    """``training_load.png``, ``training_load_2.png``, ...: a row of panels a layer, a panel a modality;
    steps run to the right, a line an expert. The names of the files."""
    names = []
    for start in range(0, len(history), LAYERS_A_FIGURE):
        part = history[start : start + LAYERS_A_FIGURE]
        name = "training_load.png" if not start else f"training_load_{start // LAYERS_A_FIGURE + 1}.png"
        _load_figure(part, folder / name)
        names.append(name)
    return names


def _load_figure(history: Sequence[LayerHistory], path: Path) -> None:
    heights = [min(2.6, max(1.3, 0.14 * layer.load_RME.shape[2])) for layer in history]
    modalities = len(history[0].modalities)
    size, margin = (10 / modalities, sum(heights) / len(history) + 0.45), (1, 1)
    figure, axes = grid(len(history) * modalities, modalities, size, margin, height_ratios=heights)
    top, largest = scale_top([layer.load_RME for layer in history])
    for row, layer in zip(axes, history, strict=True):
        steps, load = binned(layer.steps_R, layer.load_RME)
        edges, experts = _edges(steps), np.arange(load.shape[2] + 1) - 0.5
        for m, (ax, modality) in enumerate(zip(row, layer.modalities, strict=True)):
            ax.set_facecolor(ABSENT)
            colours = ax.pcolormesh(edges, experts, 100 * load[:, m].T, cmap="viridis", vmin=0, vmax=top)
            ax.invert_yaxis()
            style_heat(ax, load.shape[2], f"layer {layer.layer}: {modality}")
            if np.isnan(load[:, m]).all():
                ax.text(0.5, 0.5, "no tokens", ha="center", va="center", color=QUIET, transform=ax.transAxes)
    label_axes(axes, "expert", "step")
    colour_bar(figure, colours, axes, "share of the modality's assignments", largest)
    figure.suptitle("Where each modality's tokens went, step by step", color=INK, fontsize=12)
    figure.savefig(path, facecolor="white")


def change_over_steps(history: Sequence[LayerHistory], path: Path) -> None:
    """Specialisation of every layer over the steps, and a panel a layer: how much of each modality's
    routing changed from one logged step to the next."""
    figure, axes = grid(len(history) + 1, MAX_COLUMNS, (3.6, 2.5), (0.4, 0.9))
    _specialisation_panel(axes.flat[0], history)
    top = max(float(np.nanmax(layer.change_RM, initial=0.0)) for layer in history)
    for ax, layer in zip(list(axes.flat)[1:], history, strict=False):
        steps, change = binned(layer.steps_R[1:], layer.change_RM)
        for m, modality in enumerate(layer.modalities):
            ax.plot(steps, 100 * change[:, m], color=colour(m), linewidth=0.8, alpha=0.35)
            ax.plot(steps, 100 * smoothed(change[:, m]), color=colour(m), linewidth=2, label=modality)
        ax.set_ylim(0, 105 * top or 1)
        _style_percent(ax, f"layer {layer.layer}: change since the previous record")
    axes.flat[1].legend(frameon=False, fontsize=8.5, handlelength=1.2)
    label_axes(axes, "", "step")
    figure.suptitle("How routing changed in training", color=INK, fontsize=12)
    figure.savefig(path, facecolor="white")


def _specialisation_panel(ax: Axes, history: Sequence[LayerHistory]) -> None:
    from matplotlib import colormaps

    shades = colormaps["viridis"](np.linspace(0.0, 0.85, len(history)))
    for shade, layer in zip(shades, history, strict=True):
        steps, score = binned(layer.steps_R, layer.specialisation_R)
        ax.plot(steps, 100 * score, color=shade, linewidth=1.6, label=f"layer {layer.layer}")
    ax.set_ylim(0, 100)
    columns = math.ceil(len(history) / 6)
    ax.legend(frameon=False, fontsize=8.5 if len(history) <= 4 else 6, ncols=columns, handlelength=1.2)
    _style_percent(ax, "specialisation")


def binned(steps_R: np.ndarray, values_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most ``MAX_BINS`` rows: the last step of each bin, and the mean of its values that are numbers."""
    if len(steps_R) <= MAX_BINS:
        return steps_R, values_R
    parts = np.array_split(np.arange(len(steps_R)), MAX_BINS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a mean over NaN alone, which is NaN
        means = [np.nanmean(values_R[part], axis=0) for part in parts]
    return steps_R[[part[-1] for part in parts]], np.stack(means)


def smoothed(values_R: np.ndarray) -> np.ndarray:
    """The mean of each value and its neighbours, ``SMOOTHING`` in all; NaN counts for nothing."""
    window = np.ones(min(SMOOTHING, len(values_R)))
    known = ~np.isnan(values_R)
    sums = np.convolve(np.where(known, values_R, 0.0), window, mode="same")
    counts = np.convolve(known.astype(float), window, mode="same")
    return np.where(counts > 0, sums / np.maximum(counts, 1.0), np.nan)


def _edges(steps: np.ndarray) -> np.ndarray:
    """Borders of the columns: halfway between the steps."""
    middle = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[2 * steps[0] - middle[0]], middle, [2 * steps[-1] - middle[-1]]])


def _style_percent(ax: Axes, title: str) -> None:
    """Title, and grid lines at percentages."""
    ax.set_title(title, fontsize=10, color=INK, loc="left")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0f}%")
    ax.tick_params(length=0, labelsize=8, colors=QUIET)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.grid(axis="y", color="#E6E6E6", linewidth=0.7)
    ax.set_axisbelow(True)
