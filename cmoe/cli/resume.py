"""`cmoe resume`: go on with a run that was interrupted, killed or failed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cmoe.cli.common import DONE, Parser, data
from cmoe.rundir import find


def add_arguments(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run's id or its beginning, its folder, or 'last'")
    parser.add_argument("--root", metavar="DIR", default="mlruns", help="folder of all run output")
    parser.add_argument(
        "--anyway", action="store_true", help="go on although data, machine or versions changed (not bit-identical)"
    )


def main(args: argparse.Namespace) -> int:
    folder = find(Path(args.root), args.run)
    facts = folder.facts()
    if facts.get("status") == "FINISHED":
        print(f"cmoe: run {folder.id} is finished; `cmoe extend` lets it learn more", file=sys.stderr)
    else:
        print(f"cmoe: resuming {folder.id} ({facts.get('status', 'unknown').lower()})", file=sys.stderr, flush=True)
    from cmoe import api
    from cmoe.cli.execute import execute

    where = data(args) if args.data else None
    code = execute(
        args,
        [
            (
                folder,
                facts["label"],
                lambda console, stop: api.resume(folder, where, console, stop, args.anyway, args.plugins),
            )
        ],
    )
    return code or DONE
