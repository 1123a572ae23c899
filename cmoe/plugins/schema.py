"""The options of a component, read from its class in source."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from typing import Any

from cmoe.plugins.annotations import parse
from cmoe.plugins.source import Class, Module, Unreadable, evaluate, resolve, statements
from cmoe.plugins.types import Type


class _Required:
    """The default of an option that has none."""

    def __repr__(self) -> str:
        return "required"

    def __reduce__(self) -> str:
        return "REQUIRED"


REQUIRED: Any = _Required()


@dataclass(frozen=True)
class Option:
    """One option of a component or section.

    Attributes:
        name: its key.
        annotation: its type as the source writes it.
        type: its type as the check sees it.
        default: a plain value, or REQUIRED.
        meaning: its line in the docstring's `Options:`; empty when there is none.
    """

    name: str
    annotation: str
    type: Type
    default: Any = REQUIRED
    meaning: str = ""


def options_of(cls: Class) -> dict[str, Option]:
    """The options of a class by name, in the order of its constructor.

    The constructor is what Python would take: the nearest `__init__`, or that of the nearest dataclass, made of the
    fields of all dataclasses below it. Parameters listed in `supplied` are the system's.

    Raises:
        Unreadable: an annotation or default cannot be understood without running the file.
    """
    supplied = set(cls.attribute("supplied", ()))
    found: dict[str, Option] = {}
    said = meanings(cls)
    for owner, name, annotation, default in _parameters(cls):
        if name in supplied:
            continue
        if annotation is None:
            kind, written = Type(), "Any"
        else:
            written = ast.unparse(annotation).strip("'\"")
            try:
                kind = parse(owner, annotation)
            except Unreadable as e:
                raise Unreadable(f"option {name}: {e}") from None
        try:
            value = REQUIRED if default is None else plain(_default(owner, default))
        except Unreadable as e:
            raise Unreadable(f"the default of option {name} must be a literal: {e}") from None
        found[name] = Option(name, written, kind, value, said.get(name, ""))
    return found


def plain(value: Any) -> Any:
    """The value as YAML holds it: tuples and sets are lists, paths text."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(plain(v) for v in value)
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


Parameter = tuple[Module, str, ast.expr | None, ast.expr | None]


def _parameters(cls: Class) -> list[Parameter]:
    lineage = cls.lineage()
    for i, c in enumerate(lineage):
        init = next(
            (n for n in statements(c.node.body) if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None
        )
        if init is not None:
            return _arguments(c, init)
        if makes_init(c):
            fields: dict[str, Parameter] = {}
            for ancestor in reversed([c, *(a for a in lineage[i + 1 :] if decorated(a))]):
                for parameter in _fields(ancestor):
                    fields[parameter[1]] = parameter  # an overridden field keeps its place
                for name in _dropped(ancestor):
                    fields.pop(name, None)
            return list(fields.values())
    return []


def decorated(cls: Class) -> bool:
    """Whether the class is a dataclass by its own decorator."""
    return any("dataclass" in ast.unparse(d).partition("(")[0].split(".") for d in cls.node.decorator_list)


def makes_init(cls: Class) -> bool:
    """Whether its dataclass decorator gives the class a constructor."""
    return decorated(cls) and not any(
        k.arg == "init" and isinstance(k.value, ast.Constant) and not k.value.value
        for d in cls.node.decorator_list
        if isinstance(d, ast.Call)
        for k in d.keywords
    )


def forgotten(cls: Class) -> str | None:
    """An annotated attribute of a class whose decorator `@dataclass` was forgotten, so that it would be no option."""
    lineage = cls.lineage()
    own_init = any(isinstance(n, ast.FunctionDef) and n.name == "__init__" for n in cls.node.body)
    if own_init or decorated(cls) or not any(decorated(c) for c in lineage[1:]):
        return None
    for n in cls.node.body:
        if (
            isinstance(n, ast.AnnAssign)
            and isinstance(n.target, ast.Name)
            and "ClassVar" not in ast.unparse(n.annotation)
        ):
            return n.target.id
    return None


def _arguments(cls: Class, init: ast.FunctionDef) -> list[Parameter]:
    a = init.args
    places = [*a.posonlyargs, *a.args]
    defaults: list[ast.expr | None] = [*[None] * (len(places) - len(a.defaults)), *a.defaults]
    pairs = [*zip(places, defaults, strict=True), *zip(a.kwonlyargs, a.kw_defaults, strict=True)]
    return [(cls.module, arg.arg, arg.annotation, default) for arg, default in pairs[1:]]


def _fields(cls: Class) -> list[Parameter]:
    found: list[Parameter] = []
    for node in statements(cls.node.body):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        if re.match(r"(typing\.|t\.)?ClassVar\b|(dataclasses\.)?KW_ONLY\b", ast.unparse(node.annotation)):
            continue
        if _keyword(node.value, "init") is not None and not evaluate(cls.module, _keyword(node.value, "init")):
            continue
        found.append((cls.module, node.target.id, node.annotation, node.value if _has_default(node.value) else None))
    return found


def _dropped(cls: Class) -> list[str]:
    """Fields that a subclass takes out of the constructor with `field(init=False)`."""
    kept = {p[1] for p in _fields(cls)}
    names = [
        n.target.id
        for n in statements(cls.node.body)
        if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
    ]
    return [n for n in names if n not in kept]


def _is_field(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "field"


def _keyword(node: ast.expr | None, name: str) -> Any:
    if not _is_field(node):
        return None
    assert isinstance(node, ast.Call)
    return next((k.value for k in node.keywords if k.arg == name), None)


def _has_default(node: ast.expr | None) -> bool:
    if not _is_field(node):
        return node is not None
    return _keyword(node, "default") is not None or _keyword(node, "default_factory") is not None


def _default(module: Module, node: ast.expr) -> Any:
    if not _is_field(node):
        return evaluate(module, node)
    if (value := _keyword(node, "default")) is not None:
        return evaluate(module, value)
    factory = _keyword(node, "default_factory")
    if isinstance(factory, ast.Lambda):
        return evaluate(module, factory.body)
    if (
        isinstance(factory, ast.Name)
        and factory.id in ("list", "dict", "tuple", "set")
        and not resolve(module, factory)
    ):
        return {"list": [], "dict": {}, "tuple": (), "set": set()}[factory.id]
    raise Unreadable(f"line {node.lineno}: {ast.unparse(factory)!r} is not a lambda of a literal")


def summary(cls: Class) -> str:
    """The first line of the docstring."""
    return cls.doc.partition("\n")[0].strip()


def meanings(cls: Class) -> dict[str, str]:
    """What the docstrings' `Options:` say about each option, the class's own words before its ancestors'."""
    found: dict[str, str] = {}
    for c in cls.lineage():
        for name, text in _section(c.doc).items():
            found.setdefault(name, text)
    return found


def _section(doc: str) -> dict[str, str]:
    lines = doc.splitlines()
    start = next((i for i, line in enumerate(lines) if line.strip() == "Options:"), None)
    if start is None:
        return {}
    outer = len(lines[start]) - len(lines[start].lstrip())
    found: dict[str, str] = {}
    indent, current = None, None
    for line in lines[start + 1 :]:
        depth = len(line) - len(line.lstrip())
        if not line.strip():
            continue
        if depth <= outer:
            break
        indent = depth if indent is None else indent
        match = re.match(r"(\w+):\s*(.*)", line.strip())
        if depth == indent and match:
            current = match[1]
            found[current] = match[2]
        elif current is not None:
            found[current] += " " + line.strip()
    return found
