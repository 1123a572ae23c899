"""Types for options, with the ranges that a value must lie in.

Each alias is an ordinary type to a type checker and carries its range for the configuration check, which reads
annotations from source by these names (see `cmoe.plugins`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any


@dataclass(frozen=True)
class Range:
    """The closed or open interval that a number must lie in; None is unbounded."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )

    def __str__(self) -> str:
        bounds = ((">=", self.ge), (">", self.gt), ("<=", self.le), ("<", self.lt))
        return " and ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)


@dataclass(frozen=True)
class Component:
    """Marks an option that is itself a component of the named kind: a name, or `name:` with its options."""

    kind: str


PositiveInt = Annotated[int, Range(ge=1)]
Count = Annotated[int, Range(ge=0)]
Positive = Annotated[float, Range(gt=0)]
NonNegative = Annotated[float, Range(ge=0)]
Fraction = Annotated[float, Range(ge=0, lt=1)]
Probability = Annotated[float, Range(ge=0, le=1)]

RouterSpec = Annotated[dict[str, Any], Component("router")]
ExpertSpec = Annotated[dict[str, Any], Component("expert")]
TaskSpec = Annotated[dict[str, Any], Component("task")]
