"""Progressive neural networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmoe.learners.head import NEVER
from cmoe.moe import RouteContext
from cmoe.strategies.base import Context, Phase, Segment, Strategy
from cmoe.strategies.beside import refuse_beside
from cmoe.strategies.gates import BESIDE, hidden_layers

_ANEW = "each of both begins a network of its own"
Acts = list[Tensor]  # activities of the hidden layers, (B, H) each


class Lateral(nn.Module):
    """What earlier columns tell a layer: U relu(V [α_k h_k]) of their activities h_k one layer below.

    Args:
        columns: how many earlier columns.
        below: units of a column's layer below.
        units: of the layer that is told.
    """

    def __init__(self, columns: int, below: int, units: int) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.empty(columns).uniform_(0.0, 0.1))
        self.adapter = nn.Linear(columns * below, below)
        self.out = nn.Linear(below, units, bias=False)

    def forward(self, earlier: Sequence[Tensor]) -> Tensor:
        """(B, units) from a (B, below) of each earlier column."""
        scaled = [share * h for share, h in zip(self.share, earlier, strict=True)]
        return self.out(F.relu(self.adapter(torch.cat(scaled, 1))))


class PNN(Strategy):
    """Progressive neural networks: a new column for each experience, told by the old ones, which stay (Rusu et al. 2016).

    https://arxiv.org/abs/1606.04671.
    The model is the newest column and begins anew; every layer above the first, the outputs included, gains
    U relu(V [α_k h_k]) of the activities h_k that all earlier columns have one layer below, with learned U, V and α. Columns
    of past experiences are frozen, so that nothing is forgotten. The task label chooses the column; without it the newest
    answers. Works on the backbone `mlp`; the number of weights grows with the square of that of experiences.
    """

    owns_predict: ClassVar[bool] = True
    needs_boundaries: ClassVar[bool] = True

    def __init__(self) -> None:
        self.columns: list[
            dict[str, Any]
        ] = []  # finished: 'layers' and 'head' [(weight, bias)], 'laterals' state dicts
        self.column_of: dict[int, int] = {}  # of each experience
        self.laterals = nn.ModuleList()  # of the newest column: for each layer above the first, then for the outputs
        self._listened = self._outputs = 0  # how many columns it is told by, and how many outputs are
        self._told: list[Acts] = []  # of earlier columns for the present batch
        self._made: dict[int, nn.ModuleList] = {}

    def setup(self, context: Context) -> None:
        super().setup(context)
        others = dict.fromkeys(("gdumb", "cumulative", "expand"), _ANEW)
        refuse_beside(context, "pnn", BESIDE | others)
        self.layers = hidden_layers(context, "pnn")
        backbone, head = context.model.backbone, context.model.head
        backbone.register_forward_pre_hook(self._listen)
        for i, layer in enumerate(self.layers[1:]):
            layer.register_forward_hook(self._told_by(i))
        head.register_forward_hook(self._told_by(len(self.layers) - 1))

    # -- the newest column ----------------------------------------------------------------------------------------

    def _listen(self, module: nn.Module, args: tuple[Any, RouteContext]) -> None:
        if len(self.laterals):
            with torch.no_grad():
                self._told = self._activities(args[0], self._listened)

    def _told_by(self, place: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if not len(self.laterals):
                return None
            told = self.laterals[place]([acts[place] for acts in self._told])
            return output + F.pad(told, (0, output.shape[-1] - told.shape[-1])).to(output.dtype)

        return hook

    def before_experience(self, segment: Segment) -> None:
        number = len(self.columns)
        if number > 0:
            self.context.restart(f"pnn {number}")
            with self.context.seeded(f"pnn laterals {number}"):
                self._listened, self._outputs = number, len(self.context.model.head)
                self.laterals = self._new_laterals(number, self._outputs)
        self.column_of |= dict.fromkeys(segment.experiences, number)

    def _new_laterals(self, columns: int, outputs: int) -> nn.ModuleList:
        units = [*(layer.out_features for layer in self.layers[1:]), outputs]
        made = [Lateral(columns, layer.out_features, n) for layer, n in zip(self.layers, units, strict=True)]
        return nn.ModuleList(made).to(self.context.device, self.layers[0].weight.dtype)

    def phases(self, segment: Segment, phases: list[Phase]) -> list[Phase]:
        """Laterals are trained in phases that train all there is."""

        def parameters() -> Sequence[nn.Parameter]:
            own = self.laterals.parameters()
            return [p for p in (*self.context.model.parameters(), *own) if p.requires_grad]

        plain = [p.hooks and p.parameters is None and p.objective is None for p in phases]
        return [replace(p, parameters=parameters) if own else p for p, own in zip(phases, plain, strict=True)]

    def after_experience(self, segment: Segment) -> None:
        head = self.context.model.head
        self.columns.append({
            "layers": [_copied(layer) for layer in self.layers],
            "head": [_copied(block) for block in head.blocks],
            "laterals": {name: value.detach().clone() for name, value in self.laterals.state_dict().items()},
        })  # fmt: skip

    # -- finished columns -----------------------------------------------------------------------------------------

    def _activities(self, x: Tensor, count: int) -> list[Acts]:
        """Of the first `count` columns, from inputs (B, ...)."""
        found: list[Acts] = []
        for number in range(count):
            h, own = x.flatten(1), []
            for i, (weight, bias) in enumerate(self.columns[number]["layers"]):
                z = F.linear(h, weight, bias)
                if i and number:
                    z = z + self._laterals_of(number)[i - 1]([acts[i - 1] for acts in found])
                h = F.relu(z)
                own.append(h)
            found.append(own)
        return found

    def _laterals_of(self, number: int) -> nn.ModuleList:
        if number not in self._made:
            state = self.columns[number]["laterals"]
            made = self._new_laterals(number, len(state[f"{len(self.layers) - 1}.out.weight"]))
            made.load_state_dict(state)
            self._made[number] = made.requires_grad_(False)
        return self._made[number]

    def predict(self, x: Tensor, task: int | None) -> Tensor | None:
        number = -1 if task is None else self.column_of.get(task, -1)
        if not 0 <= number < len(self.columns):
            return None
        *earlier, own = self._activities(x, number + 1)
        logits = torch.cat([F.linear(own[-1], w, b) for w, b in self.columns[number]["head"]], 1)
        if number:
            logits = logits + self._laterals_of(number)[len(self.layers) - 1]([acts[-1] for acts in earlier])
        return F.pad(logits, (0, len(self.context.model.head) - logits.shape[1]), value=NEVER)

    def parameters(self) -> int:
        finished = sum(t.numel() for column in self.columns for t in _tensors(column))
        last = self.columns[-1]["layers"] + self.columns[-1]["head"] if self.columns else []
        return finished - sum(t.numel() for pair in last for t in pair)  # the newest column is the model itself

    def facts(self) -> dict[str, float]:
        held = sum(t.numel() * t.element_size() for column in self.columns for t in _tensors(column))
        return {"pnn/bytes": float(held), "pnn/columns": float(len(self.columns))}

    def state_dict(self) -> dict[str, Any]:
        return {
            "columns": list(self.columns),
            "column_of": dict(self.column_of),
            "laterals": {name: value.detach() for name, value in self.laterals.state_dict().items()},
            "listened": self._listened,
            "outputs": self._outputs,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = self.context.device
        self.columns = [
            {
                "layers": [(w.to(device), b.to(device)) for w, b in column["layers"]],
                "head": [(w.to(device), b.to(device)) for w, b in column["head"]],
                "laterals": column["laterals"],
            }
            for column in state["columns"]
        ]
        self.column_of = dict(state["column_of"])
        self._made.clear()
        self._listened, self._outputs = state["listened"], state["outputs"]
        if self._listened:
            self.laterals = self._new_laterals(self._listened, self._outputs)
            self.laterals.load_state_dict(state["laterals"])


def _copied(layer: nn.Module) -> tuple[Tensor, Tensor]:
    assert isinstance(layer, nn.Linear)
    return layer.weight.detach().clone(), layer.bias.detach().clone()


def _tensors(column: dict[str, Any]) -> list[Tensor]:
    pairs = [t for pair in (*column["layers"], *column["head"]) for t in pair]
    return [*pairs, *column["laterals"].values()]
