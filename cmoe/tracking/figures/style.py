"""What all figures share: colours that colour-blind people tell apart, fonts, and PNG output.

Matplotlib's object-oriented interface with the Agg canvas: no global state, safe in threads and without a display.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito 2008, ordered for contrast between neighbours
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C8C8C", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
INK = "#333333"
FAINT = "#D9D9D9"


def colour(k: int) -> str:
    """The k-th colour, repeating."""
    return COLOURS[k % len(COLOURS)]


def marker(k: int) -> str:
    """The k-th marker; it changes when the colours have been through."""
    return MARKERS[(k + k // len(COLOURS)) % len(MARKERS)]


def canvas(width: float, height: float) -> Figure:
    """An empty figure of that many inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def axes(figure: Figure, position: Any = 111) -> Axes:
    """Axes with thin lines and nothing on top and right."""
    ax = figure.add_subplot(position)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(INK)
    ax.tick_params(colors=INK, labelsize=9)
    return ax


def title(ax: Axes, text: str, sub: str = "") -> None:
    """A left-aligned title with optional smaller lines below it."""
    if sub:
        ax.set_title(escape(text) + "\n" * len(sub.splitlines()), loc="left", fontsize=11, fontweight="bold", color=INK)
        ax.annotate(
            escape(sub),
            (0, 1),
            xytext=(0, 7),
            xycoords="axes fraction",
            textcoords="offset points",
            fontsize=9,
            color=INK,
        )
    else:
        ax.set_title(escape(text), loc="left", fontsize=11, fontweight="bold", color=INK)


def escape(text: str) -> str:
    """Text that is not taken for mathematics: a user's names may hold dollar signs."""
    return text.replace("$", r"\$")


def short(text: str, length: int = 16) -> str:
    """A label that is cut when it is too long."""
    return escape(text if len(text) <= length else f"{text[: length - 1]}…")


def png(figure: Figure, dpi: int = 130) -> bytes:
    """The figure as PNG; equal figures give equal bytes."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=dpi, metadata={"Software": None})
    return out.getvalue()
