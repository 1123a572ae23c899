"""Dense feed-forward networks as experts: found by their linear maps, and proved by computing.

A network is recognised by the names of its linear maps (those of timm, of transformers, of a plain `nn.Sequential`); what
it computes between them is found out by trying: a copy with random weights must give, in float64, what an expert with the
same weights gives, with one of the known activations, gated or not. What has a norm, a residual or anything else inside does
not, and is no feed-forward network to upcycling. Dropout is found the same way.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmoe.moe.experts import EXPERTS, Expert
from cmoe.moe.experts.base import ACTIVATIONS
from cmoe.moe.experts.ffn import GATES, PLAIN
from cmoe.moe.merging import fill
from cmoe.moe.optimizer import Part, Row

# (first, second) and (gate, values, second) map, by the names of the attributes
PAIRS = (
    ("fc1", "fc2"),
    ("lin1", "lin2"),
    ("linear1", "linear2"),
    ("c_fc", "c_proj"),
    ("wi", "wo"),
    ("up_proj", "down_proj"),
    ("dense_h_to_4h", "dense_4h_to_h"),
)
TRIPLES = (
    ("gate_proj", "up_proj", "down_proj"),
    ("fc1_g", "fc1_x", "fc2"),
    ("wi_0", "wi_1", "wo"),
    ("w1", "w3", "w2"),
)
EXACT = 1e-9  # of float64; the two forms of GELU differ by 1e-4


@dataclass(frozen=True)
class Form:
    """A dense network as an expert.

    Attributes:
        expert: the kind with its options.
        dim: input dimension.
        hidden: hidden units; None for a kind without.
        out_dim: output dimension.
        rows: how each of the expert's parameters is made of the network's.
        channels_first: the network takes maps (N, C, H, W), by 1 × 1 convolutions.
        after: dropout of the network's output.
    """

    expert: dict[str, Any]
    dim: int
    hidden: int | None
    out_dim: int
    rows: dict[str, Row] = field(default_factory=dict)
    channels_first: bool = False
    after: float = 0.0

    def make(self, n: int = 1) -> Expert:
        """A cohort of copies, in the network's type and on its device."""
        options = {k: v for k, v in self.expert.items() if k != "name"}
        made = EXPERTS[self.expert["name"]](n, self.dim, self.hidden, self.out_dim, **options)
        made = made.to(next(part.old for parts in self.rows.values() for part in parts))
        fill(made, self.rows)
        return made


# -- the linear maps -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Map:
    """A linear map (I, O) and how its matrix lies in the parameter."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    inputs: int
    outputs: int
    to: Callable[[Tensor], Tensor]
    conv: bool = False


def _map(module: Any) -> _Map | None:
    if isinstance(module, nn.Linear):
        return _Map(module.weight, module.bias, module.in_features, module.out_features, Tensor.t)
    if (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and module.stride == (1, 1)
        and module.groups == 1
    ):
        return _Map(module.weight, module.bias, module.in_channels, module.out_channels, _flat_transposed, conv=True)
    if type(module).__name__ == "Conv1D" and isinstance(weight := getattr(module, "weight", None), nn.Parameter):
        return _Map(weight, module.bias, weight.shape[0], weight.shape[1], _as_it_is)  # of transformers' GPT-2
    return None


def _flat_transposed(weight: Tensor) -> Tensor:
    return weight.flatten(1).t()


def _as_it_is(weight: Tensor) -> Tensor:
    return weight


def _maps(module: nn.Module) -> list[_Map] | None:
    """The linear maps of what may be a feed-forward network: one, two, or three with a gate before the values."""
    if isinstance(module, nn.Sequential):
        found = [m for child in module if (m := _map(child)) is not None]
        rest = [child for child in module if _map(child) is None and next(child.parameters(), None) is not None]
        return found if len(found) in (1, 2) and not rest else None
    for names in (*TRIPLES, *PAIRS):
        found = [m for name in names if (m := _map(getattr(module, name, None))) is not None]
        if len(found) == len(names):
            return found
    return None


Piece = tuple[_Map, slice | None]  # a map, or a slice of its outputs


Piece = tuple[_Map, slice | None]  # a map, or a slice of its outputs


# -- what is tried ---------------------------------------------------------------------------------------------------


def _candidates(module: nn.Module) -> Iterator[Form]:
    """The experts that a network may be, by its linear maps."""
    maps = _maps(module)
    if maps is None:
        return
    first, last = maps[0], maps[-1]
    biases = {m.bias is not None for m in maps}
    if any(m.conv != first.conv for m in maps) or len({m.inputs for m in maps[: max(1, len(maps) - 1)]}) > 1:
        return
    common = {"channels_first": first.conv, "dim": first.inputs, "out_dim": last.outputs}
    if len(maps) == 1:
        rows = {"w": _whole(first.weight, first.to)} | ({"b": _whole(first.bias)} if first.bias is not None else {})
        for name in ACTIVATIONS:
            yield Form(
                {"name": "linear", "activation": name, "bias": first.bias is not None}, hidden=None, rows=rows, **common
            )
        return
    ffn = {"name": "ffn", "bias": True in biases}  # a map without a bias beside one with: its bias is 0
    if len(maps) == 2 and first.outputs == last.inputs:
        rows = _rows([(first, None)], last, ffn["bias"])
        for name in PLAIN:
            yield Form({**ffn, "activation": name}, hidden=last.inputs, rows=rows, **common)
    if len(maps) == 3 and maps[0].outputs == maps[1].outputs == last.inputs:
        halves: list[list[Piece]] = [[(maps[0], None), (maps[1], None)]]
    elif len(maps) == 2 and first.outputs == 2 * last.inputs:  # the gate may be either half
        low: Piece = (first, slice(0, last.inputs))
        high: Piece = (first, slice(last.inputs, None))
        halves = [[low, high], [high, low]]
    else:
        return
    for name in GATES:
        for pair in halves:
            rows = _rows(pair, last, ffn["bias"])
            yield Form({**ffn, "activation": name}, hidden=last.inputs, rows=rows, **common)


def _whole(parameter: nn.Parameter, to: Callable[[Tensor], Tensor] | None = None) -> Row:
    return (Part(parameter, None, 1.0, to),)


def _rows(firsts: Sequence[Piece], last: _Map, bias: bool) -> dict[str, Row]:
    """The rows of an FFN whose first map stands in one or two pieces, each a map or a slice of its outputs."""
    count, width = len(firsts), last.inputs
    w1, b1 = [], []
    for place, (m, piece) in enumerate(firsts):
        put = partial(_put, piece=piece, place=place, count=count, width=width)
        w1.append(Part(m.weight, None, 1.0, partial(_both, first=m.to, second=put)))
        if m.bias is not None:
            b1.append(Part(m.bias, None, 1.0, put))
    rows: dict[str, Row] = {"w1": tuple(w1), "w2": _whole(last.weight, last.to)}
    if bias:
        zero = partial(_zeros, size=count * width)
        rows["b1"] = tuple(b1) or (Part(firsts[0][0].weight, None, 1.0, zero),)
        rows["b2"] = (
            _whole(last.bias)
            if last.bias is not None
            else (Part(last.weight, None, 1.0, partial(_zeros, size=last.outputs)),)
        )
    return rows


def _both(value: Tensor, first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]) -> Tensor:
    return second(first(value))


def _put(value: Tensor, piece: slice | None, place: int, count: int, width: int) -> Tensor:
    """A piece of the outputs of a map at its place among zeros for the others."""
    own = value if piece is None else value[..., piece]
    return F.pad(own, (place * width, (count - 1 - place) * width)) if count > 1 else own


def _zeros(value: Tensor, size: int) -> Tensor:
    return value.new_zeros(size)


# -- proof by computing ----------------------------------------------------------------------------------------------


def recognise(module: nn.Module) -> Form | None:
    """The expert that computes what a dense network does; None for what is none, or more than one of known form."""
    if _maps(module) is None:
        return None
    try:
        probe = copy.deepcopy(module).to("cpu", torch.float64)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            return _proved(module, probe)
    except Exception:  # a module of someone else's may refuse our input in any way
        return None


def _proved(module: nn.Module, probe: nn.Module) -> Form | None:
    # all from a generator of its own: nothing else may depend on how many networks were looked at
    generator = torch.Generator().manual_seed(0)
    for parameter in probe.parameters():
        fan = max(1, parameter.numel() // parameter.shape[0]) if parameter.dim() else 1
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / fan**0.5)
    probe.eval()
    wanted: Tensor | None = None
    for candidate, real in zip(_candidates(probe), _candidates(module), strict=True):
        x = torch.randn(2, 3, candidate.dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        if wanted is None:
            wanted = _through(probe, x, candidate)
        if wanted is None or wanted.shape != (2, 3, candidate.out_dim):
            return None
        if (candidate.make().single(x.flatten(0, 1), 0).view_as(wanted) - wanted).abs().max() <= EXACT:
            return _with_dropout(real, candidate, probe, x, wanted)
    return None


def _through(probe: nn.Module, x: Tensor, form: Form) -> Tensor | None:
    """What the network makes of tokens (B, L, D)."""
    y = probe(x.permute(0, 2, 1).unsqueeze(3)) if form.channels_first else probe(x)
    if not isinstance(y, Tensor):
        return None
    return y.squeeze(3).permute(0, 2, 1) if form.channels_first else y


def _with_dropout(form: Form, own: Form, probe: nn.Module, x: Tensor, wanted: Tensor) -> Form | None:
    """The form with the network's dropout; None where it drops what an expert does not, or is random in other ways."""
    drops = [(m, m.p) for m in probe.modules() if isinstance(m, nn.Dropout) and m.p > 0]
    probe.train()
    for module, _ in drops:
        module.p = 0.0
    calm = _through(probe, x, form)
    if calm is None or (calm - wanted).abs().max() > EXACT:
        return None
    hidden, after = 0.0, 0.0
    hollow = own.make()
    for name, parameter in hollow.named_parameters():
        if name in ("w2", "w"):
            parameter.zero_()  # what is left without any hidden unit
    left = hollow.single(x.flatten(0, 1), 0).view_as(wanted) if form.expert["name"] == "ffn" else None
    for module, p in drops:
        module.p = 1.0
        dropped = _through(probe, x, form)
        module.p = 0.0
        assert dropped is not None
        if not dropped.any() and (left is None or left.any()):
            after = p
        elif left is not None and (dropped - left).abs().max() <= EXACT:
            hidden = p
        else:
            return None
    if left is None:  # a linear expert drops its outputs itself
        hidden, after = after, 0.0
    expert = {**form.expert, "dropout": hidden} if hidden else form.expert
    return Form(expert, form.dim, form.hidden, form.out_dim, form.rows, form.channels_first, after)


def linear_form(linear: nn.Linear, activation: str) -> Form:
    """A linear layer with the activation that someone else applies to its output, as an expert.

    Raises:
        ValueError: the activation is unknown.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {sorted(ACTIVATIONS)}, got {activation!r}")
    found = next(f for f in _candidates(nn.Sequential(linear)) if f.expert["activation"] == activation)
    return Form(found.expert, found.dim, None, found.out_dim, found.rows)
