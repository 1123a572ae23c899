"""The entry point `cmoe`: finds the command, runs it, and turns what goes wrong into one line and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any, TextIO

from cmoe.cli.commands import COMMANDS
from cmoe.cli.common import COMMON, DONE, FAILED, INTERRUPTED, WRONG, Parser, UsageError, encode, table
from cmoe.errors import RunFailed, UserError, nearest, one_line


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code: 0 done, 1 failed, 2 wrong input, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug, as_json = "--debug" in arguments, "--json" in arguments
    streams = _Output(as_json)
    try:
        code = _guarded(arguments, debug, streams)
        streams.finish()
        return code
    except BrokenPipeError:
        # the reader went away (`| head`); what is still buffered must not fail again at exit
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    finally:
        streams.restore()


def _guarded(arguments: list[str], debug: bool, streams: _Output) -> int:
    """The exit code of a command line, with what went wrong said in one line."""
    try:
        return _dispatch(arguments, streams)
    except SystemExit as e:  # argparse after --help
        return e.code if isinstance(e.code, int) else DONE
    except BrokenPipeError:
        raise
    except KeyboardInterrupt as e:
        return _say(streams, str(e) or "interrupted", INTERRUPTED, debug)
    except UserError as e:
        return _say(streams, str(e), WRONG, debug)
    except RunFailed as e:
        return _say(streams, str(e), FAILED, debug)
    except Exception as e:
        hint = "" if debug else " (--debug shows where)"
        return _say(streams, f"{one_line(e)}{hint}", FAILED, debug)


def _say(streams: _Output, message: str, code: int, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exc()
    line = " ".join(message.split())
    print(f"cmoe: {line}", file=sys.stderr)
    streams.document = {"error": line, "exit": code}
    return code


def _dispatch(arguments: list[str], streams: _Output) -> int:
    front, rest = _split(arguments)
    if "--version" in front:
        from importlib.metadata import version

        print(f"cmoe {version('cmoe')}")
        return DONE
    if "-h" in front or "--help" in front or not rest:
        print(overview(), file=streams.out)
        return DONE if rest or front else WRONG
    name, *own = rest
    if name == "help":
        name, own = (own[0], ["--help"]) if own else ("help", [])
    if name not in COMMANDS:
        if name == "help":
            print(overview(), file=streams.out)
            return DONE
        raise UsageError(f"expected a command (see `cmoe --help`), got '{name}'{nearest(name, COMMANDS)}")
    module_name, summary = COMMANDS[name]
    module: Any = import_module(module_name)
    parser = Parser(name, summary)
    module.add_arguments(parser)
    if "-h" in own or "--help" in own:
        print(parser.format_help(), end="", file=streams.out)
        return DONE
    args = parser.parse([*own, *front])
    code = module.main(args)
    streams.document = args.document
    return DONE if code is None else code


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The common options before the command, and the command with the rest."""
    i = 0
    while i < len(arguments) and arguments[i].startswith("-"):
        name = arguments[i].partition("=")[0]
        known = [*COMMON, "--help", "-h", "--version"]
        if name not in known:
            raise UsageError(f"unexpected option '{name}' before the command{nearest(name, known)} (see `cmoe --help`)")
        takes = COMMON.get(name, (False, ""))[0] and "=" not in arguments[i]
        i += 2 if takes else 1
    return arguments[:i], arguments[i:]


def overview() -> str:
    """What `cmoe --help` prints."""
    commands = table([[n, s] for n, (_, s) in COMMANDS.items()], indent="  ")
    common = table([[f"{n} DIR" if takes else n, meaning] for n, (takes, meaning) in COMMON.items()], indent="  ")
    return (
        "usage: cmoe COMMAND [options]\n\n"
        "Continual learning with Mixture-of-Experts models.\n\n"
        f"commands:\n{commands}\n\ncommon options:\n{common}\n\n"
        "`cmoe COMMAND --help` says more about one. Exit codes: 0 done, 1 the run failed, 2 the input was wrong,\n"
        "130 interrupted (and resumable)."
    )


class _Output:
    """Standard output; with --json it is kept for one document and everything printed goes to standard error."""

    def __init__(self, as_json: bool) -> None:
        self.document: Any = None
        self.as_json = as_json
        self.out: TextIO = sys.stdout
        self._original: TextIO = sys.stdout
        self._saved: int | None = None
        if not as_json:
            return
        sys.stdout.flush()
        with suppress(OSError, ValueError, AttributeError):
            # libraries and child processes write to the descriptor, not to sys.stdout
            if sys.stdout.fileno() == 1 and sys.stderr.fileno() == 2:
                self._saved = os.dup(1)
                os.dup2(2, 1)
        sys.stdout = sys.stderr
        self.out = sys.stderr

    def finish(self) -> None:
        """Print the document, or flush what was printed."""
        if not self.as_json:
            sys.stdout.flush()
            return
        self.restore()
        if self.document is not None:
            print(encode(self.document), flush=True)

    def restore(self) -> None:
        """Give standard output back."""
        if self.as_json and sys.stdout is sys.stderr:
            sys.stderr.flush()
            if self._saved is not None:
                os.dup2(self._saved, 1)
                os.close(self._saved)
                self._saved = None
            sys.stdout = self._original


if __name__ == "__main__":
    sys.exit(main())
