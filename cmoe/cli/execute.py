"""Running one or several runs in this process, with progress, a clean stop, and the results at the end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from typing import Any

from cmoe.cli.common import DONE, INTERRUPTED, emit
from cmoe.errors import RunFailed, UserError, one_line
from cmoe.rundir import RunFolder

Work = Callable[[Any, Any], dict[str, Any]]  # reporter, stop -> facts


def execute(args: argparse.Namespace, works: Iterable[tuple[RunFolder, str, Work]]) -> int:
    """Run each in turn and show what came out.

    Args:
        args: of the command.
        works: (folder, name in messages, what does it), each taken when its turn comes.

    Raises:
        RunFailed: one failed; the message says how to resume it.
    """
    from cmoe.cli.console import Console, StopFlag
    from cmoe.moe import keep_memory
    from cmoe.session import Interrupted

    keep_memory()  # this process is ours
    console, done = Console(), []
    stop = StopFlag(console.line)
    with stop.installed(), console.drawing():
        for folder, name, work in works:
            console.name, root = name, folder.path.parents[1]
            try:
                done.append(work(console, stop))
            except Interrupted:
                print(f"cmoe: interrupted; go on with: cmoe resume {folder.id}", file=sys.stderr)
                emit(args, {"interrupted": folder.id, "runs": done})
                return INTERRUPTED
            except UserError:
                raise
            except Exception as error:
                raise RunFailed(f"{one_line(error)} (run {folder.id} is kept: cmoe resume {folder.id})") from error
    emit(args, {"experiment": done[0]["experiment"], "runs": done})
    if not args.json:
        from cmoe.cli.results import show_runs

        show_runs(done, root)
    return DONE
