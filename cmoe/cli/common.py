"""What every command shares: options, the parser, and how results are printed."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from cmoe.errors import UserError, nearest

if TYPE_CHECKING:
    from cmoe.plugins import Catalogue
    from cmoe.streams.data import DataFolder

DONE, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 130  # exit codes

# options that may also stand before the command: name -> (takes a value, help)
COMMON = {
    "--json": (False, "print one JSON document on standard output, all else on standard error"),
    "--plugins": (True, "also look for components in this folder (may be repeated)"),
    "--data": (True, "folder of data sets; default is $CMOE_DATA, else ~/.cache/cmoe"),
    "--debug": (False, "print a traceback when something fails"),
}


class UsageError(UserError):
    """The command line was wrong."""


class Parser(argparse.ArgumentParser):
    """argparse with errors as one line and the nearest name of a mistyped option."""

    def __init__(self, command: str, summary: str) -> None:
        super().__init__(prog=f"cmoe {command}", description=summary, allow_abbrev=False)
        group = self.add_argument_group("common options")
        for name, (takes, meaning) in COMMON.items():
            if name == "--plugins":
                group.add_argument(name, metavar="DIR", action="append", default=[], help=meaning)
            elif takes:
                group.add_argument(name, metavar="DIR", help=meaning)
            else:
                group.add_argument(name, action="store_true", help=meaning)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message[:1].lower()}{message[1:]} (see `{self.prog} --help`)")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """The parsed arguments; options and positional ones may be mixed.

        Raises:
            UsageError: they do not fit.
        """
        args, rest = self.parse_known_intermixed_args(arguments)
        if rest:
            options = [o for a in self._actions for o in a.option_strings]
            self.error(f"unexpected argument '{rest[0]}'{nearest(rest[0].partition('=')[0], options)}")
        args.document = None
        return args


def emit(args: argparse.Namespace, document: Any) -> None:
    """Set the command's JSON document, which is printed once, at its end."""
    args.document = document


def encode(document: Any) -> str:
    """JSON as the standard has it: what is no finite number is null."""
    return json.dumps(finite(document), indent=2, ensure_ascii=False, default=str, allow_nan=False)


def finite(value: Any) -> Any:
    """The value with NaN and infinities as None and keys as text."""
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def catalogue(args: argparse.Namespace) -> Catalogue:
    """The components that this command line can name; broken plugins are reported once."""
    from cmoe.plugins import Catalogue

    return Catalogue(args.plugins)


def report_broken(found: Catalogue) -> None:
    """One line on standard error for each plugin that is left out."""
    for path, reason in found.broken:
        print(f"cmoe: {path}: {reason} (left out)", file=sys.stderr)


def data(args: argparse.Namespace) -> DataFolder:
    """Where data sets are looked for."""
    from cmoe.streams.data import data_folder

    return data_folder(args.data)


def table(rows: Sequence[Sequence[str]], indent: str = "") -> str:
    """Rows as columns of equal width, the last one free."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1] if rows else []
    lines = []
    for row in rows:
        cells = [c.ljust(w) for c, w in zip(row, widths, strict=False)] + [row[-1]]
        lines.append((indent + "  ".join(cells)).rstrip())
    return "\n".join(lines)
