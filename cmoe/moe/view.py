"""A layer's experts as routers and dispatch see them: ids, columns, cohorts, tasks, with cached index tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

NONE = -1  # the expert id that stands for "no expert"


class Columns:
    """Some of a layer's experts in column order: all of them, or those that are visible.

    Attributes:
        ids: expert id of each column.
        parts: (cohort key, its experts' row indices, or None for all rows) in column order.
        members: the expert ids of each part.
        frozen: keys of the cohorts that are.
    """

    def __init__(
        self,
        parts: tuple[tuple[str, tuple[int, ...], tuple[int, ...] | None], ...],
        frozen: frozenset[str] = frozenset(),
    ) -> None:
        self.frozen = frozen
        self.ids: tuple[int, ...] = tuple(i for _, ids, _ in parts for i in ids)
        self.parts = tuple((key, rows) for key, _, rows in parts)
        self.members = tuple(ids for _, ids, _ in parts)
        self.index: dict[int, int] = {expert: column for column, expert in enumerate(self.ids)}
        self.identity = self.ids == tuple(range(len(self.ids)))
        self.ascending = all(a < b for a, b in zip(self.ids, self.ids[1:], strict=False))
        self._tensors: dict[tuple[str, torch.device], Tensor] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def cached(self, name: str, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
        """A tensor that depends on nothing but these columns, made when it is first asked for."""
        found = self._tensors.get((name, device))
        if found is None:
            if torch.compiler.is_compiling():  # no context of its own within a graph
                found = make().to(device)
            else:  # a first asking within inference_mode must not keep later ones from training
                with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
                    found = make().to(device)
            self._tensors[(name, device)] = found
        return found

    def _tensor(self, name: str, values: Sequence[int], device: torch.device) -> Tensor:
        return self.cached(name, device, lambda: torch.tensor(values, dtype=torch.int64))

    def ids_E(self, device: torch.device) -> Tensor:
        """The expert ids as a tensor."""
        return self._tensor("ids", self.ids, device)

    def rows(self, key: str, rows: tuple[int, ...], device: torch.device) -> Tensor:
        """A part's row indices as a tensor."""
        return self._tensor(f"rows {key}", rows, device)

    def to_ids(self, columns_TK: Tensor) -> Tensor:
        """Expert ids of column indices."""
        if self.identity:
            return columns_TK
        return self.ids_E(columns_TK.device).index_select(0, columns_TK.reshape(-1)).view(columns_TK.shape)

    def to_columns(self, ids_TK: Tensor, none: int = 0) -> Tensor:
        """Column indices of expert ids that are known to be here; -1 becomes `none`."""
        size = max(self.ids, default=-1) + 2
        lookup = self._tensors.get((f"lookup {none}", ids_TK.device))
        if lookup is None:
            values = [none] * size
            for expert, column in self.index.items():
                values[expert + 1] = column
            lookup = self._tensor(f"lookup {none}", values, ids_TK.device)
        return lookup.index_select(0, ids_TK.reshape(-1) + 1).view(ids_TK.shape)

    def check(self, ids_TK: Tensor) -> None:
        """Refuse a replay that names an expert which is not here.

        Raises:
            ValueError: with the ids that are not here.
        """
        unknown = sorted(set(ids_TK.unique().tolist()) - set(self.ids) - {NONE})
        if unknown:
            raise ValueError(f"replay: expected expert ids among {list(self.ids)}, got {unknown}")


class ExpertView(Columns):
    """All experts of a layer as a router sees them; made anew by the layer at each structural change.

    Attributes:
        tasks: task label -> expert ids assigned to it, in order of assignment.
        where: expert id -> (cohort key, row).
        first: expert ids of the oldest cohort.
    """

    def __init__(
        self,
        cohorts: Mapping[str, tuple[int, ...]],
        tasks: Mapping[int, tuple[int, ...]],
        frozen: Iterable[str] = (),
    ) -> None:
        super().__init__(tuple((key, ids, None) for key, ids in cohorts.items()), frozenset(frozen))
        self.cohorts = dict(cohorts)
        self.tasks = dict(tasks)
        self.where = {expert: (key, row) for key, ids in cohorts.items() for row, expert in enumerate(ids)}
        self.first: tuple[int, ...] = next(iter(cohorts.values()), ())
        self._slices: dict[tuple[int, ...], Columns] = {}

    def slice(self, visible: tuple[int, ...] | None, keep: bool = True) -> Columns:
        """The columns of the visible experts, in column order (None: all).

        Args:
            visible: expert ids.
            keep: whether to remember them; not for a choice that hardly comes again.

        Raises:
            ValueError: an id is unknown, or none is visible.
        """
        if visible is None:
            return self
        found = self._slices.get(visible)
        if found is None:
            unknown = sorted(set(visible) - set(self.ids))
            if unknown or not visible:
                raise ValueError(f"visible: expected expert ids among {list(self.ids)}, got {unknown or 'none'}")
            parts = []
            for key, ids in self.cohorts.items():
                rows = tuple(row for row, expert in enumerate(ids) if expert in visible)
                if rows:
                    parts.append((key, tuple(ids[row] for row in rows), None if len(rows) == len(ids) else rows))
            found = Columns(tuple(parts), self.frozen)
            if keep:
                self._slices[visible] = found
        return found
