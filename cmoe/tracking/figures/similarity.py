"""How alike the experts of a layer are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cmoe.tracking.figures.style import INK, axes, canvas, short, title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# what is shown: its heading, its colours, and the range of the scale
PANELS = {
    "cosine": ("cosine of outputs", "PuOr_r", (-1.0, 1.0)),
    "cka": ("linear CKA of outputs", "cividis", (0.0, 1.0)),
    "disagreement": ("disagreement of predictions", "cividis", (0.0, 1.0)),
}


@dataclass(frozen=True)
class Similarity:
    """How alike the experts of one layer are.

    Attributes:
        layer: its name.
        experts: stable ids, in the order of rows and columns.
        matrices: (E, E) by the keys of `PANELS`; NaN where not defined.
    """

    layer: str
    experts: tuple[int, ...]
    matrices: dict[str, NDArray[np.float64]]


def similarity(layers: Sequence[Similarity], sub: str = "") -> Figure:
    """A row of heat maps per layer: cosine, centred kernel alignment, disagreement."""
    assert layers, "no layer with experts that were compared"
    side = [min(4.6, max(2.4, 0.3 * len(x.experts) + 0.6)) for x in layers]
    figure = canvas(3 * max(side) + 2.4, sum(side) + 0.5 * len(layers) + 0.5)
    grid = figure.add_gridspec(len(layers), 3, height_ratios=side)
    for i, layer in enumerate(layers):
        n = len(layer.experts)
        for k, (key, (what, colours, (low, high))) in enumerate(PANELS.items()):
            ax = axes(figure, grid[i, k])
            matrix = layer.matrices[key]
            image = ax.imshow(np.ma.masked_invalid(matrix), cmap=colours, vmin=low, vmax=high)
            ax.set_facecolor("#F2F2F2")
            if n <= 10:
                for a, b in np.argwhere(np.isfinite(matrix)):
                    level = (matrix[a, b] - low) / (high - low)
                    white = level < 0.55 if colours == "cividis" else not 0.2 < level < 0.8
                    text = f"{matrix[a, b]:.2f}".replace("0.", ".", 1).replace("-.00", ".00")
                    text = "1" if matrix[a, b] > 0.995 else "0" if abs(matrix[a, b]) < 0.005 else text
                    ax.text(b, a, text, ha="center", va="center", fontsize=7.5, color="white" if white else "black")
            ticks = list(range(0, n, max(1, n // 12)))
            ids = [str(layer.experts[t]) for t in ticks]
            ax.set_xticks(ticks, ids)
            ax.set_yticks(ticks, ids)
            if k == 0:
                ax.set_ylabel(f"{short(layer.layer, 24)} · expert" if len(layers) > 1 else "expert", color=INK)
            if i == len(layers) - 1:
                ax.set_xlabel("expert", color=INK)
            ax.spines[:].set_visible(False)
            ax.tick_params(length=0)
            bar = figure.colorbar(image, ax=ax, fraction=0.046, pad=0.03)
            bar.ax.tick_params(labelsize=7.5, colors=INK)
            if i == 0:
                lines = [sub, what] if k == 0 and sub else [what]
                title(ax, "How alike the experts are" if k == 0 else "", "\n".join(lines))
    return figure
