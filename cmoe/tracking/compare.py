"""Runs of one experiment beside each other: means over seeds, and paired differences to a baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from cmoe.errors import UserError, nearest
from cmoe.metrics.statistics import Summary, paired_difference, summarise
from cmoe.tracking.settings import tell_apart, warnings
from cmoe.tracking.summary import RunSummary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# per view: the score at the end, and what was forgotten
HEADLINES = {
    "class_il": ("acc_macro", "forgetting_chaudhry"),
    "task_il": ("acc_macro", "forgetting_chaudhry"),
    "next_byte_accuracy": ("acc_macro", "forgetting_chaudhry"),
    "bits_per_byte": ("bpb_macro", "forgetting_chaudhry"),
}
PERCENT = ("class_il", "task_il", "next_byte_accuracy")


def choose(runs: Sequence[RunSummary]) -> tuple[list[RunSummary], list[str]]:
    """The runs to compare, and what a reader must know about the choice.

    Runs with one label and different settings get labels of their own; of runs that share settings and seed the newest
    counts.
    """
    newest: dict[tuple[str, int], RunSummary] = {}
    for run in tell_apart(runs):
        newest[run.label, run.seed] = run
    labels = list(dict.fromkeys(label for label, _ in newest))
    chosen = sorted(newest.values(), key=lambda r: (labels.index(r.label), r.seed))
    notes = warnings(chosen)
    kept = {run.run_id for run in chosen}
    older = [run.run_id for run in runs if run.run_id not in kept]
    if older:
        notes.append(f"repeated with the same settings and seed, the newest counts; left out: {', '.join(older)}")
    return chosen, notes


def compare(runs: Sequence[RunSummary], baseline: str | None = None) -> dict[str, Any]:
    """Every metric by label over seeds.

    Args:
        runs: of one experiment, each label and seed once (see `choose`).
        baseline: label that the differences refer to; default is `naive` where there is one, else the first.

    Returns:
        A document for JSON: `experiment`, `baseline`, `labels` in order, `seeds` by label, `runs` (ids by label),
        `metrics`: name -> label -> {n, mean, std, low, high, difference: {n, mean, std, low, high} | null,
        missing: reason | null}; `costs`: label -> mean parameters and wall seconds.
        A label has a value only when all of its runs have one.

    Raises:
        UserError: no run has the baseline's label.
    """
    assert runs, "no runs to compare"
    groups: dict[str, list[RunSummary]] = {}
    for run in runs:
        groups.setdefault(run.label, []).append(run)
    if baseline is not None and baseline not in groups:
        raise UserError(f"--baseline: expected one of {', '.join(groups)}, got '{baseline}'{nearest(baseline, groups)}")
    plain = [label for label in groups if label.partition(" (")[0] == "naive"]
    reference = baseline or (plain or list(groups))[0]
    groups = {reference: groups[reference], **groups}  # the baseline stands first
    names = list(dict.fromkeys(name for run in runs for name in run.metrics))
    metrics: dict[str, dict[str, Any]] = {}
    for name in names:
        cells = {label: _cell(group, name) for label, group in groups.items()}
        values = {label: _by_seed(group, name) for label, group in groups.items()}
        if all(cell["mean"] is None for cell in cells.values()):
            continue
        for label, cell in cells.items():
            common = values[label].keys() & values[reference].keys()
            known = label != reference and cell["mean"] is not None and bool(common)
            cell["difference"] = asdict(paired_difference(values[label], values[reference])) if known else None
        metrics[name] = cells
    return {
        "experiment": runs[0].experiment,
        "baseline": reference,
        "labels": list(groups),
        "seeds": {label: [run.seed for run in group] for label, group in groups.items()},
        "runs": {label: [run.run_id for run in group] for label, group in groups.items()},
        "metrics": metrics,
        "costs": {label: _costs(group) for label, group in groups.items()},
    }


def headline_metrics(result: dict[str, Any]) -> list[str]:
    """Names of the few metrics that a table shows, those that exist."""
    names = [f"{view}/{metric}" for view, metrics in HEADLINES.items() for metric in metrics]
    return [name for name in names if name in result["metrics"]]


def table(result: dict[str, Any], metrics: Sequence[str] | None = None) -> tuple[list[str], list[list[str]]]:
    """Header and rows of text: a row per label, mean ± half the 95 % interval, and the difference to the baseline."""
    chosen = headline_metrics(result) if metrics is None else list(metrics)
    header = ["label", "seeds"]
    for name in chosen:
        header += [name, f"Δ to {result['baseline']}"]
    header += ["parameters", "seconds"]
    rows = []
    for label in result["labels"]:
        row = [label, str(len(result["seeds"][label]))]
        for name in chosen:
            cell = result["metrics"][name][label]
            row += [number(cell, name), difference(cell, name)]
        costs = result["costs"][label]
        row.append("–" if costs["parameters_total"] is None else f"{costs['parameters_total']:,.0f}")
        row.append("–" if costs["wall_seconds"] is None else f"{costs['wall_seconds']:.1f}")
        rows.append(row)
    return header, rows


def number(cell: dict[str, Any] | None, name: str, signed: bool = False) -> str:
    """`mean ± half the interval`, in percent for accuracies; a dash where there is none."""
    if cell is None or cell["mean"] is None:
        return "–"
    percent = name.split("/")[0] in PERCENT
    scale, digits = (100.0, 1) if percent else (1.0, 3)
    text = f"{scale * cell['mean']:{'+' if signed else ''}.{digits}f}"
    if cell["low"] is None:
        return text
    return f"{text} ± {scale * (cell['high'] - cell['low']) / 2:.{digits}f}"


def difference(cell: dict[str, Any], name: str) -> str:
    """The paired difference of a cell, with the number of pairs where not every seed has one."""
    paired = cell["difference"]
    text = number(paired, name, signed=True)
    return text if paired is None or paired["n"] == cell["n"] else f"{text} (n={paired['n']})"


def main_view(result: dict[str, Any]) -> str:
    """The first view in which every label has a score, else the first that any label has one in.

    Raises:
        StopIteration: there is none.
    """
    scores = {view: result["metrics"].get(f"{view}/{metrics[0]}") for view, metrics in HEADLINES.items()}
    known = {view: cells for view, cells in scores.items() if cells}
    everywhere = (v for v, cells in known.items() if all(c["mean"] is not None for c in cells.values()))
    return next(everywhere, None) or next(iter(known))


def picture(runs: Sequence[RunSummary], result: dict[str, Any], view: str | None = None) -> Figure:
    """Bars of score and forgetting, and the mean over seen experiences, for one view (default: the first there is)."""
    from cmoe.tracking.figures import comparison
    from cmoe.tracking.figures.heatmap import UNITS

    there = [v for v in HEADLINES if any(f"{v}/{m}" in result["metrics"] for m in HEADLINES[v])]
    if not there:
        raise UserError(f"{result['experiment']}: none of its runs has an evaluated matrix, there is nothing to draw")
    chosen = view or main_view(result)
    what, unit = UNITS[chosen]
    scale = 100.0 if unit == "%" else 1.0
    bars = []
    for metric, heading in zip(HEADLINES[chosen], (what, "Forgetting (lower is better)"), strict=True):
        cells = result["metrics"].get(f"{chosen}/{metric}", {})
        bars.append(
            (heading, {label: _scaled(cell, scale) for label, cell in cells.items() if cell["mean"] is not None})
        )
    curves: dict[str, list[np.ndarray]] = {}
    names: list[str] = []
    for run in runs:
        if chosen in run.matrices:
            R = scale * run.matrices[chosen].R
            curve = np.array([R[i, : i + 1].mean() for i in range(len(R))])  # NaN where a seen one was not evaluated
            curves.setdefault(run.label, []).append(curve)
            names = names if len(names) >= len(run.names) else run.names
    counts = sorted(len(s) for s in result["seeds"].values())
    seeds = f"{counts[0]}" if counts[0] == counts[-1] else f"{counts[0]}–{counts[-1]}"
    interval = "s · bars: 95 % interval" if seeds != "1" else ""
    sub = f"{result['experiment']} · {seeds} seed{interval}"
    return comparison(bars, curves, names, unit, "Mean over the experiences seen so far", sub)


def _scaled(cell: dict[str, Any], scale: float) -> Summary:
    parts = {k: None if cell[k] is None else scale * cell[k] for k in ("mean", "std", "low", "high")}
    return Summary(cell["n"], **parts)  # ty: ignore[invalid-argument-type]


def _by_seed(group: Sequence[RunSummary], name: str) -> dict[int, float]:
    return {run.seed: value for run in group if (value := run.metrics.get(name)) is not None}


def _cell(group: Sequence[RunSummary], name: str) -> dict[str, Any]:
    """A mean over fewer seeds than there are runs would be a silent one: then there is none, with the reason."""
    values = _by_seed(group, name)
    absent = [run for run in group if run.seed not in values]
    if absent:
        reason = absent[0].reasons.get(name, "not recorded")
        where = "" if len(absent) == len(group) else f" (seed {absent[0].seed})"
        return {"n": 0, "mean": None, "std": None, "low": None, "high": None, "missing": reason + where}
    return {**asdict(summarise(list(values.values()))), "missing": None}


def _costs(group: Sequence[RunSummary]) -> dict[str, float | None]:
    out: dict[str, float | None] = {}
    for name in ("parameters_total", "parameters_active", "wall_seconds"):
        values = [getattr(run, name) for run in group]
        known = [float(v) for v in values if v is not None]
        out[name] = sum(known) / len(known) if len(known) == len(values) else None
    return out
