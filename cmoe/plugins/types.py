"""The types that an option can have, as plain data read from annotations.

`describe` gives the words of an error message ("expected an integer >= 1"), `annotation` what `cmoe show` prints.
The check of a value against a type is in `cmoe.config.check`, which also knows the components.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cmoe.config.types import Range
from cmoe.plugins.builtin import an

if TYPE_CHECKING:
    from cmoe.plugins.schema import Option

UNBOUNDED = Range()


@dataclass(frozen=True)
class Type:
    """Base of all option types; as itself it takes any plain value."""

    def describe(self) -> str:
        """What is expected, in words."""
        return "any value"

    def plural(self) -> str:
        """What is expected of the items of a list."""
        return "values"

    def build(self, value: Any) -> Any:
        """The value that a constructor gets for the plain (YAML) `value`."""
        return value


@dataclass(frozen=True)
class Number(Type):
    """An integer, or with `integral` false any real number, in a range."""

    integral: bool
    range: Range = UNBOUNDED

    def describe(self) -> str:
        return " ".join(filter(None, ("an integer" if self.integral else "a number", str(self.range))))

    def plural(self) -> str:
        return " ".join(filter(None, ("integers" if self.integral else "numbers", str(self.range))))


@dataclass(frozen=True)
class Text(Type):
    def describe(self) -> str:
        return "text"

    def plural(self) -> str:
        return "texts"


@dataclass(frozen=True)
class File(Text):
    """A path; text in a configuration."""

    def describe(self) -> str:
        return "a path"

    def plural(self) -> str:
        return "paths"

    def build(self, value: Any) -> Any:
        from pathlib import Path

        return Path(value)


@dataclass(frozen=True)
class Flag(Type):
    def describe(self) -> str:
        return "true or false"

    def plural(self) -> str:
        return "true or false values"


@dataclass(frozen=True)
class Nothing(Type):
    def describe(self) -> str:
        return "null"

    def plural(self) -> str:
        return "nulls"


@dataclass(frozen=True)
class Choice(Type):
    """One of a few literal values."""

    values: tuple[Any, ...]

    def describe(self) -> str:
        return either(self.words())

    def words(self) -> list[str]:
        return [repr(v) if isinstance(v, str) else scalar(v) for v in self.values]

    def plural(self) -> str:
        return self.describe()


@dataclass(frozen=True)
class ListOf(Type):
    item: Type = field(default_factory=Type)

    def describe(self) -> str:
        return f"a list of {self.item.plural()}"

    def plural(self) -> str:
        return f"lists of {self.item.plural()}"


@dataclass(frozen=True)
class TupleOf(Type):
    """A list of fixed length in a configuration, a tuple in Python."""

    items: tuple[Type, ...]

    def describe(self) -> str:
        return f"a list of {len(self.items)} ({', '.join(i.describe() for i in self.items)})"

    def plural(self) -> str:
        return f"lists of {len(self.items)}"

    def build(self, value: Any) -> Any:
        return tuple(item.build(v) for item, v in zip(self.items, value, strict=True))


@dataclass(frozen=True)
class Sequence(ListOf):
    """`tuple[x, ...]`: a list in a configuration, a tuple in Python."""

    def build(self, value: Any) -> Any:
        return tuple(self.item.build(v) for v in value)


@dataclass(frozen=True)
class MapOf(Type):
    key: Type = field(default_factory=Text)
    value: Type = field(default_factory=Type)

    def describe(self) -> str:
        return f"a mapping to {self.value.plural()}"

    def plural(self) -> str:
        return f"mappings to {self.value.plural()}"


@dataclass(frozen=True)
class Nested(Type):
    """A mapping with options of its own, such as `moe:`; empty is null where null is allowed."""

    name: str
    options: dict[str, Option] = field(hash=False)

    def describe(self) -> str:
        return f"a mapping with keys among {', '.join(self.options)}"

    def plural(self) -> str:
        return "mappings"


@dataclass(frozen=True)
class OneComponent(Type):
    """A component: its bare name, or a mapping with `name:` and options."""

    kind: str

    def describe(self) -> str:
        return f"{an(self.kind)} (its name, or a mapping with `name:` and its options)"

    def plural(self) -> str:
        return f"{self.kind}s"


@dataclass(frozen=True)
class Union(Type):
    members: tuple[Type, ...]

    def describe(self) -> str:
        last = [t for t in self.members if isinstance(t, Nothing)]  # null reads best at the end
        words: list[str] = []
        for t in [t for t in self.members if not isinstance(t, Nothing)] + last:
            words += t.words() if isinstance(t, Choice) else [t.describe()]
        return either(words)

    def plural(self) -> str:
        return either([t.plural() for t in self.members])

    def build(self, value: Any) -> Any:
        if value is None:
            return None
        for member in self.members:
            if isinstance(member, TupleOf | Sequence) and isinstance(value, list):
                return member.build(value)
            if isinstance(member, File) and isinstance(value, str):
                return member.build(value)
        return value


def either(words: list[str]) -> str:
    """`a, b or c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def scalar(value: Any) -> str:
    """A scalar as YAML writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value)
