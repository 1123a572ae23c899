"""Whether the model, and each expert alone, knows how often it is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cmoe.tracking.figures.style import FAINT, INK, axes, canvas, colour, short, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALE = "#7FB0D3"
FEW = 5  # predictions in a bin, below which its accuracy says nothing
MANY = 12  # experts, above which they are not told apart
SHADES = 6  # grey and black are the pools' and the model's


@dataclass(frozen=True)
class Calibrated:
    """One way of predicting.

    Attributes:
        name: for the legend.
        accuracy, ece, nll: over all samples; None where not defined.
        bins: of the confidence: number of predictions, mean confidence, accuracy (None in an empty bin).
    """

    name: str
    accuracy: float
    ece: float | None
    nll: float | None
    bins: Sequence[tuple[int, float | None, float | None]]


@dataclass(frozen=True)
class Calibration:
    """One layer's.

    Attributes:
        layer: its name.
        model: the model as it is.
        alone: each of its experts alone.
        pools: the experts' answers joined in other ways.
    """

    layer: str
    model: Calibrated
    alone: list[Calibrated] = field(default_factory=list)
    pools: list[Calibrated] = field(default_factory=list)


def calibration(layers: Sequence[Calibration], sub: str = "") -> Figure:
    """Per layer a reliability diagram (Guo et al. 2017) and bars of the expected calibration error.

    Black is the model as it is; the area of a dot tells how many predictions its bin holds, and bins with fewer than five
    are not drawn.
    """
    assert layers, "no layer with experts that were asked"
    rows = [1 + len(x.pools) + (len(x.alone) if len(x.alone) <= MANY else 1) for x in layers]
    heights = [max(3.0, 1.0 + 0.25 * n) for n in rows]
    figure = canvas(10.4, sum(heights) + 0.4)
    grid = figure.add_gridspec(len(layers), 2, width_ratios=[1.0, 1.45], height_ratios=heights)
    top = max((c.ece or 0.0) for x in layers for c in (x.model, *x.pools, *x.alone))
    for i, layer in enumerate(layers):
        last = i == len(layers) - 1
        ax = axes(figure, grid[i, 0])
        ax.plot([0, 100], [0, 100], color=FAINT, linewidth=1.2, zorder=1)
        many = len(layer.alone) > MANY
        for k, one in enumerate(layer.alone):
            _curve(ax, one, PALE if many else colour(k % SHADES), 0.7 if many else 1.1, 0.5 if many else 0.85)
        _curve(ax, layer.model, "#000000", 2.2, 1.0)
        ax.set_xlim(0, 103)
        ax.set_ylim(-3, 103)
        ax.set_ylabel("accuracy in the bin (%)", color=INK)
        if last:
            ax.set_xlabel("confidence (%)", color=INK)
        head = "Calibration of the model and of each expert alone" if i == 0 else ""
        title(ax, head, " · ".join(filter(None, (layer.layer, sub if i == 0 else ""))))

        ax = axes(figure, grid[i, 1])
        bars = [(layer.model, "#000000"), *((p, "#8C8C8C") for p in layer.pools)]
        if many:
            bars.append((_mean(layer.alone), PALE))
        else:
            bars += [(one, colour(k % SHADES)) for k, one in enumerate(layer.alone)]
        for y, (one, shade) in enumerate(bars):
            if one.ece is None:
                continue
            ax.barh(y, one.ece, height=0.66, color=shade)
            nll = "" if one.nll is None else f" · NLL {one.nll:.2f}"
            ax.text(one.ece + 0.01 * top, y, f"{one.ece:.3f} · {100 * one.accuracy:.1f} %{nll}", va="center", fontsize=8, color=INK)  # fmt: skip
        ax.set_yticks(range(len(bars)), [short(one.name, 22) for one, _ in bars])
        ax.set_ylim(len(bars) - 0.4, -0.6)
        ax.set_xlim(0, max(1.5 * top, 1e-6))
        if last:
            ax.set_xlabel("expected calibration error", color=INK)
        title(ax, "", "ECE · accuracy · NLL in nats" if i == 0 else "")
    return figure


def _mean(every: Sequence[Calibrated]) -> Calibrated:
    """The mean of many experts alone, for the bars."""
    errors, losses = (
        [v for v in values if v is not None] for values in ([x.ece for x in every], [x.nll for x in every])
    )
    return Calibrated(
        "experts alone, mean",
        sum(x.accuracy for x in every) / len(every),
        sum(errors) / len(errors) if errors else None,
        sum(losses) / len(losses) if losses else None,
        [],
    )


def _curve(ax: Axes, one: Calibrated, shade: str, width: float, alpha: float) -> None:
    """A line through the bins, with dots by how many predictions they hold."""
    points = [(100 * c, 100 * a, n) for n, c, a in one.bins if n >= FEW and c is not None and a is not None]
    if points:
        x, y, counts = zip(*points, strict=True)
        total, order = sum(counts), 3 if width > 2 else 2
        ax.plot(x, y, color=shade, linewidth=width, alpha=alpha, zorder=order)
        ax.scatter(x, y, s=[8 + 90 * n / total for n in counts], color=shade, alpha=alpha, linewidth=0, zorder=order)
