"""What goes wrong, by who can mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """The input was wrong: one line that says where, what was expected and the nearest name. Exit code 2."""


class RunFailed(Exception):
    """The run could not go on; what it had is kept and it can be resumed. Exit code 1."""


def first_line(error: BaseException, otherwise: str = "") -> str:
    """The first line of an error's message; `otherwise`, or its class's name, where it has none."""
    return (str(error).strip().splitlines() or [otherwise or type(error).__name__])[0]


def one_line(error: BaseException) -> str:
    """An error in one line, with its class unless it is one of ours, whose messages are made for people."""
    line = first_line(error)
    ours = isinstance(error, UserError | RunFailed) or line == type(error).__name__
    return line if ours else f"{type(error).__name__}: {line}"


def nearest(name: str, names: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the closest of `names`, or the empty string when nothing is close."""
    found = difflib.get_close_matches(str(name), [str(n) for n in names], n=1, cutoff=0.5)
    return f" (did you mean '{found[0]}'?)" if found else ""
