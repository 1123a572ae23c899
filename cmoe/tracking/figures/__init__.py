"""Figures of a run and of a comparison. All return a `matplotlib.figure.Figure`; `png` makes a file of it."""

from cmoe.tracking.figures.comparison import comparison
from cmoe.tracking.figures.curves import curves
from cmoe.tracking.figures.experts import ExpertLife, RouterLoad, expert_timeline, router_load
from cmoe.tracking.figures.heatmap import heatmap
from cmoe.tracking.figures.style import png

__all__ = ["ExpertLife", "RouterLoad", "comparison", "curves", "expert_timeline", "heatmap", "png", "router_load"]
