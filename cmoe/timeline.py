"""What happened to the experts, and when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cmoe.tracking.figures.experts import ExpertLife

BEGIN, END = ("added", "upcycled"), ("removed", "merged", "collapsed")
KINDS = (*BEGIN, "frozen", "thawed", "assigned", *END)


@dataclass
class Timeline:
    """Changes of experts in the order they happened.

    Attributes:
        events: mappings with `kind` (one of `KINDS`), `layer`, `experts` (ids), `experience`, `after` (1: after its
            training, 0: before it), and for 'merged' `into`, the expert that they became.
    """

    events: list[dict[str, Any]] = field(default_factory=list)

    def add(
        self,
        kind: str,
        layer: str,
        experts: Sequence[int],
        experience: int,
        after: bool = False,
        into: int | None = None,
    ) -> None:
        """Note a change; one of no expert is none.

        Raises:
            ValueError: the kind is unknown.
        """
        if kind not in KINDS:
            raise ValueError(f"event: expected one of {KINDS}, got {kind!r}")
        if not len(experts):
            return
        event = {"kind": kind, "layer": layer, "experts": [int(e) for e in experts], "experience": int(experience)}
        event["after"] = int(after)
        if into is not None:
            event["into"] = int(into)
        self.events.append(event)

    def to_list(self) -> list[dict[str, Any]]:
        """Plain containers."""
        return [dict(e) for e in self.events]

    def lives(
        self,
        present: Mapping[str, Sequence[int]],
        used: Mapping[tuple[str, int], dict[int, float]],
        tasks: Mapping[tuple[str, int], tuple[int, ...]],
    ) -> list[ExpertLife]:
        """The life of each expert that ever was; one no event spoke of was there from the start.

        Args:
            present: ids of the experts that there are, by layer.
            used: share of each experience's test assignments, by layer and expert.
            tasks: task labels that an expert is assigned to, by layer and expert.
        """
        born: dict[tuple[str, int], tuple[int, str]] = {}
        died: dict[tuple[str, int], tuple[int, str, int | None]] = {}
        frozen: dict[tuple[str, int], list[tuple[int, int | None]]] = {}
        for event in self.events:
            when, kind = _place(event), event["kind"]
            for expert in event["experts"]:
                who = (event["layer"], expert)
                if kind in BEGIN:
                    born.setdefault(who, (when, kind))
                elif kind in END:
                    died.setdefault(who, (when, kind, event.get("into")))
                elif kind == "frozen":
                    frozen.setdefault(who, []).append((when, None))
                elif kind == "thawed" and frozen.get(who):
                    frozen[who][-1] = (frozen[who][-1][0], when)
        for layer, experts in present.items():
            for expert in experts:
                born.setdefault((layer, expert), (0, "added"))
        for who in [*died, *frozen]:
            born.setdefault(who, (0, "added"))
        return [
            ExpertLife(
                layer=who[0],
                expert=who[1],
                added=when,
                origin=origin,
                frozen=tuple(span for span in frozen.get(who, ()) if span[0] != span[1]),
                ended=died[who][0] if who in died else None,
                how=died[who][1] if who in died else "",
                into=died[who][2] if who in died else None,
                tasks=tasks.get(who, ()),
                used=used.get(who, {}),
            )
            for who, (when, origin) in born.items()
        ]


def _place(event: Mapping[str, Any]) -> int:
    """The experience before which it happened; one more than the last where it was after all of them."""
    after = event.get("after", int(event["kind"] == "removed"))  # runs from before it was noted
    return int(event["experience"]) + int(after)
