"""One self-contained HTML file of a comparison: pictures inside, everything escaped, nothing fetched from anywhere."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from html import escape
from typing import Any

from cmoe.tracking import diagnostics, figures
from cmoe.tracking.compare import HEADLINES, headline_metrics, number, picture, table
from cmoe.tracking.figures.style import png
from cmoe.tracking.summary import RunSummary

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#222;max-width:1180px;margin:2em auto;padding:0 1em}
h1{font-size:1.6em;margin-bottom:0}h2{font-size:1.2em;margin-top:2.2em;border-bottom:1px solid #ddd;padding-bottom:.2em}
p.note{background:#fff4d6;padding:.5em 1em}p.sub{color:#666;margin-top:.2em}img{max-width:100%;height:auto}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:13.5px;font-variant-numeric:tabular-nums}
th,td{padding:.3em .8em;text-align:right;border-bottom:1px solid #eee;white-space:nowrap}
th:first-child,td:first-child{text-align:left}th{background:#f6f6f6;position:sticky;top:0}
td.absent{color:#999}.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(380px,1fr));gap:1em}
details{margin:.5em 0}summary{cursor:pointer}pre{background:#f6f6f6;padding:1em;overflow-x:auto;font-size:12.5px}
"""


def report(runs: Sequence[RunSummary], result: dict[str, Any], title: str | None = None) -> str:
    """The HTML document.

    Args:
        runs: the summaries that `result` was made from.
        result: see `compare.compare`.
        title: default is the experiment's name.
    """
    name = title or f"{result['experiment']}: comparison"
    seeds = "; ".join(f"{label}: {', '.join(map(str, s))}" for label, s in result["seeds"].items())
    views = [v for v in HEADLINES if any(v in run.matrices for run in runs) and _drawable(result, v)]
    header, rows = table(result)
    parts = [
        f"<h1>{escape(name)}</h1>",
        f'<p class="sub">{len(runs)} runs · seeds {escape(seeds)} · ± is half the 95 % interval over seeds · '
        f"Δ is the paired difference to {escape(result['baseline'])}</p>",
        *(f'<p class="note">{escape(note)}</p>' for note in result.get("notes", [])),
        _table(header, rows),
        *(f"<p>{_image(png(picture(runs, result, view)), f'comparison, {view}')}</p>" for view in views),
        "<h2>All metrics</h2>",
        _all_metrics(result),
        "<h2>Accuracy matrices</h2>" if views else "",
        *(_matrices(runs, view) for view in views),
        *_experts(runs),
        "<h2>Runs</h2>",
        _runs(runs),
        "<h2>Configurations</h2>",
        *(_config(run) for run in runs),
    ]
    body = "\n".join(parts)
    # the policy makes a browser refuse whatever an escape may have missed
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width"><title>{escape(name)}</title>\n'
        f"<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _drawable(result: dict[str, Any], view: str) -> bool:
    return any(f"{view}/{metric}" in result["metrics"] for metric in HEADLINES[view])


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(h)}</th>" for h in header)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _all_metrics(result: dict[str, Any]) -> str:
    labels, headline = result["labels"], headline_metrics(result)
    head = "".join(f"<th>{escape(x)}</th>" for x in ["metric", *labels])
    lines = []
    for name, cells in result["metrics"].items():
        row = [f"<td><b>{escape(name)}</b></td>" if name in headline else f"<td>{escape(name)}</td>"]
        for label in labels:
            cell = cells[label]
            if cell["mean"] is None:
                row.append(f'<td class="absent" title="{escape(str(cell["missing"]))}">–</td>')
            else:
                row.append(f"<td>{escape(number(cell, name))}</td>")
        lines.append(f"<tr>{''.join(row)}</tr>")
    note = '<p class="sub">A dash: not defined for these runs; the reason shows when you point at it.</p>'
    return note + f'<div class="scroll"><table><tr>{head}</tr>\n' + "\n".join(lines) + "</table></div>"


def _matrices(runs: Sequence[RunSummary], view: str) -> str:
    """The heat map of each label's first seed."""
    first = {}
    for run in runs:
        if view in run.matrices:
            first.setdefault(run.label, run)
    images = [
        _image(
            png(figures.heatmap(run.matrices[view], run.names, f"{label} · seed {run.seed}"), dpi=100),
            f"matrix of {label}",
        )
        for label, run in first.items()
    ]
    return f'<div class="grid">{"".join(f"<div>{image}</div>" for image in images)}</div>'


def _experts(runs: Sequence[RunSummary]) -> list[str]:
    """What the experts of each label's first seed do at the end, of those that were asked."""
    first = {}
    for run in runs:
        if run.experts is not None:
            first.setdefault(run.label, run)
    images = []
    for label, run in first.items():
        document, sub = run.experts, f"{label} · seed {run.seed}"
        assert document is not None
        if lost := diagnostics.dropped(document):
            images.append(_image(png(figures.drop_one(lost, document["names"], sub), dpi=100), f"drop one, {label}"))
        if known := diagnostics.calibrations(document):
            images.append(_image(png(figures.calibration(known, sub), dpi=100), f"calibration of {label}"))
        if alike := diagnostics.similarities(document):
            images.append(_image(png(figures.similarity(alike, sub), dpi=100), f"similarity of experts, {label}"))
    return ["<h2>Experts</h2>", *(f"<p>{image}</p>" for image in images)] if images else []


def _runs(runs: Sequence[RunSummary]) -> str:
    header = ["run", "label", "seed", "status", "parameters", "active", "seconds"]
    rows = [
        [
            run.run_id,
            run.label,
            str(run.seed),
            run.status,
            "–" if run.parameters_total is None else f"{run.parameters_total:,}",
            "–" if run.parameters_active is None else f"{run.parameters_active:,}",
            "–" if run.wall_seconds is None else f"{run.wall_seconds:.1f}",
        ]
        for run in runs
    ]
    return _table(header, rows)


def _config(run: RunSummary) -> str:
    text = json.dumps(run.config, indent=2, ensure_ascii=False, default=str)
    return f"<details><summary>{escape(run.run_id)}</summary><pre>{escape(text)}</pre></details>"


def _image(data: bytes, alt: str) -> str:
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
