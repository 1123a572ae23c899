"""The matrix R as a picture with its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cmoe.metrics.matrix import View
from cmoe.tracking.figures.style import FAINT, INK, axes, canvas, short, title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNITS = {
    "class_il": ("Accuracy without task label", "%"),
    "task_il": ("Accuracy with task label", "%"),
    "next_byte_accuracy": ("Next-byte accuracy", "%"),
    "bits_per_byte": ("Bits per byte (lower is better)", "bits"),
}


def heatmap(view: View, names: Sequence[str], sub: str = "") -> Figure:
    """R as a heat map: a row per trained experience, a column per tested one; the baseline b is the row above.

    Args:
        view: the matrix; cells that were not evaluated stay empty.
        names: of the experiences.
        sub: second line of the title, e.g. the run's id.
    """
    what, unit = UNITS.get(view.name, (view.name, ""))
    scale = 100.0 if unit == "%" else 1.0
    R = scale * view.R
    start = [] if np.isnan(view.b).all() else [scale * view.b]
    table = np.vstack([*start, R])
    labels = ["untrained"] * len(start) + [f"{i}: {short(names[i])}" for i in range(len(R))]
    rows, columns = table.shape
    figure = canvas(max(5.0, 2.6 + 0.62 * columns), max(3.2, 1.7 + 0.46 * rows))
    ax = axes(figure)
    low, high = (0.0, 100.0) if unit == "%" else (float(np.nanmin(R)), float(np.nanmax(R)))  # b may lie far off
    colours = "cividis" if view.higher_is_better else "cividis_r"
    image = ax.imshow(np.ma.masked_invalid(table), cmap=colours, vmin=low, vmax=max(high, low + 1e-9), aspect="auto")
    ax.set_facecolor("#F2F2F2")
    small = rows * columns > 650
    for i in range(rows):
        for j in range(columns):
            if small or np.isnan(table[i, j]):
                continue
            level = (table[i, j] - low) / max(high - low, 1e-9)
            dark = level < 0.55 if view.higher_is_better else level > 0.45
            text = (
                f"{table[i, j]:.0f}" if unit == "%" and columns > 12 else f"{table[i, j]:.{1 if unit == '%' else 2}f}"
            )
            ax.text(j, i, text, ha="center", va="center", fontsize=8.5, color="white" if dark else "black")
    ax.set_xticks(range(columns), [f"{j}: {short(names[j])}" for j in range(columns)], rotation=35, ha="right")
    ax.set_yticks(range(rows), labels)
    ax.set_xlabel("tested on experience", color=INK)
    ax.set_ylabel("after training on", color=INK)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    if start:
        ax.axhline(0.5, color="white", linewidth=3)
    for k in range(len(R)):  # the diagonal: what was just learned
        if k < columns and not np.isnan(R[k, k]):
            from matplotlib.patches import Rectangle

            y = k + len(start)
            ax.add_patch(Rectangle((k - 0.48, y - 0.46), 0.96, 0.92, fill=False, edgecolor="#D55E00", linewidth=1.6))
    bar = figure.colorbar(image, ax=ax, fraction=0.05, pad=0.02)
    bar.ax.tick_params(labelsize=8, colors=INK)
    bar.outline.set_edgecolor(FAINT)
    bar.set_label(unit, color=INK, fontsize=9)
    title(ax, what, sub)
    return figure
