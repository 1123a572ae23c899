"""The layer once more, as a plain formula in float64: no sorting, no stacking, no sharing of code with the package."""

from __future__ import annotations

import torch


def expert_output(x, kind, activation, p):
    """All rows x (T, D) through one expert with parameters p: name -> tensor without the expert dimension."""
    act = {
        "relu": lambda h: h.clamp(min=0),
        "gelu": lambda h: 0.5 * h * (1 + torch.erf(h / 2**0.5)),
        "none": lambda h: h,
        "tanh": lambda h: (h.exp() - (-h).exp()) / (h.exp() + (-h).exp()),
        "silu": lambda h: h / (1 + (-h).exp()),
    }
    if kind == "linear":
        h = torch.einsum("td,do->to", x, p["w"])
        return act[activation](h + p["b"] if "b" in p else h)
    h = torch.einsum("td,dh->th", x, p["w1"])
    if "b1" in p:
        h = h + p["b1"]
    if activation == "swiglu":
        half = h.shape[1] // 2
        h = act["silu"](h[:, :half]) * h[:, half:]
    else:
        h = act[activation](h)
    y = torch.einsum("th,ho->to", h, p["w2"])
    return y + p["b2"] if "b2" in p else y


def leaves(layer):
    """Double copies of the layer's parameters that gather gradients of their own."""
    return {name: p.detach().double().clone().requires_grad_() for name, p in layer.named_parameters()}


def all_outputs(layer, x, kind, activation, params):
    """{expert id: (T, O)} for every expert of the layer."""
    outputs = {}
    for key, ids in layer.cohort_ids.items():
        prefix = f"cohorts.{key}."
        for row, expert in enumerate(ids):
            own = {name[len(prefix) :]: p[row] for name, p in params.items() if name.startswith(prefix)}
            outputs[expert] = expert_output(x, kind, activation, own)
    return outputs


def topk_weights(layer, x, params, chosen, order):
    """(T, E) dense weights, E in the order of the layer's ids, for the ids `chosen` (list of sets, one per token)."""
    weight = torch.cat([params[f"router.columns.{key}.weight"] for key in layer.cohort_ids])
    logits = x @ weight.T
    mask = torch.tensor([[expert in row for expert in layer.ids] for row in chosen])
    if order == "after":
        e = (logits - logits.max(1, keepdim=True).values.detach()).exp()
        return (e / e.sum(1, keepdim=True)) * mask
    e = (logits - logits.max(1, keepdim=True).values.detach()).exp() * mask
    return e / e.sum(1, keepdim=True)


def combine(outputs, weights, ids):
    """Σ over experts of weight · output; outputs {id: (T, O)}, weights (T, E)."""
    return sum(weights[:, column : column + 1] * outputs[expert] for column, expert in enumerate(ids))
