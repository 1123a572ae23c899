"""The command-line and component references of the docs, made from the code: `python -m cmoe.cli.reference docs/`."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path

from cmoe.cli.commands import COMMANDS
from cmoe.cli.common import COMMON, DONE, WRONG, Parser
from cmoe.cli.show import Shown, about, component, default_text, section, section_names
from cmoe.plugins import KINDS, PLURALS, Catalogue, Option, builtin_folder

NOTICE = "<!-- made by `python -m cmoe.cli.reference docs/` (make docs): change the code, not this file -->"


def main(argv: list[str] | None = None) -> int:
    """Write `cli.md` and `components.md` into the folder given."""
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        print("usage: python -m cmoe.cli.reference FOLDER", file=sys.stderr)
        return WRONG
    for name, text in pages().items():
        (Path(arguments[0]) / name).write_text(text, encoding="utf-8")
    return DONE


def pages() -> dict[str, str]:
    """Text of each generated page by file name."""
    return {"cli.md": cli(), "components.md": components()}


def cli() -> str:
    """The command line in Markdown."""
    parts = [NOTICE, "# Command line", "`cmoe COMMAND [options]`. Exit codes: 0 done, 1 the run failed, 2 the input was "
             "wrong, 130 interrupted (and resumable).", "Every command takes:"]  # fmt: skip
    parts.append("\n".join(f"- `{n}{' DIR' if takes else ''}`: {meaning}" for n, (takes, meaning) in COMMON.items()))
    for name, (module, summary) in COMMANDS.items():
        parser = Parser(name, summary)
        import_module(module).add_arguments(parser)
        own = [a for a in parser._actions if not {*a.option_strings} & {*COMMON, "-h"}]
        usage = " ".join(["cmoe", name, *map(_usage, own)])
        parts += [f"## {name}", f"{summary[0].upper()}{summary[1:]}.", f"```\n{usage}\n```"]
        if own:
            parts.append("\n".join(f"- `{_name(a)}`: {a.help or ''}" for a in own))
    return "\n\n".join(parts) + "\n"


def _name(action: argparse.Action) -> str:
    metavar = action.metavar if isinstance(action.metavar, str) else (action.dest.upper() if action.nargs != 0 else "")
    return " ".join(filter(None, [", ".join(action.option_strings), metavar]))


def _usage(action: argparse.Action) -> str:
    text = _name(action).split(", ")[-1]
    if action.nargs == "*":
        return f"[{text} ...]"
    if action.nargs == "+":
        return f"{text} [{text} ...]"
    return text if not action.option_strings and action.nargs != "?" else f"[{text}]"


def components() -> str:
    """Sections and built-in components of every kind with all their options, in Markdown."""
    parts = [NOTICE, "# Sections and components", "What a configuration can say. A component is given by its name, or by "
             "a mapping with `name:` and its options; `cmoe show NAME` prints the same."]  # fmt: skip
    parts.append("## Sections")
    for name in section_names():
        title = {"config": "top level", "moe": "model.moe"}.get(name, name)
        parts += _entry(section(name), title)
    found = Catalogue([])
    for kind in KINDS:
        parts.append(f"## {PLURALS[kind].capitalize()}")
        shared: dict[str, Option] = {}
        if kind == "task":  # what all tasks have is said once
            shared = task_options()
            parts += ["Options of every task:", _table(shared)]
        for name, entry in found.entries(kind).items():
            if not entry.builtin or (kind == "task" and entry.path.parent != builtin_folder("tasks").resolve()):
                continue
            shown = component(found, kind, name)
            shown.options = {k: o for k, o in shown.options.items() if shared.get(k) != o}
            parts += _entry(shown, name)
    return "\n\n".join(parts) + "\n"


def task_options() -> dict[str, Option]:
    """The options of the base class of tasks."""
    from cmoe.plugins.schema import options_of
    from cmoe.plugins.source import PACKAGE, Class, open_module

    module = open_module("cmoe.streams.task", {"cmoe": PACKAGE})
    assert module is not None
    return options_of(Class(module, module.classes["Task"]))


def _entry(shown: Shown, title: str) -> list[str]:
    return [f"### {title}", about(shown), *([_table(shown.options)] if shown.options else [])]


def _table(options: dict[str, Option]) -> str:
    rows = ["| option | value | default | meaning |", "|---|---|---|---|"]
    for o in options.values():
        cells = [f"`{o.name}`", o.type.describe(), f"`{default_text(o)}`", o.meaning]
        rows.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
