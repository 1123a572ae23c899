"""What single experts do for a model's predictions: each alone, the model without each, and other ways to join them.

One layer at a time; all other layers route as usual, so that experts of different layers are never mixed up. Two passes
for each expert, in evaluation mode. Nothing of the model changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from cmoe.learners.answers import Answers
from cmoe.learners.model import Model
from cmoe.learners.reading import Read
from cmoe.moe import MoELayer, RouteContext, Routing
from cmoe.moe.diagnostics import Tap, alone, reachable, silent, tapped, without

TOKENS = 512  # whose outputs are compared, per layer
MOST = 64  # experts of a layer; with more, it is left out


@dataclass
class LayerAnswers:
    """One layer's.

    Attributes:
        experts: the ids, in the order of the columns.
        alone: answers when this expert works on every token of the layer with weight 1, by expert.
        without: answers when the router may not choose this expert, by expert.
        pools: answers when the answers of the experts alone are joined: 'gate' (mean weighted by the router's weights),
            'uniform' (mean), 'log' (log-opinion pool: normalised geometric mean). The latter two join the experts that
            the sample's task label allows.
        outputs: (T, O) what each expert gives for some tokens, the same ones for all, by expert.
        reasons: why one of these is missing.
    """

    experts: tuple[int, ...]
    alone: dict[int, Answers] = field(default_factory=dict)
    without: dict[int, Answers] = field(default_factory=dict)
    pools: dict[str, Answers] = field(default_factory=dict)
    outputs: dict[int, list[Tensor]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


@dataclass
class Examination:
    """Answers of the model as it is, and of each layer's experts; layers that were left out are not there.

    Attributes:
        model: the model's own answers.
        layers: by name.
        left_out: why a layer is not among them, by name.
    """

    model: Answers = field(default_factory=Answers)
    layers: dict[str, LayerAnswers] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass
class Sample:
    """Some samples of an experience.

    Attributes:
        experience: its index, the task label.
        batches: inputs and targets.
        read: how logits are read.
    """

    experience: int
    batches: Sequence[tuple[Tensor, Tensor]]
    read: Read


def examine(model: Model, samples: Sequence[Sample], device: torch.device) -> Examination:
    """Ask every expert; the model must be in evaluation mode, and may draw random numbers.

    Args:
        model: backbone and head.
        samples: of each experience that it learned.
        device: where the model is.
    """
    found = Examination()
    # no inference mode: what layers and heads keep for later (index tensors) must serve training too
    with torch.no_grad():
        for sample in samples:
            quota = max(TOKENS // max(len(samples), 1) // max(len(sample.batches), 1), 1)
            for x, y in sample.batches:
                _batch(model, sample, x.to(device), y.to(device), quota, found)
    return found


def _batch(model: Model, sample: Sample, x: Tensor, y: Tensor, quota: int, found: Examination) -> None:
    context, layers = RouteContext(task=sample.experience), model.moe_layers()
    with ExitStack() as stack:
        taps = {name: stack.enter_context(tapped(layer)) for name, layer in layers.items()}
        output = model(x, context)
    log_probs, target, kept = sample.read(output.logits, y)
    found.model.add(sample.experience, log_probs, target)
    for name, layer in layers.items():
        if name not in output.routings:
            continue
        routing = output.routings[name]
        if name not in found.layers and name not in found.left_out:
            if reason := _refusal(layer, routing):
                found.left_out[name] = reason
            else:
                found.layers[name] = LayerAnswers(layer.ids)
        if name not in found.layers:
            continue
        gate = _gate(routing, layer, taps[name], y)
        asked = _Question(model, layer, sample, x, y, context)
        asked.alone(found.layers[name], gate if gate is None else gate.index_select(0, kept), quota, taps[name])
        asked.without(found.layers[name], (log_probs, target))


def _refusal(layer: MoELayer, routing: Routing) -> str | None:
    if routing.kind != "sparse":
        return f"routing of kind '{routing.kind}' gives no token to one expert"
    if len(layer.ids) > MOST:
        return f"{len(layer.ids)} experts, more than the {MOST} that are asked one by one"
    return None


@dataclass
class _Question:
    """A batch that one layer's experts are asked about."""

    model: Model
    layer: MoELayer
    sample: Sample
    x: Tensor
    y: Tensor
    context: RouteContext

    def _ask(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.sample.read(self.model(self.x, self.context).logits, self.y)

    def alone(self, answers: LayerAnswers, gate_NE: Tensor | None, quota: int, usual: Tap) -> None:
        """Each expert for every token, and their answers joined."""
        task = self.sample.experience
        chosen = _spread(usual.routing, quota)
        with silent(self.layer), tapped(self.layer) as rest:
            self.layer(*usual.arguments, **usual.options)  # what the layer gives by itself, such as shared experts
        allowed = set(reachable(self.layer, task))
        pools: dict[str, Tensor] = {}
        target = None
        for k, expert in enumerate(self.layer.ids):
            with alone(self.layer, expert), tapped(self.layer) as tap:
                log_probs, target, _ = self._ask()
            answers.alone.setdefault(expert, Answers()).add(task, log_probs, target)
            own = tap.tokens().index_select(0, chosen).float() - rest.tokens().index_select(0, chosen).float()
            answers.outputs.setdefault(expert, []).append(own.cpu())
            if expert in allowed:
                pools["uniform"] = _plus(pools.get("uniform"), log_probs)
                pools["log"] = pools["log"] + log_probs if "log" in pools else log_probs
            if gate_NE is not None:
                pools["gate"] = _plus(pools.get("gate"), log_probs + gate_NE[:, k : k + 1].log().to(log_probs.dtype))
        assert target is not None
        pools["uniform"] = pools["uniform"] - math.log(len(allowed))
        pools["log"] = F.log_softmax(pools["log"] / len(allowed), 1)
        if gate_NE is None:
            answers.reasons["gate_pool"] = "the backbone does not tell which tokens belong to a sample"
        else:
            served_N1 = gate_NE.sum(1, keepdim=True) > 0
            pools["gate"] = torch.where(served_N1, pools["gate"], pools["uniform"])
        for name, log_probs in pools.items():
            answers.pools.setdefault(name, Answers()).add(task, log_probs, target)

    def without(self, answers: LayerAnswers, own: tuple[Tensor, Tensor]) -> None:
        """The model without each expert; one that the task label keeps out anyway changes nothing."""
        if "drop_one" in answers.reasons:
            return
        task = self.sample.experience
        allowed = set(reachable(self.layer, task))
        for expert in self.layer.ids:
            log_probs, target = own
            if expert in allowed:
                try:
                    with without(self.layer, expert, task):
                        log_probs, target, _ = self._ask()
                except ValueError as error:  # a plugin's router that cannot do without it
                    answers.reasons["drop_one"] = f"the router refuses to do without expert {expert}: {error}"
                    answers.without.clear()
                    return
            answers.without.setdefault(expert, Answers()).add(task, log_probs, target)


def _plus(total: Tensor | None, log_probs: Tensor) -> Tensor:
    """Sum of probabilities, as logarithms."""
    return log_probs if total is None else torch.logaddexp(total, log_probs)


def _spread(routing: Routing, quota: int) -> Tensor:
    """Up to `quota` tokens without padding, evenly over the batch."""
    tokens, device = routing.ids.shape[0], routing.ids.device
    places = torch.arange(tokens, device=device) if routing.valid is None else routing.valid.nonzero().squeeze(1)
    return places.index_select(0, evenly(len(places), min(quota, len(places))).to(device))


def evenly(size: int, n: int) -> Tensor:
    """`n` ≤ `size` different indices below `size`, evenly apart, the first among them; (n,) int64."""
    return torch.arange(n, dtype=torch.int64) * size // max(n, 1)


def _gate(routing: Routing, layer: MoELayer, usual: Tap, y: Tensor) -> Tensor | None:
    """(N, E) the router's weights of each of the batch's predictions, rows of sum 1 (of sum 0: nobody served it).

    A prediction for a whole sample has the weights of all its tokens. None where it is not known whose tokens they are.
    """
    tokens, experts = routing.ids.shape[0], len(layer.ids)
    total_TE = routing.weights.new_zeros(tokens, experts + 1, dtype=torch.float64)
    columns = layer.view.to_columns(routing.ids, none=experts)  # nobody has the last column
    weights = total_TE.scatter_add(1, columns, routing.weights.double())[:, :experts]
    if tokens != y.numel():
        if y.dim() > 1 or usual.arguments[0].shape[0] != len(y):
            return None
        weights = weights.view(len(y), -1, experts).sum(1)
    return weights / weights.sum(1, keepdim=True).clamp(min=1e-300)
