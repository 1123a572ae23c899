"""What commands print when runs are done: the matrix, a table, pictures and the way on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cmoe.cli.common import table


def show_runs(facts: Sequence[dict[str, Any]], root: str | Path) -> None:
    """The matrix of each run, then (of several) the comparison, and where everything is."""
    from rich.console import Console

    from cmoe.tracking.compare import HEADLINES

    console = Console(highlight=False, soft_wrap=True)
    several = len(facts) > 1
    shared = next((v for v, m in HEADLINES.items() if all(f"{v}/{m[0]}" in _known(run) for run in facts)), None)
    for run in facts:
        _matrices(console, run, Path(root), shared if several else None, several)
    if several:
        document, picture, report = write_comparison(facts[0]["experiment"], Path(root))
        show_comparison(document, picture, report)
    else:
        folder = Path(root) / "runs" / facts[0]["run_id"]
        for picture in facts[0].get("pictures", [])[:1]:
            print(f"picture: {folder / picture}")
    print(f"MLflow:  cmoe ui {facts[0]['experiment']}")


def _known(run: dict[str, Any]) -> set[str]:
    return {name for name, value in run.get("metrics", {}).items() if value is not None}


def _matrices(console: Any, run: dict[str, Any], root: Path, shared: str | None, several: bool) -> None:
    """A table for each view: rows trained, columns tested; of several runs one view, which all have if there is one."""
    from rich.table import Table

    from cmoe.tracking.compare import PERCENT
    from cmoe.tracking.summary import read_run

    summary = read_run(root / "runs" / run["run_id"])
    if summary is None:
        return
    views = list(summary.matrices.items())
    if several:
        views = [(n, v) for n, v in views if n == shared] or views[:1]
    for name, view in views:
        percent = name in PERCENT
        unit = "%" if percent else "bits per byte"
        table = Table(title=f"{run['label']}: {name} after each experience ({unit})", title_justify="left")
        heads, rows = _labels(summary.names, console.width)
        table.add_column("after", no_wrap=True, overflow="ellipsis")
        for head in heads:
            table.add_column(head, justify="right", no_wrap=True, min_width=5)
        for i, row in enumerate(view.R):
            if all(x != x for x in row):
                continue
            cells = ["" if x != x else f"{100 * x:.1f}" if percent else f"{x:.3f}" for x in row]
            table.add_row(rows[i], *cells)
        console.print(table)


def _labels(names: Sequence[str], width: int) -> tuple[list[str], list[str]]:
    """Heads of columns and of rows: the experiences' names, or numbers above where the names are too wide."""
    if sum(max(len(n), 5) + 3 for n in names) + max(map(len, names), default=0) + 4 <= width:
        return list(names), list(names)
    numbers = [str(i + 1) for i in range(len(names))]
    return numbers, [f"{k} {n}" for k, n in zip(numbers, names, strict=True)]


def show_comparison(document: dict[str, Any], picture: Path, report: Path) -> None:
    """Means over seeds, the paired differences to the baseline, and where picture and report are."""
    from cmoe.tracking.compare import difference, headline_metrics, number

    names = [n for n in headline_metrics(document) if not n.startswith("bits_per_byte/forgetting")]
    heads = [n.replace("acc_macro", "acc").replace("forgetting_chaudhry", "forgetting") for n in names]
    rows = [["label", "seeds", *heads, "parameters", "seconds"]]
    differences = [["label", *heads]]
    for label in document["labels"]:
        cells = [document["metrics"][n][label] for n in names]
        costs = document["costs"][label]
        size, seconds = costs["parameters_total"], costs["wall_seconds"]
        rows.append(
            [
                label,
                str(len(document["seeds"][label])),
                *(number(c, n) for c, n in zip(cells, names, strict=True)),
                "–" if size is None else f"{size:,.0f}",
                "–" if seconds is None else f"{seconds:.1f}",
            ]
        )
        if label != document["baseline"]:
            differences.append([label, *(difference(c, n) for c, n in zip(cells, names, strict=True))])
    most = max(map(len, document["seeds"].values()))
    print(f"\n{document['experiment']}: {'mean over seeds ± half the 95 % interval' if most > 1 else 'one seed'}")
    print(table(rows, indent="  "))
    if len(differences) > 1:
        print(f"\ndifference to {document['baseline']}, paired over seeds")
        print(table(differences, indent="  "))
    for note in document["notes"]:
        print(f"\nnote: {note}")
    print(f"\npicture: {picture}\nreport:  {report}")


def write_comparison(experiment: str, root: Path, baseline: str | None = None) -> tuple[dict[str, Any], Path, Path]:
    """Compare an experiment's finished runs; writes a picture and a self-contained report, returns all three."""
    from cmoe.tracking.compare import choose, compare, picture
    from cmoe.tracking.figures.style import png
    from cmoe.tracking.files import write_atomic
    from cmoe.tracking.report import report
    from cmoe.tracking.summary import load_runs

    runs, notes = choose(load_runs(root, experiment))
    document = {**compare(runs, baseline), "notes": notes}
    from cmoe.rundir import slug

    folder = root / "reports" / slug(experiment)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "comparison.png", png(picture(runs, document)))
    write_atomic(folder / "report.html", report(runs, document).encode())
    return document, folder / "comparison.png", folder / "report.html"
