"""The layer once more, as a plain formula in float64: no sorting, no stacking, no sharing of code with the package."""

from __future__ import annotations

import torch

ACT = {
    "relu": lambda h: h.clamp(min=0),
    "gelu": lambda h: 0.5 * h * (1 + torch.erf(h / 2**0.5)),
    "none": lambda h: h,
    "tanh": lambda h: (h.exp() - (-h).exp()) / (h.exp() + (-h).exp()),
    "silu": lambda h: h / (1 + (-h).exp()),
}


def expert_output(x, kind, options, p):
    """All units x (T, ..., D) through one expert with parameters p: name -> tensor without the expert dimension."""
    return KINDS[kind](x, options, p)


def linear(x, options, p):
    h = torch.einsum("...d,do->...o", x, p["w"])
    return ACT[options.get("activation", "relu")](h + p["b"] if "b" in p else h)


def ffn(x, options, p):
    activation = options.get("activation", "gelu")
    h = torch.einsum("...d,dh->...h", x, p["w1"])
    if "b1" in p:
        h = h + p["b1"]
    if activation == "swiglu":
        half = h.shape[-1] // 2
        h = ACT["silu"](h[..., :half]) * h[..., half:]
    else:
        h = ACT[activation](h)
    y = torch.einsum("...h,ho->...o", h, p["w2"])
    return y + p["b2"] if "b2" in p else y


def lora(x, options, p):
    """x W with W = A B · alpha / rank."""
    return torch.einsum("...d,do->...o", x, p["a"] @ p["b"] * (options.get("alpha", 16.0) / options.get("rank", 8)))


def zero(x, options, p):
    return torch.zeros_like(x)


def copy(x, options, p):
    return x


def constant(x, options, p):
    e = torch.einsum("...d,dc->...c", x, p["w"]).exp()
    share = e / e.sum(-1, keepdim=True)
    return share[..., :1] * x + share[..., 1:] * p["v"][0]


def convolution(x, w, b):
    """x (T, H, W, I), w (O, I, k, k), or (I, 1, k, k) for each channel by itself: a sum over the kernel's pixels."""
    height, width, r = x.shape[1], x.shape[2], w.shape[-1] // 2
    x = torch.nn.functional.pad(x, (0, 0, r, r, r, r))
    y = 0
    for i in range(w.shape[-1]):
        for j in range(w.shape[-1]):
            part = x[:, i : i + height, j : j + width]
            y = y + (part * w[:, 0, i, j] if w.shape[1] == 1 else torch.einsum("thwi,oi->thwo", part, w[:, :, i, j]))
    return y if b is None else y + b


def conv(x, options, p):
    if "w0" in p:
        x = convolution(x, p["w0"], p.get("b0"))
    h = ACT[options.get("activation", "gelu")](convolution(x, p["w1"], p.get("b1")))
    return convolution(h, p["w2"], p.get("b2"))


KINDS = {
    "ffn": ffn,
    "adapter": ffn,
    "linear": linear,
    "lora": lora,
    "zero": zero,
    "copy": copy,
    "constant": constant,
    "conv": conv,
}


def leaves(layer):
    """Double copies of the layer's parameters that gather gradients of their own."""
    return {name: p.detach().double().clone().requires_grad_() for name, p in layer.named_parameters()}


def all_outputs(layer, x, params):
    """{expert id: (T, ..., O)} for every expert of the layer."""
    outputs = {}
    for key, ids in layer.cohort_ids.items():
        prefix, kind = f"cohorts.{key}.", layer.kinds[layer.cohort_kinds[key]]
        for row, expert in enumerate(ids):
            own = {name[len(prefix) :]: p[row] for name, p in params.items() if name.startswith(prefix)}
            outputs[expert] = expert_output(x, kind.name, kind.options, own)
    return outputs


def router_logits(layer, x, params):
    """(T, E), E in the order of the layer's ids; of a unit of several places from their mean."""
    weight = torch.cat([params[f"router.columns.{key}.weight"] for key in layer.cohort_ids])
    return x.flatten(1, -2).mean(1) @ weight.T if x.dim() > 2 else x @ weight.T


def topk_weights(layer, x, params, chosen, order):
    """(T, E) dense weights, E in the order of the layer's ids, for the ids `chosen` (list of sets, one per token)."""
    logits = router_logits(layer, x, params)
    mask = torch.tensor([[expert in row for expert in layer.ids] for row in chosen])
    if order == "after":
        e = (logits - logits.max(1, keepdim=True).values.detach()).exp()
        return (e / e.sum(1, keepdim=True)) * mask
    e = (logits - logits.max(1, keepdim=True).values.detach()).exp() * mask
    return e / e.sum(1, keepdim=True)


def combine(outputs, weights, ids):
    """Σ over experts of weight · output; outputs {id: (T, ..., O)}, weights (T, E)."""
    some = next(iter(outputs.values()))
    return sum(weights[:, column].view(-1, *[1] * (some.dim() - 1)) * outputs[e] for column, e in enumerate(ids))
