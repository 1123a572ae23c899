"""Strategies beside each other, with intervals over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cmoe.metrics.statistics import Summary, summarise
from cmoe.tracking.figures.style import FAINT, INK, axes, canvas, colour, marker, short, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def comparison(
    bars: Sequence[tuple[str, Mapping[str, Summary]]],
    curves: Mapping[str, Sequence[NDArray[np.float64]]],
    names: Sequence[str],
    unit: str,
    curve_title: str,
    sub: str = "",
) -> Figure:
    """Bars with 95 % intervals, and the mean over seen experiences as the stream goes on.

    Args:
        bars: (title, summary by label) for each group of bars.
        curves: by label, one (T,) curve per seed; bands are 95 % intervals.
        names: of the experiences.
        unit: of the numbers, which are drawn as they are.
        curve_title: title of the curves; they are left out when there are none.
        sub: second line of the title.
    """
    labels = list(dict.fromkeys([label for _, group in bars for label in group] + list(curves)))
    hue = {label: k for k, label in enumerate(labels)}
    wide = max(3.2, 1.4 + 0.62 * len(labels))
    widths = [wide] * len(bars) + ([5.4] if curves else [])
    figure = canvas(sum(widths) + 0.4, 4.4)
    grid = figure.add_gridspec(1, len(widths), width_ratios=widths)
    for k, (heading, group) in enumerate(bars):
        _bars(axes(figure, grid[0, k]), heading, group, labels, hue, unit, sub if k == 0 else "")
    if curves:
        _curves(axes(figure, grid[0, len(bars)]), curve_title, curves, names, hue, unit)
    return figure


def _bars(
    ax: Axes,
    heading: str,
    group: Mapping[str, Summary],
    labels: Sequence[str],
    hue: Mapping[str, int],
    unit: str,
    sub: str,
) -> None:
    for x, label in enumerate(labels):
        if label not in group:
            ax.text(x, 0, "–", ha="center", va="bottom", color=INK)
            continue
        s = group[label]
        ax.bar(x, s.mean, width=0.68, color=colour(hue[label]))
        if s.half is not None:
            ax.errorbar(x, s.mean, yerr=s.half, color=INK, capsize=4, linewidth=1.3)
        tip = s.mean + (s.half or 0) if s.mean >= 0 else s.mean - (s.half or 0)
        up = s.mean >= 0
        ax.annotate(
            f"{s.mean:.3g}" if abs(s.mean) < 10 else f"{s.mean:.1f}", (x, tip), xytext=(0, 3 if up else -3),
            textcoords="offset points", ha="center", va="bottom" if up else "top", fontsize=8.5, color=INK,
        )  # fmt: skip
    crowded = sum(map(len, labels)) > 28 or len(labels) > 5
    ax.set_xticks(range(len(labels)), [short(label, 20) for label in labels], rotation=35 if crowded else 0, ha="right" if crowded else "center")  # fmt: skip
    ax.axhline(0, color=INK, linewidth=0.8)
    ax.margins(y=0.12)
    ax.set_ylabel(unit, color=INK)
    ax.grid(axis="y", color=FAINT, linewidth=0.7)
    ax.set_axisbelow(True)
    title(ax, heading, sub)


def _curves(
    ax: Axes,
    heading: str,
    curves: Mapping[str, Sequence[NDArray[np.float64]]],
    names: Sequence[str],
    hue: Mapping[str, int],
    unit: str,
) -> None:
    T = max(len(c) for seeds in curves.values() for c in seeds)
    for label, seeds in curves.items():
        points = []
        for i in range(T):
            values = [c[i] for c in seeds if i < len(c) and np.isfinite(c[i])]
            if values:
                s = summarise(values)
                points.append((i, s.mean, s.half or 0.0))
        if not points:
            continue
        x, mean, half = (np.array(column) for column in zip(*points, strict=True))
        k = hue[label]
        ax.plot(x, mean, color=colour(k), marker=marker(k), markersize=5, linewidth=1.8, label=short(label, 24))
        ax.fill_between(x, mean - half, mean + half, color=colour(k), alpha=0.15, linewidth=0)
    ax.set_xticks(range(T), [short(names[i], 10) if T <= 8 else str(i) for i in range(T)])
    ax.set_xlabel("after training on experience", color=INK)
    ax.set_ylabel(unit, color=INK)
    if unit == "%":
        ax.set_ylim(-3, 103)
    ax.grid(axis="y", color=FAINT, linewidth=0.7)
    ax.legend(frameon=False, fontsize=8.5)
    title(ax, heading)
