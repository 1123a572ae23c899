"""YAML text to plain containers, strictly: no duplicate keys, no tags, no surprises.

The scalars are OmegaConf's: `1e-3` is a number and a date is text; beside that `1:30` and `010` stay text too.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
import yaml.constructor

from cmoe.config.where import ConfigError, Where
from cmoe.errors import first_line

_DEEP, _LARGE = 40, 20_000  # no real configuration is deeper or larger; aliases can make both out of little text

_FLOAT = re.compile(
    r"""^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
        |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
        |[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
        |[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)
_INT = re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)$")
_FLOAT_TAG, _INT_TAG, _TIME_TAG = (f"tag:yaml.org,2002:{t}" for t in ("float", "int", "timestamp"))


def _resolvers(old: dict[Any, Any]) -> dict[Any, Any]:
    """PyYAML's table of implicit types by first character, with our numbers and without dates."""
    table = {c: [(t, p) for t, p in e if t not in (_FLOAT_TAG, _INT_TAG, _TIME_TAG)] for c, e in old.items()}
    for c in "-+.0123456789":
        table.setdefault(c, []).extend([(_FLOAT_TAG, _FLOAT), (_INT_TAG, _INT)])
    return table


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _resolvers(yaml.SafeLoader.yaml_implicit_resolvers)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, Any] = {}
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name is not None and (key.tag, name) in seen:
                first = seen[key.tag, name].line + 1
                raise yaml.constructor.ConstructorError(
                    None, None, f"key '{name}' stands twice, first on line {first}", key.start_mark
                )
            seen[key.tag, name] = key.start_mark
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _resolvers(yaml.SafeDumper.yaml_implicit_resolvers)

    def ignore_aliases(self, data: Any) -> bool:
        return True


def parse(text: str, source: str) -> Any:
    """The value of a YAML text, in fresh plain containers.

    Raises:
        ConfigError: the text is not YAML, or holds what is not plain.
    """
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        problem = e.problem or e.context or "not YAML"
        if "'\\t'" in problem:
            problem = "expected spaces, got a tab"
        raise ConfigError(f"{source}: {line}{problem}") from None
    except yaml.YAMLError as e:
        raise ConfigError(f"{source}: not YAML: {first_line(e)}") from None
    except RecursionError:
        raise ConfigError(f"{source}: not YAML: nested too deeply") from None
    except (ValueError, OverflowError, TypeError) as e:
        raise ConfigError(f"{source}: not YAML: {e}") from None
    return plain(value, source)


def dump(value: Any) -> str:
    """YAML that `parse` reads as the same value, keys in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def plain(value: Any, source: str) -> Any:
    """A fresh copy in dicts, lists and scalars.

    Raises:
        ConfigError: there is something else in it, or it is recursive or huge.
    """
    count = 0

    def copy(v: Any, depth: int, key: str) -> Any:
        nonlocal count
        count += 1
        if depth > _DEEP or count > _LARGE:
            raise ConfigError(f"{source}: expected a configuration of usual size, got one nested without end")
        if isinstance(v, dict):
            for k in v:
                if not isinstance(k, str | int | float | bool):
                    raise Where(source, key).expected("keys that are text", repr(k))
            return {k: copy(x, depth + 1, f"{key}.{k}" if key else str(k)) for k, x in v.items()}
        if isinstance(v, list | tuple):
            return [copy(x, depth + 1, f"{key}.{i}") for i, x in enumerate(v)]
        if v is None or isinstance(v, bool | int | float | str):
            return v
        if isinstance(v, Path):
            return str(v)
        raise Where(source, key).expected("text, a number, true, false, null, a list or a mapping", type(v).__name__)

    return copy(value, 0, "")


def read_file(path: Path) -> Any:
    """The value of a YAML file.

    Raises:
        ConfigError: it cannot be read, is not UTF-8 or not YAML.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path}: expected UTF-8 text, got the byte 0x{e.object[e.start]:02x} at {e.start}") from None
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read: {e.strerror or e}") from None
    return parse(text, str(path))
