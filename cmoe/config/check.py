"""Holding a configuration to the types, ranges and names of the components it uses."""

from __future__ import annotations

import math
import re
from functools import cache
from pathlib import Path
from typing import Any

from cmoe.config import rules, sections
from cmoe.config.plan import Plan
from cmoe.config.sections import SECTIONS
from cmoe.config.tree import Tree, dotted
from cmoe.config.where import COMMAND_LINE, DEFAULT, ConfigError, show
from cmoe.errors import nearest
from cmoe.plugins import PLURALS, REQUIRED, Catalogue, Entry, Option
from cmoe.plugins.builtin import an
from cmoe.plugins.catalogue import fingerprint
from cmoe.plugins.schema import options_of, summary
from cmoe.plugins.source import Class, Module, read
from cmoe.plugins.types import (
    Choice,
    File,
    Flag,
    ListOf,
    MapOf,
    Nested,
    Nothing,
    Number,
    OneComponent,
    Text,
    TupleOf,
    Type,
    Union,
)

COMPONENT_SECTIONS = {"stream": "task", "model": "backbone", "optimizer": "optimizer", "scheduler": "scheduler"}
_NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?")


@cache
def _sections_module() -> Module:
    path = Path(sections.__file__)
    return read(path, "cmoe.config.sections")


def section_class(cls: type) -> Class:
    """A section's class as the schema reader sees it."""
    module = _sections_module()
    return Class(module, module.classes[cls.__name__])


@cache
def section_options(cls: type) -> dict[str, Option]:
    """The options of a section class."""
    return options_of(section_class(cls))


def section_summary(cls: type) -> str:
    """One line on what a section is for."""
    return summary(section_class(cls))


def top_options() -> dict[str, Option]:
    """The options at the top level of a configuration."""
    return section_options(sections.Run)


def check(tree: Tree, catalogue: Catalogue) -> Plan:
    """The plan of a composed configuration.

    Raises:
        ConfigError: the first thing that is wrong, by sections in the order of a plan.
    """
    return _Check(tree, catalogue).plan()


class _Check:
    def __init__(self, tree: Tree, catalogue: Catalogue) -> None:
        self.tree, self.catalogue = tree, catalogue
        self.entries: dict[str, Entry] = {}  # by full key

    def plan(self) -> Plan:
        value = self.tree.value
        parts = ["stream", "model", "strategy", "optimizer", "scheduler"]
        parts += [n for n in SECTIONS if n not in parts]
        known = [*top_options(), *parts, "plugins"]
        for key in value:
            if key not in known:  # `extends` is a key of files, and gone by now
                raise self._unknown((key,), key, [*known, "extends"], "a configuration")
        self._plugins()
        run = {n: self.value(o.type, value.get(n), (n,)) for n, o in top_options().items()}
        done: dict[str, Any] = {n: self._section(n) for n in parts}
        folders = sorted({str(e.folder) for e in self.entries.values() if e.folder is not None})
        sources = {dotted(p): s for p, s in self.tree.sources.items() if s != DEFAULT}
        plan = Plan(run=run, **done, plugins=folders, code=fingerprint(self.entries.values()), sources=sources)
        rules.apply(rules.View(plan, self.entries, lambda key: self.tree.where(_path(key))))
        return plan

    def _plugins(self) -> None:
        """Folders that the configuration itself names join the catalogue."""
        given = self.value(ListOf(Text()), self.tree.value.get("plugins", []), ("plugins",))
        new = [f for f in given if Path(f).expanduser().resolve() not in self.catalogue.folders]
        for i, folder in enumerate(given):
            if not Path(folder).expanduser().is_dir():
                raise self.tree.where(("plugins", i)).expected("a folder", f"'{folder}'")
        if new:
            self.catalogue = Catalogue([*self.catalogue.given, *new])

    def _section(self, name: str) -> Any:
        value = self.tree.value.get(name)
        if name == "strategy":
            return self._strategies(value)
        own = section_options(SECTIONS[name]) if name in SECTIONS else {}
        if name in COMPONENT_SECTIONS:
            return self.component(COMPONENT_SECTIONS[name], value, (name,), own)
        value = {} if value is None and self.tree.sources.get((name,)) else value
        return self.mapping(own, value, (name,), f"section {name}")

    def _strategies(self, value: Any) -> list[dict[str, Any]]:
        if not isinstance(value, list) or not value:
            raise self.tree.where(("strategy",)).expected("a strategy or a list of strategies", show(value))
        return [self.component("strategy", v, ("strategy", i)) for i, v in enumerate(value)]

    def component(
        self,
        kind: str,
        value: Any,
        path: tuple[Any, ...],
        section: dict[str, Option] | None = None,
        default: Any = None,
    ) -> dict[str, Any]:
        """A component's mapping with all options; `section` options stand beside its own."""
        where = self.tree.where(path)
        value = {"name": value} if isinstance(value, str) else value
        wanted = OneComponent(kind)
        if value is None and path[0] in COMPONENT_SECTIONS and len(path) == 1:
            value = {}
        if not isinstance(value, dict):
            raise where.expected(wanted.describe(), show(value))
        name = value.get("name", (default or {}).get("name"))
        if name is None:
            raise self.tree.where((*path, "name")).expected(
                f"the name of {an(kind)} (see `cmoe list {PLURALS[kind]}`)", "nothing"
            )
        if not isinstance(name, str):
            raise self.tree.where((*path, "name")).expected(f"the name of {an(kind)}", show(name))
        # a bare name is reported under its own key, a mapping's under `name`
        entry = self.catalogue.find(kind, name, self.tree.where((*path, "name") if len(value) > 1 else path))
        self.entries[dotted(path)] = entry
        beside = {k: o for k, o in (section or {}).items() if k != "name"}
        if clash := sorted(set(beside) & set(entry.options())):
            raise ConfigError(
                f"{entry.path}: option '{clash[0]}' of {entry.attr} is also one of section {path[0]}; rename it"
            )
        if default and default.get("name") == name:
            value = {**default, **value}
        rest = {k: v for k, v in value.items() if k != "name"}
        return {"name": name, **self.mapping({**entry.options(), **beside}, rest, path, f"{kind} '{name}'", entry)}

    def mapping(
        self, options: dict[str, Option], value: Any, path: tuple[Any, ...], of: str, entry: Entry | None = None
    ) -> dict[str, Any]:
        """The value of every option, defaults included."""
        if not isinstance(value, dict):
            raise self.tree.where(path).expected("a mapping", show(value))
        for key in value:
            if key not in options:
                raise self._unknown((*path, key), key, list(options), of)
        done = {}
        for name, option in options.items():
            here = (*path, name)
            if name in value:
                done[name] = self.value(option.type, value[name], here, option.default)
            elif option.default is REQUIRED:
                raise self.tree.where(here).expected(f"{option.type.describe()} (required by {of})", "nothing")
            else:
                done[name] = self._default(option, here, entry)
        return done

    def _default(self, option: Option, path: tuple[Any, ...], entry: Entry | None) -> Any:
        if option.default is None:
            return None  # `x: int = None` means what it says
        before = self.tree.sources
        self.tree.sources = {path: str(entry.path) if entry else DEFAULT}
        try:
            return self.value(option.type, option.default, path, option.default)
        finally:
            self.tree.sources = before

    def value(self, kind: Type, value: Any, path: tuple[Any, ...], default: Any = None) -> Any:
        """The value as its type wants it, such as 1.0 for 1 where a number is meant.

        Raises:
            ConfigError: it is of another type or out of range.
        """
        match kind:
            case OneComponent(name):
                return self.component(name, value, path, default=default if isinstance(default, dict) else None)
            case Nested(name, options) if isinstance(value, dict):
                return self.mapping(options, value, path, dotted(path))
            case TupleOf(items) if isinstance(value, list) and len(value) == len(items):
                return [self.value(t, v, (*path, i)) for i, (t, v) in enumerate(zip(items, value, strict=True))]
            case ListOf(item) if isinstance(value, list):
                return [self.value(item, v, (*path, i)) for i, v in enumerate(value)]
            case MapOf(key, item) if isinstance(value, dict):
                return {self._key(key, k, path): self.value(item, v, (*path, k)) for k, v in value.items()}
            case Union(members):
                return self._union(kind, members, value, path, default)
        found, result = scalar(kind, value)
        if found:
            return result
        if isinstance(kind, Text) and (text := self._typed(path)) is not None:
            return text  # `label=12` on the command line: the shell has no quotes to say that it is text
        where = self.tree.where(path)
        hint = nearest(str(value), [str(v) for v in kind.values]) if isinstance(kind, Choice) else ""
        if isinstance(kind, Text) and isinstance(value, bool | int | float):
            hint = " (put it in quotes)"
        raise where.expected(kind.describe(), show(value), hint)

    def _typed(self, path: tuple[Any, ...]) -> str | None:
        """The text of a scalar that was typed on the command line."""
        given = self.tree.get(path)
        return (
            self.tree.raw.get(path) if isinstance(given, bool | int | float) and self._from_command_line(path) else None
        )

    def _from_command_line(self, path: tuple[Any, ...]) -> bool:
        return self.tree.sources.get(path) == COMMAND_LINE

    def _key(self, kind: Type, key: Any, path: tuple[Any, ...]) -> Any:
        found, result = scalar(kind, key)
        if not found and isinstance(kind, Number) and isinstance(key, str) and re.fullmatch(r"-?\d+", key):
            found, result = scalar(kind, int(key))  # JSON has text keys only
        if not found:
            raise self.tree.where((*path, key)).expected(f"keys that are {kind.plural()}", show(key))
        return result

    def _union(self, kind: Union, members: tuple[Type, ...], value: Any, path: tuple[Any, ...], default: Any) -> Any:
        if value == {} and any(isinstance(m, Nested) for m in members) and any(isinstance(m, Nothing) for m in members):
            return None
        fitting = [m for m in members if _shape(m, value)]
        if len(fitting) == 1:  # the only member of this shape says best what is wrong inside
            structured = isinstance(fitting[0], ListOf | TupleOf | MapOf | Nested | OneComponent)
            if structured or len([m for m in members if not isinstance(m, Nothing)]) == 1:
                return self.value(fitting[0], value, path, default)
        for member in fitting:
            try:
                return self.value(member, value, path, default)
            except ConfigError:
                continue
        choices = [str(v) for m in members if isinstance(m, Choice) for v in m.values]
        if (text := self._typed(path)) is not None and any(type(m) is Text for m in members):
            return text
        raise self.tree.where(path).expected(kind.describe(), show(value), nearest(str(value), choices))

    def _unknown(self, path: tuple[Any, ...], key: Any, known: list[str], of: str) -> ConfigError:
        hint = ""
        for name in ("trainer", *SECTIONS):  # a key that belongs to another section
            if not hint and key in section_options(SECTIONS[name]) and name != path[0]:
                hint = f" (did you mean '{name}.{key}'?)"
        where = self.tree.where(path)
        if hint and not nearest(str(key), known):
            return where.unknown(str(key), known, of, hint)
        return where.unknown(str(key), known, of)


def scalar(kind: Type, value: Any) -> tuple[bool, Any]:
    """Whether a value without structure is of a type, and the value as that type."""
    match kind:
        case Number(integral=whole, range=bounds):
            if isinstance(value, str) and not whole and _NUMBER.fullmatch(value):
                value = float(value.replace("_", ""))
            if isinstance(value, bool) or not isinstance(value, int | float):
                return False, None
            if whole and isinstance(value, float):
                if not value.is_integer():
                    return False, None
                value = int(value)
            if isinstance(value, float) and math.isnan(value):
                return False, None
            try:
                return value in bounds, value if whole else float(value)
            except OverflowError:  # an integer beyond any float
                return False, None
        case Choice(values):
            return any(type(v) is type(value) and v == value for v in values), value
        case Flag():
            return isinstance(value, bool), value
        case Nothing():
            return value is None, value
        case File() | Text():
            return isinstance(value, str), value
    return type(kind) is Type, value


def _shape(member: Type, value: Any) -> bool:
    """Whether a value is of the member's form, whatever it holds."""
    match member:
        case Nested() | MapOf():
            return isinstance(value, dict)
        case OneComponent():
            return isinstance(value, dict | str)
        case ListOf() | TupleOf():
            return isinstance(value, list)
        case Nothing():
            return value is None
        case Number() | Choice() | Flag() | Text():
            return not isinstance(value, dict | list) and value is not None
    return True


def _path(key: str) -> tuple[Any, ...]:
    return tuple(int(k) if k.isdecimal() else k for k in key.split("."))
