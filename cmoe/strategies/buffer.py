"""Memory of samples: which are kept, and how they are drawn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Buffer:
    """Raw samples with their targets and experiences, chosen by a policy, one decision per incoming sample.

    Policies: ``reservoir`` (Vitter 1985: every sample seen is kept with the same probability) and ``class_balanced``
    (Chrysakis & Moens 2020: classes that are not the largest always get a place, the largest gives one up).

    Args:
        size: places.
        policy: 'reservoir' or 'class_balanced'.
        generator: of every random choice; saved with the buffer.
    """

    def __init__(self, size: int, policy: str, generator: torch.Generator) -> None:
        self.size, self.policy, self.generator = size, policy, generator
        self.seen = 0
        self.class_seen: dict[int, int] = {}
        self.filled = 0
        self.x = self.y = self.experience = torch.empty(0)
        self.extra: dict[str, Tensor] = {}
        self._members: dict[int, list[int]] = {}
        self._class_of: list[int] = []
        self._full: set[int] = set()

    def __len__(self) -> int:
        return self.filled

    def places(self, y: Tensor) -> list[int]:
        """A place for each incoming sample with class y (B,), or −1 for those that are not kept."""
        if self.policy == "reservoir":
            return self._reservoir(y.shape[0])
        return [self._balanced(int(c), i) for i, c in enumerate(y.tolist())]

    def _reservoir(self, count: int) -> list[int]:
        places = []
        draws = torch.rand(count, generator=self.generator, dtype=torch.float64).tolist()
        for draw in draws:
            place = self.filled if self.filled < self.size else int(draw * (self.seen + 1))
            self.filled = min(self.filled + 1, self.size)
            places.append(place if place < self.size else -1)
            self.seen += 1
        return places

    def _balanced(self, label: int, _: int) -> int:
        self.seen += 1
        self.class_seen[label] = self.class_seen.get(label, 0) + 1
        members = self._members.setdefault(label, [])
        draw = float(torch.rand((), generator=self.generator, dtype=torch.float64))
        if self.filled < self.size:
            place = self.filled
            self.filled += 1
            self._class_of.append(label)
        else:
            most = max(map(len, self._members.values()))
            largest = [c for c, m in self._members.items() if len(m) == most]
            self._full.update(largest)
            if label not in self._full:
                victims = self._members[min(largest)]
                place = victims.pop(int(draw * most))
                self._class_of[place] = label
            else:
                k = int(draw * self.class_seen[label])
                return members[k] if k < len(members) else -1
        members.append(place)
        return place

    def write(self, places: list[int], x: Tensor, y: Tensor, experience: Tensor, **extra: Tensor) -> None:
        """Put samples into their places; where two share one the later stays.

        Args:
            places: a place for each sample, all ≥ 0.
            x: raw samples (M, ...).
            y: targets (M, ...).
            experience: (M,).
            extra: what else is kept of each sample (its logits, its score), (M, ...), the same names at each call.
        """
        if self.x.shape[0] == 0:
            self.x = torch.zeros((self.size, *x.shape[1:]), dtype=x.dtype)
            self.y = torch.zeros((self.size, *y.shape[1:]), dtype=y.dtype)
            self.experience = torch.zeros(self.size, dtype=torch.int64)
        final = {place: row for row, place in enumerate(places)}  # index_copy_ has no order among equal indices
        to = torch.tensor(list(final), dtype=torch.int64)
        rows = torch.tensor(list(final.values()), dtype=torch.int64)
        self.x.index_copy_(0, to, x.index_select(0, rows))
        self.y.index_copy_(0, to, y.index_select(0, rows))
        self.experience.index_copy_(0, to, experience.index_select(0, rows))
        for name, values in extra.items():
            held = self.extra.get(name)
            if held is None:
                held = self.extra[name] = torch.zeros((self.size, *values.shape[1:]), dtype=values.dtype)
            held.index_copy_(0, to, values.index_select(0, rows))

    def pick(self, count: int) -> Tensor:
        """`count` random places, without replacement; all, in order, when it holds fewer."""
        if count >= self.filled:
            return torch.arange(self.filled)
        return torch.randperm(self.filled, generator=self.generator)[:count]

    def read(self, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Raw samples, targets and experiences of places (M,); what else is kept lies in `extra` under the same numbers."""
        return self.x.index_select(0, places), self.y.index_select(0, places), self.experience.index_select(0, places)

    def draw(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """`read` of what `pick` gives."""
        return self.read(self.pick(count))

    def bytes(self) -> int:
        """Memory of the samples held."""
        held = (self.x, self.y, self.experience, *self.extra.values())
        return sum(t[: self.filled].numel() * t.element_size() for t in held)

    def state_dict(self) -> dict[str, Any]:
        """Everything, the counters and the generator included."""
        return {
            "seen": self.seen,
            "filled": self.filled,
            "class_seen": dict(self.class_seen),
            "members": {c: list(m) for c, m in self._members.items()},
            "class_of": list(self._class_of),
            "full": sorted(self._full),
            "x": self.x,
            "y": self.y,
            "experience": self.experience,
            "extra": dict(self.extra),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.seen, self.filled = state["seen"], state["filled"]
        self.class_seen = dict(state["class_seen"])
        self._members = {c: list(m) for c, m in state["members"].items()}
        self._class_of = list(state["class_of"])
        self._full = set(state["full"])
        self.x, self.y, self.experience = state["x"], state["y"], state["experience"]
        self.extra = dict(state["extra"])
        self.generator.set_state(state["generator"])
