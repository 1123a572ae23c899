"""What the experts of a cohort are: a kind with its options and size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from cmoe.moe.experts import EXPERTS, Expert

Spec = str | Mapping[str, Any] | Callable[..., Any]


@dataclass(frozen=True)
class Kind:
    """A kind of expert.

    Attributes:
        factory: makes a cohort from n, dim, hidden, out_dim and the options.
        options: beside those.
        hidden: hidden units of one expert; None lets the factory choose.
        name: under which it is known; None for a factory that was given as it is.
    """

    factory: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)
    hidden: int | None = None
    name: str | None = None

    @classmethod
    def of(cls, spec: Spec, hidden: int | None, known: Mapping[str, Any] = EXPERTS) -> Kind:
        """From a name, a mapping `name:` with options, or a callable.

        Raises:
            ValueError: the name is unknown.
        """
        factory, options = resolve("expert", spec, known)
        name = spec if isinstance(spec, str) else spec["name"] if isinstance(spec, Mapping) else None
        return cls(factory, options, hidden, name)

    def like(self, spec: Spec | None, hidden: int | None, known: Mapping[str, Any] = EXPERTS) -> Kind:
        """This kind with another specification, another size, or both."""
        size = self.hidden if hidden is None else hidden
        return replace(self, hidden=size) if spec is None else Kind.of(spec, size, known)

    def make(self, n: int, dim: int, out_dim: int, hidden: int | None = None) -> Expert:
        """A cohort with weights of zero."""
        return self.factory(n=n, dim=dim, hidden=hidden or self.hidden, out_dim=out_dim, **self.options)

    def plain(self) -> dict[str, Any]:
        """As ints and strings, for `of`.

        Raises:
            ValueError: it has no name.
        """
        if self.name is None:
            raise ValueError("experts of a kind without a name can only come with the layer: say them in `more`")
        return {"expert": {"name": self.name, **self.options}, "hidden": self.hidden}


def resolve(kind: str, spec: Spec, known: Mapping[str, Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The factory and options that a specification means.

    Raises:
        ValueError: the name is unknown.
    """
    options: dict[str, Any] = {}
    if isinstance(spec, Mapping):
        options = dict(spec)
        spec = options.pop("name", "")
    if isinstance(spec, str):
        if spec not in known:
            raise ValueError(f"{kind}: expected one of {sorted(known)}, got {spec!r}")
        return known[spec], options
    return spec, options
