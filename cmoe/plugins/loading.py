"""Importing a component's class, and only then."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from cmoe.errors import UserError, first_line

PARENT = "cmoe_plugins"


def file_module(kind: str, path: Path) -> ModuleType:
    """The module of a plugin file, under the fixed name `cmoe_plugins.<kind>.<stem>` in every process.

    A file that changed since, or another file of the same name, is imported anew.

    Raises:
        UserError: it cannot be imported; the plugin's own error is named.
    """
    name = f"{PARENT}.{kind}.{path.stem}"
    stamp = (str(path), path.stat().st_mtime_ns)
    known = sys.modules.get(name)
    if known is not None and getattr(known, "__cmoe_stamp__", None) == stamp:
        return known
    for package in (PARENT, f"{PARENT}.{kind}"):
        if package not in sys.modules:
            sys.modules[package] = ModuleType(package, "Plugin files that were imported.")
            sys.modules[package].__path__ = []
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    module.__dict__["__cmoe_stamp__"] = stamp
    sys.modules[name] = module  # dataclasses look their module up while it runs
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as e:
        sys.modules.pop(name, None)
        if known is not None:
            sys.modules[name] = known
        raise UserError(f"{path}: cannot be imported: {type(e).__name__}: {first_line(e)}") from e
    return module


def installed(dotted: str, attribute: str, builtin: bool) -> type:
    """The class `attribute` of an installed module.

    Raises:
        UserError: the module of an entry point cannot be imported or lacks the class.
    """
    if builtin:
        return getattr(importlib.import_module(dotted), attribute)
    try:
        return getattr(importlib.import_module(dotted), attribute)
    except (Exception, SystemExit) as e:
        raise UserError(f"{dotted}:{attribute}: cannot be imported: {type(e).__name__}: {first_line(e)}") from e
