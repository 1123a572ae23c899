"""Layers of a configuration laid over each other, with the source of every key remembered."""

from __future__ import annotations

from typing import Any

from cmoe.config.where import DEFAULT, ConfigError, Where, show

Path = tuple[Any, ...]

# where a component may stand as its bare name
COMPONENTS: set[Path] = {
    ("stream",), ("model",), ("optimizer",), ("scheduler",), ("model", "moe", "router"), ("model", "moe", "expert"),
}  # fmt: skip


def dotted(path: Path) -> str:
    """`model.moe.k` for a path of keys."""
    return ".".join(str(p) for p in path)


class Tree:
    """A configuration in the making.

    Args:
        kept: for a section whose component may change, the keys that are the section's own and stay when it does.

    Attributes:
        main: the source that is named for what no source gave.
        value: plain containers.
        sources: the source of each key, by path.
    """

    def __init__(self, kept: dict[Path, set[str]] | None = None) -> None:
        self.main = "configuration"
        self.value: dict[str, Any] = {}
        self.sources: dict[Path, str] = {}
        self.raw: dict[Path, str] = {}  # the text of command-line values
        self.kept = kept or {}

    def where(self, path: Path) -> Where:
        """The key and what set it: its own source, else that of the nearest mapping around it."""
        around = path
        while around and around not in self.sources:
            around = around[:-1]
        source = self.sources.get(around, self.main)
        return Where(self.main if source == DEFAULT else source, dotted(path))

    def merge(self, layer: dict[Any, Any], source: str, path: Path = ()) -> None:
        """Lay a mapping over the one at `path`: mappings merge, everything else replaces.

        A component whose name changes is replaced wholly, but for the keys in `kept`.
        """
        target = self.get(path)
        assert isinstance(target, dict)
        renamed = "name" in layer and "name" in target and layer["name"] != target["name"]
        if renamed:
            stay = self.kept.get(path, set())
            for key in [k for k in target if k not in stay]:
                self._drop((*path, key))
        for key, item in layer.items():
            here = (*path, key)
            item = normal(here, item)
            if isinstance(item, dict) and isinstance(target.get(key), dict):
                self.sources.setdefault(here, source)
                self.merge(item, source, here)
            else:
                self.put(here, item, source)

    def put(self, path: Path, item: Any, source: str) -> None:
        """Replace what is at `path`."""
        parent = self.get(path[:-1])
        if isinstance(parent, dict):
            self._drop(path)
        parent[path[-1]] = item
        self.sources = {p: s for p, s in self.sources.items() if p[: len(path)] != path}
        self._mark(path, item, source)

    def assign(self, keys: list[str], item: Any, source: str, text: str) -> None:
        """Set `a.b.c=item`, as the command line does.

        Raises:
            ConfigError: something on the way cannot hold keys.
        """
        path: Path = ()
        for i, key in enumerate(keys[:-1]):
            path = (*path, self._index(path, key, source) if isinstance(self.get(path), list) else key)
            here = self.get(path)
            if here is None or here == {}:
                self.put(path, {}, source)
            elif isinstance(here, str) and (path in COMPONENTS or path[0] == "strategy"):
                self.put(path, {"name": here}, self.where(path).source)
            elif not isinstance(here, dict | list):
                key = dotted(path + tuple(keys[i + 1 :]))
                raise Where(source, key).expected(f"a mapping at {dotted(path)}", show(here))
        last: Any = keys[-1]
        if isinstance(self.get(path), list):
            last = self._index(path, last, source)
            self.put((*path, last), strategy(item) if path == ("strategy",) else item, source)
        else:
            self.merge({last: item}, source, path)
        self.raw[(*path, last)] = text

    def get(self, path: Path) -> Any:
        """What is at `path`; None when nothing is."""
        here: Any = self.value
        for key in path:
            if isinstance(here, dict):
                here = here.get(key)
            elif isinstance(here, list) and isinstance(key, int) and key < len(here):
                here = here[key]
            else:
                return None
        return here

    def _index(self, path: Path, key: str, source: str) -> int:
        """Which item of the list at `path` a key means: a number, or in a list of components a name."""
        items = self.get(path)
        names = [i.get("name") if isinstance(i, dict) else i for i in items]
        if key.isdecimal() and int(key) < len(items):
            return int(key)
        if names.count(key) == 1:
            return names.index(key)
        if len(items) == 1 and path == ("strategy",) and not key.isdecimal():
            raise Where(source, f"{dotted(path)}.{key}").expected(
                f"an index or name of the list (0 or '{names[0]}', as in {dotted(path)}.0.{key}=...)", f"'{key}'"
            )
        known = f"0 to {len(items) - 1}" if items else "the list is empty"
        raise Where(source, f"{dotted(path)}.{key}").expected(f"an index or name of the list ({known})", f"'{key}'")

    def _drop(self, path: Path) -> None:
        parent = self.get(path[:-1])
        if isinstance(parent, dict):
            parent.pop(path[-1], None)
        for table in (self.sources, self.raw):
            for p in [p for p in table if p[: len(path)] == path]:
                del table[p]

    def _mark(self, path: Path, item: Any, source: str) -> None:
        self.sources[path] = source
        children = item.items() if isinstance(item, dict) else enumerate(item) if isinstance(item, list) else ()
        for key, child in children:
            self._mark((*path, key), child, source)


def normal(path: Path, item: Any) -> Any:
    """A component given by its bare name as a mapping; the strategies as a list."""
    if path == ("strategy",):
        items = item if isinstance(item, list) else [item]
        return [strategy(i) for i in items] if item is not None else None
    if path in COMPONENTS and isinstance(item, str):
        return {"name": item}
    if path == ("model", "moe") and isinstance(item, dict):
        return {k: normal((*path, k), v) for k, v in item.items()}
    if path == ("model",) and isinstance(item, dict) and isinstance(item.get("moe"), dict):
        return {**item, "moe": normal((*path, "moe"), item["moe"])}
    return item


def strategy(item: Any) -> Any:
    """One strategy of the list."""
    return {"name": item} if isinstance(item, str) else item


def parse_override(text: str) -> tuple[list[str], str]:
    """The keys and the value's text of `a.b=value`.

    Raises:
        ConfigError: it has another form.
    """
    key, sign, value = text.partition("=")
    keys = key.strip().split(".")
    if not sign or not all(keys) or any(c.isspace() for c in key.strip()):
        raise ConfigError(f"command line: expected key=value (such as trainer.epochs=2), got {text!r}")
    return keys, value.strip()
