"""`cmoe run`: train a configuration, or each of its variants in turn."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from cmoe.cli.common import DONE, INTERRUPTED, Parser, catalogue, data, emit, report_broken
from cmoe.errors import RunFailed, UserError


def add_arguments(parser: Parser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a file, or the name of a configuration that comes with cmoe")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="values that replace the file's")
    parser.add_argument("--only", metavar="LABEL", action="append", default=[], help="only this variant (repeatable)")


def main(args: argparse.Namespace) -> int:
    # the first line comes before anything heavy is imported
    print(f"cmoe: reading {args.config}", file=sys.stderr, flush=True)
    from cmoe.config.study import read_study

    found = catalogue(args)
    study = read_study(args.config, args.overrides, found, args.only)
    report_broken(found)
    what = ", ".join(p.label for p in study.plans)
    first = study.plans[0]
    print(f"cmoe: experiment {first.experiment}: {what} on {first.stream['name']}, seed {first.seed}", file=sys.stderr)
    print("cmoe: importing torch, Lightning and Avalanche takes 10 to 20 s", file=sys.stderr, flush=True)
    return _train(args, study.plans, found)


def _train(args: argparse.Namespace, plans: list[Any], found: Any) -> int:
    from cmoe import api
    from cmoe.cli.console import Console, StopFlag
    from cmoe.session import Interrupted

    console, done = Console(), []
    stop = StopFlag(console.line)
    where = data(args)
    with stop.installed(), console.drawing():
        for plan in plans:
            console.name = plan.label
            folder = api.new_run(plan)
            try:
                done.append(api.start_in(plan, folder, found, where, console, stop))
            except Interrupted:
                print(f"cmoe: interrupted; go on with: cmoe resume {folder.id}", file=sys.stderr)
                emit(args, {"interrupted": folder.id, "runs": done})
                return INTERRUPTED
            except (UserError, RunFailed) as error:
                if isinstance(error, RunFailed):
                    raise RunFailed(f"{error} (resume with: cmoe resume {folder.id})") from error
                raise
            except Exception as error:
                raise RunFailed(
                    f"{_line(error)}; run {folder.id} is kept, resume with: cmoe resume {folder.id}"
                ) from error
    emit(args, {"experiment": plans[0].experiment, "runs": done})
    if not args.json:
        from cmoe.cli.results import show_runs

        show_runs(done, plans[0].tracking["root"])
    return DONE


def _line(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"
