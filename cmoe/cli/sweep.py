"""`cmoe sweep`: a grid of runs, several processes at a time; what is finished is skipped."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from cmoe.cli.common import DONE, FAILED, INTERRUPTED, Parser, UsageError, catalogue, data, emit, table


def add_arguments(parser: Parser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a file, or the name of a configuration that comes with cmoe")
    parser.add_argument(
        "overrides",
        metavar="key=a,b",
        nargs="*",
        help="values to combine, separated by commas, or a range like seed=0..4",
    )
    parser.add_argument("--only", metavar="LABEL", action="append", default=[], help="only this variant (repeatable)")
    parser.add_argument(
        "--select",
        metavar="val:METRIC",
        help="choose each method's setting on the validation split, then run it with fresh seeds on the test split",
    )
    parser.add_argument(
        "--confirm",
        metavar="N",
        type=int,
        default=0,
        help="with --select: how many fresh seeds; default as many as before",
    )
    add_jobs(parser)


def add_jobs(parser: Parser) -> None:
    """Options of every command that runs several processes."""
    parser.add_argument("--jobs", metavar="N", type=int, default=0, help="runs at a time; default is one for each core")
    parser.add_argument("--again", action="store_true", help="run also what is finished already")


def main(args: argparse.Namespace) -> int:
    print(f"cmoe: reading {args.config}", file=sys.stderr, flush=True)
    if args.confirm and not args.select:
        raise UsageError("--confirm: expected --select beside it")
    if args.select:
        return select(args)
    plans = plans_of(args)
    jobs = run_all(args, plans)
    return _finish(args, plans, jobs, summary(jobs))


def _finish(args: argparse.Namespace, plans: list[Any], jobs: list[Any], document: dict[str, Any]) -> int:
    """Compare what is finished, and say how it went."""
    from cmoe.cli.results import show_comparison, write_comparison

    if any(j.status in ("finished", "skipped") for j in jobs):
        experiment, root = plans[0].experiment, plans[0].tracking["root"]
        from pathlib import Path

        comparison, picture, report = write_comparison(experiment, Path(root))
        document["comparison"] = comparison
        if not args.json:
            show_comparison(comparison, picture, report)
            print(f"MLflow:  cmoe ui {experiment}")
    emit(args, document)
    return exit_code(jobs)


def plans_of(args: argparse.Namespace) -> list[Any]:
    """Every plan of the grid; what varies beside the strategy becomes part of the label."""
    from cmoe.selection import settings

    found = settings(args.config, args.overrides, catalogue(args), args.only)
    if not any(o.startswith("label=") for o in args.overrides):
        _labelled(found)
    hashes: dict[str, Any] = {}
    for plan in (plan for setting in found for plan in setting.plans):
        hashes.setdefault(plan.hash, plan)
    return list(hashes.values())


def _labelled(found: list[Any]) -> None:
    for setting in found:
        for plan in setting.plans:
            plan.run["label"] = setting.label


def select(args: argparse.Namespace) -> int:
    """Run the grid on the validation split, choose for each method, and run what is chosen with fresh seeds on the test
    split."""
    from cmoe.config.study import read_study
    from cmoe.selection import choose, confirmed, equal_budget, fresh_seeds, settings, wanted

    metric, found = wanted(args.select), catalogue(args)
    study = read_study(args.config, [o for o in args.overrides if o.startswith("experiment=")], found)
    experiment = study.plans[0].experiment
    more = ["evaluation.split=validation", f"experiment={experiment}_selection"]
    tried = settings(args.config, args.overrides, found, args.only, more)
    budget = equal_budget(tried)
    methods = len({s.method for s in tried})
    seeds = fresh_seeds(tried)
    if args.confirm < 0:
        raise UsageError(f"--confirm: expected a number from 1, got {args.confirm}")
    if args.confirm:
        seeds = list(range(seeds[0], seeds[0] + args.confirm))
    _labelled(tried)
    print(f"cmoe: {methods} methods with {budget} settings each, on the validation split", file=sys.stderr, flush=True)
    jobs = run_all(args, [plan for setting in tried for plan in setting.plans])
    document: dict[str, Any] = {"metric": metric, "selection": summary(jobs)["runs"]}
    if any(j.status not in ("finished", "skipped") for j in jobs):
        emit(args, document)
        return exit_code(jobs)
    value = {id(j.plan): (j.facts or {}).get("metrics", {}).get(metric) for j in jobs}
    choices = choose(tried, metric, lambda plan: value[id(plan)])
    document["chosen"] = [
        {"method": c.setting.method, "setting": list(c.setting.values), "mean": c.mean, "tried": c.tried}
        for c in choices
    ]
    if not args.json:
        rows = [["method", "tried", f"{metric} (validation)", "chosen"]]
        rows += [[c.setting.method, str(c.tried), f"{c.mean:.4f}", ", ".join(c.setting.values)] for c in choices]
        print(table(rows, indent="  "), flush=True)
    plans = confirmed(args.config, choices, seeds, found)
    print(f"cmoe: what was chosen, on the test split with seeds {seeds[0]} to {seeds[-1]}", file=sys.stderr, flush=True)
    final = run_all(args, plans)
    return _finish(args, plans, final, {**document, **summary(final)})


def run_all(args: argparse.Namespace, plans: list[Any]) -> list[Any]:
    """Run every plan; what is finished is skipped. Lines about each go to standard error."""
    from cmoe.api import prepare_tracking
    from cmoe.cli.console import Console, StopFlag
    from cmoe.sweep import Job, sweep

    if args.jobs < 0:
        raise UsageError(f"--jobs: expected a number from 1, got {args.jobs}")
    parallel = args.jobs or os.cpu_count() or 1
    jobs = [Job(plan, f"{plan.label} s{plan.seed}") for plan in plans]
    print(f"cmoe: {len(jobs)} runs, {min(parallel, len(jobs))} at a time", file=sys.stderr, flush=True)
    prepare_tracking(plans[0])
    console = Console()
    stop = StopFlag(console.line)

    def event(job: Any, name: str, arguments: tuple[Any, ...]) -> None:
        console.on(job.name, name, arguments)
        if name == "ended":
            left = sum(j.status in ("waiting", "running") for j in jobs)
            console.line(f"[{job.name}] {job.status}{f': {job.error}' if job.error else ''} ({left} left)")

    with stop.installed(), console.drawing():
        sweep(jobs, data(args), parallel, event, stop, args.again)
    return jobs


def summary(jobs: list[Any]) -> dict[str, Any]:
    """What became of each run, for JSON."""
    return {
        "runs": [
            {
                "name": j.name,
                "run_id": j.run_id,
                "status": j.status,
                "error": j.error,
                "metrics": (j.facts or {}).get("metrics"),
            }
            for j in jobs
        ]
    }


def exit_code(jobs: list[Any]) -> int:
    """0 when every run is finished, 130 when some wait for the next start, 1 when one failed."""
    states = {j.status for j in jobs}
    if "failed" in states:
        for job in jobs:
            if job.status == "failed":
                print(f"cmoe: {job.name}: {job.error}", file=sys.stderr)
        return FAILED
    if states & {"interrupted", "waiting"}:
        print("cmoe: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return INTERRUPTED
    return DONE
