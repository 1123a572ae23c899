"""`cmoe sync`: deliver to the tracking server what it has not received yet."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from cmoe.cli.common import DONE, Parser, emit, table
from cmoe.errors import RunFailed, UserError

if TYPE_CHECKING:
    from cmoe.rundir import RunFolder


def add_arguments(parser: Parser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="*", help="ids, beginnings of ids, folders or `last`; default all")
    parser.add_argument("--uri", metavar="URI", help="where to; default is each run's own, else $MLFLOW_TRACKING_URI")
    parser.add_argument("--root", metavar="DIR", default="mlruns", help="folder of run output; default is mlruns")


def main(args: argparse.Namespace) -> int:
    from cmoe.api import server_of
    from cmoe.rundir import find, runs

    root = Path(args.root)
    chosen = [find(root, name) for name in dict.fromkeys(args.runs)] if args.runs else runs(root)
    if not chosen:
        raise UserError(f"no runs in {root}; start one with: cmoe run quickstart")
    rows, refused, waiting = [], {}, []
    for folder in {f.path.resolve(): f for f in chosen}.values():
        location = server_of(folder, args.uri)
        row = {"run": folder.id, "server": location and location.name, "delivered_bytes": 0}
        if location is not None and location.name in refused:
            waiting.append(folder.id)  # one that does not answer is asked once
        elif location is not None:
            try:
                row["delivered_bytes"] = _deliver(folder, args.uri)
            except Exception as error:  # a server, its HTTP client and its database fail in many ways
                refused[location.name] = " ".join(str(error).split())[:200]
                waiting.append(folder.id)
        row["state"] = _state(row, waiting)
        rows.append(row)
    emit(args, {"runs": rows})
    if not args.json:
        print(table([[r["run"], r["state"]] for r in rows]))
    if refused:
        where, reason = next(iter(refused.items()))
        named = f"run {waiting[0]} waits" if len(waiting) == 1 else f"{len(waiting)} runs wait"
        raise RunFailed(f"{where} cannot be reached, {named} with nothing lost; call `cmoe sync` again ({reason})")
    return DONE


def _deliver(folder: RunFolder, uri: str | None) -> int:
    from cmoe.api import deliver_rest

    logger = logging.getLogger("mlflow")
    before = logger.level
    logger.setLevel(logging.ERROR)  # what fails is said here, in one line
    try:
        return deliver_rest(folder, uri)
    finally:
        logger.setLevel(before)


def _state(row: dict, waiting: list[str]) -> str:
    if row["server"] is None:
        return "tracking is off (tracking.enabled: false)"
    if row["run"] in waiting:
        return f"waits for {row['server']}"
    size = row["delivered_bytes"]
    return f"{size / 1000:.1f} kB delivered to {row['server']}" if size else "nothing new"
