"""Where a value of a configuration came from, for messages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cmoe.errors import UserError, nearest

COMMAND_LINE = "command line"
DEFAULT = "default"
_SHOWN = 60  # characters of a wrong value


class ConfigError(UserError):
    """A configuration is wrong: one line `FILE: KEY: expected X, got Y (did you mean 'Z'?)`."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


@dataclass(frozen=True)
class Where:
    """A key and the file (or 'command line', 'default') that gave its value."""

    source: str
    key: str = ""

    def __str__(self) -> str:
        return f"{self.source}: {self.key}" if self.key else self.source

    def expected(self, what: str, got: str, hint: str = "") -> ConfigError:
        """The error for a value; `hint` is `nearest(...)` or another remark in brackets."""
        return ConfigError(f"{self}: expected {what}, got {got}{hint}")

    def unknown(self, name: str, names: list[str], of: str, hint: str = "") -> ConfigError:
        """The error for a key `name` that is not among `names`."""
        listed = f" ({', '.join(names)})" if 0 < len(names) <= 12 else ""
        what = f"an option of {of}{listed}" if names else f"no options, {of} has none"
        return self.expected(what, f"'{name}'", nearest(name, names) or hint)


def show(value: Any) -> str:
    """A wrong value as YAML would write it, shortened."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        text = "a mapping" if value else "an empty mapping"
    elif isinstance(value, list):
        text = f"a list of {len(value)}" if value else "an empty list"
    else:
        text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
