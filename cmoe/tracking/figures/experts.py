"""Where tokens go, and the life of each expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cmoe.tracking.figures.style import FAINT, INK, axes, canvas, short, title

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure

TRAINED, FROZEN, GONE = "#0072B2", "#BBD6E8", "#D55E00"
SHORT = 0.35  # width of the bar of an expert that came after the last experience
ENDS = {"removed": "x", "merged": "4", "collapsed": "s"}  # markers


@dataclass(frozen=True)
class RouterLoad:
    """Where one layer's router sends the test samples of each experience.

    Attributes:
        layer: its name.
        experts: stable ids, one per column.
        share: (experiences, experts) share of the assignments, rows sum to 1; NaN where not measured.
        information: mutual information of experience and expert in nats, and over the smaller entropy; None where not
            known.
        purity: share of the assignments that are of their expert's main experience.
    """

    layer: str
    experts: tuple[int, ...]
    share: NDArray[np.float64]
    information: tuple[float, float | None] | None = None
    purity: float | None = None

    def facts(self) -> list[str]:
        """Information and purity in words, those that are known."""
        found = []
        if self.information is not None:
            nats, part = self.information
            found.append(f"I(task; expert) {nats:.2f} nats" + ("" if part is None else f", {100 * part:.0f} %"))
        if self.purity is not None:
            found.append(f"purity {100 * self.purity:.0f} %")
        return found


@dataclass(frozen=True)
class ExpertLife:
    """What became of one expert. Times are experiences before whose training it happened; their number is the end.

    Attributes:
        layer: name of its layer.
        expert: stable id.
        added: when it came (0: there from the start).
        origin: 'added', or 'upcycled' as a copy of a dense network.
        frozen: from when until when it was frozen; None is until the end.
        ended: when it went; None if it is there.
        how: it was 'removed', 'merged' with others, or 'collapsed' with its layer into a dense network.
        into: the expert that it was merged into.
        tasks: task labels that it is assigned to.
        used: share of each experience's test assignments that it gets at the end, by experience.
    """

    layer: str
    expert: int
    added: int
    origin: str = "added"
    frozen: tuple[tuple[int, int | None], ...] = ()
    ended: int | None = None
    how: str = ""
    into: int | None = None
    tasks: tuple[int, ...] = ()
    used: dict[int, float] = field(default_factory=dict)

    def bars(self, experiences: int) -> list[tuple[float, float, bool]]:
        """(begin, width, frozen) of each stretch in which it did not change; a short one if all is over when it comes."""
        end = experiences if self.ended is None else self.ended
        if self.added >= end:
            return [(self.added, SHORT, bool(self.frozen))]
        edges = [(self.added, False)]
        for begin, until in self.frozen:
            edges += [(max(begin, self.added), True), (end if until is None else until, False)]
        stops = [*(when for when, _ in edges[1:]), end]
        found = [
            (float(begin), float(min(stop, end) - begin), cold)
            for (begin, cold), stop in zip(edges, stops, strict=True)
        ]
        return [(begin, width, cold) for begin, width, cold in found if width > 0]


def router_load(loads: Sequence[RouterLoad], names: Sequence[str], sub: str = "") -> Figure:
    """A heat map per layer: experiences down, experts across."""
    assert loads, "no layer with a router"
    widths = [max(2.0, 0.34 * len(load.experts)) for load in loads]
    figure = canvas(min(24.0, 2.6 + sum(widths) + 0.3 * len(loads)), max(2.9, 1.8 + 0.34 * len(names)))
    grid = figure.add_gridspec(1, len(loads), width_ratios=widths)
    for k, load in enumerate(loads):
        ax = axes(figure, grid[0, k])
        top = max(float(np.nanmax(x.share)) for x in loads if np.isfinite(x.share).any())
        image = ax.imshow(np.ma.masked_invalid(100 * load.share), cmap="cividis", vmin=0, vmax=100 * top, aspect="auto")
        ax.set_facecolor("#F2F2F2")
        if load.share.size <= 150:
            for i, j in np.argwhere(np.isfinite(load.share)):
                dark = load.share[i, j] < 0.55 * top
                ax.text(j, i, f"{100 * load.share[i, j]:.0f}", ha="center", va="center", fontsize=8, color="white" if dark else "black")  # fmt: skip
        step = max(1, len(load.experts) // 24)
        ticks = list(range(0, len(load.experts), step))
        ax.set_xticks(ticks, [str(load.experts[t]) for t in ticks])
        rows = range(load.share.shape[0])
        ax.set_yticks(rows, [f"{i}: {short(names[i])}" if k == 0 else "" for i in rows])
        ax.set_xlabel("expert", color=INK)
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
        lines = [sub if k == 0 else "", load.layer, *load.facts()]
        title(ax, "Router load per experience" if k == 0 else "", "\n".join(filter(None, lines)))
    bar = figure.colorbar(image, ax=figure.axes, fraction=0.04, pad=0.02)
    bar.ax.tick_params(labelsize=8, colors=INK)
    bar.set_label("% of assignments", color=INK, fontsize=9)
    return figure


def expert_timeline(lives: Sequence[ExpertLife], names: Sequence[str], sub: str = "") -> Figure:
    """A bar per expert from the experience it was added with: dark while trained, pale while frozen.

    A dot in an experience's column says that the finished model uses the expert for it; its area is the share. Where an
    expert was merged a line leads to the one that it became.
    """
    assert lives, "no experts"
    layers = list(dict.fromkeys(life.layer for life in lives))
    ordered = sorted(lives, key=lambda life: (layers.index(life.layer), life.expert))
    T = len(names)
    figure = canvas(max(6.4, 2.8 + 0.75 * T), 1.9 + 0.27 * len(ordered) + 0.1 * len(layers))
    ax = axes(figure)
    position, labels, places, rows = 0.0, [], [], {}
    for k, life in enumerate(ordered):
        if k and ordered[k - 1].layer != life.layer:
            position += 0.6
            ax.axhline(position - 0.8, color=FAINT, linewidth=0.8)
        for begin, width, cold in life.bars(T):
            ax.barh(position, width, left=begin, height=0.72, color=FROZEN if cold else TRAINED)
        if life.origin == "upcycled":
            ax.plot([life.added], [position], "D", color="#009E73", markersize=6, clip_on=False, zorder=4)
        if life.ended is not None:
            ax.plot([life.ended], [position], ENDS[life.how], color=GONE, markersize=7, markeredgewidth=2, zorder=4)
        rows[life.layer, life.expert] = position
        for j, share in life.used.items():
            if share > 0.005:
                ax.scatter(
                    [j + 0.5],
                    [position],
                    s=12 + 90 * share,
                    color="#E69F00",
                    edgecolor="white",
                    linewidth=0.7,
                    zorder=3,
                )
        labels.append(f"{life.layer} · {life.expert}" if len(layers) > 1 else str(life.expert))
        places.append(position)
        position += 1.0
    for life in ordered:
        if life.into is not None and (life.layer, life.into) in rows and life.ended is not None:
            both = (rows[life.layer, life.expert], rows[life.layer, life.into])
            ax.plot([life.ended] * 2, both, color=GONE, linewidth=1.2, zorder=3)
    ax.set_yticks(places, labels)
    ax.set_ylim(position - 0.3, -0.7)
    ax.set_xlim(0, T + (SHORT + 0.1) * any(life.added >= T for life in lives))
    ax.set_xticks(np.arange(T) + 0.5, [f"{j}: {short(names[j], 12)}" for j in range(T)], rotation=35, ha="right")
    for j in range(1, T):
        ax.axvline(j, color="white", linewidth=1.0, zorder=2)
    ax.set_xlabel("experience", color=INK)
    ax.set_ylabel("layer · expert" if len(layers) > 1 else "expert", color=INK)
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    used = "used for the experience (area: share)"
    handles: list[Artist] = [Patch(color=TRAINED, label="trained"), Patch(color=FROZEN, label="frozen")]
    handles.append(Line2D([], [], marker="o", ls="", color="#E69F00", markeredgecolor="white", ms=8, label=used))
    if any(life.origin == "upcycled" for life in ordered):
        handles.append(Line2D([], [], marker="D", ls="", color="#009E73", label="from a dense network"))
    ends = dict.fromkeys(life.how for life in ordered if life.how)
    handles += [Line2D([], [], marker=ENDS[how], ls="", color=GONE, markeredgewidth=2, label=how) for how in ends]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(3, len(handles)), frameon=False, fontsize=8.5)
    title(ax, "The life of the experts", sub)
    return figure
