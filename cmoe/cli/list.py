"""`cmoe list`: names and one-liners, read without importing any component."""

from __future__ import annotations

import argparse
from typing import Any

from cmoe.cli.common import DONE, Parser, UsageError, catalogue, emit, report_broken, table
from cmoe.errors import nearest
from cmoe.plugins import KINDS, PLURALS, Catalogue

CONFIGS = "configs"
WHAT = {**{PLURALS[k]: k for k in KINDS}, CONFIGS: CONFIGS}


def add_arguments(parser: Parser) -> None:
    parser.add_argument("what", metavar="WHAT", nargs="?", help=f"one of {', '.join(WHAT)}; default is all")


def main(args: argparse.Namespace) -> int:
    what = args.what
    if what is not None and what not in WHAT:
        what = next((plural for plural, kind in WHAT.items() if kind == what), None)  # the singular is understood
        if what is None:
            raise UsageError(f"list: expected one of {', '.join(WHAT)}, got '{args.what}'{nearest(args.what, WHAT)}")
    found = catalogue(args)
    rows = [row for plural in ([what] if what else WHAT) for row in _rows(found, plural)]
    report_broken(found)
    emit(args, rows)
    if not args.json:
        kinds = list(dict.fromkeys(r["kind"] for r in rows))
        for i, kind in enumerate(kinds):
            if len(kinds) > 1:
                print(f"{'' if i == 0 else chr(10)}{PLURALS.get(kind, CONFIGS)}")
            cells = [[r["name"], r["summary"] + _origin(r["origin"])] for r in rows if r["kind"] == kind]
            print(table(cells, indent="  " if len(kinds) > 1 else ""))
        if not rows:
            print(f"no {what} found")
    return DONE


def _origin(origin: str) -> str:
    return "" if origin == "built-in" else f"  [{origin}]"


def _rows(found: Catalogue, plural: str) -> list[dict[str, Any]]:
    if plural == CONFIGS:
        return _configs()
    entries = found.entries(WHAT[plural]).values()
    return [
        {"kind": e.kind, "name": e.name, "summary": e.summary, "origin": e.origin, "file": str(e.path)} for e in entries
    ]


def _configs() -> list[dict[str, Any]]:
    """The configurations that come with cmoe; the first comment of a file is its one-liner."""
    from cmoe.plugins import builtin_folder

    folder, rows = builtin_folder("configs"), []
    for path in sorted(folder.rglob("*.yaml")) if folder.is_dir() else ():
        with path.open(encoding="utf-8") as lines:
            first = lines.readline().strip()
        name = path.relative_to(folder).with_suffix("").as_posix()
        summary = first.lstrip("# ").strip() if first.startswith("#") else ""
        rows.append({"kind": "config", "name": name, "summary": summary, "origin": "built-in", "file": str(path)})
    return rows
