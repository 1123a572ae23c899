"""Figures hold what they are given, in every shape."""

from __future__ import annotations

import io

import numpy as np
import pytest
from matplotlib.patches import Rectangle
from PIL import Image

from cmoe.metrics import View, summarise
from cmoe.tracking import figures
from cmoe.tracking.figures import ExpertLife, RouterLoad, png


def some_view(rows, columns, name="class_il", holes=False, baseline=True):
    rng = np.random.default_rng(rows)
    R = rng.random((rows, columns))
    if holes:
        R[0, -1] = np.nan
        R[:-1] = np.nan
    b = rng.random(columns) if baseline else np.full(columns, np.nan)
    return View(name, R, b, np.ones(columns), (), name != "bits_per_byte")


def texts(figure):
    return [t.get_text() for ax in figure.axes for t in ax.texts]


@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (5, 5)])
@pytest.mark.parametrize("name", ["class_il", "bits_per_byte"])
@pytest.mark.parametrize("holes", [False, True])
def test_matrix_figures_draw_in_every_shape(shape, name, holes):
    v = some_view(*shape, name=name, holes=holes and shape[0] > 1, baseline=not holes)
    names = [f"experience $x_{j}$ with a long name" for j in range(shape[1])]
    for figure in (figures.heatmap(v, names, "sub $1"), figures.curves(v, names)):
        image = Image.open(io.BytesIO(png(figure)))
        assert min(image.size) > 250


def test_many_experiences_still_draw():
    assert png(figures.heatmap(some_view(30, 30), [str(j) for j in range(30)]), dpi=40)
    assert png(figures.curves(some_view(30, 30), [str(j) for j in range(30)]), dpi=40)


def test_the_heat_map_shows_each_number():
    v = some_view(3, 3)
    shown = texts(figures.heatmap(v, ["a", "b", "c"]))
    for value in [*v.R.ravel(), *v.b]:
        assert f"{100 * value:.1f}" in shown


def test_equal_figures_are_equal_files():
    assert png(figures.heatmap(some_view(3, 3), ["a"] * 3)) == png(figures.heatmap(some_view(3, 3), ["a"] * 3))


def test_no_global_state_is_touched():
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    png(figures.heatmap(some_view(2, 2), ["a", "b"]))
    assert plt.get_fignums() == before


def test_the_timeline_has_a_bar_per_state_of_each_expert():
    lives = [
        ExpertLife("b0", 0, 0, frozen=((1, None),), used={0: 0.5}),
        ExpertLife("b0", 1, 1, used={1: 1.0, 0: 0.001}),
        ExpertLife("b1", 7, 0, ended=2, how="removed"),
    ]
    ax = figures.expert_timeline(lives, ["x", "y", "z"]).axes[0]
    bars = [(p.get_x(), p.get_width()) for p in ax.patches if isinstance(p, Rectangle)]
    assert bars == [(0, 1), (1, 2), (1, 2), (0, 2)]
    assert len(ax.collections) == 2  # shares near nothing are no use
    assert [t.get_text() for t in ax.get_yticklabels()] == ["b0 · 0", "b0 · 1", "b1 · 7"]


def test_the_timeline_shows_how_experts_came_thawed_and_went():
    lives = [
        ExpertLife("b", 0, 1, "upcycled", ended=3, how="merged", into=2),
        ExpertLife("b", 1, 0, frozen=((1, 2), (3, None)), ended=3, how="merged", into=2),
        ExpertLife("b", 2, 3),  # after the last of three experiences
        ExpertLife("b", 3, 0, frozen=((1, 2),), ended=2, how="collapsed"),
    ]
    assert lives[0].bars(3) == [(1, 2, False)]
    assert lives[1].bars(3) == [(0, 1, False), (1, 1, True), (2, 1, False)]
    assert lives[1].bars(5) == [(0, 1, False), (1, 1, True), (2, 1, False)]  # it ended before
    assert [begin for begin, _, _ in lives[2].bars(3)] == [3]
    assert lives[2].bars(3)[0][1] > 0
    assert lives[3].bars(3) == [(0, 1, False), (1, 1, True)]
    figure = figures.expert_timeline(lives, ["x", "y", "z"])
    ax = figure.axes[0]
    ends = [
        (line.get_marker(), float(np.asarray(line.get_xdata())[0])) for line in ax.lines if line.get_marker() != "None"
    ]
    assert sorted(ends) == [("4", 3.0), ("4", 3.0), ("D", 1.0), ("s", 2.0)]
    joined = [list(np.asarray(line.get_ydata())) for line in ax.lines if list(np.asarray(line.get_xdata())) == [3, 3]]
    assert [0.0, 2.0] in joined
    assert [1.0, 2.0] in joined
    said = {t.get_text() for legend in figure.legends for t in legend.get_texts()}
    assert {"merged", "collapsed", "from a dense network"} <= said
    assert png(figure)


def test_router_load_shows_shares_in_percent():
    share = np.array([[0.25, 0.75], [1.0, 0.0]])
    loads = [RouterLoad("b0", (0, 4), share), RouterLoad("b1", (0, 1), np.full((2, 2), np.nan))]
    figure = figures.router_load(loads, ["x", "y"])
    assert {"25", "75", "100", "0"} <= set(texts(figure))
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["0", "4"]
    assert png(figure)


def test_comparison_has_bars_with_intervals_and_curves_with_bands():
    bars = [("score", {"a": summarise([80.0, 90.0]), "b": summarise([50.0])})]
    curves = {"a": [np.array([99.0, 85.0]), np.array([97.0, np.nan])], "b": [np.array([99.0, 50.0])]}
    figure = figures.comparison(bars, curves, ["x", "y"], "%", "curve")
    left, right = figure.axes
    assert [p.get_height() for p in left.patches if isinstance(p, Rectangle)] == [85.0, 50.0]
    assert list(np.asarray(right.lines[0].get_ydata())) == [98.0, 85.0]
    assert png(figures.comparison(bars, {}, ["x"], "%", "none"))
