"""Python files read, not run: their imports, classes, base classes and literal values.

Names are followed through import statements within cmoe and within the package that a file belongs to; everything else
(torch, numpy, ...) stays a name. So a plugin's options are known without importing it or what it imports.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1]
MISSING = object()
_DEPTH = 20  # of imports that re-export imports; more is a cycle
_LARGE = 2**20  # arithmetic stays small: a file that is only listed must not keep us busy
_OPERATORS: dict[type[ast.operator], Any] = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
              ast.Pow: operator.pow}  # fmt: skip
_CONTAINERS = {"tuple": tuple, "list": list, "dict": dict, "set": set, "frozenset": frozenset}


class Unreadable(Exception):
    """A file or a part of it cannot be understood without running it; the message says what and where."""


@dataclass(eq=False)
class Module:
    """One parsed file.

    Attributes:
        path: the file.
        name: dotted module name, or "" for a file outside any package.
        roots: folders of the top-level packages in which names are followed.
    """

    path: Path
    name: str
    roots: dict[str, Path]
    classes: dict[str, ast.ClassDef] = field(default_factory=dict)
    imports: dict[str, tuple[str, str | None]] = field(default_factory=dict)  # local name -> module, attribute
    values: dict[str, ast.expr] = field(default_factory=dict)

    def collect(self, body: list[ast.stmt]) -> None:
        """Note what `body` defines; the last definition of a name wins, as when run."""
        for node in statements(body):
            if isinstance(node, ast.ClassDef):
                self.classes[node.name] = node
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    local = alias.asname or alias.name.partition(".")[0]
                    self.imports[local] = (alias.name if alias.asname else local, None)
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    self.imports[alias.asname or alias.name] = (self.absolute(node), alias.name)
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    if isinstance(target, ast.Name):
                        self.values[target.id] = node.value
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
                self.values[node.target.id] = node.value
            elif hasattr(ast, "TypeAlias") and isinstance(node, ast.TypeAlias):
                self.values[node.name.id] = node.value

    def absolute(self, node: ast.ImportFrom) -> str:
        """The dotted module that a `from` statement names."""
        if not node.level:
            return node.module or ""
        parts = self.name.split(".") if self.name else []
        keep = len(parts) - node.level + (self.path.name == "__init__.py")
        return ".".join([*parts[: max(keep, 0)], *filter(None, [node.module])])


@dataclass(frozen=True, eq=False)
class Class:
    """A class and the module that it stands in."""

    module: Module
    node: ast.ClassDef

    @property
    def name(self) -> str:
        return self.node.name

    @property
    def doc(self) -> str:
        return ast.get_docstring(self.node) or ""

    def bases(self) -> list[Class | str]:
        """Base classes; one that cannot be followed is its last name."""
        found: list[Class | str] = []
        for base in self.node.bases:
            inner = base.value if isinstance(base, ast.Subscript) else base  # Generic[T] is Generic
            found.append(follow(self.module, inner) or ast.unparse(inner).rpartition(".")[2])
        return found

    def lineage(self) -> list[Class]:
        """This class and its readable ancestors, nearest first (method resolution order for the usual shapes)."""
        order: list[Class] = []
        self._visit(order, 0)
        # an ancestor reached twice counts where it was reached last
        seen: list[Class] = []
        for c in reversed(order):
            if all(c.node is not s.node for s in seen):
                seen.append(c)
        return seen[::-1]

    def _visit(self, order: list[Class], depth: int) -> None:
        if depth > _DEPTH:
            raise Unreadable(f"line {self.node.lineno}: class {self.name} derives from itself")
        order.append(self)
        for base in self.bases():
            if isinstance(base, Class):
                base._visit(order, depth + 1)

    def ancestors(self) -> set[str]:
        """Names of all base classes, direct and indirect, as far as they can be followed."""
        names: set[str] = set()
        for c in self.lineage():
            names |= {b if isinstance(b, str) else b.name for b in c.bases()}
        return names

    def attribute(self, name: str, default: Any) -> Any:
        """The literal value of a class attribute, inherited ones included; `default` when absent or not literal."""
        for c in self.lineage():
            for node in reversed(list(statements(c.node.body))):
                target = node.targets[-1] if isinstance(node, ast.Assign) else getattr(node, "target", None)
                if isinstance(target, ast.Name) and target.id == name and getattr(node, "value", None) is not None:
                    try:
                        return evaluate(c.module, node.value)  # ty: ignore[missing-attribute]
                    except Unreadable:
                        return default
        return default


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a body, those under `if` and `try` included (`if TYPE_CHECKING:` holds imports)."""
    for node in body:
        if isinstance(node, ast.If):
            yield from statements([*node.orelse, *node.body])
        elif isinstance(node, ast.Try):
            yield from statements([*(s for h in node.handlers for s in h.body), *node.body, *node.orelse])
        else:
            yield node


def read(path: Path, name: str = "", roots: dict[str, Path] | None = None) -> Module:
    """The parsed file; kept until the file changes.

    Raises:
        Unreadable: it is not there, not UTF-8 or not Python.
    """
    try:
        stat = path.stat()
    except OSError as e:
        raise Unreadable(f"cannot be read: {e.strerror or e}") from None
    return _read(path, name, stat.st_mtime_ns, stat.st_size, tuple((roots or {}).items()))


@lru_cache(maxsize=1024)
def _read(path: Path, name: str, _time: int, _size: int, roots: tuple[tuple[str, Path], ...]) -> Module:
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError as e:
        raise Unreadable(f"line {e.lineno or 1}: {e.msg}") from None
    except (ValueError, RecursionError, MemoryError) as e:
        raise Unreadable(f"is not Python source: {e}") from None
    except OSError as e:
        raise Unreadable(f"cannot be read: {e.strerror or e}") from None
    module = Module(path, name, {"cmoe": PACKAGE, **dict(roots)})
    module.collect(tree.body)
    return module


def locate(dotted: str, roots: dict[str, Path]) -> Path | None:
    """The file of a module below one of `roots`, without importing its parents; None elsewhere."""
    top, *rest = dotted.split(".")
    if top not in roots:
        return None
    base = roots[top].joinpath(*rest)
    for path in (base / "__init__.py", base.with_name(base.name + ".py")):
        if path.is_file():
            return path
    return None


def open_module(dotted: str, roots: dict[str, Path]) -> Module | None:
    """The parsed module of a dotted name below one of `roots`; None when it is elsewhere or cannot be read."""
    path = locate(dotted, roots)
    if path is None:
        return None
    try:
        return read(path, dotted, {k: v for k, v in roots.items() if k != "cmoe"})
    except Unreadable:
        return None


def find(module: Module, name: str, depth: int = 0) -> tuple[Module, ast.ClassDef | ast.expr] | Module | None:
    """What a name means at the top level of a module: a class, the expression assigned to it, or a module."""
    if name in module.classes:
        return module, module.classes[name]
    if name in module.values:
        return module, module.values[name]
    if name not in module.imports or depth > _DEPTH:
        return _lazy(module, name, depth)
    origin, attribute = module.imports[name]
    target = open_module(origin, module.roots)
    if attribute is None or target is None:
        return target
    return find(target, attribute, depth + 1) or open_module(f"{origin}.{attribute}", module.roots)


def _lazy(module: Module, name: str, depth: int) -> tuple[Module, ast.ClassDef | ast.expr] | Module | None:
    """A name that a package exports on demand: its table `name -> module` is a literal of the `__init__` file."""
    if depth > _DEPTH or module.path.name != "__init__.py":
        return None
    for value in module.values.values():
        if not isinstance(value, ast.Dict):
            continue
        for key, item in zip(value.keys, value.values, strict=True):
            if isinstance(key, ast.Constant) and key.value == name:
                text = next((n.value for n in ast.walk(item) if isinstance(n, ast.Constant)), None)
                if isinstance(text, str):
                    dotted = text.partition(":")[0]
                    dotted = module.name + dotted if dotted.startswith(".") else dotted
                    target = open_module(dotted, module.roots) or open_module(f"{module.name}.{dotted}", module.roots)
                    return find(target, name, depth + 1) if target else None
    return None


def follow(module: Module, expression: ast.expr) -> Class | None:
    """The class that a name or dotted name means in a module."""
    found = resolve(module, expression)
    if isinstance(found, tuple):
        owner, meaning = found
        return Class(owner, meaning) if isinstance(meaning, ast.ClassDef) else None
    return None


def resolve(module: Module, expression: ast.expr) -> tuple[Module, ast.ClassDef | ast.expr] | Module | None:
    """What a name or dotted name means in a module; a name for a name is followed to the end."""
    for _ in range(_DEPTH):
        if isinstance(expression, ast.Name):
            found = find(module, expression.id)
        elif isinstance(expression, ast.Attribute):
            owner = resolve(module, expression.value)
            found = None
            if isinstance(owner, Module):
                found = find(owner, expression.attr) or open_module(f"{owner.name}.{expression.attr}", owner.roots)
        else:
            return module, expression
        if not isinstance(found, tuple):
            return found
        owner, meaning = found
        if not isinstance(meaning, ast.Name | ast.Attribute):
            return owner, meaning
        module, expression = owner, meaning
    return None


def evaluate(module: Module, node: ast.expr) -> Any:
    """The value of an expression made of literals, arithmetic, module constants and plain containers.

    Raises:
        Unreadable: it is something else.
    """
    try:
        return _evaluate(module, node)
    except (TypeError, ValueError, ArithmeticError, RecursionError) as e:
        raise Unreadable(f"line {node.lineno}: {ast.unparse(node)!r} has no value: {e}") from None


def _evaluate(module: Module, node: ast.expr) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        items = [_evaluate(module, e) for e in node.elts]
        return tuple(items) if isinstance(node, ast.Tuple) else items if isinstance(node, ast.List) else set(items)
    if isinstance(node, ast.Dict) and None not in node.keys:
        keys = [_evaluate(module, k) for k in node.keys if k is not None]
        return dict(zip(keys, (_evaluate(module, v) for v in node.values), strict=True))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _evaluate(module, node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _evaluate(module, node.left), _evaluate(module, node.right)
        small = 64 if isinstance(node.op, ast.Pow) else _LARGE
        if all(isinstance(v, int | float) for v in (left, right)) and abs(left) < _LARGE and abs(right) < small:
            return _OPERATORS[type(node.op)](left, right)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords and len(node.args) <= 1:
        arguments = [_evaluate(module, a) for a in node.args]
        if node.func.id in _CONTAINERS:
            return _CONTAINERS[node.func.id](*arguments)
        if node.func.id == "Path":
            return Path(*arguments)
        if node.func.id == "float":
            return float(*arguments)
    if isinstance(node, ast.Name | ast.Attribute):
        found = resolve(module, node)
        if isinstance(found, tuple):
            owner, meaning = found
            if not isinstance(meaning, ast.ClassDef):
                return _evaluate(owner, meaning)
    raise Unreadable(f"line {node.lineno}: {ast.unparse(node)!r} is not a literal value")
