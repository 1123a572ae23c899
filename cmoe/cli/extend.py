"""`cmoe extend`: a finished run goes on learning."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from cmoe.cli.common import Parser, UsageError, data
from cmoe.rundir import find


def add_arguments(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run's id or its beginning, its folder, or 'last'")
    parser.add_argument(
        "overrides",
        metavar="task=…",
        nargs="+",
        help="task=next, task=2 or task=all for the experiences that stream.limit left; task=NAME (with "
        "task.OPTION=value) for another task",
    )
    parser.add_argument("--root", metavar="DIR", default="mlruns", help="folder of all run output")
    parser.add_argument(
        "--anyway", action="store_true", help="go on although data, machine or versions changed (not bit-identical)"
    )


def main(args: argparse.Namespace) -> int:
    folder = find(Path(args.root), args.run)
    task = _task(args.overrides)
    print(f"cmoe: extending {folder.id}", file=sys.stderr, flush=True)
    from cmoe import api
    from cmoe.cli.execute import execute

    where = data(args) if args.data else None
    facts = folder.facts()

    def work(console: Any, stop: Any) -> dict[str, Any]:
        return api.extend(folder, task, where, console, stop, args.anyway, args.plugins)

    return execute(args, [(folder, facts.get("label", folder.id), work)])


def _task(overrides: list[str]) -> Any:
    """What `task=…` and `task.option=…` say: a word, a number, or a mapping."""
    from cmoe.config.text import parse
    from cmoe.config.tree import parse_override

    name: Any = None
    options: dict[str, Any] = {}
    for override in overrides:
        keys, text = parse_override(override)
        if keys[0] != "task":
            raise UsageError(f"expected task=… or task.OPTION=value, got '{override}'")
        value = parse(text, f"command line: {'.'.join(keys)}")
        if len(keys) == 1:
            name = value
        elif len(keys) == 2:
            options[keys[1]] = value
        else:
            raise UsageError(f"expected task.OPTION=value, got '{override}'")
    if name is None:
        raise UsageError("expected task=next, task=all, task=N or task=NAME")
    if isinstance(name, dict):
        return {**name, **options}
    return {"name": name, **options} if options else name
