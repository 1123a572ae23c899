"""Every component by kind and name: what comes with cmoe, plugin files in folders, and installed entry points."""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cmoe.config.where import ConfigError, Where
from cmoe.errors import UserError, nearest
from cmoe.plugins import loading, schema
from cmoe.plugins.builtin import BASES, BUILTIN, GROUPS, KINDS, PLURALS, an, builtin_folder
from cmoe.plugins.schema import Option
from cmoe.plugins.source import Class, Module, Unreadable, follow, locate, open_module, read

SHOWN = 12  # more names than these are not listed in an error


@dataclass(frozen=True)
class Entry:
    """One component.

    Attributes:
        kind: one of KINDS.
        name: what a configuration calls it.
        summary: first line of its docstring.
        path: the file that its class stands in.
        attr: the class's name.
        origin: 'built-in', the folder that it was found in, or 'entry point of DISTRIBUTION'.
        module: dotted name to import, or "" for a plugin file.
        cls: the class as read from source.
    """

    kind: str
    name: str
    summary: str
    path: Path
    attr: str
    origin: str
    module: str
    cls: Class

    def options(self) -> dict[str, Option]:
        """Its options by name, in the order of its constructor, read without importing it."""
        return self._options

    @cached_property
    def _options(self) -> dict[str, Option]:
        return schema.options_of(self.cls)

    def attribute(self, name: str, default: Any = None) -> Any:
        """The literal value of a class attribute (inherited ones count), without importing the class."""
        return self.cls.attribute(name, default)

    @property
    def builtin(self) -> bool:
        return self.origin == "built-in"

    @property
    def folder(self) -> Path | None:
        """The user's plugin folder that it came from; None for what is installed."""
        return self.path.parent if not self.module and not self.builtin else None

    def load(self) -> type:
        """The class, imported now.

        Raises:
            UserError: a plugin cannot be imported.
        """
        if self.module:
            return loading.installed(self.module, self.attr, self.builtin)
        return getattr(loading.file_module(self.kind, self.path), self.attr)

    def pick(self, mapping: dict[str, Any]) -> dict[str, Any]:
        """The component's own options out of a resolved section, as its constructor takes them."""
        return {k: o.type.build(mapping[k]) for k, o in self.options().items() if k in mapping}

    def create(self, mapping: dict[str, Any], **supplied: Any) -> Any:
        """An instance from a resolved section and what the system supplies."""
        return self.load()(**self.pick(mapping), **supplied)


class Catalogue:
    """The components that can be named.

    Later folders win over earlier ones, folders over what is built in, and that over entry points.

    Args:
        folders: plugin folders (`--plugins DIR`); `./tasks` of the working folder is always looked in.

    Raises:
        UserError: a given folder is not there.
    """

    def __init__(self, folders: Sequence[Path | str] = ()) -> None:
        self.broken: list[tuple[Path, str]] = []
        self._other: dict[Path, str] = {}  # files without a component, for messages
        self._cache: dict[str, dict[str, Entry]] = {}
        self.given = [Path(f).expanduser() for f in folders]
        for folder in self.given:
            if not folder.is_dir():
                raise UserError(f"plugins: expected a folder, got '{folder}'")
        own = builtin_folder("tasks").resolve()
        ordered = [own, Path("tasks").resolve(), *(f.resolve() for f in self.given)]
        # the last mention counts, but what is built in stays built in
        self.folders = [f for i, f in enumerate(ordered) if f not in ordered[:i] and f.is_dir()]
        self._own = own
        self._read_folders()

    def entries(self, kind: str) -> dict[str, Entry]:
        """All components of a kind by name, sorted."""
        assert kind in KINDS, kind
        if kind not in self._cache:
            found = {**self._points(kind), **self._builtins(kind), **self._files.get(kind, {})}
            self._cache[kind] = dict(sorted(found.items()))
        return self._cache[kind]

    def find(self, kind: str, name: str, where: Where | None = None) -> Entry:
        """The component of that name.

        Args:
            where: the key that named it, for the message.

        Raises:
            ConfigError: there is none, or its file is broken.
        """
        at = f"{where}: " if where is not None else ""
        known = self.entries(kind)
        if name in known and not self._hides(name, known[name]):
            return known[name]
        for path, reason in self.broken:
            if path.stem == name:
                raise ConfigError(f"{at}expected {an(kind)}, got '{name}', whose file is broken: {path}: {reason}")
        for path, reason in self._other.items():
            if path.stem == name:
                raise ConfigError(f"{at}expected {an(kind)}, got '{name}', but {path} {reason}")
        hint = nearest(name, known)
        names = (", ".join(known) or "there is none") if len(known) <= SHOWN else f"see `cmoe list {PLURALS[kind]}`"
        elsewhere = next((k for k in KINDS if k != kind and name in self.entries(k)), None)
        if elsewhere and not hint:
            hint = f" ('{name}' is {an(elsewhere)})"
        raise ConfigError(f"{at}expected {an(kind)} ({names}), got '{name}'{hint}")

    def _hides(self, name: str, entry: Entry) -> bool:
        """Whether a broken file would have won over the component of its name: that one is not what was meant."""
        place = {folder: i for i, folder in enumerate(self.folders)}
        beaten = place.get(entry.folder, -1) if entry.folder else -1
        return any(path.stem == name and place.get(path.parent, -1) > beaten for path, _ in self.broken)

    def _read_folders(self) -> None:
        self._files: dict[str, dict[str, Entry]] = {}
        for folder in self.folders:
            for path in sorted(folder.glob("*.py")):
                if not path.name.startswith(("_", "test_", "conftest")):
                    self._read_file(path, "built-in" if folder == self._own else str(folder))

    def _read_file(self, path: Path, origin: str) -> None:
        try:
            found = components(read(path))
            entries = [_entry(kind, path.stem, cls, origin) for kind, cls in found.items()]
        except Unreadable as e:
            self.broken.append((path, str(e)))
            return
        if not entries:
            self._other[path] = f"has no public class that derives from {', '.join(dict.fromkeys(BASES))}"
        for entry in entries:
            self._files.setdefault(entry.kind, {})[entry.name] = entry

    def _builtins(self, kind: str) -> dict[str, Entry]:
        found = {}
        for name, target in BUILTIN[kind].items():
            dotted, _, attribute = target.partition(":")
            module = open_module(dotted, read_roots())
            assert module is not None, f"built-in {kind} '{name}': {dotted} cannot be read"
            assert attribute in module.classes, f"built-in {kind} '{name}': {target} has no such class"
            found[name] = _entry(kind, name, Class(module, module.classes[attribute]), "built-in", dotted)
        return found

    def _points(self, kind: str) -> dict[str, Entry]:
        found = {}
        for group in (g for g, k in GROUPS.items() if k == kind):
            for point in _entry_points(tuple(sys.path)).select(group=group):
                origin = f"entry point of {point.dist.name if point.dist else 'an installed package'}"
                try:
                    found[point.name] = _entry(kind, point.name, point_class(point.value), origin, point.module)
                except Unreadable as e:
                    self.broken.append((Path(f"{group}: {point.name} = {point.value}"), str(e)))
        return found


@functools.lru_cache(maxsize=4)
def _entry_points(path: tuple[str, ...]) -> Any:
    """Those of all installed packages; looking through them takes longer than all else that is read here.

    Args:
        path: `sys.path`, where they are looked for.
    """
    from importlib.metadata import entry_points

    return entry_points()


def fingerprint(entries: Collection[Entry]) -> str:
    """Hash (12 hexadecimal digits) of the source of those components that do not come with cmoe; '' without any.

    Of a plugin file in a folder, the helpers beside it (their names begin with an underscore) count too.
    """
    files = {e.path for e in entries if not e.builtin}
    files |= {helper for e in entries if e.folder is not None for helper in e.folder.glob("_*.py")}
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12] if files else ""


def read_roots() -> dict[str, Path]:
    """Where names are followed for what is built in."""
    from cmoe.plugins.source import PACKAGE

    return {"cmoe": PACKAGE}


def _entry(kind: str, name: str, cls: Class, origin: str, dotted: str = "") -> Entry:
    entry = Entry(kind, name, schema.summary(cls), cls.module.path, cls.name, origin, dotted, cls)
    if missing := schema.forgotten(cls):
        raise Unreadable(f"line {cls.node.lineno}: class {cls.name} needs @dataclass, else '{missing}' is no option")
    if "name" in entry.options():  # read here, so that what cannot be read makes the plugin broken now, not later
        raise Unreadable(f"class {cls.name}: an option cannot be called 'name', which picks the component")
    return entry


def components(module: Module) -> dict[str, Class]:
    """The component classes of a plugin file by kind.

    Raises:
        Unreadable: two public classes are of one kind.
    """
    found: dict[str, list[Class]] = {}
    for node in module.classes.values():
        cls = Class(module, node)
        if node.name.startswith("_"):
            continue
        kinds = {BASES[a] for a in cls.ancestors() if a in BASES}
        for kind in sorted(kinds):
            found.setdefault(kind, []).append(cls)
    chosen = {}
    for kind, classes in found.items():
        below = {id(b.node) for c in classes for b in c.lineage()[1:]}
        leaves = [c for c in classes if id(c.node) not in below]
        if len(leaves) > 1:
            names = " and ".join(c.name for c in leaves)
            raise Unreadable(f"expected one public {kind} class, got {names} (begin helpers with an underscore)")
        chosen[kind] = leaves[0]
    return chosen


def point_class(value: str) -> Class:
    """The class that an entry point `package.module:Class` means, found without importing the package."""
    from importlib.machinery import PathFinder

    dotted, _, attribute = value.partition(":")
    top = dotted.partition(".")[0]
    spec = PathFinder.find_spec(top, sys.path)
    if spec is None:
        raise Unreadable(f"package {top} is not installed")
    places = list(spec.submodule_search_locations or [])
    root = Path(places[0]) if places else Path(spec.origin or "").with_suffix("")
    roots = {top: root}
    if locate(dotted, roots) is None:
        raise Unreadable(f"module {dotted} is not there")
    module = read(locate(dotted, roots) or root, dotted, roots)
    import ast

    cls = follow(module, ast.Name(attribute.strip(), lineno=1))
    if cls is None:
        raise Unreadable(f"module {dotted} has no class {attribute.strip()}")
    return cls
