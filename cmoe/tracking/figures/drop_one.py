"""What the model loses without each expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cmoe.tracking.figures.style import FAINT, INK, axes, canvas, colour, marker, short, title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MANY = 240  # marks, above which experiences are not told apart


@dataclass(frozen=True)
class DropOne:
    """What one layer's experts are worth.

    Attributes:
        layer: its name.
        experts: stable ids.
        lost: (E,) accuracy with all experts minus accuracy without this one.
        by_experience: (E, experiences) the same on each experience; NaN where not measured.
    """

    layer: str
    experts: tuple[int, ...]
    lost: NDArray[np.float64]
    by_experience: NDArray[np.float64]


def drop_one(layers: Sequence[DropOne], names: Sequence[str], sub: str = "") -> Figure:
    """Bars of the points of accuracy lost without each expert, a panel per layer; a mark for each experience.

    Below zero the model is better without it.
    """
    assert layers, "no layer with experts that were left out"
    width = max(5.2, 1.6 + 0.5 * max(len(x.experts) for x in layers))
    figure = canvas(min(width, 16.0) + 1.9, 1.1 + 2.2 * len(layers))
    shown = [100 * x.by_experience[np.isfinite(x.by_experience)] for x in layers] + [100 * x.lost for x in layers]
    low, high = min(min(map(np.min, shown)), 0.0), max(max(map(np.max, shown)), 0.0)
    room = 0.08 * max(high - low, 1.0)
    grid, handles = figure.add_gridspec(len(layers), 1), []
    for i, layer in enumerate(layers):
        ax = axes(figure, grid[i, 0])
        x = np.arange(len(layer.experts))
        ax.bar(x, 100 * layer.lost, width=0.62, color="#C9D6DF", zorder=1)
        experiences = layer.by_experience.shape[1]
        handles, many = [], layer.by_experience.size > MANY
        for j in range(experiences):
            place = x + (0.0 if experiences == 1 else 0.44 * (j / (experiences - 1) - 0.5))
            if many:
                ax.plot(place, 100 * layer.by_experience[:, j], ls="", marker=".", ms=3, color="#8C8C8C", zorder=3)
                continue
            handles += ax.plot(place, 100 * layer.by_experience[:, j], ls="", marker=marker(j), ms=4.5, color=colour(j), zorder=3, label=short(f"{j}: {names[j]}"))  # fmt: skip
        ax.axhline(0, color=INK, linewidth=0.8)
        ax.set_ylim(low - room, high + room)
        step, room_x = max(1, len(x) // 32), max(0.7, (5 - len(x)) / 2)
        ax.set_xlim(-room_x, len(x) - 1 + room_x)
        ax.set_xticks(x[::step], [str(e) for e in layer.experts[::step]])
        ax.set_ylabel("points lost", color=INK)
        ax.grid(axis="y", color=FAINT, linewidth=0.7, zorder=0)
        ax.set_axisbelow(True)
        if i == len(layers) - 1:
            ax.set_xlabel("expert left out", color=INK)
        head = "Accuracy lost without each expert" if i == 0 else ""
        title(ax, head, " · ".join(filter(None, (layer.layer, sub if i == 0 else ""))))
    if 1 < len(handles) <= 24:
        figure.legend(handles=handles, title="tested on", loc="outside right center", frameon=False, fontsize=8.5, title_fontsize=9)  # fmt: skip
    return figure
