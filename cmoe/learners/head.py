"""Output layers: shared, one per task, or growing with the classes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

SHARED = -1
NEVER = -1e30  # logit of an output that is not to be chosen; −∞ would make NaN where no allowed output can be


class Head(nn.Module):
    """Linear outputs in blocks; each output stands for a class, and in a multi-head for a class of a task.

    A block that was added later is a matrix of its own, so that the logits of earlier blocks keep every bit.

    Args:
        width: size D of the features.
        kind: 'shared', 'multi' or 'growing'.
    """

    _anchor: Tensor

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        # goes where the head goes: new outputs get its device and type
        self.register_buffer("_anchor", torch.empty(0), persistent=False)
        self.width, self.kind = width, kind
        self.blocks = nn.ModuleList()
        self.block_classes: list[list[int]] = []
        self.block_tasks: list[int] = []
        self._index()

    def add(self, classes: Sequence[int], task: int = SHARED) -> int:
        """A block with one output for each of `classes`, belonging to `task`; returns the block's index."""
        return self._install(nn.Linear(self.width, len(classes)), classes, task)

    def _install(self, block: nn.Linear, classes: Sequence[int], task: int) -> int:
        self.blocks.append(block.to(self._anchor))
        self.block_classes.append([int(c) for c in classes])
        self.block_tasks.append(int(task))
        self._index()
        return len(self.blocks) - 1

    def _index(self) -> None:
        self.units = [(c, t) for cs, t in zip(self.block_classes, self.block_tasks, strict=True) for c in cs]
        self.classes = {c for c, _ in self.units}
        self.tasks = set(self.block_tasks)
        self._tables: dict[Any, Tensor] = {}

    def __len__(self) -> int:
        return len(self.units)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (..., U) of all outputs for features (..., D)."""
        if len(self.blocks) == 1:
            return self.blocks[0](x)
        return torch.cat([block(x) for block in self.blocks], dim=-1)

    def unit_classes(self) -> Tensor:
        """Class of each output, (U,) int64."""
        return self._table("classes", lambda: torch.tensor([c for c, _ in self.units]))

    def columns(self, classes: Iterable[int], task: int | None = None) -> Tensor | None:
        """Outputs, as sorted indices, that stand for one of `classes` (and, in a multi-head, for `task`).

        Returns None when these are all outputs, so that nothing needs to be selected.
        """
        wanted = frozenset(classes)

        def make() -> Tensor:
            rows = [u for u, (c, t) in enumerate(self.units) if c in wanted and (task is None or t in (SHARED, task))]
            return torch.tensor(rows, dtype=torch.int64)

        found = self._table(("columns", wanted, task), make)
        return None if len(found) == len(self.units) else found

    def targets(self, y: Tensor, task: int | Tensor) -> Tensor:
        """Index of the output that stands for each sample's class, (B,); −1 where there is none."""
        if self.kind != "multi":
            return self._table("shared lookup", self._shared_lookup).index_select(0, y)
        table = self._table("lookup", self._lookup)
        if isinstance(task, int):
            return table[task].index_select(0, y)
        return table.flatten().index_select(0, task * table.shape[1] + y)

    def own_task(self) -> Tensor:
        """Which outputs belong to each task label, (tasks, U) bool; for batches that mix tasks in a multi-head."""

        def make() -> Tensor:
            tasks = torch.tensor([t for _, t in self.units])
            return torch.arange(max(self.block_tasks) + 1).unsqueeze(1) == tasks

        return self._table("own task", make)

    def is_identity(self) -> bool:
        """Whether output u stands for class u, so that targets need no translation."""
        return self.kind != "multi" and [c for c, _ in self.units] == list(range(len(self.units)))

    def _shared_lookup(self) -> Tensor:
        table = torch.full((max(self.classes) + 1,), -1)
        table[self.unit_classes().to(table.device)] = torch.arange(len(self.units))
        return table

    def _lookup(self) -> Tensor:
        table = torch.full((max(self.block_tasks) + 1, max(self.classes) + 1), -1)
        for u, (c, t) in enumerate(self.units):
            table[t, c] = u
        return table

    def _table(self, key: Any, make: Any) -> Tensor:
        device = next((p.device for p in self.blocks.parameters()), torch.device("cpu"))
        table = self._tables.get(key)
        if table is None or table.device != device:
            table = self._tables[key] = make().to(device)
        return table

    def structure(self) -> dict[str, Any]:
        """Plain containers from which `restore_structure` makes the same blocks."""
        return {"kind": self.kind, "classes": [list(c) for c in self.block_classes], "tasks": list(self.block_tasks)}

    def restore_structure(self, structure: dict[str, Any]) -> None:
        """Blocks as they were when `structure()` was taken; their weights follow by `load_state_dict`.

        Blocks that are here already stay; others come with weights of zero. Draws no random numbers.
        """
        # where the stream decides (`head: auto`), one without samples may have decided otherwise
        self.kind = structure.get("kind", self.kind)
        wanted = list(zip(structure["classes"], structure["tasks"], strict=True))
        kept = 0
        while kept < min(len(wanted), len(self.blocks)):
            if (self.block_classes[kept], self.block_tasks[kept]) != (list(wanted[kept][0]), wanted[kept][1]):
                break
            kept += 1
        self.blocks = self.blocks[:kept]
        self.block_classes, self.block_tasks = self.block_classes[:kept], self.block_tasks[:kept]
        self._index()
        for classes, task in wanted[kept:]:
            block = nn.utils.skip_init(nn.Linear, self.width, len(classes))
            for parameter in block.parameters():
                nn.init.zeros_(parameter)
            self._install(block, classes, task)
