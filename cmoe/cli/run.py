"""`cmoe run`: train a configuration, or each of its variants in turn."""

from __future__ import annotations

import argparse
import sys

from cmoe.cli.common import Parser, catalogue, data, report_broken


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
    from cmoe import api
    from cmoe.cli.execute import Work, execute
    from cmoe.config.plan import Plan
    from cmoe.rundir import RunFolder

    where = data(args)

    def work(plan: Plan, folder: RunFolder) -> Work:
        return lambda console, stop: api.start_in(plan, folder, found, where, console, stop)

    api.prepare_tracking(first)
    folders = ((plan, api.new_run(plan)) for plan in study.plans)
    return execute(args, ((folder, plan.label, work(plan, folder)) for plan, folder in folders))
