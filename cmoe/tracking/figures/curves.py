"""Each experience's score while later ones are learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cmoe.metrics.matrix import View
from cmoe.tracking.figures.heatmap import UNITS
from cmoe.tracking.figures.style import FAINT, INK, axes, canvas, colour, marker, short, title

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def curves(view: View, names: Sequence[str], sub: str = "") -> Figure:
    """A line per experience from the moment it is learned, and the mean over those seen so far.

    Before an experience is learned its line is dotted (zero-shot); arguments as for `heatmap`.
    """
    what, unit = UNITS.get(view.name, (view.name, ""))
    R = view.R * (100.0 if unit == "%" else 1.0)
    rows, columns = R.shape
    figure = canvas(8.2, 4.2)
    ax = axes(figure)
    x = np.arange(rows)
    for j in range(columns):
        if j < rows and np.isfinite(R[j:, j]).any():
            ax.plot(
                x[j:], R[j:, j], label=f"{j}: {short(names[j])}", color=colour(j), marker=marker(j), ms=5, linewidth=1.6
            )
        if columns <= 10 and np.isfinite(R[: j + 1, j]).sum() > 1:
            ax.plot(x[: j + 1], R[: j + 1, j], ":", color=colour(j), linewidth=1.0, alpha=0.7)
    seen = [R[i, : i + 1].mean() if np.isfinite(R[i, : i + 1]).all() else np.nan for i in range(rows)]
    if np.isfinite(seen).any():
        ax.plot(x, seen, color=INK, linewidth=3, label="mean of seen", zorder=1, alpha=0.55)
    if unit == "%":
        ax.set_ylim(-3, 103)
    ax.set_xticks(x, [short(names[i], 12) if rows <= 12 else str(i) for i in range(rows)])
    ax.set_xlabel("after training on experience", color=INK)
    ax.set_ylabel(unit, color=INK)
    ax.grid(axis="y", color=FAINT, linewidth=0.7)
    if columns <= 24:
        ax.legend(
            title="tested on", loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8.5,
            ncols=1 if columns <= 12 else 2, title_fontsize=9,
        )  # fmt: skip
    title(ax, f"{what}, as experiences arrive", sub)
    return figure
