"""Back from experts to a dense network: their mean, one of them, or a network that learns what the layer does."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from cmoe.moe.experts import Expert
from cmoe.moe.layer import MoELayer
from cmoe.moe.merging import Weights, fill, leading, mixture, shares
from cmoe.moe.optimizer import ParameterChange
from cmoe.moe.surgery.bare import Bare
from cmoe.moe.surgery.dense import Dense
from cmoe.moe.surgery.observe import Run, observe
from cmoe.moe.surgery.place import replace
from cmoe.moe.surgery.report import Surgery, home, layers

How = Literal["merge", "single", "distil"]


def collapse(
    model: nn.Module,
    how: How = "merge",
    *,
    where: str | list[str] = "all",
    source: int | None = None,
    weights: Weights = "usage",
    align: bool = True,
    run: Run | None = None,
    limit: int = 4096,
    steps: int = 300,
    lr: float = 1e-3,
    batch: int = 256,
    generator: torch.Generator | None = None,
) -> Surgery:
    """Make a dense network of each layer of experts; shared experts and a base stay beside it.

    Args:
        model: with layers of experts.
        how: 'merge' (the weighted mean of all experts), 'single' (one of them), or 'distil' (begin with the mean, or with
            the most used one where they differ in kind, and learn the layer's outputs on its inputs while `run` works).
        where: 'all' or names of layers.
        source: for 'single', which; default is the most used.
        weights: for means, what each counts.
        align: for means, put hidden units in one order first.
        run: for 'distil', calls the model on some inputs (`observe`).
        limit: for 'distil', tokens kept of each layer.
        steps, lr, batch: for 'distil', steps of Adam, their learning rate and tokens in each.
        generator: for 'distil', draws the batches.

    Returns:
        Events 'collapsed'. The state of an optimizer follows means and single experts; with 'distil' it begins anew.

    Raises:
        ValueError: 'merge' of experts of several kinds, 'distil' without `run`, or an unknown layer or expert.
    """
    if how not in ("merge", "single", "distil"):
        raise ValueError(f"collapse: how: expected 'merge', 'single' or 'distil', got {how!r}")
    if how == "distil" and run is None:
        raise ValueError("collapse: distil needs run, a function that calls the model on some inputs")
    root, known = home(model), layers(model)
    heads = [name for name, layer in known.items() if type(layer).forward is not MoELayer.forward]
    known = {name: layer for name, layer in known.items() if name not in heads}
    wanted = list(known) if where == "all" else [where] if isinstance(where, str) else list(where)
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"collapse: where: expected layers among {list(known)}, got {unknown[0]!r}")
    seen = observe(model, run, limit) if how == "distil" and run is not None else {}
    generator = generator or torch.Generator().manual_seed(0)
    done = Surgery()
    for name in wanted:
        layer = known[name]
        expert, kind, change = _begin(layer, how, source, weights, align)
        if how == "distil":
            change = ParameterChange()
            own = seen[name]
            done.errors[name] = distil(
                layer, expert, own.tokens, own.outputs, steps=steps, lr=lr, batch=batch, generator=generator
            )
        ids = layer.ids
        _install(root, name, layer, expert, kind)
        kept = {id(p) for part in (layer.shared, layer.base) if part is not None for p in part.parameters()}
        change.removed += [p for p in layer.parameters() if id(p) not in kept]
        done.change += change
        done.note("collapsed", name, ids)
    return done


def _begin(
    layer: MoELayer, how: str, source: int | None, weights: Weights, align: bool
) -> tuple[Expert, int, ParameterChange]:
    """A cohort of one, its kind, and where its parameters come from."""
    ids = sorted(layer.ids)
    counts = shares(layer, ids, weights)
    alike = len({layer.cohort_kinds[layer.view.where[expert][0]] for expert in ids}) == 1
    if how == "single" and source is not None:
        layer.check_ids([source])
        ids, counts = [source], [1.0]
    elif how == "single" or (how == "distil" and not alike):
        ids, counts = [leading(ids, shares(layer, ids, "usage"))], [1.0]
    elif not alike:
        raise ValueError("collapse: merge: expected experts of one kind and size; use how='distil' or 'single'")
    kind = layer.cohort_kinds[layer.view.where[ids[0]][0]]
    expert, rows = layer.new_cohort(1, kind).to(layer.like), mixture(layer, ids, counts, align)
    fill(expert, rows)
    if set(ids) <= layer.frozen_ids and how != "distil":
        expert.requires_grad_(False)
    return expert, kind, ParameterChange(mixed={p: [rows[name]] for name, p in expert.named_parameters()})


def _install(root: nn.Module, name: str, layer: MoELayer, expert: Expert, kind: int) -> None:
    """Put the dense network where the layer is."""
    parent = root.get_submodule(name.rpartition(".")[0])
    sides: dict[str, Any] = {"channels_first": bool(getattr(parent, "use_conv_mlp", False)), "after": 0.0}
    old: nn.Module = layer
    if isinstance(parent, Bare):
        old, sides = parent, {"channels_first": parent.channels_first, "after": parent.described["after"]}
    own = layer.kinds[kind]
    described = {
        "is": "dense",
        "kind": kind,
        "expert": None if own.name is None else {"name": own.name, **own.options},
        "hidden": own.hidden,
        "dim": layer.dim,
        "out_dim": layer.out_dim,
        "inner": layer.inner,
        "next_expert": layer.structure()["next_expert"],
        "channels_first": int(sides["channels_first"]),
        "after": sides["after"],
    }
    dense = Dense(expert, described, inner=layer.inner, shared=layer.shared, base=layer.base, **sides)
    replace(root, old, dense.train(old.training))


def distil(
    layer: MoELayer,
    expert: Expert,
    tokens: Tensor,
    outputs: Tensor,
    *,
    steps: int,
    lr: float,
    batch: int,
    generator: torch.Generator,
) -> tuple[float, float]:
    """Train one expert, in place, to give a layer's outputs on its inputs (mean squared error, Adam).

    What the shared experts and the base give is taken off first. The learning rate falls to 0; where the end is no better
    than the beginning, the expert stays as it was.

    Args:
        layer: whose work it is to do.
        expert: a cohort of one.
        tokens: (N, D) the layer's inputs.
        outputs: (N, O) what it made of them.
        steps: updates.
        lr: learning rate.
        batch: tokens in each, drawn with replacement.
        generator: draws them.

    Returns:
        The squared error as a share of the outputs' own, before and afterwards.

    Raises:
        ValueError: there are no tokens.
    """
    if not len(tokens):
        raise ValueError("distil: expected inputs of the layer, got none")
    with torch.no_grad():
        target = outputs
        if layer.shared is not None or layer.base is not None:
            target = target - Dense(_Nothing(), {}, inner=layer.inner, shared=layer.shared, base=layer.base)(tokens)

    def error(x: Tensor, y: Tensor) -> Tensor:
        return (expert.single(x, 0) - y).square().sum() / y.square().sum().clamp(min=1e-30)

    if next(expert.parameters(), None) is None:  # a copy or nothing: there is nothing to teach it
        with torch.no_grad():
            unchanged = float(error(tokens, target))
        return unchanged, unchanged
    expert.eval()  # without dropout: the layer was observed without, too
    with torch.no_grad():
        before = float(error(tokens, target))
        start = [p.detach().clone() for p in expert.parameters()]
    with torch.enable_grad():
        expert.requires_grad_(True)
        optimizer = torch.optim.Adam(expert.parameters(), lr)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
            rows = torch.randint(len(tokens), (min(batch, len(tokens)),), generator=generator).to(tokens.device)
            optimizer.zero_grad()
            error(tokens.index_select(0, rows), target.index_select(0, rows)).backward()
            optimizer.step()
    for parameter in expert.parameters():
        parameter.grad = None
    with torch.no_grad():
        after = float(error(tokens, target))
        if not after < before:
            for parameter, value in zip(expert.parameters(), start, strict=True):
                parameter.copy_(value)
    return before, min(before, after)


class _Nothing(Expert):
    """An expert that gives 0 to whatever it gets."""

    def __init__(self) -> None:
        super().__init__(1, 0, None, 0)

    def single(self, x_ND: Tensor, row: int) -> Tensor:
        return x_ND.new_zeros(())
