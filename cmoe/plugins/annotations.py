"""From an annotation in source to the type of an option."""

from __future__ import annotations

import ast

from cmoe.config.types import Range
from cmoe.plugins.source import Class, Module, Unreadable, evaluate, resolve
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
    Sequence,
    Text,
    TupleOf,
    Type,
    Union,
)

SIMPLE: dict[str, Type] = {
    "int": Number(True),
    "float": Number(False),
    "str": Text(),
    "bool": Flag(),
    "Any": Type(),
    "object": Type(),
    "None": Nothing(),
    "Path": File(),
    "list": ListOf(),
    "dict": MapOf(),
    "tuple": Sequence(),
}
_DEPTH = 20


def parse(module: Module, node: ast.expr, depth: int = 0) -> Type:
    """The type that an annotation in `module` stands for.

    Raises:
        Unreadable: it is none that a configuration can hold.
    """
    if depth > _DEPTH:
        raise Unreadable(f"line {node.lineno}: annotation {ast.unparse(node)!r} refers to itself")
    if isinstance(node, ast.Constant):
        if node.value is None:
            return Nothing()
        if isinstance(node.value, str):  # a quoted annotation
            try:
                inner = ast.parse(node.value, mode="eval").body
            except SyntaxError:
                raise _unknown(node) from None
            return parse(module, ast.copy_location(inner, node), depth + 1)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return union([parse(module, node.left, depth + 1), parse(module, node.right, depth + 1)])
    if isinstance(node, ast.Subscript):
        return _subscript(module, node, depth)
    if isinstance(node, ast.Name | ast.Attribute):
        last = node.id if isinstance(node, ast.Name) else node.attr
        found = resolve(module, node)
        if isinstance(found, tuple):
            owner, meaning = found
            if isinstance(meaning, ast.ClassDef):
                from cmoe.plugins.schema import options_of  # the two need each other: options hold nested options

                return Nested(meaning.name, options_of(Class(owner, meaning)))
            return parse(owner, meaning, depth + 1)
        if last in SIMPLE:
            return SIMPLE[last]
    raise _unknown(node)


def _subscript(module: Module, node: ast.Subscript, depth: int) -> Type:
    head = ast.unparse(node.value).rpartition(".")[2]
    inner = list(node.slice.elts) if isinstance(node.slice, ast.Tuple) else [node.slice]
    if head == "Literal":
        return Choice(tuple(evaluate(module, e) for e in inner))
    if head == "Annotated":
        return _annotated(parse(module, inner[0], depth + 1), inner[1:], module)
    if head in ("ClassVar", "Final", "InitVar", "Required", "NotRequired"):
        return parse(module, inner[0], depth + 1)
    if head == "Optional":
        return union([parse(module, inner[0], depth + 1), Nothing()])
    if head == "Union":
        return union([parse(module, e, depth + 1) for e in inner])
    if head.lower() == "tuple":
        if len(inner) == 2 and isinstance(inner[1], ast.Constant) and inner[1].value is ...:
            return Sequence(parse(module, inner[0], depth + 1))
        return TupleOf(tuple(parse(module, e, depth + 1) for e in inner))
    if head in ("list", "List"):
        return ListOf(parse(module, inner[0], depth + 1))
    if head in ("Sequence", "Iterable", "Collection"):
        return ListOf(parse(module, inner[0], depth + 1))
    if head in ("dict", "Dict", "Mapping") and len(inner) == 2:
        return MapOf(parse(module, inner[0], depth + 1), parse(module, inner[1], depth + 1))
    raise _unknown(node)


def _annotated(base: Type, marks: list[ast.expr], module: Module) -> Type:
    for mark in marks:
        if not isinstance(mark, ast.Call):
            continue
        name = ast.unparse(mark.func).rpartition(".")[2]
        named = {k.arg: evaluate(module, k.value) for k in mark.keywords if k.arg}
        plain = [evaluate(module, a) for a in mark.args]
        if name == "Component":
            return OneComponent(named["kind"] if named else plain[0])
        if name == "Range" and isinstance(base, Number):
            base = Number(base.integral, Range(*plain, **named))
    return base


def union(members: list[Type]) -> Type:
    """One type of several, flat."""
    flat: list[Type] = []
    for m in members:
        flat += m.members if isinstance(m, Union) else [m]
    return Union(tuple(flat))


def _unknown(node: ast.expr) -> Unreadable:
    return Unreadable(
        f"line {node.lineno}: annotation {ast.unparse(node)!r} is not understood; an option is of int, float, str, bool, "
        "list, dict, tuple, Literal, Path, Any or a type of cmoe.config.types"
    )
