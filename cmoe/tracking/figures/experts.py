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

TRAINED, FROZEN = "#0072B2", "#BBD6E8"


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
    """What became of one expert.

    Attributes:
        layer: name of its layer.
        expert: stable id.
        added: experience before whose training it was added (0: there from the start).
        frozen: experience after whose training it was frozen; None if it never was.
        removed: experience after whose training it was removed; None if it is there.
        used: share of each experience's test assignments that it gets at the end, by experience.
    """

    layer: str
    expert: int
    added: int
    frozen: int | None = None
    removed: int | None = None
    used: dict[int, float] = field(default_factory=dict)


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
    """A bar per expert from the experience it was added with: dark while trained, pale when frozen.

    A dot in an experience's column says that the finished model uses the expert for it; its area is the share.
    """
    assert lives, "no experts"
    layers = list(dict.fromkeys(life.layer for life in lives))
    ordered = sorted(lives, key=lambda life: (layers.index(life.layer), life.expert))
    T = len(names)
    figure = canvas(max(6.4, 2.8 + 0.75 * T), 1.9 + 0.27 * len(ordered) + 0.1 * len(layers))
    ax = axes(figure)
    position, labels, places = 0.0, [], []
    for k, life in enumerate(ordered):
        if k and ordered[k - 1].layer != life.layer:
            position += 0.6
            ax.axhline(position - 0.8, color=FAINT, linewidth=0.8)
        end = T if life.removed is None else life.removed + 1
        until = end if life.frozen is None else min(life.frozen + 1, end)
        ax.barh(position, until - life.added, left=life.added, height=0.72, color=TRAINED)
        if until < end:
            ax.barh(position, end - until, left=until, height=0.72, color=FROZEN)
        if life.removed is not None:
            ax.plot([end], [position], "x", color="#D55E00", markersize=7, markeredgewidth=2)
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
    ax.set_yticks(places, labels)
    ax.set_ylim(position - 0.3, -0.7)
    ax.set_xlim(0, T)
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
    if any(life.removed is not None for life in ordered):
        handles.append(Line2D([], [], marker="x", ls="", color="#D55E00", markeredgewidth=2, label="removed"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8.5)
    title(ax, "The life of the experts", sub)
    return figure
