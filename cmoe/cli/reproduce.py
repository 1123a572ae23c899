"""`cmoe reproduce`: run a published table and print our figures beside its own."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from cmoe.cli.common import Parser, catalogue, emit, table
from cmoe.cli.sweep import add_jobs, exit_code, run_all, summary
from cmoe.errors import UserError


def add_arguments(parser: Parser) -> None:
    parser.add_argument("name", metavar="NAME", help="a file of configs/reproduce (`cmoe list configs`), or a path")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="values that replace the file's")
    parser.add_argument("--only", metavar="LABEL", action="append", default=[], help="only this row (repeatable)")
    parser.add_argument("--seeds", metavar="N", type=int, default=0, help="seeds 0 to N-1 instead of the file's")
    add_jobs(parser)


def main(args: argparse.Namespace) -> int:
    from cmoe.config.study import read_study

    print(f"cmoe: reading {args.name}", file=sys.stderr, flush=True)
    is_path = args.name.endswith((".yaml", ".yml"))
    name = args.name if is_path or args.name.startswith("reproduce/") else f"reproduce/{args.name}"
    found = catalogue(args)
    study = read_study(name, args.overrides, found, args.only)
    if not study.published:
        raise UserError(f"{args.name}: expected a section `published`, without one there is nothing to hold against")
    seeds = list(range(args.seeds)) if args.seeds > 0 else study.seeds
    plans = [p for s in seeds for p in read_study(name, [*args.overrides, f"seed={s}"], found, args.only).plans]
    unknown = set(study.published["rows"]) - {p.label for p in read_study(name, (), found).plans}
    if unknown:
        raise UserError(f"{args.name}: published.rows: expected labels of variants, got '{sorted(unknown)[0]}'")
    jobs = run_all(args, plans)
    rows = hold_against(study.published, jobs)
    emit(args, {"source": study.published.get("source"), "seeds": seeds, "rows": rows, **summary(jobs)})
    if not args.json and rows:
        print(f"\n{args.name}: {study.published.get('source', '')}\n{study.published.get('unit', '')}\n")
        print(render(rows))
        held = [r["within"] for r in rows if r["within"] is not None]
        print(f"\n{sum(held)} of {len(held)} published cells are within the tolerance")
        print(f"runs: {Path(plans[0].tracking['root']) / 'runs'}")
    return exit_code(jobs)


def hold_against(published: dict[str, Any], jobs: list[Any]) -> list[dict[str, Any]]:
    """A row for each published cell: ours with its standard error, theirs, and the difference, in percent.

    A cell is within the tolerance when the difference of the means is at most `tolerance` points or two standard
    errors of our mean, whichever is larger.
    """
    from cmoe.metrics.statistics import summarise

    tolerance, rows = float(published.get("tolerance", 3.0)), []
    for label, cells in published["rows"].items():
        asked = [j for j in jobs if j.plan.label == label]
        done = [j for j in asked if j.facts]
        for metric, theirs in cells.items():
            values = [100 * j.facts["metrics"][metric] for j in done if j.facts["metrics"].get(metric) is not None]
            if not asked:  # left out by --only
                continue
            if not values:  # it failed, or has no such metric: a cell that is not reproduced
                empty = dict.fromkeys(("ours", "std", "standard_error", "difference"))
                within = None if theirs is None else False
                rows.append(
                    {"row": label, "metric": metric, **empty, "seeds": [], "published": theirs, "within": within}
                )
                continue
            ours = summarise(values)
            error = ours.std / len(values) ** 0.5 if ours.std is not None else 0.0
            difference = None if theirs is None else ours.mean - theirs
            rows.append(
                {
                    "row": label,
                    "metric": metric,
                    "ours": ours.mean,
                    "std": ours.std,
                    "standard_error": error,
                    "seeds": sorted(j.plan.seed for j in done),
                    "published": theirs,
                    "difference": difference,
                    "within": None if difference is None else abs(difference) <= max(tolerance, 2 * error),
                }
            )
    return rows


def render(rows: list[dict[str, Any]]) -> str:
    """The rows as a table of text."""
    lines = [["row", "metric", "seeds", "ours", "published", "difference", "within"]]
    for r in rows:
        spread = "" if r["std"] is None else f" ± {r['std']:.2f}"
        lines.append(
            [
                r["row"],
                r["metric"],
                str(len(r["seeds"])),
                "–" if r["ours"] is None else f"{r['ours']:.2f}{spread}",
                "–" if r["published"] is None else f"{r['published']:.2f}",
                "–" if r["difference"] is None else f"{r['difference']:+.2f}",
                {True: "yes", False: "NO", None: "–"}[r["within"]],
            ]
        )
    return table(lines, indent="  ")
