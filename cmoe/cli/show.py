"""`cmoe show`: every option of a component or of a section, with type, default and meaning."""

from __future__ import annotations

import argparse
import textwrap
from dataclasses import dataclass
from typing import Any

from cmoe.cli.common import DONE, Parser, catalogue, emit
from cmoe.errors import UserError, nearest
from cmoe.plugins import KINDS, REQUIRED, Catalogue, Option


@dataclass
class Shown:
    """What is shown.

    Attributes:
        kind: a component's kind, or 'section'.
        full: its whole docstring.
    """

    kind: str
    name: str
    full: str
    options: dict[str, Option]
    origin: str
    path: str


def add_arguments(parser: Parser) -> None:
    parser.add_argument("name", metavar="NAME", help="a component, `kind/name` where kinds share a name, or a section")


def main(args: argparse.Namespace) -> int:
    shown = look_up(args.name, catalogue(args))
    emit(args, document(shown))
    if not args.json:
        print(render(shown))
    return DONE


def look_up(name: str, found: Catalogue) -> Shown:
    """The component or section of that name.

    Raises:
        UserError: there is none, or more than one.
    """
    kind, slash, short = name.rpartition("/")
    if slash and kind not in (*KINDS, "section"):
        raise UserError(
            f"show: expected one of {', '.join(KINDS)}, section before '/', got '{kind}'{nearest(kind, KINDS)}"
        )
    sections = section_names()
    matches = [k for k in ([kind] if slash else KINDS) if k != "section" and short in found.entries(k)]
    if short in sections and kind in ("", "section"):
        matches.append("section")
    if len(matches) > 1:
        choices = " or ".join(f"{k}/{short}" for k in matches)
        raise UserError(f"show: expected one component, '{short}' is several: {choices}")
    if not matches:
        if slash and kind != "section":
            found.find(kind, short)  # says why and names the nearest
        for path, reason in found.broken:
            if path.stem == short:
                raise UserError(f"show: {path}: {reason}")
        names = [*sections, *(n for k in KINDS for n in found.entries(k))]
        raise UserError(f"show: expected a component (see `cmoe list`) or a section ({', '.join(sections)}), got '{name}'"
                        f"{nearest(short, names)}")  # fmt: skip
    return section(short) if matches == ["section"] else component(found, matches[0], short)


def component(found: Catalogue, kind: str, name: str) -> Shown:
    """A component as it is shown; its class is not imported."""
    entry = found.find(kind, name)
    return Shown(kind, name, entry.cls.doc, entry.options(), entry.origin, str(entry.path))


def section_names() -> list[str]:
    """The sections that have options of their own, and `config` for the top level."""
    from cmoe.config.sections import SECTIONS

    return ["config", *SECTIONS, "moe"]


def section(name: str) -> Shown:
    """A section as it is shown."""
    from cmoe.config import sections
    from cmoe.config.check import section_class, section_options

    cls = {"config": sections.Run, "moe": sections.MoE, **sections.SECTIONS}[name]
    own = {k: o for k, o in section_options(cls).items() if not (name == "optimizer" and k == "name")}
    return Shown("section", name, section_class(cls).doc, own, "built-in", sections.__file__)


def document(shown: Shown) -> dict[str, Any]:
    """The JSON document."""
    return {
        "kind": shown.kind,
        "name": shown.name,
        "description": about(shown),
        "origin": shown.origin,
        "file": shown.path,
        "options": [
            {"name": o.name, "type": o.annotation, "expected": o.type.describe(), "required": o.default is REQUIRED,
             "default": None if o.default is REQUIRED else o.default, "meaning": o.meaning}
            for o in shown.options.values()
        ],
    }  # fmt: skip


def about(shown: Shown) -> str:
    """The docstring without its `Options:`."""
    lines = shown.full.splitlines()
    end = next((i for i, line in enumerate(lines) if line.strip() == "Options:"), len(lines))
    return "\n".join(lines[:end]).strip()


def default_text(option: Option) -> str:
    """A default as one would write it in YAML."""
    import json

    if option.default is REQUIRED:
        return "required"
    if isinstance(option.default, str):
        return option.default or '""'
    return json.dumps(option.default)


def render(shown: Shown) -> str:
    """The text for a terminal."""
    origin = "" if shown.origin == "built-in" else f"  [{shown.origin}]"
    lines = [f"{shown.kind} {shown.name}{origin}", "", about(shown)]
    lines += ["", "options:"] if shown.options else ["", "no options"]
    for o in shown.options.values():
        default = "required" if o.default is REQUIRED else f"default {default_text(o)}"
        lines.append(f"  {o.name}: {o.type.describe()}; {default}")
        lines += textwrap.wrap(o.meaning, 100, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)
