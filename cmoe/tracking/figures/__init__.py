"""Figures of a run and of a comparison. All return a `matplotlib.figure.Figure`; `png` makes a file of it."""

from cmoe.tracking.figures.calibration import Calibrated, Calibration, calibration
from cmoe.tracking.figures.comparison import comparison
from cmoe.tracking.figures.curves import curves
from cmoe.tracking.figures.drop_one import DropOne, drop_one
from cmoe.tracking.figures.experts import ExpertLife, RouterLoad, expert_timeline, router_load
from cmoe.tracking.figures.heatmap import heatmap
from cmoe.tracking.figures.similarity import Similarity, similarity
from cmoe.tracking.figures.style import png

__all__ = [
    "Calibrated",
    "Calibration",
    "DropOne",
    "ExpertLife",
    "RouterLoad",
    "Similarity",
    "calibration",
    "comparison",
    "curves",
    "drop_one",
    "expert_timeline",
    "heatmap",
    "png",
    "router_load",
    "similarity",
]
