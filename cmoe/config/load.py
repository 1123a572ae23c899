"""Reading a configuration: files, what they extend, the command line, interpolation.

The layers, later over earlier: defaults, the files named by `extends:` in their order, the file, `key=value`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cmoe.config import text
from cmoe.config.check import check, section_options, top_options
from cmoe.config.plan import Plan
from cmoe.config.sections import SECTIONS, defaults
from cmoe.config.tree import Tree, dotted, parse_override
from cmoe.config.where import COMMAND_LINE, DEFAULT, ConfigError, Where, show
from cmoe.errors import first_line, nearest
from cmoe.plugins import REQUIRED, Catalogue, builtin_folder

PYTHON = "<python>"
_SUFFIXES = (".yaml", ".yml")


def read(
    config: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), catalogue: Catalogue | None = None
) -> Plan:
    """The plan that a configuration describes, every default filled in.

    Args:
        config: a file, the name of a configuration that comes with cmoe, or a mapping with the same content.
        overrides: `key=value`, the value in YAML; `strategy.0.size=100` or `strategy.replay.size=100` reach the list.
        catalogue: what can be named; default is what is installed and `./tasks`.

    Raises:
        ConfigError: anything is wrong, in one line with source, key, expectation and nearest name.
        UserError: a plugin folder is not there.
    """
    return resolve(compose(config), overrides, catalogue)


def compose(config: str | Path | Mapping[str, Any]) -> Tree:
    """The layers of a configuration over each other, before the command line and unchecked."""
    tree = base()
    if isinstance(config, Mapping):
        tree.main = PYTHON
        layer = text.plain(dict(config), PYTHON)
        _extend(tree, layer, PYTHON, Path(), ())
    else:
        path = find(str(config))
        tree.main = str(path)
        _file(tree, path, ())
    return tree


def resolve(tree: Tree, overrides: Sequence[str], catalogue: Catalogue | None) -> Plan:
    """The plan of composed layers with the command line over them; see `read`."""
    for override in overrides:
        _override(tree, override)
    _interpolate(tree)
    if catalogue is None:
        catalogue = Catalogue()
    return check(tree, catalogue)


def base() -> Tree:
    """The defaults of every section, and of the components where none is named."""
    kept = {(name,): set(section_options(cls)) - {"name"} for name, cls in SECTIONS.items()}
    tree = Tree({p: k for p, k in kept.items() if p[0] in ("model", "optimizer")})
    layer: dict[str, Any] = {n: copy.deepcopy(o.default) for n, o in top_options().items()}
    for name, cls in SECTIONS.items():
        layer[name] = {
            n: copy.deepcopy(o.default) for n, o in section_options(cls).items() if o.default is not REQUIRED
        }
    for name, value in defaults().items():
        layer[name] = {**value, **layer[name]} if isinstance(value, dict) and name in layer else value
    tree.merge(layer, DEFAULT)
    return tree


def find(name: str, beside: Path | None = None) -> Path:
    """The file that a name means: a path (from `beside`, else the working folder), else one that comes with cmoe.

    Raises:
        ConfigError: there is none.
    """
    path = Path(name).expanduser()
    if beside is not None:
        path = beside / path
    suffixed = path.suffix in _SUFFIXES
    folder = builtin_folder("configs")
    choices = [path] if suffixed else [path, *(path.with_name(path.name + s) for s in _SUFFIXES)]
    choices += [folder / name] if suffixed else [folder / f"{name}.yaml"]
    try:
        for choice in choices:
            if choice.is_file():
                return choice
        folder_given = path.is_dir()
    except (OSError, ValueError):  # a name that no file can have
        raise ConfigError(f"{show(name)}: expected a configuration file") from None
    if folder_given:
        raise ConfigError(f"{name}: expected a configuration file, got a folder")
    if suffixed:
        near = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise ConfigError(f"{name}: no such file{nearest(path.name, near)}")
    known = [n for n, _ in builtin_configs()]
    raise ConfigError(
        f"{name}: expected a configuration file or one of {', '.join(known) or 'none built in'}{nearest(name, known)}"
    )


def builtin_configs() -> Iterator[tuple[str, Path]]:
    """Name and file of each configuration that comes with cmoe."""
    folder = builtin_folder("configs")
    for path in sorted(folder.rglob("*.yaml")) if folder.is_dir() else ():
        yield path.relative_to(folder).with_suffix("").as_posix(), path


def _file(tree: Tree, path: Path, chain: tuple[Path, ...]) -> None:
    if path.resolve() in [c.resolve() for c in chain]:
        raise Where(str(chain[-1]), "extends").expected("no circle", " -> ".join(str(c) for c in (*chain, path)))
    value = text.read_file(path)
    if value is None:
        raise ConfigError(f"{path}: expected a configuration, got an empty file")
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, got {show(value)}")
    _extend(tree, value, str(path), path.parent, (*chain, path))


def _extend(tree: Tree, value: dict[str, Any], source: str, beside: Path, chain: tuple[Path, ...]) -> None:
    """Lay what `value` extends, then itself, over the tree."""
    names = value.pop("extends", [])
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise Where(source, "extends").expected("a file or a list of files", show(names))
    for name in names:
        try:
            path = find(name, beside)
        except ConfigError as e:
            raise ConfigError(f"{source}: extends: {e}") from None
        _file(tree, path, chain)
    if isinstance(folders := value.get("plugins"), list):  # plugin folders are relative to the file that names them
        value["plugins"] = [str((beside / f).resolve()) if isinstance(f, str) else f for f in folders]
    tree.merge(value, source)


def _override(tree: Tree, override: str) -> None:
    keys, value = parse_override(override)
    if keys[0] in ("extends", "plugins"):
        hint = "a key of a configuration file" if keys[0] == "extends" else "the option --plugins DIR"
        raise Where(COMMAND_LINE, keys[0]).expected(hint, "key=value")
    tree.assign(keys, text.parse(value, f"{COMMAND_LINE}: {dotted(tuple(keys))}"), COMMAND_LINE, value)


def _interpolate(tree: Tree) -> None:
    """Resolve `${section.key}` by OmegaConf; it is imported only for a configuration that has any."""
    marked = [p for p, v in _leaves(tree.value, ()) if isinstance(v, str) and ("${" in v or v == "???")]
    if not marked:
        return
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for path in marked:
        if tree.get(path) == "???":
            raise tree.where(path).expected("a value", "'???'")
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(tree.value), resolve=True)
    except (OmegaConfBaseException, ValueError, TypeError, RecursionError) as e:
        raise _interpolation_error(tree, marked, e) from None
    assert isinstance(resolved, dict)
    tree.value = text.plain(resolved, "configuration")
    for path in marked:
        tree.raw.pop(path, None)


def _interpolation_error(tree: Tree, marked: list[tuple[Any, ...]], error: BaseException) -> ConfigError:
    from omegaconf import OmegaConf

    reason = first_line(error, "cannot be resolved")
    for path in marked:  # the first that cannot be resolved alone is the one to name
        try:
            OmegaConf.select(OmegaConf.create(tree.value), dotted(path), throw_on_missing=True)
        except Exception:
            return tree.where(path).expected(
                "an interpolation that can be resolved", f"{show(tree.get(path))} ({reason})"
            )
    return tree.where(marked[0]).expected(
        "an interpolation that can be resolved", f"{show(tree.get(marked[0]))} ({reason})"
    )


def _leaves(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if children is None:
        yield path, value
    for key, child in children or ():
        yield from _leaves(child, (*path, key))
